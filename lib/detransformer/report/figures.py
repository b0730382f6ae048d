"""The papers' figures, drawn from a run's saved tables only: table in, Figure out.

`FIGURES` names each figure with the tables it needs and the function that draws it, most of them in modules beside this
one. A published value is hollow or hatched beside the obtained one. Drawing computes nothing but what the axes name.
"""

from collections.abc import Callable

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from detransformer.files import atomic_write
from detransformer.record.run import RunFolder
from detransformer.report import (
    accuracy_figures,
    adaptive_figures,
    coformer_figures,
    coformer_search,
    latency_figures,
    service_figures,
)
from detransformer.report.canvas import (
    COLOURS,
    STYLE,
    bandwidth_axis,
    legend_below,
    legend_beside,
    need,
    panels,
    whole_ticks,
)
from detransformer.report.tables import METHOD_NAMES, MODEL_NAMES, NUM_DEVICES

SMOOTHED = 5  # points that a difference of losses is averaged over


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
    rows = need(frame[frame["layer_flops_ratio"].notna() & (frame["num_divisions"] > 1)], "decoupling", "Ndiv > 1")
    model = rows["model"].iloc[0]
    rows = rows[rows["model"] == model]
    figure, axes = panels(1, width=5.2)
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
    whole_ticks(axis, sorted(rows["num_divisions"].unique()))
    axis.set(xlabel="Ndiv (sub-blocks a layer)", ylabel="FLOPs, decoupled / original layer")
    axis.set_ylim(0)
    figure.suptitle(f"Cost of a decoupled {MODEL_NAMES.get(model, model)} layer (paper Fig. 4, Eq. 2)", fontsize=10)
    legend_beside(axis)
    return figure


# --- 02 training -------------------------------------------------------------------------------------------------


def pretraining_loss(frame: pd.DataFrame) -> Figure:
    """Masked-language-model loss of original and decoupled models over the same tokens (Section IV-B)."""
    rows = need(frame[frame["train_loss"].notna()], "pretraining_loss", "train_loss")
    names = list(dict.fromkeys(rows["row"]))
    wide = rows.pivot_table(index="step", columns="row", values="train_loss")[names]
    first = names[0]
    figure, (left, right) = panels(2, width=4.4, sharey=False)
    for colour, name in zip(sns.color_palette("colorblind", len(names)), names, strict=True):
        left.plot(wide.index, wide[name], color=colour, lw=1.2, label=str(name))
        if name != first:
            apart = (wide[name] - wide[first]).rolling(SMOOTHED, min_periods=1).mean()
            right.plot(wide.index, apart, color=colour, lw=1.4)
    left.set(xlabel="Optimiser step", ylabel="Training loss (nats a masked token)")
    left.set_title("Loss")
    right.axhline(0, color="0.3", lw=1, ls=":")
    right.set(xlabel="Optimiser step", ylabel=f"Difference (nats, mean of {SMOOTHED} points)")
    right.set_title(f"Loss less that of {first}")
    legend_below(figure, left, columns=3)
    figure.suptitle("Pre-training, original and decoupled (paper Section IV-B)")
    return figure


# --- 04, 05 profile and placement --------------------------------------------------------------------------------


def fig2a(frame: pd.DataFrame) -> Figure:
    """Single-device latency of BERT-Base and BERT-Large: published (hatched) beside measured."""
    frame = need(frame[frame["latency_s"].notna()], "fig2a", "latency_s")
    figure, axes = panels(1, width=5.2)
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
    legend_below(figure, axis, columns=1)
    return figure


def placement(frame: pd.DataFrame) -> Figure:
    """Predicted latency of each plan by bandwidth; a ring marks the plan that BP+Auto chooses (Section III-C)."""
    rows = need(frame[frame["predicted_s"].notna()], "placement", "predicted_s")
    num_devices = NUM_DEVICES if (rows["num_devices"] == NUM_DEVICES).any() else rows["num_devices"].max()
    rows = rows[rows["num_devices"] == num_devices]
    models = list(dict.fromkeys(rows["model"]))
    figure, axes = panels(len(models), width=4.2, sharey=False)
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
        bandwidth_axis(axis, part["bandwidth_mbps"])
        axis.set_ylim(0)
        axis.set_title(MODEL_NAMES.get(model, model))
    axes[0].set_ylabel("Predicted latency (s)")
    figure.suptitle(f"Plans by bandwidth on {num_devices:g} devices (paper Section III-C)", fontsize=10)
    legend_below(figure, axes[0])
    return figure


FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., Figure]]] = {
    "decoupling": (("decoupling",), decoupling),
    "pretraining_loss": (("pretraining_loss",), pretraining_loss),
    "table_iii": (("table_iii",), accuracy_figures.table_iii),
    "table_iii_noise": (("accuracy_runs",), accuracy_figures.table_iii_noise),
    "calibration": (("calibration",), accuracy_figures.calibration),
    "placements": (("placements",), accuracy_figures.placements),
    "wire_accuracy": (("wire_accuracy",), accuracy_figures.wire_accuracy),
    "fig2a": (("fig2a",), fig2a),
    "placement": (("placement",), placement),
    "fig2b": (("latency",), latency_figures.fig2b),
    "fig7a": (("latency",), latency_figures.fig7a),
    "fig7b": (("latency",), latency_figures.fig7b),
    "fig7c": (("latency",), latency_figures.fig7c),
    "fig7d": (("latency",), latency_figures.fig7d),
    "fig8": (("latency",), latency_figures.fig8),
    "table_iv": (("table_iv",), latency_figures.table_iv),
    "bandwidth": (("latency",), latency_figures.bandwidth),
    "parts": (("latency",), latency_figures.parts),
    "timeline": (("timeline",), latency_figures.timeline),
    "wire": (("latency",), latency_figures.wire),
    "plan_map": (("plan_map",), adaptive_figures.plan_map),
    "choices": (("choice_cells",), adaptive_figures.choices_by_bandwidth),
    "predicted": (("choices",), adaptive_figures.predicted),
    "unequal": (("unequal",), adaptive_figures.unequal),
    "trace": (("trace",), adaptive_figures.trace),
    "generation": (("generation",), adaptive_figures.generation),
    "perplexity": (("perplexity",), adaptive_figures.perplexity),
    "scale_out": (("scale_out",), adaptive_figures.scale_out),
    "coformer_aggregators": (("coformer_ablation", "coformer_aggregators"), coformer_figures.aggregators),
    "coformer_devices": (("coformer_devices",), coformer_figures.devices),
    "coformer_tradeoff": (("coformer_latency",), coformer_figures.tradeoff),
    "coformer_bandwidth": (("coformer_latency",), coformer_figures.bandwidth),
    "coformer_energy": (("coformer_latency",), coformer_figures.energy),
    "predictor": (("predictor_points",), coformer_search.predictor),
    "proxy": (("proxy_points", "proxy"), coformer_search.proxy),
    "search": (("search_history",), coformer_search.search),
    "policies": (("policies",), coformer_search.policies),
    "faults": (("chaos_rounds",), service_figures.faults),
    "soak": (("soak_samples",), service_figures.soak),
    "coverage": (("coverage",), service_figures.coverage),
}
