"""`detransformer bench`: measures methods side by side on emulated devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detransformer.commands import options
from detransformer.commands.plan import cluster_of, markdown, on_devices
from detransformer.parallel.methods import METHODS
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.presets import PRESETS

if TYPE_CHECKING:
    import pandas as pd

    from detransformer.cluster.cells import Cell

MAX_EMULATED = 8
USUAL = options.Words(("single", "tp", "sp", "ulysses", "bp+tp", "bp+sp", "bp+allgather", "bp+paper", "bp+auto"))
SHOWN = ("method", "plan", "num_devices", "bandwidth_mbps", "wire", "latency_s", "interval", "auto_speedup")
SHOWN += ("over_limit", "compute_s", "comm_s", "wait_s", "predicted_s", "collectives", "sent_kib", "weights_mib")
SHOWN += ("peak_mib", "valid")
SHORT_KINDS = {"all_reduce": "ar", "all_gather": "ag", "all_to_all": "a2a", "reduce_scatter": "rs", "send": "send"}
REFERENCES = ("single", "tp", "sp")  # also measured, in float32, if --wire is another format


def bench(
    model: options.Model = "bert-base",
    cluster: options.ClusterFile = None,
    devices: options.Devices = None,
    bandwidth: options.Bandwidth = None,
    methods: Annotated[
        options.Words,
        typer.Option(parser=options.words_of(METHODS, "all"), help=f"all, or some of {', '.join(METHODS)}."),
    ] = USUAL,
    repeats: Annotated[int, typer.Option(min=1, help="Measured requests per row.")] = 5,
    output: options.Output = None,
    timeline: Annotated[
        Path | None, typer.Option(parser=options.file_to_write, help="CSV file for what each device did when.")
    ] = None,
    num_original_layers: options.Layers = 4,
    num_divisions: options.Divisions = 4,
    attention_width: options.Width = "full",
    seq_len: options.Tokens = 128,
    batch_size: options.Batch = 1,
    device: options.Preset = None,
    wire: Annotated[Literal[WIRE_FORMATS], typer.Option(help="Number format of messages.")] = "float32",
    delay: Annotated[
        float | None, typer.Option(min=0, max=10_000, help="One-way delay of a packet between two devices, in ms.")
    ] = None,
    jitter: Annotated[
        float | None, typer.Option(min=0, max=10_000, help="Largest deviation of a packet's delay from --delay, in ms.")
    ] = None,
    memory: options.Memory = None,
    transport: options.Transport = "auto",
    time_scale: options.TimeScale = None,
    pace: options.Pace = "measured",
) -> None:
    """Measure methods on emulated devices: one row per method and bandwidth, which --output saves as CSV."""
    spec = cluster_of(cluster, devices, device, delay=delay, jitter=jitter)
    if not spec.emulated:
        raise ValueError(
            f"{cluster} lists real hosts, and a bench measures emulated ones: set emulated: true in a copy of it, "
            "or measure requests on the hosts with `detransformer run`."
        )
    num_devices = len(spec.devices)
    if num_devices > MAX_EMULATED:
        raise ValueError(f"{num_devices} devices are more than the {MAX_EMULATED} that a bench emulates.")
    mbps = bandwidth or [spec.link.bandwidth_mbps]

    from detransformer.cluster.bench import Bench, measure_grid, timelines
    from detransformer.files import atomic_write

    cells = cells_of(
        model,
        methods,
        mbps,
        num_devices,
        wire,
        num_original_layers=num_original_layers,
        num_divisions=num_divisions,
        attention_width=attention_width,
        seq_len=seq_len,
        batch_size=batch_size,
        repeats=repeats,
        pace=pace,
    )
    emulated = spec.emulate(bandwidth_bps=mbps[0] * 1e6, transport=transport)
    planned = Bench(emulated, time_scale=time_scale, memory_budget_bytes=options.in_bytes(memory))
    for cell in cells:
        planned.case(cell)  # raises for what does not fit
    measured = f"{output}.rows.json" if output else None  # until the CSV is written
    with emulated:
        rows = measure_grid(planned, cells, measured)
    for path, table in ((timeline, timelines(rows)), (output, rows.drop(columns="timeline"))):
        if path:
            with atomic_write(path) as file:
                table.to_csv(file, index=False)
    if measured:
        Path(measured).unlink()
    print(
        f"\n{model} on {on_devices(emulated.devices)} (emulated), {emulated.link} link, seq {seq_len}, "
        f"batch {batch_size}, median of {repeats}\n"
    )
    print(markdown(shown_rows(rows)))
    print(f"Shares of a layer are paced by --pace {pace}.")
    print("ar all_reduce, ag all_gather, a2a all_to_all, rs reduce_scatter; over limit: latency over (single device /")
    print("devices); auto speedup: how many times as fast BP+Auto is; intervals: 95%; peak mib: resident memory.\n")
    for row in rows[~rows["valid"].astype(bool)].itertuples():
        print(f"not valid: {row.method} at {row.bandwidth_mbps:g} Mbps, {row.wire}: {row.why_invalid}.")
    for line in summary_lines(rows):
        print(line)
    for path in filter(None, (output, timeline)):
        print(f"saved to {path}")


def cells_of(
    model: str, methods: Sequence[str], bandwidths: Sequence[float], num_devices: int, wire: str, **common: Any
) -> list["Cell"]:
    """The rows of one bench; on another wire than float32, `REFERENCES` in float32 come first.

    Of these, a decoupled checkpoint runs only `single`: TP and SP are for unmodified models.
    """
    from detransformer.cluster.cells import grid
    from detransformer.opening import open_checkpoint

    decoupled = model not in PRESETS and open_checkpoint(model).decoupled
    references = REFERENCES[:1] if decoupled else REFERENCES
    cells = grid(model, references, bandwidths, num_devices, **common) if wire != "float32" else []
    cells += grid(model, methods, bandwidths, num_devices, wire, **common)
    return list(dict.fromkeys(cells))


def shown_rows(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Bench rows as printed; `interval` is the median's 95% interval, for `MIN_SAMPLES` requests or more."""
    from detransformer.record.intervals import bootstrap_median, samples_of

    shown = rows.assign(
        interval=[_between(*bootstrap_median(samples_of(text))) for text in rows["samples_s"]],
        auto_speedup=[_auto_speedup(rows.iloc[[place]], rows) for place in range(len(rows))],
        collectives=[_collectives(row) for row in rows.to_dict("records")],
        sent_kib=rows[[f"{kind}_bytes" for kind in SHORT_KINDS]].sum(axis=1) / 1024,
        weights_mib=rows["weights_bytes"] / 2**20,
        peak_mib=rows["peak_rss_bytes"].astype(float) / 2**20,
    )
    return shown[list(SHOWN)].rename(columns=lambda name: name.replace("_", " "))


