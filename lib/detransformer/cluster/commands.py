"""The bodies of `detransformer bench`, `plan` and `profile`: words in, tables printed and saved."""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from detransformer import __version__
from detransformer.cluster.devices import PACES
from detransformer.cluster.spec import BANDWIDTH_LIMITS_MBPS, ClusterSpec
from detransformer.files import atomic_write
from detransformer.models.configuration import PRESETS
from detransformer.parallel.methods import METHODS
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.parse import number, one_of, whole_number, words
from detransformer.planning.profile import ClusterProfile, LinkProfile
from detransformer.record.intervals import MIN_SAMPLES, bootstrap_median, bootstrap_ratio, samples_of

if TYPE_CHECKING:
    from detransformer.cluster.cells import Cell
    from detransformer.cluster.devices import DeviceSpec
    from detransformer.planning.placement import Placement

MAX_BENCH_DEVICES = 8
# where neither the command nor a cluster file says otherwise
DEFAULT_DEVICES, DEFAULT_DEVICE, DEFAULT_BANDWIDTH_MBPS = "4", "rpi4b", "125"
SHOWN = {  # column of a bench row -> heading in the printed table
    "method": "method",
    "plan": "plan",
    "num_devices": "devices",
    "bandwidth_mbps": "Mbps",
    "wire": "wire",
    "latency_s": "latency s",
    "interval": "95% interval",
    "auto_speedup": "BP+Auto is faster by",
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
PACE_SENTENCES = {
    "measured": "Paced by the efficiency that shares of a layer were measured to have on a core (--pace measured).",
    "roofline": "Paced as if every share of a layer computed at the whole layer's rate (--pace roofline).",
}
REFERENCES = ("single", "tp", "sp")  # measured in float32 beside methods on another wire


def bench_command(
    model: str,
    cluster: str | None,
    devices: str | None,
    bandwidth: str | None,
    methods: str,
    repeats: str,
    output: str | None,
    timeline: str | None,
    num_original_layers: str,
    num_divisions: str,
    attention_width: str,
    seq_len: str,
    batch_size: str,
    device: str | None,
    wire: str,
    delay: str | None,
    jitter: str | None,
    memory: str | None,
    transport: str,
    time_scale: str,
    pace: str,
) -> None:
    """Measures the methods at each bandwidth on emulated devices; prints and saves one row a method."""
    beside = {"--devices": devices, "--device": device, "--delay": delay, "--jitter": jitter}
    spec = _cluster_file(cluster, beside)
    if spec and not spec.emulated:
        raise ValueError(
            f"{cluster} lists real hosts, and a bench measures emulated ones: set emulated: true in a copy of it, "
            "or measure requests on the hosts with `detransformer run`."
        )
    num_devices = len(spec.members) if spec else whole_number(devices or DEFAULT_DEVICES, "--devices", 1)
    if num_devices > MAX_BENCH_DEVICES:
        raise ValueError(f"{num_devices} devices are more than the {MAX_BENCH_DEVICES} that a bench emulates.")
    bandwidths = _bandwidths(bandwidth, spec)
    names = list(METHODS) if methods == "all" else words(methods, "--methods", METHODS)
    count = whole_number(repeats, "--repeats", 1)
    common = dict(
        num_original_layers=whole_number(num_original_layers, "--num-original-layers", 1),
        num_divisions=whole_number(num_divisions, "--num-divisions", 1),
        attention_width=one_of(attention_width, "--attention-width", ("full", "narrow")),
        seq_len=whole_number(seq_len, "--seq-len", 1),
        batch_size=whole_number(batch_size, "--batch-size", 1),
        repeats=count,
        pace=one_of(pace, "--pace", PACES),
    )
    one_of(wire, "--wire", WIRE_FORMATS)
    delay_s, jitter_s = (
        number(text or "0", name, 0, 10_000) / 1e3 for text, name in ((delay, "--delay"), (jitter, "--jitter"))
    )
    scale = None if time_scale == "auto" else number(time_scale, "--time-scale", 0.1, 64)
    for path, name in ((output, "--output"), (timeline, "--timeline")):
        if path:
            _check_writable(path, name)

    from detransformer.cluster.bench import Bench, measure_grid
    from detransformer.cluster.session import EmulatedCluster

    cells = bench_cells(model, names, bandwidths, num_devices, wire, **common)
    if spec:
        emulated = spec.emulate(bandwidth_bps=bandwidths[0] * 1e6, transport=transport)
    else:
        alike = dict(device=device or DEFAULT_DEVICE, delay_s=delay_s, jitter_s=jitter_s)
        emulated = EmulatedCluster(num_devices, bandwidth_bps=bandwidths[0] * 1e6, transport=transport, **alike)
    bench = Bench(emulated, time_scale=scale, memory_budget_bytes=_budget(memory))
    for cell in cells:
        bench.case(cell)  # or says what does not fit
    with emulated:
        rows = measure_grid(bench, cells, f"{output}.rows.json" if output else None, timeline=timeline)
    if output:
        with atomic_write(output) as file:
            rows.to_csv(file, index=False)
    print(
        f"\n{model} on {_on_devices(emulated.devices)} (emulated), {emulated.link} link, seq {seq_len}, "
        f"batch {batch_size}, median of {repeats}\n"
    )
    print(_markdown(shown_rows(rows)))
    print(PACE_SENTENCES[pace])
    print("ar all_reduce, ag all_gather, a2a all_to_all, rs reduce_scatter; x limit: over single device / devices.\n")
    for row in rows[~rows["valid"].astype(bool)].itertuples():
        print(f"not valid: {row.method} at {row.bandwidth_mbps:g} Mbps, {row.wire}: {row.why_invalid}.")
    for line in summary_lines(rows):
        print(line)
    for path in (output, timeline):
        if path:
            print(f"saved to {path}")


def bench_cells(
    model: str,
    methods: Sequence[str],
    bandwidths: Sequence[float],
    num_devices: int,
    wire: str,
    **common: Any,
) -> list["Cell"]:
    """The rows of one `detransformer bench`; on another wire than float32, with `REFERENCES` in float32 before them.

    Of these a decoupled checkpoint runs on one device alone: TP and SP are for unmodified models.
    """
    from detransformer.cluster.cells import grid
    from detransformer.cluster.checkpoints import open_folder

    decoupled = model not in PRESETS and open_folder(model).decoupled
    references = REFERENCES[:1] if decoupled else REFERENCES
    cells = grid(model, references, bandwidths, num_devices, **common) if wire != "float32" else []
    cells += grid(model, methods, bandwidths, num_devices, wire, **common)
    return list(dict.fromkeys(cells))


def shown_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Bench rows as they are printed, intervals from `MIN_SAMPLES` requests on."""
    shown = rows.assign(
        interval=[_between(*bootstrap_median(samples_of(text))) for text in rows["samples_s"]],
        auto_speedup=[_auto_speedup(row, rows) for row in rows.to_dict("records")],
        collectives=[_collectives(row) for row in rows.to_dict("records")],
        sent_kib=_sent_bytes(rows) / 1024,
        weights_mib=rows["weights_bytes"] / 2**20,
        peak_mib=rows["peak_rss_bytes"].astype(float) / 2**20,
    )
    return shown[list(SHOWN)].rename(columns=SHOWN)


def _between(low: float, high: float) -> str:
    return "" if low != low else f"{low:.3f} to {high:.3f}"


def _auto_speedup(row: dict, rows: pd.DataFrame) -> str:
    """How many times as fast BP+Auto answers as `row` does under the same conditions, such as `2.39 (2.35 to 2.43)`."""
    alike = rows[(rows["method"] == "bp+auto") & (rows["wire"] == row["wire"]) & rows["valid"].astype(bool)]
    for name in ("bandwidth_mbps", "time_scale"):
        alike = alike[alike[name] == row[name]]
    if len(alike) != 1 or row["method"] == "bp+auto" or not row["valid"]:
        return ""
    auto = alike.iloc[0]
    slower, faster = samples_of(row["samples_s"]), samples_of(auto["samples_s"])
    ratio = f"{row['latency_s'] / auto['latency_s']:.2f}"
    if not len(slower) == len(faster) >= MIN_SAMPLES:
        return ratio
    low, high = bootstrap_ratio(slower, faster)
    return f"{ratio} ({low:.2f} to {high:.2f})"


def _collectives(row: dict) -> str:
    """Such as `4 ag + 8 a2a`."""
    counts = [(row[f"{kind}_count"], short) for kind, short in SHORT_KINDS.items()]
    return " + ".join(f"{count} {short}" for count, short in counts if count) or "-"


def summary_lines(rows: pd.DataFrame) -> list[str]:
    """BP+Auto against float32 TP and SP, the limit and all other rows: a line for each of its valid rows."""
    lines = []
    valid = rows[rows["valid"].astype(bool)]
    for auto in valid[valid["method"] == "bp+auto"].to_dict("records"):
        alike = valid[valid["bandwidth_mbps"] == auto["bandwidth_mbps"]]
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
        lines.append(f"{line}; output error {error}.")
    return lines


def plan_command(
    model: str,
    cluster: str | None,
    devices: str | None,
    bandwidth: str | None,
    memory: str | None,
    profile: str | None,
    device: str | None,
    num_original_layers: str,
    num_divisions: str,
    attention_width: str,
    seq_len: str,
    batch_size: str,
    wire: str,
    explain: bool,
    output: str | None,
    pace: str,
) -> None:
    """Prints the plans of a model on a cluster, what each is predicted to take, and which is chosen and why."""
    spec = _cluster_file(cluster, {"--devices": devices, "--device": device, "--profile": profile})
    num_devices = len(spec.members) if spec else whole_number(devices or DEFAULT_DEVICES, "--devices", 1)
    bandwidths = _bandwidths(bandwidth, spec)
    layers = whole_number(num_original_layers, "--num-original-layers", 1)
    divisions = whole_number(num_divisions, "--num-divisions", 1)
    one_of(attention_width, "--attention-width", ("full", "narrow"))
    tokens, batch = whole_number(seq_len, "--seq-len", 1), whole_number(batch_size, "--batch-size", 1)
    wires = words(wire, "--wire", WIRE_FORMATS)
    budget = _budget(memory)
    one_of(pace, "--pace", PACES)
    if output:
        _check_writable(output)
        if len(bandwidths) > 1:
            raise ValueError(f"--output {output} takes the plan of one bandwidth, and --bandwidth names several.")

    from detransformer.cluster.devices import cluster_profile, device_specs
    from detransformer.planning.placement import place_freely

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
            shares = known.link.shares[:num_devices]
            link = replace(known.link, bandwidth_bps=mbps * 1e6, shares=shares)
            planned, name = ClusterProfile(known.devices[:num_devices], link), f"{num_devices} profiled devices"
        elif spec:
            planned = spec.profile(model, config, pace, mbps * 1e6)
            name = f"{spec.name}: {_on_devices(spec.device_specs)}"
        else:
            specs = device_specs(num_devices, device or DEFAULT_DEVICE)
            planned, name = cluster_profile(specs, model, config, mbps * 1e6, pace=pace), _on_devices(specs)
        started = time.perf_counter()
        placement = place_freely(config, planned, tokens, batch, budget, wires=wires)
        planning_s = time.perf_counter() - started
        print(f"\n{model} on {name}, at {mbps:g} Mbps (predicted)\n")
        chosen = placement.chosen
        if explain:
            from detransformer.planning.explain import explain as explanation

            print(explanation(placement, config, planned, tokens, batch))
        else:
            rows = placement_rows(placement).assign(
                devices=[_listed(a.plan.device_ids) for a in placement.alternatives],
                memory_mib=lambda frame: frame["memory_bytes"] / 2**20,
            )
            shown = ["method", "devices", "plan", "predicted_s", "compute_s", "comm_s", "memory_mib", "fits", "reason"]
            print(_markdown(rows.drop_duplicates(["method", "devices"])[shown]))
            print(
                f"\nchosen: {chosen.plan.method} ({chosen.plan.describe()}), {chosen.prediction.latency_s:.3f} s: "
                f"the fastest of {len(rows)} looked at that fit; planned in {planning_s:.2f} s."
            )
            for sentence in placement.left_out:
                print(f"{sentence}.")
        if output:
            with atomic_write(output) as file:
                json.dump({"plan": chosen.plan.to_dict(), "predicted_s": chosen.prediction.latency_s}, file, indent=2)
            print(f"saved to {output}")


def _listed(devices: Sequence[int]) -> str:
    """Such as `0+1+3`, or how many they are."""
    return "+".join(map(str, devices)) if len(devices) <= MAX_BENCH_DEVICES else f"{len(devices)} devices"


def placement_rows(placement: "Placement") -> pd.DataFrame:
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
    cluster: str | None,
    devices: str | None,
    bandwidth: str | None,
    device: str | None,
    output: str,
    num_original_layers: str,
    num_divisions: str,
    attention_width: str,
) -> None:
    """Profiles operations (a preset's rates, or this host's by measuring) and links, and saves them as JSON.

    Of a cluster of real hosts, this host is measured, and its links are assumed as the file says; of an emulated one,
    the rates are those of its devices.
    """
    spec = _cluster_file(cluster, {"--devices": devices, "--device": device})
    count = len(spec.members) if spec else devices or DEFAULT_DEVICES
    num_devices = whole_number(count, "devices in --cluster" if spec else "--devices", 2, MAX_BENCH_DEVICES)
    (mbps, *more) = _bandwidths(bandwidth, spec)
    if more:
        raise ValueError(f"--bandwidth {bandwidth} names several; a profile is made at one.")
    layers = whole_number(num_original_layers, "--num-original-layers", 1)
    divisions = whole_number(num_divisions, "--num-divisions", 1)
    one_of(attention_width, "--attention-width", ("full", "narrow"))
    _check_writable(output)

    from detransformer.cluster.devices import DEVICES, link_shares, preset_profile
    from detransformer.cluster.profiler import host_profile, profile_link, profile_operations
    from detransformer.cluster.session import EmulatedCluster

    if device:
        one_of(device, "--device", ("host", *DEVICES))
    config = _model_config(model, layers, divisions, attention_width)
    if spec and spec.emulated:
        computes = spec.profile(model, config).devices
    elif device in (None, "host"):
        operations = profile_operations(config)
        print(_markdown(operations))
        computes = (host_profile(platform.node() or "host", operations),) * num_devices
    else:
        computes = (preset_profile(device, config),) * num_devices
    for name, rate, source in dict.fromkeys((c.name, c.flops_per_s, c.source) for c in computes):
        print(f"{name}: {rate / 1e9:.1f} GFLOP/s ({source})")
    link = LinkProfile(mbps * 1e6)
    emulated = EmulatedCluster(num_devices, bandwidth_bps=mbps * 1e6)  # with equal links, whatever their shares
    if emulated.transport == "namespaces" and not (spec and not spec.emulated):
        with emulated:
            link, rows = profile_link(emulated)
        print(_markdown(rows))
    link = replace(link, shares=link_shares(spec.device_specs) if spec else ())
    print(f"link: {link.source}")
    provenance = {
        "model": model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.platform(),
        "python": sys.version.split()[0],
        "detransformer": __version__,
    }
    ClusterProfile(computes, link).save(output, provenance)
    print(f"saved to {output}")


def _model_config(model: str, num_original_layers: int, num_divisions: int, attention_width: str):
    """The decoupled configuration of a preset, or a folder's own."""
    from detransformer.cluster.checkpoints import open_folder
    from detransformer.models.configuration import preset_config

    if model in PRESETS:
        return preset_config(model, num_original_layers, num_divisions, attention_width)
    return open_folder(model).config


def _cluster_file(path: str | None, beside: dict[str, str | None]) -> ClusterSpec | None:
    """The file of `--cluster`; ValueError where an option `beside` it says what the file says."""
    if path is None:
        return None
    for name, text in beside.items():
        if text is not None:
            raise ValueError(f"{name} {text} stands beside --cluster, which says that already; leave one out.")
    return ClusterSpec.load(path)


def _bandwidths(text: str | None, spec: ClusterSpec | None = None) -> list[float]:
    if text is None:
        return [spec.bandwidth_bps / 1e6 if spec else float(DEFAULT_BANDWIDTH_MBPS)]
    return [number(word, "--bandwidth", *BANDWIDTH_LIMITS_MBPS) for word in words(text, "--bandwidth")]


def _on_devices(specs: Sequence["DeviceSpec"]) -> str:
    """Such as `4 x Raspberry Pi 4B`, or a list where they differ."""
    from detransformer.cluster.devices import describe_devices

    alike = len({spec.hardware for spec in specs}) == 1
    return f"{len(specs)} x {describe_devices(specs)}" if alike else describe_devices(specs)


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
