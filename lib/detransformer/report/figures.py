"""The papers' figures, drawn from a run's saved tables only: table in, Figure out.

`FIGURES` names each figure with the tables it needs and the function that draws it. A published value is a hollow
diamond or a hatched bar beside the obtained one. Drawing computes nothing but the ratios that the axes name.
"""

import io
from collections.abc import Callable

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detransformer.files import atomic_write
from detransformer.report.expected import published_claim
from detransformer.report.runs import RunFolder
from detransformer.report.tables import (
    BASELINES,
    MODEL_NAMES,
    NUM_DEVICES,
    TASK_COLUMNS,
    links_of,
    normalised,
    select,
    single_latency,
    valid_rows,
)

METHODS = ("tp", "sp", "bp+tp", "bp+sp", "bp+allgather", "bp+auto")
METHOD_NAMES = {
    "single": "Single",
    "tp": "TP",
    "sp": "SP",
    "bp+tp": "BP+TP",
    "bp+sp": "BP+SP",
    "bp+allgather": "BP+Allgather",
    "bp+auto": "BP+Auto",
    "dp": "DP",
    "pp": "PP",
}
# One colour a method in every figure; the palette is safe for colour-blind readers.
COLOURS = dict(zip(("bp+auto", *METHODS[:-1], "dp", "pp"), sns.color_palette("colorblind"), strict=False)) | {
    "single": "0.4"
}
SCALING_BANDWIDTH_MBPS = 500  # Section IV-C-2
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "detransformer",  # same table, same bytes
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
}


