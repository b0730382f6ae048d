"""CoFormer beside other methods (2025, Figs. 9, 10 and 12): latency, energy and memory, predicted and measured.

    predicted_rows   every method at DeiT-B's size on the paper's cluster, by the cost models
    measured_rows    the same methods on the emulated cluster, at a measurable size and with measurable links

Galaxy, EdgeShard (`pp`) and DeTransformer (`bp+paper`, its own plans; `bp+auto`, ours) are `planning`'s; `auto` is our
planner on the unmodified model. CoFormer and DeViT are priced by `predictor.latency`. Energy is modelled from thermal
design power.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from transformers import BertForSequenceClassification, PretrainedConfig

from detransformer.answers import random_tokens
from detransformer.cluster.bench import Bench
from detransformer.cluster.cells import Cell, RowFile
from detransformer.cluster.devices import DEVICES, DeviceSpec, cluster_profile
from detransformer.cluster.selfcheck import host_time_scale, lateness, why_invalid
from detransformer.cluster.session import EmulatedCluster
from detransformer.coformer.aggregator import make_aggregator
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.distributed import EnsembleRun, run_ensemble
from detransformer.coformer.ensemble import Ensemble, save_ensemble, whole_answer
from detransformer.coformer.policy import FLOAT_BYTES, SIZES, Original, Policy, SubModelConfig, flops, memory_bytes
from detransformer.coformer.predictor import STRATEGY, Latency, fastest_device, latency
from detransformer.models.configuration import decoupled_config, preset_config
from detransformer.planning.cost import busy_seconds, predict
from detransformer.planning.placement import method_plan
from detransformer.planning.profile import SENT_KINDS, ClusterProfile

PEERS = {"galaxy": "exact", "pp": "exact", "auto": "exact", "bp+paper": "decoupled", "bp+auto": "decoupled"}
ANSWERS = {"single": "exact", **PEERS}  # kinds of answers; of CoFormer's and DeViT's sub-models: `boosted`
NUM_CLASSES = 2
NUM_DIVISIONS = 4  # Ndiv of the decoupled model


def tdp_w(specs: Sequence[DeviceSpec]) -> tuple[float, ...]:
    """Thermal design power of each device (Table VII)."""
    return tuple(DEVICES[spec.preset].power_w for spec in specs)


def scale_policy(policy: Policy, original: Original, other: Original) -> Policy:
    """The policy that takes the same shares of `other` as `policy` takes of `original`.

    If `other` has more layers, each layer's heads and FFN widths are repeated. So a policy found on a small model can
    be priced at the size of a large one of the same kind.

    Raises:
        ValueError: if `other` is not a whole multiple of `original` in layers, width, heads and FFN.
    """
    ratios = []
    for name in SIZES:
        ratio, rest = divmod(getattr(other, name), getattr(original, name))
        if rest or not ratio:
            raise ValueError(
                f"{name}={getattr(other, name)} is not a multiple of {getattr(original, name)}: "
                "give sizes that are multiples of the model's own."
            )
        ratios.append(ratio)
    layers, width, heads, ffn = ratios

    def scaled(c: SubModelConfig) -> SubModelConfig:
        more_heads = [heads * size for size in c.num_heads for _ in range(layers)]
        more_ffn = [ffn * size for size in c.ffn_sizes for _ in range(layers)]
        return SubModelConfig(layers * c.num_layers, width * c.hidden_size, more_heads, more_ffn)

    return Policy(tuple(map(scaled, policy.sub_models)))


def energy_j(times: Latency, powers_w: Sequence[float]) -> float:
    """Modelled energy of one request over all devices: power times each device's compute time.

    Nothing is published on sending, and idle power is left out, since the paper subtracts it. Thermal design power
    makes this too high: the published 760.64 mJ of DeiT-B in 123.48 ms on a Jetson TX2 are 6.2 W of its 15 W (Table V).
    It serves to compare policies.
    """
    busy = list(times.backbone_s)
    busy[times.central] += times.aggregate_s
    return sum(power * seconds for power, seconds in zip(powers_w, busy, strict=True))


# Predicted --------------------------------------------------------------------------------------------------------


def predicted_rows(
    policies: Mapping[str, Policy],
    original: Original,
    specs: Sequence[DeviceSpec],
    bandwidths_mbps: Sequence[float],
    priced: Original,
) -> pd.DataFrame:
    """Every method at every bandwidth, predicted at the size `priced`; one row each.

    Args:
        policies: by method (`coformer`, `devit`, ..), of `original`'s size, one sub-model a device; a policy of one
            sub-model (`small`) runs on the fastest device.

    Columns: bandwidth_mbps, kind (`predicted`), size, answers, method, plan, num_devices, latency_ms, compute_ms,
    comm_ms, energy_mj, memory_mib, sent_kib, rounds.
    """
    configs, rows = peer_configs(priced), []
    scaled = {method: scale_policy(policy, original, priced) for method, policy in policies.items()}
    size = f"{priced.num_layers} layers of {priced.hidden_size}, {priced.seq_len} tokens"
    for mbps in bandwidths_mbps:
        profile = cluster_profile(specs, configs["exact"], mbps * 1e6, pace="roofline")
        found = [_single_row(priced, profile, specs, number) for number in range(len(specs))]
        found += [_peer_row(method, configs[kind], profile, specs, priced) for method, kind in PEERS.items()]
        for method, policy in scaled.items():
            for tokens in (1, None) if policy.num_devices > 1 else (1,):
                found.append(_ensemble_row(method, policy, priced, profile, specs, tokens))
        where = {"bandwidth_mbps": mbps, "kind": "predicted", "size": size}
        rows += [where | {"answers": ANSWERS.get(row["method"], "boosted")} | row for row in found]
    return pd.DataFrame(rows)


def original_layers(original: Original, priced: Original) -> int:
    """Nb of a model decoupled in the same proportion as size `priced` with Nb=4: one layer in three of twelve."""
    return max(1, 4 * original.num_layers // priced.num_layers)


def peer_configs(priced: Original) -> dict[str, PretrainedConfig]:
    """BERT with `priced`'s layers and numbers outside them: `exact`, and `decoupled` (Nb=4, Ndiv=4)."""
    config = preset_config("bert-base")
    config.num_hidden_layers, config.hidden_size = priced.num_layers, priced.hidden_size
    config.num_attention_heads, config.intermediate_size = priced.num_heads, priced.ffn_size
    config.max_position_embeddings = priced.seq_len
    config.vocab_size = priced.embedding_rows - priced.seq_len - config.type_vocab_size - 2
    return {"exact": config, "decoupled": decoupled_config(config, 4, NUM_DIVISIONS)}


