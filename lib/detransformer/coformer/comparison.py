"""The other side of the comparison (CoFormer 2025, Figs. 9, 10 and 12): latency, energy, memory against other methods.

    predicted_rows   every method at DeiT-B's size on the cluster of the paper, by the cost models
    measured_rows    the same methods on the emulated cluster, at a size and links that can be measured

Galaxy, EdgeShard (`pp`) and DeTransformer (`bp+paper`, its own plans; `bp+auto`, ours) are `planning`'s; `auto` is our
planner on the unmodified model. CoFormer and DeViT are priced by `evaluator.latency`, with the pooled features sent or,
as Eq. 6 is printed, all tokens. Energy is modelled from thermal design power.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import BertForSequenceClassification, PretrainedConfig

from detransformer.cluster.bench import (
    Bench,
    Cell,
    Check,
    RowFile,
    first_time_scale,
    usual_devices,
    why_invalid,
)
from detransformer.cluster.devices import DeviceSpec, cluster_profile
from detransformer.cluster.ensembles import EnsembleRun, run_ensemble
from detransformer.cluster.host import lateness
from detransformer.cluster.session import EmulatedCluster
from detransformer.coformer.aggregator import make_aggregator
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.ensemble import Ensemble, save_ensemble, whole_answer
from detransformer.coformer.evaluator import (
    STRATEGY,
    Latency,
    energy_j,
    fastest_device,
    latency,
    roofline_s,
    tdp_w,
)
from detransformer.coformer.policy import (
    FLOAT_BYTES,
    Original,
    Policy,
    flops,
    memory_bytes,
    scale_policy,
)
from detransformer.machine import usable_cores
from detransformer.models.configuration import decoupled_config, preset_config
from detransformer.parallel.plan import Plan
from detransformer.planning.cost import Compute, Prediction, compute_seconds, device_steps, predict
from detransformer.planning.placement import method_plan
from detransformer.planning.profile import SENT_KINDS, ClusterProfile

PEERS = ("galaxy", "pp", "auto", "bp+paper", "bp+auto")
EXACT = ("single", "galaxy", "pp", "auto")  # the large model's own answer
DECOUPLED = ("bp+paper", "bp+auto")
NUM_CLASSES = 2
SENT = ("sent_bytes", *(f"{kind}_bytes" for kind in SENT_KINDS))


def answers_of(method: str) -> str:
    """What a method's answers are: `exact`, of a `decoupled` model, or of a `boosted` ensemble."""
    return "exact" if method in EXACT else "decoupled" if method in DECOUPLED else "boosted"


# Predicted --------------------------------------------------------------------------------------------------------


def peer_configs(priced: Original, num_original_layers: int = 4, num_divisions: int = 4) -> dict[str, PretrainedConfig]:
    """BERT with the layers and as many numbers outside them as `priced` has: as it is, and decoupled (Nb, Ndiv)."""
    config = preset_config("bert-base")
    for name, value in (
        ("num_hidden_layers", priced.num_layers),
        ("hidden_size", priced.hidden_size),
        ("num_attention_heads", priced.num_heads),
        ("intermediate_size", priced.ffn_size),
        ("max_position_embeddings", priced.seq_len),
    ):
        setattr(config, name, value)
    config.vocab_size = priced.embedding_rows - priced.seq_len - config.type_vocab_size - 2
    return {"original": config, "decoupled": decoupled_config(config, num_original_layers, num_divisions)}


def busy_s(config: PretrainedConfig, plan: Plan, profile: ClusterProfile, seq_len: int) -> list[float]:
    """Seconds in which each device of `plan` computes, in rank order."""
    return [
        sum(
            compute_seconds(step, profile.devices[device])
            for step in device_steps(config, plan, rank, seq_len)
            if isinstance(step, Compute)
        )
        for rank, device in enumerate(plan.device_ids)
    ]