class NotebookFigure(Figure):
    """A Figure that a notebook shows without pyplot: nothing is registered, so nothing needs closing."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def draw(run: RunFolder, name: str) -> Figure:
    """Draw figure NAME from the run's saved tables, save figures/NAME.svg and .png, and return it.

    Raises:
        ValueError: for an unknown name, a missing table, or a table without the rows the figure needs.
    """
    if name not in FIGURES:
        raise ValueError(f"No figure is called {name!r}; choose one of {', '.join(FIGURES)}.")
    tables, function = FIGURES[name]
    frames = [run.load_table(table) for table in tables]
    with matplotlib.rc_context(STYLE):
        figure = function(*frames)
        with atomic_write(run.figures / f"{name}.svg", "wb") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
        with atomic_write(run.figures / f"{name}.png", "wb") as file:
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return figure


def draw_all(run: RunFolder) -> tuple[list[str], dict[str, str]]:
    """Draw every figure whose tables are there; returns the names drawn and, for the others, why not."""
    drawn, missing = [], {}
    for name in FIGURES:
        try:
            draw(run, name)
            drawn.append(name)
        except ValueError as error:
            missing[name] = str(error)
    return drawn, missing


# --- 01 decoupling -----------------------------------------------------------------------------------------------


def decoupling(frame: pd.DataFrame) -> Figure:
    """FLOPs of a decoupled layer over an original one: the price of all heads in every sub-block."""
    rows = _need(frame[frame["layer_flops_ratio"].notna() & (frame["num_divisions"] > 1)], "decoupling", "Ndiv > 1")
    model = rows["model"].iloc[0]
    rows = rows[rows["model"] == model]
    figure, axes = _panels(1, width=5.2)
    axis = axes[0]
    widths = list(dict.fromkeys(rows["attention_width"]))
    seq_lens = sorted(rows["seq_len"].dropna().unique())
    colours = sns.color_palette("colorblind", len(seq_lens))
    for width in widths:
        for colour, seq_len in zip(colours, seq_lens, strict=True):
            line = rows[(rows["attention_width"] == width) & (rows["seq_len"] == seq_len)]
            line = line.drop_duplicates("num_divisions").sort_values("num_divisions")
            if len(line):
                label = f"{width} heads, {seq_len:g} tokens"
                style = "-" if width == "full" else ":"
                axis.plot(
                    line["num_divisions"], line["layer_flops_ratio"], style, marker="o", ms=4, color=colour, label=label
                )
    axis.axhline(1, color="0.3", lw=1, ls="--")
    axis.set_xscale("log", base=2)
    _whole_ticks(axis, sorted(rows["num_divisions"].unique()))
    axis.set(xlabel="Ndiv (sub-blocks a layer)", ylabel="FLOPs, decoupled / original layer")
    axis.set_ylim(0)
    figure.suptitle(f"Cost of a decoupled {MODEL_NAMES.get(model, model)} layer (paper Fig. 4, Eq. 2)", fontsize=10)
    _legend_beside(axis)
    return figure


# --- 02, 03 training ---------------------------------------------------------------------------------------------


def pretraining_loss(frame: pd.DataFrame) -> Figure:
    """Masked-language-model loss of original and decoupled models over the same tokens (Section IV-B)."""
    rows = _need(frame[frame["train_loss"].notna()], "pretraining_loss", "train_loss")
    figure, axes = _panels(1, width=5.6)
    axis = axes[0]
    names = list(dict.fromkeys(rows["row"]))
    for colour, name in zip(sns.color_palette("colorblind", len(names)), names, strict=True):
        line = rows[rows["row"] == name].sort_values("step")
        axis.plot(line["step"], line["train_loss"], color=colour, lw=1.4, label=str(name))
    axis.set(xlabel="Optimiser step", ylabel="Training loss (nats a masked token)")
    axis.set_title("Pre-training, original and decoupled (paper Section IV-B)")
    _legend_beside(axis)
    return figure


def table_iii(frame: pd.DataFrame) -> Figure:
    """Table III as trends: each task over Nb (Ndiv=4) and over Ndiv (Nb=4); published hollow, obtained filled."""
    rows = frame.copy()
    rows["nb"] = pd.to_numeric(rows["num_original_layers"], errors="coerce")
    rows["ndiv"] = pd.to_numeric(rows["num_divisions"], errors="coerce")
    rows = _need(rows[rows["obtained_mean"].notna() | rows["published"].notna()], "table_iii", "any row")
    model = "bert-base" if (rows["model"] == "bert-base").any() else rows["model"].iloc[0]
    rows = rows[rows["model"] == model]
    original = rows[rows["nb"].isna()]
    tasks = list(dict.fromkeys(rows["task"]))
    figure, grid = _grid(2, len(tasks), width=2.15, height=2.1)
    for column, task in enumerate(tasks):
        base = original[original["task"] == task]
        for row, (key, fixed, value, title) in enumerate(
            [("nb", "ndiv", 4, "Nb (Ndiv = 4)"), ("ndiv", "nb", 4, "Ndiv (Nb = 4)")]
        ):
            axis = grid[row][column]
            line = rows[(rows["task"] == task) & (rows[fixed] == value)].sort_values(key)
            axis.plot(line[key], line["published"], "D--", mfc="none", color="0.35", ms=5, lw=0.9)
            axis.errorbar(
                line[key],
                line["obtained_mean"],
                yerr=line["obtained_std"].fillna(0),
                fmt="o-",
                color="C0",
                ms=4,
                capsize=2,
            )
            for values, colour in ((base["published"], "0.35"), (base["obtained_mean"], "C0")):
                if values.notna().any():
                    axis.axhline(values.mean(), color=colour, lw=0.9, ls=":")
            _whole_ticks(axis, sorted(line[key].unique()))
            axis.set_xlabel(title)
            if row == 0:
                metric = base["metric"].iloc[0] if "metric" in base and len(base) else "score"
                axis.set_title(f"{TASK_COLUMNS.get(task, task)} ({metric})")
            if column == 0:
                axis.set_ylabel("Score (x100)")
    handles = [
        matplotlib.lines.Line2D([], [], marker="D", mfc="none", color="0.35", ls="--", lw=0.9, label="published"),
        matplotlib.lines.Line2D([], [], marker="o", color="C0", ms=4, label="obtained (mean ± std over seeds)"),
        matplotlib.lines.Line2D([], [], color="0.35", ls=":", label="original model (grey published, blue obtained)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(f"Accuracy of decoupled {MODEL_NAMES.get(model, model)} (paper Table III)", fontsize=10)
    return figure


# --- 04, 05 profile and placement --------------------------------------------------------------------------------


def fig2a(frame: pd.DataFrame) -> Figure:
    """Single-device latency of BERT-Base and BERT-Large: published (hatched) beside measured."""
    frame = _need(frame[frame["latency_s"].notna()], "fig2a", "latency_s")
    figure, axes = _panels(1, width=5.2)
    axis = axes[0]
    kinds = [kind for kind in ("published", "measured") if (frame["kind"] == kind).any()]
    models = list(dict.fromkeys(frame["model"]))
    bars = [(k, d) for k in kinds for d in dict.fromkeys(frame.loc[frame["kind"] == k, "device"])]
    step = 0.8 / len(bars)
    for index, (kind, device) in enumerate(bars):
        rows = frame[(frame["kind"] == kind) & (frame["device"] == device)].groupby("model")["latency_s"].median()
        places = [models.index(m) - 0.4 + step * (index + 0.5) for m in rows.index]
        look = dict(fill=False, hatch="////", edgecolor="0.35") if kind == "published" else dict(color=f"C{index - 1}")
        drawn = axis.bar(places, rows.values, 0.9 * step, label=f"{kind}: {device}", **look)
        axis.bar_label(drawn, fmt="%.2f s", fontsize=8, padding=2)
    axis.set_xticks(range(len(models)), [MODEL_NAMES.get(m, m) for m in models])
    axis.margins(y=0.12)
    axis.set_ylabel("Latency (s), seq 128, batch 1")
    axis.set_title("One device (paper Fig. 2a)")
    _legend_below(figure, axis, columns=1)
    return figure


def placement(frame: pd.DataFrame) -> Figure:
    """Predicted latency of each plan by bandwidth; a ring marks the plan that BP+Auto chooses (Section III-C)."""
    rows = _need(frame[frame["predicted_s"].notna()], "placement", "predicted_s")
    num_devices = NUM_DEVICES if (rows["num_devices"] == NUM_DEVICES).any() else rows["num_devices"].max()
    rows = rows[rows["num_devices"] == num_devices]
    models = list(dict.fromkeys(rows["model"]))
    figure, axes = _panels(len(models), width=4.2, sharey=False)
    for axis, model in zip(axes, models, strict=True):
        part = rows[rows["model"] == model]
        for method in dict.fromkeys(part["method"]):
            line = part[part["method"] == method].sort_values("bandwidth_mbps").drop_duplicates("bandwidth_mbps")
            colour = COLOURS.get(method, "0.3")
            style = dict(lw=1.4) if len(line) > 1 else dict(ls="none")
            axis.plot(
                line["bandwidth_mbps"],
                line["predicted_s"],
                marker="o",
                ms=4,
                color=colour,
                label=METHOD_NAMES.get(method, method),
                **style,
            )
        chosen = part[part["chosen"].astype(str).str.lower() == "true"]
        axis.plot(
            chosen["bandwidth_mbps"], chosen["predicted_s"], "o", ms=11, mfc="none", mec="0.2", mew=1.2, label="chosen"
        )
        _bandwidth_axis(axis, part["bandwidth_mbps"])
        axis.set_ylim(0)
        axis.set_title(MODEL_NAMES.get(model, model))
    axes[0].set_ylabel("Predicted latency (s)")
    figure.suptitle(f"Plans by bandwidth on {num_devices:g} devices (paper Section III-C)", fontsize=10)
    _legend_below(figure, axes[0])
    return figure


# --- 06 latency --------------------------------------------------------------------------------------------------


def fig2b(latency: pd.DataFrame) -> Figure:
    """TP on BERT-Base over 1 to 4 devices at 500 Mbps: latency split in compute and communication, and speedup."""
    latency = valid_rows(latency)
    base = single_latency(latency, "bert-base")
    links = [
        link
        for link in links_of(latency)
        if len(select(latency, "bert-base", "tp", link=link, bandwidth_mbps=SCALING_BANDWIDTH_MBPS, num_devices=None))
    ]
    if base is None or not links:
        raise ValueError(
            "Table 'latency' has no valid rows of bert-base single and tp at 500 Mbps; run 06_latency first."
        )
    figure, axes = _panels(len(links), width=3.8, sharey=False)
    for axis, link in zip(axes, links, strict=True):
        rows = select(latency, "bert-base", "tp", link=link, bandwidth_mbps=SCALING_BANDWIDTH_MBPS, num_devices=None)
        rows = rows.groupby("num_devices")[["latency_s", "compute_s", "comm_s"]].median()
        rows.loc[1] = {"latency_s": base, "compute_s": base, "comm_s": 0.0}
        rows = rows.sort_index()
        # compute_s is the slowest rank's; whatever else the median latency holds is communication and waiting.
        compute = rows["compute_s"].clip(upper=rows["latency_s"])
        axis.bar(rows.index, compute, 0.6, color="C0", label="compute")
        axis.bar(
            rows.index, rows["latency_s"] - compute, 0.6, bottom=compute, color="C1", label="communication and waiting"
        )
        axis.set(xlabel="Devices", ylabel="Latency (s)" if axis is axes[0] else "")
        _whole_ticks(axis, list(rows.index))
        axis.set_ylim(0, 1.25 * rows["latency_s"].max())
        right = axis.twinx()
        right.grid(False)
        right.spines["right"].set_visible(True)
        right.plot(rows.index, base / rows["latency_s"], "o-", color="0.2", ms=4, label="speedup (right axis)")
        right.set_ylim(0, max(4.2, 1.1 * (base / rows["latency_s"]).max()))
        if axis is axes[-1]:
            right.set_ylabel("Speedup over one device")
        axis.set_title(f"link: {link}")
    handles = [h for a in (axes[0], right) for h in a.get_legend_handles_labels()[0]]
    figure.suptitle("TP on BERT-Base at 500 Mbps (paper Fig. 2b)", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def fig7a(latency: pd.DataFrame) -> Figure:
    """Latency of BERT-Base on 4 devices over the single device's, every method by bandwidth."""
    return _normalised_bars(latency, "bert-base", "Fig. 7a")