def _single_row(priced: Original, profile: ClusterProfile, specs: Sequence[DeviceSpec], number: int) -> dict:
    """The large model on device `number`."""
    alone = ClusterProfile(profile.devices[number : number + 1], replace(profile.link, shares=()))
    row = _ensemble_row("single", Policy((priced.whole,)), priced, alone, specs[number : number + 1])
    return row | {"plan": specs[number].title}


def _ensemble_row(
    method: str,
    policy: Policy,
    priced: Original,
    profile: ClusterProfile,
    specs: Sequence[DeviceSpec],
    sent_tokens: int | None = 1,
) -> dict:
    """Eqs. 3 to 6 for a policy at its own size; `sent_tokens` as in `predictor.latency`."""
    if policy.num_devices < len(specs):
        number = fastest_device(profile.devices)
        profile, specs = ClusterProfile(profile.devices[number : number + 1], profile.link), specs[number : number + 1]
    times = latency(policy, priced, profile, sent_tokens=sent_tokens)
    tokens = priced.seq_len if sent_tokens is None else sent_tokens
    sent = [FLOAT_BYTES * tokens * width for n, width in enumerate(policy.widths) if n != times.central]
    share = sum(flops(config, priced) for config in policy.sub_models) / flops(priced.whole, priced)
    compute_s, what = max(times.backbone_s) + times.aggregate_s, "all tokens" if tokens > 1 else "pooled features"
    return {
        "method": method,
        "plan": f"{share:.0%} of the FLOPs" + (f", {what} sent" if sent else ""),
        "num_devices": policy.num_devices,
        "latency_ms": 1e3 * times.total_s,
        "compute_ms": 1e3 * compute_s,
        "comm_ms": 1e3 * (times.total_s - compute_s),
        "energy_mj": 1e3 * energy_j(times, tdp_w(specs)),
        "memory_mib": max(memory_bytes(config, priced) for config in policy.sub_models) / 2**20,
        "sent_kib": max(sent, default=0) / 2**10,
        "rounds": min(1, len(sent)),
    }