def peer_row(
    method: str, config: PretrainedConfig, profile: ClusterProfile, specs: Sequence[DeviceSpec], priced: Original
) -> dict:
    """What the cost model says of a method; energy by the rule of `evaluator.energy_j`.

    BERT looks tokens up where a ViT multiplies patches: every device of a plan does that for itself, of a pipeline the
    first alone.
    """
    plan = method_plan(method, config, profile, seq_len=priced.seq_len)
    prediction: Prediction = predict(config, plan, profile, priced.seq_len)
    work = 2 * (priced.seq_len - 1) * priced.patch_values * priced.hidden_size
    patches = [profile.devices[device].compute_s(work, STRATEGY) for device in plan.device_ids]
    patches = [*patches[:1], *(0.0 for _ in patches[1:])] if plan.stages else patches
    powers, busy = tdp_w(specs), busy_s(config, plan, profile, priced.seq_len)
    devices = zip(plan.device_ids, busy, patches, strict=True)
    joules = sum(powers[device] * (seconds + before) for device, seconds, before in devices)
    return {
        "method": method,
        "plan": plan.describe(),
        "num_devices": plan.num_devices,
        "latency_ms": 1e3 * (prediction.latency_s + max(patches)),
        "compute_ms": 1e3 * (prediction.compute_s + max(patches)),
        "comm_ms": 1e3 * prediction.comm_s,
        "energy_mj": 1e3 * joules,
        "memory_mib": max(prediction.memory_bytes) / 2**20,
        "sent_kib": sum(prediction.bytes.values()) / 2**10,
        "rounds": sum(prediction.counts.values()),
    }


def single_row(priced: Original, profile: ClusterProfile, specs: Sequence[DeviceSpec], number: int) -> dict:
    """The large model on one device."""
    seconds = roofline_s(priced.whole, priced, profile.devices[number])
    return {
        "method": "single",
        "plan": specs[number].title,
        "num_devices": 1,
        "latency_ms": 1e3 * seconds,
        "compute_ms": 1e3 * seconds,
        "comm_ms": 0.0,
        "energy_mj": 1e3 * seconds * tdp_w(specs)[number],
        "memory_mib": memory_bytes(priced.whole, priced) / 2**20,
        "sent_kib": 0.0,
        "rounds": 0,
    }


def ensemble_row(
    method: str,
    policy: Policy,
    priced: Original,
    profile: ClusterProfile,
    specs: Sequence[DeviceSpec],
    sent_tokens: int | None,
) -> dict:
    """What Eqs. 3 to 6 say of a policy at its own size; `sent_tokens` as in `evaluator.latency`.

    A policy of one sub-model runs on the fastest device.
    """
    if policy.num_devices == 1:
        number = fastest_device(profile.devices)
        profile, specs = ClusterProfile(profile.devices[number : number + 1], profile.link), specs[number : number + 1]
    times: Latency = latency(policy, priced, profile, sent_tokens=sent_tokens)
    tokens = priced.seq_len if sent_tokens is None else sent_tokens
    sent = [FLOAT_BYTES * tokens * c.hidden_size for n, c in enumerate(policy.sub_models) if n != times.central]
    share = sum(flops(config, priced) for config in policy.sub_models) / flops(priced.whole, priced)
    busiest, what = max(times.backbone_s), "all tokens" if sent_tokens is None else "pooled features"
    return {
        "method": method,
        "plan": f"{share:.0%} of the FLOPs" + (f", {what} sent" if sent else ""),
        "num_devices": policy.num_devices,
        "latency_ms": 1e3 * times.total_s,
        "compute_ms": 1e3 * (busiest + times.aggregate_s),
        "comm_ms": 1e3 * (times.total_s - busiest - times.aggregate_s),
        "energy_mj": 1e3 * energy_j(times, tdp_w(specs)),
        "memory_mib": max(memory_bytes(config, priced) for config in policy.sub_models) / 2**20,
        "sent_kib": max(sent, default=0) / 2**10,
        "rounds": min(1, len(sent)),
    }


def predicted_rows(
    policies: Mapping[str, Policy],
    original: Original,
    specs: Sequence[DeviceSpec],
    bandwidths_mbps: Sequence[float],
    priced: Original,
    methods: Sequence[str] = PEERS,
    num_original_layers: int = 4,
    num_divisions: int = 4,
) -> pd.DataFrame:
    """Every method at every bandwidth, predicted at the size `priced`; one row each.

    Args:
        policies: of `original`'s size by method (`coformer`, `coformer-published`, `devit`), a sub-model a device;
            of one sub-model (`small`), on the fastest device.

    Columns: bandwidth_mbps, kind (`predicted`), size, answers, and those of `peer_row`.
    """
    configs, rows = peer_configs(priced, num_original_layers, num_divisions), []
    scaled = {method: scale_policy(policy, original, priced) for method, policy in policies.items()}
    size = f"{priced.num_layers} layers of {priced.hidden_size}, {priced.seq_len} tokens"
    for mbps in bandwidths_mbps:
        profile = cluster_profile(specs, "bert-base", configs["original"], mbps * 1e6, pace="roofline")
        found = [single_row(priced, profile, specs, number) for number in range(len(specs))]
        for method in methods:
            config = configs["decoupled" if method in DECOUPLED else "original"]
            found.append(peer_row(method, config, profile, specs, priced))
        for method, policy in scaled.items():
            tokens = (1, None) if policy.num_devices > 1 else (1,)
            found += [ensemble_row(method, policy, priced, profile, specs, sent) for sent in tokens]
        where = {"bandwidth_mbps": mbps, "kind": "predicted", "size": size}
        rows += [where | {"answers": answers_of(row["method"])} | row for row in found]
    return pd.DataFrame(rows)