def fig7b(latency: pd.DataFrame) -> Figure:
    """Latency of BERT-Large on 4 devices over the single device's, every method by bandwidth."""
    return _normalised_bars(latency, "bert-large", "Fig. 7b")


def fig7c(latency: pd.DataFrame) -> Figure:
    """Speedup of BERT-Base over the single device, by device count at 500 Mbps."""
    return _scaling(latency, "bert-base", "Fig. 7c", {})


def fig7d(latency: pd.DataFrame) -> Figure:
    """Speedup of BERT-Large over the single device, by device count at 500 Mbps, with the text's two values."""
    claims = {
        "bp+auto": published_claim("bert_large_bp_auto_speedup_over_single_500mbps_4dev"),
        "tp": published_claim("bert_large_tp_speedup_over_single_500mbps_4dev"),
    }
    return _scaling(latency, "bert-large", "Fig. 7d", claims)


def fig8(latency: pd.DataFrame) -> Figure:
    """Normalised latency of BP+Auto with Nb = 1, 2, 3, 4 on 4 devices, by bandwidth."""
    rows = normalised(valid_rows(latency))
    rows = rows[
        (rows["model"] == "bert-base")
        & (rows["method"] == "bp+auto")
        & (rows["num_devices"] == NUM_DEVICES)
        & (rows["num_divisions"] == 4)
    ]
    rows = _need(rows, "latency", "bert-base bp+auto on 4 devices and single")
    counts = sorted(rows["num_original_layers"].dropna().unique())
    links = links_of(rows)
    figure, axes = _panels(len(links), width=4.0)
    colours = sns.color_palette("viridis", len(counts))
    for axis, link in zip(axes, links, strict=True):
        for colour, count in zip(colours, counts, strict=True):
            line = rows[(rows["link"] == link) & (rows["num_original_layers"] == count)]
            line = line.groupby("bandwidth_mbps")["normalised"].median()
            axis.plot(line.index, line.values, "o-", ms=4, color=colour, label=f"Nb = {count:g}")
        axis.axhline(1, color="0.3", lw=1, ls="--")
        _bandwidth_axis(axis, rows["bandwidth_mbps"])
        axis.set_ylim(0)
        axis.set_title(f"link: {link}")
    axes[0].set_ylabel("Latency / single device")
    figure.suptitle("BP+Auto on 4 devices by number of original layers (paper Fig. 8)", fontsize=10)
    _legend_below(figure, axes[0])
    return figure