def _peer_row(
    method: str, config: PretrainedConfig, profile: ClusterProfile, specs: Sequence[DeviceSpec], priced: Original
) -> dict:
    """The cost model's prediction for a method; energy as in `energy_j`.

    BERT looks tokens up, a ViT multiplies patches: every device of a plan does that itself, in a pipeline only the
    first.
    """
    plan = method_plan(method, config, profile, seq_len=priced.seq_len)
    prediction = predict(config, plan, profile, priced.seq_len)
    work = 2 * (priced.seq_len - 1) * priced.patch_values * priced.hidden_size
    patches = [profile.devices[device].compute_s(work, STRATEGY) for device in plan.device_ids]
    patches = [*patches[:1], *(0.0 for _ in patches[1:])] if plan.stages else patches
    busy = zip(plan.device_ids, busy_seconds(config, plan, profile, priced.seq_len), patches, strict=True)
    return {
        "method": method,
        "plan": plan.describe(),
        "num_devices": plan.num_devices,
        "latency_ms": 1e3 * (prediction.latency_s + max(patches)),
        "compute_ms": 1e3 * (prediction.compute_s + max(patches)),
        "comm_ms": 1e3 * prediction.comm_s,
        "energy_mj": 1e3 * sum(tdp_w(specs)[device] * (seconds + before) for device, seconds, before in busy),
        "memory_mib": max(prediction.memory_bytes) / 2**20,
        "sent_kib": sum(prediction.bytes.values()) / 2**10,
        "rounds": sum(prediction.counts.values()),
    }


# Measured ---------------------------------------------------------------------------------------------------------


def measured_rows(
    run_path: str | Path,
    policies: Mapping[str, Policy],
    original: Original,
    specs: Sequence[DeviceSpec],
    bandwidths_mbps: Sequence[float],
    model: str = "bert-base",
    seq_len: int = 128,
    repeats: int = 1,
    methods: Sequence[str] = ("single", *PEERS),
    time_scale: float | None = None,
    transport: str = "auto",
) -> pd.DataFrame:
    """The methods on emulated devices: real processes and sockets, compute paced, links shaped or modelled.

    `single` runs on the fastest device. Rows are kept in `run_path`; an interrupted call resumes. No bandwidths give no
    rows.

    Args:
        policies: by method, of `original`'s size.
        model: a preset of BERT, or a folder; its sizes are multiples of `original`'s.
        time_scale: None lets the bench choose.
    """
    if not len(bandwidths_mbps):
        return pd.DataFrame()
    rows = []
    with EmulatedCluster(len(specs), specs, bandwidths_mbps[0] * 1e6, transport) as cluster:
        bench, kept = Bench(cluster, time_scale=time_scale), RowFile(Path(run_path) / "comparison_rows.json", cluster)
        for mbps in bandwidths_mbps:
            # The efficiency of sub-models was not measured: all methods are paced by operations and bytes alone.
            single = Cell(model, "single", len(specs), mbps, seq_len=seq_len, repeats=repeats, pace="roofline")
            config, central = bench.config(single), fastest_device(bench.profile(single).devices)
            for method in methods:
                cell = replace(single, method=method)
                plan = bench.case(cell).plan
                plan = replace(plan, devices=(central,)) if method == "single" else plan
                key = asdict(cell) | {"plan": plan.to_dict(), "specs": [spec.title for spec in specs]}
                rows.append(kept.get(key) or kept.put(key, bench.measure([cell], [plan])[0]))
            for method, policy in policies.items():
                key = asdict(single) | {"ensemble": method, "policy": asdict(policy)}
                if (row := kept.get(key)) is None:
                    folder = Path(run_path) / "ensembles" / method
                    ensemble = random_ensemble(folder, config, policy, original, central, seq_len)
                    row = kept.put(key, measure_ensemble(bench, single, method, ensemble))
                rows.append(row)
    return _as_compared(pd.DataFrame(rows), f"{model}, {seq_len} tokens")