# Measured ---------------------------------------------------------------------------------------------------------


def latency_ensemble(
    folder: str | Path, config: PretrainedConfig, policy: Policy, original: Original, central: int, seq_len: int
) -> Ensemble:
    """An ensemble of random weights with `policy`'s shares of a BERT of `config`: enough to be timed."""
    sizes = Original.of(config, seq_len)
    scaled = scale_policy(policy, original, sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = type(config)(**config.to_dict() | {"num_labels": NUM_CLASSES})
        sub_models = decompose(BertForSequenceClassification(config).eval(), scaled)
        widths = [c.hidden_size for c in scaled.sub_models]
        aggregator = make_aggregator("coformer", widths, NUM_CLASSES, pooling="first").eval()
    return save_ensemble(folder, sub_models, aggregator, scaled, sizes, central)


def measure_ensemble(bench: Bench, cell: Cell, method: str, ensemble: Ensemble) -> dict:
    """A row as `Bench.measure` makes them, for an ensemble under the conditions of `cell`.

    Links and pacing are checked before and after; a disturbed row is measured again.
    """
    cluster, config = bench.cluster, bench.config(cell)
    profile = bench.profile(cell)
    words = torch.randint(
        1, config.vocab_size, (cell.batch_size, cell.seq_len), generator=torch.Generator().manual_seed(0)
    )
    inputs = {"input_ids": words}
    expected = whole_answer(ensemble, inputs)
    checks_links = cluster.transport == "namespaces"
    busy = usual_devices(profile.devices, config) / (1 if checks_links else 2)
    total_bps = cell.bandwidth_mbps * 1e6 * cell.num_devices if checks_links else 0.0
    scale = bench.fixed_time_scale or first_time_scale(total_bps, busy, usable_cores())
    predicted = latency(ensemble.policy, ensemble.original, profile, central=ensemble.central, sent_tokens=1)

    def measure(number: int, is_last: bool) -> EnsembleRun:
        return run_ensemble(cluster, ensemble, inputs, cell.repeats)

    def make_row(number: int, runs: list[EnsembleRun], scale: float, check: Check, steal: float) -> tuple[dict, None]:
        (run,) = runs
        conditions = {"bandwidth_mbps": cell.bandwidth_mbps, "seq_len": cell.seq_len, "repeats": cell.repeats}
        conditions |= {"num_devices": cell.num_devices, "model": cell.model, "method": method}
        conditions |= {"time_scale": scale, "device": cluster.profile_name, "link": cluster.link}
        conditions |= {"wire": "float32", "predicted_s": predicted.total_s, "host_steal": steal}
        row = conditions | asdict(check) | _run_fields(run, ensemble.central, expected)
        why = why_invalid(row) or ("" if all(run.present) else run.sentence)
        return row | {"valid": not why, "why_invalid": why}, None

    ((row, _),) = bench.in_turn(
        cell.bandwidth_mbps, cell.num_devices, scale, checks_links, measure, make_row, repeats=[1]
    )
    return row


def _run_fields(run: EnsembleRun, central: int, expected: torch.Tensor) -> dict:
    """What the last repeat says of each device, and how far the answer is from a single process's."""
    records = [record for record in run.records if record is not None]
    error = (run.logits - expected).abs()
    return {
        "plan": f"{len(run.present)} sub-models, device {central} aggregates",
        "latency_s": run.latency_s,
        "spread_s": max(run.samples_s) - min(run.samples_s),
        "compute_s": max(record["compute_s"] for record in records),
        "pacing_overrun": lateness(records),
        "weights_bytes": max(record["weights_bytes"] for record in records),
        "sent_bytes": max(
            (sum(r["bytes"].values()) for n, r in enumerate(run.records) if r and n != central), default=0
        ),
        "max_abs_error": float(error.max()),
        "relative_error": float(error.square().mean().sqrt() / expected.square().mean().sqrt()),
    }


def measured_rows(
    run_path: str | Path,
    policies: Mapping[str, Policy],
    original: Original,
    specs: Sequence[DeviceSpec],
    bandwidths_mbps: Sequence[float],
    methods: Sequence[str] = ("single", *PEERS),
    model: str = "bert-base",
    seq_len: int = 128,
    repeats: int = 1,
    time_scale: float | None = None,
    transport: str = "auto",
    num_original_layers: int = 4,
    num_divisions: int = 4,
) -> pd.DataFrame:
    """The methods on emulated devices: real processes and sockets, compute paced, links shaped or modelled.

    `single` runs on the fastest device. Rows are kept in `run_path` as they come: an interrupted call goes on. No rows
    for no bandwidths.

    Args:
        policies: of `original`'s size, by method.
        model: a preset of BERT, or a folder; its sizes are multiples of `original`'s.
        time_scale: None lets the bench choose.
    """
    if not len(bandwidths_mbps):
        return pd.DataFrame()
    kept_path, rows = Path(run_path) / "comparison_rows.json", []
    with EmulatedCluster(len(specs), specs, bandwidths_mbps[0] * 1e6, transport) as cluster:
        bench, kept = Bench(cluster, time_scale=time_scale), RowFile(kept_path, cluster)
        # Nobody has measured how efficient sub-models are: all methods are paced by operations and bytes alone.
        common = dict(num_devices=len(specs), seq_len=seq_len, repeats=repeats, pace="roofline")
        common |= dict(num_original_layers=num_original_layers, num_divisions=num_divisions)
        single = Cell(model, "single", bandwidth_mbps=bandwidths_mbps[0], **common)
        config, profile = bench.config(single), bench.profile(single)
        central = fastest_device(profile.devices)
        total = len(bandwidths_mbps) * (len(methods) + len(policies))
        with tqdm(total=total, unit="row", desc="comparison") as progress:
            for method in methods:
                for mbps in bandwidths_mbps:
                    cell = Cell(model, method, bandwidth_mbps=mbps, **common)
                    plan = bench.case(cell).plan
                    plan = replace(plan, devices=(central,)) if method == "single" else plan
                    key = asdict(cell) | {"plan": plan.to_dict(), "specs": [spec.title for spec in specs]}
                    rows.append(kept.get(key) or kept.put(key, bench.measure_plans(cell, [plan])[0]))
                    progress.update()
            for method, policy in policies.items():
                folder, ensemble = Path(run_path) / "ensembles" / method, None
                for mbps in bandwidths_mbps:
                    cell = Cell(model, "single", bandwidth_mbps=mbps, **common)
                    key = asdict(cell) | {"ensemble": method, "policy": policy.to_dict()}
                    if (row := kept.get(key)) is None:
                        ensemble = ensemble or latency_ensemble(folder, config, policy, original, central, seq_len)
                        row = kept.put(key, measure_ensemble(bench, cell, method, ensemble))
                    rows.append(row)
                    progress.update()
    return _as_compared(pd.DataFrame(rows), f"{model}, {seq_len} tokens")


def _as_compared(rows: pd.DataFrame, size: str) -> pd.DataFrame:
    """Bench rows with the columns of `predicted_rows`; `predicted_ms` is the cost model's word for the same row."""
    sent = rows[[name for name in SENT if name in rows]].sum(axis=1)
    made = {
        "bandwidth_mbps": rows["bandwidth_mbps"],
        "kind": "measured",
        "size": size,
        "answers": [answers_of(method) for method in rows["method"]],
        "method": rows["method"],
        "plan": rows["plan"],
        "num_devices": rows["num_devices"],
        "latency_ms": 1e3 * rows["latency_s"],
        "compute_ms": 1e3 * rows["compute_s"],
        "spread_ms": 1e3 * rows["spread_s"],
        "predicted_ms": 1e3 * rows["predicted_s"],
        "sent_kib": sent / 2**10,
        "weights_mib": rows["weights_bytes"] / 2**20,
        **{name: rows[name] for name in ("time_scale", "link", "device", "pacing_overrun", "host_steal")},
        **{name: rows[name] for name in ("max_abs_error", "valid", "why_invalid")},
    }
    return pd.DataFrame(made)