def table_iv(frame: pd.DataFrame) -> Figure:
    """Table IV as points: speedup of BP+Auto over TP and SP by bandwidth, published hollow, obtained filled."""
    models = list(dict.fromkeys(frame["model"]))
    _need(frame[frame["obtained"].notna()], "table_iv", "any measured cell")
    links = [link for link in dict.fromkeys(frame["link"].fillna("")) if frame["obtained"][frame["link"] == link].any()]
    markers = dict(zip(links, "osv^P*", strict=False))
    figure, axes = _panels(len(models), width=4.2)
    for axis, model in zip(axes, models, strict=True):
        for baseline in BASELINES:
            rows = frame[(frame["model"] == model) & (frame["baseline"] == baseline)].sort_values("bandwidth_mbps")
            colour, name = COLOURS[baseline], METHOD_NAMES[baseline]
            stated = rows.drop_duplicates("bandwidth_mbps")
            axis.plot(
                stated["bandwidth_mbps"],
                stated["published"],
                "D--",
                mfc="none",
                color=colour,
                ms=6,
                lw=0.9,
                label=f"over {name}, published",
            )
            for link in links:
                line = rows[(rows["link"] == link) & rows["obtained"].notna()]
                axis.plot(
                    line["bandwidth_mbps"],
                    line["obtained"],
                    marker=markers[link],
                    color=colour,
                    ms=5,
                    label=f"over {name}, {link}",
                )
        axis.axhline(1, color="0.3", lw=1, ls="--")
        _bandwidth_axis(axis, frame["bandwidth_mbps"])
        axis.set_ylim(0)
        axis.set_title(MODEL_NAMES.get(model, model))
    axes[0].set_ylabel("Speedup of BP+Auto")
    figure.suptitle("DeTransformer's speedup over TP and SP on 4 devices (paper Table IV)", fontsize=10)
    _legend_below(figure, axes[0], columns=2)
    return figure


FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., Figure]]] = {
    "decoupling": (("decoupling",), decoupling),
    "pretraining_loss": (("pretraining_loss",), pretraining_loss),
    "table_iii": (("table_iii",), table_iii),
    "fig2a": (("fig2a",), fig2a),
    "placement": (("placement",), placement),
    "fig2b": (("latency",), fig2b),
    "fig7a": (("latency",), fig7a),
    "fig7b": (("latency",), fig7b),
    "fig7c": (("latency",), fig7c),
    "fig7d": (("latency",), fig7d),
    "fig8": (("latency",), fig8),
    "table_iv": (("table_iv",), table_iv),
}


# --- parts -------------------------------------------------------------------------------------------------------


def _normalised_bars(latency: pd.DataFrame, model: str, place: str) -> Figure:
    rows = normalised(valid_rows(latency))
    rows = _need(rows[rows["model"] == model], "latency", f"{model} (single and distributed)")
    parts = [select(rows, model, method) for method in METHODS]
    rows = _need(pd.concat(parts), "latency", f"{model} on {NUM_DEVICES} devices")
    links, bandwidths = links_of(rows), sorted(rows["bandwidth_mbps"].unique(), reverse=True)
    methods = [m for m in METHODS if (rows["method"] == m).any()]
    figure, axes = _panels(len(links), width=max(3.6, 1.0 * len(bandwidths)))
    step = 0.84 / len(methods)
    for axis, link in zip(axes, links, strict=True):
        for index, method in enumerate(methods):
            part = rows[(rows["link"] == link) & (rows["method"] == method)]
            values = part.groupby("bandwidth_mbps")["normalised"].median().reindex(bandwidths)
            places = np.arange(len(bandwidths)) - 0.42 + step * (index + 0.5)
            axis.bar(places, values, 0.92 * step, color=COLOURS[method], label=METHOD_NAMES[method])
        axis.axhline(1, color="0.3", lw=1, ls="--")
        axis.set_xticks(range(len(bandwidths)), [f"{b:g}" for b in bandwidths])
        axis.grid(False, axis="x")
        axis.set_xlabel("Bandwidth (Mbps)")
        axis.set_title(f"link: {link}")
    axes[0].set_ylabel("Latency / single device")
    figure.suptitle(f"{MODEL_NAMES[model]} on {NUM_DEVICES} devices, Nb = 4, Ndiv = 4 (paper {place})", fontsize=10)
    _legend_below(figure, axes[0])
    return figure