def random_ensemble(
    folder: str | Path, config: PretrainedConfig, policy: Policy, original: Original, central: int, seq_len: int
) -> Ensemble:
    """A random-weight ensemble with `policy`'s shares of a BERT of `config`: enough for timing."""
    sizes = Original.of(config, seq_len)
    scaled = scale_policy(policy, original, sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = type(config)(**config.to_dict() | {"num_labels": NUM_CLASSES})
        sub_models = decompose(BertForSequenceClassification(config).eval(), scaled)
        aggregator = make_aggregator("coformer", scaled.widths, NUM_CLASSES).eval()
    return save_ensemble(folder, sub_models, aggregator, scaled, sizes, central)


def measure_ensemble(bench: Bench, cell: Cell, method: str, ensemble: Ensemble) -> dict:
    """A row like those of `Bench.measure`, for an ensemble under the conditions of `cell`.

    Links and pacing are checked before and after; a disturbed row is measured again.
    """
    cluster, config, profile = bench.cluster, bench.config(cell), bench.profile(cell)
    inputs = random_tokens(config, cell.seq_len)
    expected = whole_answer(ensemble, inputs)
    scale = bench.time_scale or host_time_scale(cluster, config, profile, range(cell.num_devices))
    predicted_s = latency(ensemble.policy, ensemble.original, profile, central=ensemble.central).total_s

    def measure(number: int, is_last: bool) -> EnsembleRun:
        return run_ensemble(cluster, ensemble, inputs, cell.repeats)

    conditions = (cell.bandwidth_mbps, cell.num_devices, scale, True)
    (((run,), steal),), scale, check = bench.in_turn(
        *conditions, measure, num_trials=1, repeats=1, late=lambda run: lateness(run.records)
    )
    records = [record for record in run.records if record is not None]
    sent = [sum(record["bytes"].values()) for n, record in enumerate(run.records) if record and n != ensemble.central]
    error = (run.logits - expected).abs()
    row = {name: getattr(cell, name) for name in ("bandwidth_mbps", "seq_len", "repeats", "num_devices", "model")}
    row |= {"method": method, "plan": f"{len(run.present)} sub-models, device {ensemble.central} aggregates"}
    row |= {"time_scale": scale, "device": cluster.profile_name, "link": cluster.link, "wire": "float32"}
    row |= {"latency_s": run.latency_s, "spread_s": max(run.samples_s) - min(run.samples_s)}
    row |= {"compute_s": max(record["compute_s"] for record in records), "predicted_s": predicted_s}
    row |= {"weights_bytes": max(record["weights_bytes"] for record in records), "sent_bytes": max(sent, default=0)}
    row |= {"pacing_overrun": lateness(records), "host_steal": steal, "max_abs_error": float(error.max())}
    row |= {"relative_error": float(error.square().mean().sqrt() / expected.square().mean().sqrt())} | asdict(check)
    why = why_invalid(row) or ("" if all(run.present) else run.sentence)
    return row | {"valid": not why, "why_invalid": why}


def _as_compared(rows: pd.DataFrame, size: str) -> pd.DataFrame:
    """Bench rows with the columns of `predicted_rows`; `predicted_ms` is the cost model's prediction for the row."""
    sent = [name for name in ("sent_bytes", *(f"{kind}_bytes" for kind in SENT_KINDS)) if name in rows]
    same = ["bandwidth_mbps", "method", "plan", "num_devices", "time_scale", "link", "device", "pacing_overrun"]
    made = rows[[*same, "host_steal", "max_abs_error", "valid", "why_invalid"]]
    return made.assign(
        kind="measured",
        size=size,
        answers=made["method"].map(ANSWERS).fillna("boosted"),
        sent_kib=rows[sent].sum(axis=1) / 2**10,
        weights_mib=rows["weights_bytes"] / 2**20,
        **{f"{name}_ms": 1e3 * rows[f"{name}_s"] for name in ("latency", "compute", "spread", "predicted")},
    )