def _between(low: float, high: float) -> str:
    return "" if low != low else f"{low:.3f} to {high:.3f}"


def _auto_speedup(row: "pd.DataFrame", rows: "pd.DataFrame") -> str:
    """How many times as fast BP+Auto answers as `row` does under the same conditions, such as `2.39 (2.35 to 2.43)`."""
    from detransformer.tables.latency import checked_rows, speedup

    conditions = ["bandwidth_mbps", "time_scale", "wire"]
    auto = checked_rows(rows[rows["method"] == "bp+auto"])
    auto = auto[(auto[conditions] == row[conditions].iloc[0]).all(axis=1)]
    if len(auto) != 1 or not len(checked_rows(row[row["method"] != "bp+auto"])):
        return ""
    ratio, low, high = speedup(row, auto)
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})" if low == low else f"{ratio:.2f}"


def _collectives(row: dict) -> str:
    counts = [(row[f"{kind}_count"], short) for kind, short in SHORT_KINDS.items()]
    return " + ".join(f"{count} {short}" for count, short in counts if count) or "-"


def summary_lines(rows: "pd.DataFrame") -> list[str]:
    """A line for each valid row of BP+Auto, against float32 TP and SP, the limit and all other rows."""
    from detransformer.tables.latency import checked_rows

    lines, valid = [], checked_rows(rows)
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