def _scaling(latency: pd.DataFrame, model: str, place: str, claims: dict[str, float]) -> Figure:
    rows = normalised(valid_rows(latency))
    at_bandwidth = dict(bandwidth_mbps=SCALING_BANDWIDTH_MBPS, num_devices=None)
    rows = pd.concat([select(rows, model, method, **at_bandwidth) for method in METHODS])
    rows = _need(rows, "latency", f"{model} at {SCALING_BANDWIDTH_MBPS} Mbps (single and distributed)")
    links = links_of(rows)
    methods = [m for m in METHODS if (rows["method"] == m).any()]
    figure, axes = _panels(len(links), width=4.0)
    for axis, link in zip(axes, links, strict=True):
        for method in methods:
            line = rows[(rows["link"] == link) & (rows["method"] == method)].groupby("num_devices")["speedup"].median()
            line = pd.concat([pd.Series({1: 1.0}), line[line.index > 1].sort_index()])
            axis.plot(line.index, line.values, "o-", ms=4, color=COLOURS[method], label=METHOD_NAMES[method])
        for method, value in claims.items():
            label = f"{METHOD_NAMES[method]}, published"
            axis.plot([NUM_DEVICES], [value], "D", ms=8, mfc="none", mew=1.4, color=COLOURS[method], label=label)
        devices = np.arange(1, NUM_DEVICES + 1)
        axis.plot(devices, devices, color="0.6", lw=0.9, ls=":", label="ideal")
        axis.set_xlabel("Devices")
        axis.set_ylim(0)
        _whole_ticks(axis, list(devices))
        axis.set_title(f"link: {link}")
    axes[0].set_ylabel("Speedup over one device")
    title = f"{MODEL_NAMES[model]} at {SCALING_BANDWIDTH_MBPS} Mbps, Nb = 4, Ndiv = 4 (paper {place})"
    figure.suptitle(title, fontsize=10)
    _legend_below(figure, axes[0])
    return figure


def _need(rows: pd.DataFrame, table: str, what: str) -> pd.DataFrame:
    if not len(rows):
        raise ValueError(f"Table {table!r} has no valid rows of {what}; run the notebook that measures them first.")
    return rows


def _grid(num_rows: int, num_columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = NotebookFigure(figsize=(max(width * num_columns, 4.2), height * num_rows + 0.7), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _panels(count: int, width: float, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    figure = NotebookFigure(figsize=(max(width * count, 4.6), 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def _legend_below(figure: Figure, axis: Axes, columns: int = 4) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _legend_beside(axis: Axes) -> None:
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _whole_ticks(axis: Axes, values: list[float]) -> None:
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()


def _bandwidth_axis(axis: Axes, bandwidths: pd.Series) -> None:
    axis.set_xscale("log", base=2)
    _whole_ticks(axis, sorted(bandwidths.dropna().unique()))
    axis.tick_params(axis="x", labelrotation=45)  # 750 and 1000 are close on a logarithmic axis
    axis.set_xlabel("Bandwidth (Mbps)")
