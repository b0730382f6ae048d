"""The bodies of `detransformer bench`, `plan` and `profile`: words in, tables printed and saved."""

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from detransformer import __version__
from detransformer.files import atomic_write
from detransformer.models.configuration import PRESET_SIZES
from detransformer.parallel.plan import METHODS, READS
from detransformer.parallel.wire import check_spec
from detransformer.parse import number, one_of, whole_number, words
from detransformer.planning.profile import ClusterProfile, LinkProfile

if TYPE_CHECKING:
    from detransformer.cluster.bench import Cell

BANDWIDTH_LIMITS_MBPS = (0.1, 100_000)
MAX_BENCH_DEVICES = 8
SHOWN = {  # column of a bench row -> heading in the printed table
    "method": "method",
    "plan": "plan",
    "num_devices": "devices",
    "bandwidth_mbps": "Mbps",
    "wire": "wire",
    "reads": "reads",
    "latency_s": "latency s",
    "spread_s": "spread s",
    "over_limit": "x limit",
    "compute_s": "compute s",
    "comm_s": "comm s",
    "wait_s": "wait s",
    "predicted_s": "predicted s",
    "collectives": "collectives",
    "sent_kib": "sent KiB",
    "weights_mib": "weights MiB",
    "peak_mib": "peak RSS MiB",
    "valid": "valid",
}
SHORT_KINDS = {
    "all_reduce": "ar",
    "all_gather": "ag",
    "all_to_all": "a2a",
    "reduce_scatter": "rs",
    "send": "send",
}
REFERENCES = ("single", "tp", "sp")  # measured in float32 beside methods on another wire


def bench_command(
    model: str,
    devices: str,
    bandwidth: str,
    methods: str,
    repeats: str,
    output: str | None,
    timeline: str | None,
    num_original_layers: str,
    num_divisions: str,
    attention_width: str,
    seq_len: str,
    batch_size: str,
    device: str,
    wire: str,
    reads: str,
    link: str,
    delay: str,
    jitter: str,
    memory: str | None,
    transport: str,
    time_scale: str,
) -> None:
    """Measures the methods at each bandwidth on emulated devices; prints and saves one row a method."""
    num_devices = whole_number(devices, "--devices", 1, MAX_BENCH_DEVICES)
    bandwidths = _bandwidths(bandwidth)
    names = list(METHODS) if methods == "all" else words(methods, "--methods", METHODS)
    count = whole_number(repeats, "--repeats", 1)
    common = dict(
        num_original_layers=whole_number(num_original_layers, "--num-original-layers", 1),
        num_divisions=whole_number(num_divisions, "--num-divisions", 1),
        attention_width=one_of(attention_width, "--attention-width", ("full", "narrow")),
        seq_len=whole_number(seq_len, "--seq-len", 1),
        batch_size=whole_number(batch_size, "--batch-size", 1),
        repeats=count,
    )
    check_spec(wire)
    all_reads = READS if one_of(reads, "--reads", (*READS, "both")) == "both" else (reads,)
    delay_s, jitter_s = (
        number(text, name, 0, 10_000) / 1e3 for text, name in ((delay, "--delay"), (jitter, "--jitter"))
    )
    scale = None if time_scale == "auto" else number(time_scale, "--time-scale", 0.1, 64)
    for path, name in ((output, "--output"), (timeline, "--timeline")):
        if path:
            _check_writable(path, name)

    from detransformer.cluster.bench import Bench, check_cells, measure_grid
    from detransformer.cluster.session import EmulatedCluster

    cells = bench_cells(model, names, bandwidths, num_devices, wire, all_reads, **common)
    cluster = EmulatedCluster(
        num_devices, device, bandwidths[0] * 1e6, transport, link=link, delay_s=delay_s, jitter_s=jitter_s
    )
    bench = Bench(cluster, time_scale=scale, memory_budget_bytes=_budget(memory))
    check_cells(bench, cells)
    with cluster:
        rows = measure_grid(bench, cells, f"{output}.rows.json" if output else None, timeline=timeline)
    if output:
        with atomic_write(output) as file:
            rows.to_csv(file, index=False)
    print(
        f"\n{model} on {num_devices} x {cluster.profile_name}, {cluster.link} link, seq {seq_len}, batch {batch_size}, "
        f"median of {repeats}\n"
    )
    print(_markdown(shown_rows(rows)))
    print("ar all_reduce, ag all_gather, a2a all_to_all, rs reduce_scatter; x limit: over single device / devices.\n")
    for row in rows[~rows["valid"].astype(bool)].itertuples():
        print(f"not valid: {row.method} at {row.bandwidth_mbps:g} Mbps, {row.wire}: {row.why_invalid}.")
    for line in summary_lines(rows):
        print(line)
    for path in (output, timeline):
        if path:
            print(f"saved to {path}")


def bench_cells(
    model: str, methods: Sequence[str], bandwidths: Sequence[float], num_devices: int, wire: str, reads, **common
) -> list["Cell"]:
    """The rows of one `detransformer bench`; on another wire than float32, with `REFERENCES` in float32 before them."""
    from detransformer.cluster.bench import grid

    cells = []
    for part in reads:
        if wire != "float32":
            cells += grid(model, REFERENCES, bandwidths, num_devices, reads=part, **common)
        cells += grid(model, methods, bandwidths, num_devices, wire, part, **common)
    return list(dict.fromkeys(cells))


def shown_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Bench rows as they are printed; `reads` only where it differs."""
    shown = rows.assign(
        collectives=[_collectives(row) for row in rows.to_dict("records")],
        sent_kib=_sent_bytes(rows) / 1024,
        weights_mib=rows["weights_bytes"] / 2**20,
        peak_mib=rows["peak_rss_bytes"].astype(float) / 2**20,
    )
    columns = [name for name in SHOWN if name != "reads" or rows["reads"].nunique() > 1]
    return shown[columns].rename(columns=SHOWN)


def _collectives(row: dict) -> str:
    """Such as `4 ag + 8 a2a`."""
    counts = [(row[f"{kind}_count"], short) for kind, short in SHORT_KINDS.items()]
    return " + ".join(f"{count} {short}" for count, short in counts if count) or "-"


def summary_lines(rows: pd.DataFrame) -> list[str]:
    """BP+Auto against float32 TP and SP, the limit and all other rows: a line for each of its valid rows."""
    lines = []
    valid = rows[rows["valid"].astype(bool)]
    for auto in valid[valid["method"] == "bp+auto"].to_dict("records"):
        alike = valid[(valid["bandwidth_mbps"] == auto["bandwidth_mbps"]) & (valid["reads"] == auto["reads"])]
        parts = []
        for name in ("tp", "sp"):
            other = alike[(alike["method"] == name) & (alike["wire"] == "float32")]
            if len(other):
                parts.append(f"{other['latency_s'].iloc[0] / auto['latency_s']:.2f}x faster than {name.upper()}")
        line = f"BP+Auto ({auto['plan']}) at {auto['bandwidth_mbps']:g} Mbps, {auto['wire']}: {auto['latency_s']:.3f} s"
        line += f", {' and '.join(parts)} in float32" if parts else ""
        line += f"; {auto['over_limit']:.2f} times the limit of {auto['limit_s']:.3f} s"
        fastest = alike.loc[alike["latency_s"].idxmin()]
        if fastest["method"] == "bp+auto":
            line += f"; the fastest of {len(alike)} rows" if len(alike) > 1 else ""
        else:
            line += f"; {fastest['method']} ({fastest['wire']}) is faster, {fastest['latency_s']:.3f} s"
        error = f"{auto['max_abs_error']:.1e} at most, {auto['relative_error']:.1e} RMS"
        lines.append(f"{line}; output error {error}{', [CLS] read alone' if auto['reads'] == 'cls' else ''}.")
    return lines


def plan_command(
    model: str,
    devices: str,
    bandwidth: str,
    memory: str | None,
    profile: str | None,
    device: str,
    num_original_layers: str,
    num_divisions: str,
    attention_width: str,
    seq_len: str,
    batch_size: str,
) -> None:
    """Prints the plans of a model on a cluster, what each is predicted to take, and which is chosen and why."""
    num_devices = whole_number(devices, "--devices", 1)
    bandwidths = _bandwidths(bandwidth)
    layers = whole_number(num_original_layers, "--num-original-layers", 1)
    divisions = whole_number(num_divisions, "--num-divisions", 1)
    one_of(attention_width, "--attention-width", ("full", "narrow"))
    tokens, batch = whole_number(seq_len, "--seq-len", 1), whole_number(batch_size, "--batch-size", 1)
    budget = _budget(memory)

    from detransformer.cluster.devices import preset_profile
    from detransformer.planning.placement import place

    config = _model_config(model, layers, divisions, attention_width)
    if tokens > config.max_position_embeddings:
        raise ValueError(f"--seq-len {tokens} is out of range; give one from 1 to {config.max_position_embeddings}.")
    known = ClusterProfile.load(profile) if profile else None
    if known and len(known.devices) < num_devices:
        raise ValueError(
            f"--devices {num_devices} is more than the {len(known.devices)} in {profile}; profile them first."
        )
    for mbps in bandwidths:
        if known:
            cluster = ClusterProfile(known.devices[:num_devices], known.link.at(mbps * 1e6))
        else:
            cluster = ClusterProfile((preset_profile(device, config),) * num_devices, LinkProfile(mbps * 1e6))
        placement = place(config, cluster, tokens, batch, budget)
        print(f"\n{model} on {num_devices} x {cluster.devices[0].name} at {mbps:g} Mbps (predicted)\n")
        rows = placement_rows(placement)
        rows["memory_bytes"] /= 2**20
        print(_markdown(rows.rename(columns={"memory_bytes": "memory_mib"})))
        chosen = placement.chosen
        print(
            f"\nchosen: {chosen.plan.method} ({chosen.plan.describe()}), {chosen.prediction.latency_s:.3f} s: "
            f"least summed time of the plans that fit."
        )


def placement_rows(placement) -> pd.DataFrame:
    """A row an alternative of a `Placement`, fastest first."""
    return pd.DataFrame(
        [
            {
                "method": a.plan.method,
                "plan": a.plan.describe(),
                "predicted_s": a.prediction.latency_s,
                "compute_s": a.prediction.compute_s,
                "comm_s": a.prediction.comm_s,
                "memory_bytes": max(a.prediction.memory_bytes),
                "fits": a.fits,
                "chosen": a is placement.chosen,
                "reason": a.reason,
            }
            for a in placement.alternatives
        ]
    )


def profile_command(
    model: str,
    devices: str,
    bandwidth: str,
    device: str,
    output: str,
    num_original_layers: str,
    num_divisions: str,
    attention_width: str,
) -> None:
    """Profiles operations (a preset's rates, or this host's by measuring) and links, and saves them as JSON."""
    num_devices = whole_number(devices, "--devices", 2, MAX_BENCH_DEVICES)
    (mbps, *more) = _bandwidths(bandwidth)
    if more:
        raise ValueError(f"--bandwidth {bandwidth} names several; a profile is made at one.")
    layers = whole_number(num_original_layers, "--num-original-layers", 1)
    divisions = whole_number(num_divisions, "--num-divisions", 1)
    one_of(attention_width, "--attention-width", ("full", "narrow"))
    _check_writable(output)

    from detransformer.cluster.devices import DEVICES, preset_profile
    from detransformer.cluster.profiler import host_profile, profile_link, profile_operations
    from detransformer.cluster.session import EmulatedCluster

    one_of(device, "--device", ("host", *DEVICES))
    config = _model_config(model, layers, divisions, attention_width)
    if device == "host":
        operations = profile_operations(config)
        print(_markdown(operations))
        compute = host_profile(platform.node() or "host", operations)
    else:
        compute = preset_profile(device, config)
        print(f"{compute.name}: {compute.flops_per_s['*'] / 1e9:.1f} GFLOP/s ({compute.source})")
    link = LinkProfile(mbps * 1e6)
    cluster = EmulatedCluster(num_devices, bandwidth_bps=mbps * 1e6)
    if cluster.transport == "namespaces":
        with cluster:
            link, rows = profile_link(cluster)
        print(_markdown(rows))
    print(f"link: {link.source}")
    provenance = {
        "model": model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.platform(),
        "python": sys.version.split()[0],
        "detransformer": __version__,
    }
    ClusterProfile((compute,) * num_devices, link).save(output, provenance)
    print(f"saved to {output}")


def _model_config(model: str, num_original_layers: int, num_divisions: int, attention_width: str):
    """The decoupled configuration of a preset, or a folder's own."""
    from detransformer.cluster.checkpoints import open_folder
    from detransformer.models.configuration import preset_config

    if model in PRESET_SIZES:
        return preset_config(model, num_original_layers, num_divisions, attention_width)
    return open_folder(model).config


def _bandwidths(text: str) -> list[float]:
    low, high = BANDWIDTH_LIMITS_MBPS
    return [number(word, "--bandwidth", low, high) for word in words(text, "--bandwidth")]


def _budget(memory: str | None) -> int | None:
    return None if memory is None else int(number(memory, "--memory", 1) * 2**20)


def _check_writable(output: str, option: str = "--output") -> None:
    """Fails before an hour of measuring, not after it."""
    if Path(output).is_dir():
        raise ValueError(f"{option} {output} is a folder; give a file name.")
    with atomic_write(f"{output}.probe") as file:
        file.write("x")
    Path(f"{output}.probe").unlink()


def _sent_bytes(rows: pd.DataFrame) -> pd.Series:
    return rows[[f"{kind}_bytes" for kind in SHORT_KINDS]].sum(axis=1)


def _markdown(frame: pd.DataFrame) -> str:
    return frame.to_markdown(index=False, floatfmt=".4g")
