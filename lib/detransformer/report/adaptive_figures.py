"""The figures of adaptive execution (TPDS 2025): plans by conditions, unequal devices, a link that changes, generation.

Each function takes saved tables and returns a Figure; `report.figures` names and saves them. A predicted value is named
so in the figure's title or legend.
"""

import re
from collections import Counter

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from detransformer.report.canvas import (
    COLOURS,
    bandwidth_axis,
    legend_below,
    need,
    panel_grid,
    panels,
    whole_ticks,
)
from detransformer.report.tables import METHOD_NAMES, MODEL_NAMES, checked_rows

NEAR = 0.1  # a prediction within 10% counts as near


ORIGINAL_LAYERS = ("tensor", "heads", "ulysses", "sequence", "galaxy", "replicate", "one device")


def in_short(plan: str) -> tuple[str, int]:
    """(strategy of most original layers, or `one device`; chunks) of a plan in words."""
    if plan.endswith("on 1 device"):
        return "one device", 1
    names = Counter(word for word in re.findall(r"[a-z]+", plan) if word in ORIGINAL_LAYERS)
    chunks = re.search(r"(\d+) chunks", plan)
    return names.most_common(1)[0][0], int(chunks[1]) if chunks else 1


def plan_map(frame: pd.DataFrame) -> Figure:
    """The chosen plan over bandwidth and length, a panel a number of devices: strategy, chunks, predicted seconds."""
    rows = need(frame[frame["predicted_s"].notna()], "plan_map", "predicted plans")
    rows = rows.assign(strategy=[in_short(plan)[0] for plan in rows["plan"]])
    rows["chunks"] = [in_short(plan)[1] for plan in rows["plan"]]
    counts, models = sorted(rows["num_devices"].unique()), list(dict.fromkeys(rows["model"]))
    colours = [*sns.color_palette("colorblind", len(ORIGINAL_LAYERS) - 1), (0.75, 0.75, 0.75)]
    pale = ListedColormap([tuple(0.5 + 0.5 * part for part in colour) for colour in colours])
    figure, axes = panel_grid(len(models), len(counts), width=4.0, height=0.9 + 0.36 * rows["seq_len"].nunique())
    for (i, model), (j, count) in ((a, b) for a in enumerate(models) for b in enumerate(counts)):
        axis = axes[i][j]
        part = rows[(rows["model"] == model) & (rows["num_devices"] == count)]
        codes = part.assign(code=[ORIGINAL_LAYERS.index(name) for name in part["strategy"]])
        grids = {
            name: codes.pivot(index="seq_len", columns="bandwidth_mbps", values=name)
            for name in ("code", "predicted_s", "chunks")
        }
        axis.imshow(grids["code"], cmap=pale, vmin=-0.5, vmax=len(ORIGINAL_LAYERS) - 0.5, aspect="auto", origin="lower")
        for y, x in np.ndindex(*grids["code"].shape):
            seconds, chunks = grids["predicted_s"].iat[y, x], grids["chunks"].iat[y, x]
            text = f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3f}"
            axis.text(x, y, f"{text} /{chunks:g}" if chunks > 1 else text, ha="center", va="center", fontsize=7)
        grid = grids["code"]
        axis.set_xticks(range(len(grid.columns)), [f"{value:g}" for value in grid.columns])
        axis.set_yticks(range(len(grid.index)), [f"{value:g}" for value in grid.index])
        axis.grid(False)
        axis.set_title(f"{MODEL_NAMES.get(model, model)}, {count:g} devices", fontsize=9)
        if j == 0:
            axis.set_ylabel("Tokens")
        if i == len(models) - 1:
            axis.set_xlabel("Bandwidth (Mbps)")
    figure.suptitle("How most original layers are run, and seconds / chunks (all predicted)", fontsize=10)
    seen = [name for name in ORIGINAL_LAYERS if (rows["strategy"] == name).any()]
    handles = [Patch(color=pale(ORIGINAL_LAYERS.index(name)), label=name) for name in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def predicted(frame: pd.DataFrame) -> Figure:
    """Predicted against measured latency of every plan of the grid; filled marks are the chosen ones."""
    rows = need(checked_rows(frame), "choices", "measured plans")
    models = list(dict.fromkeys(rows["model"]))
    figure, axes = panels(len(models), width=4.4, sharey=False)
    for axis, model in zip(axes, models, strict=True):
        part = rows[rows["model"] == model]
        low, high = 0.8 * part["latency_s"].min(), 1.25 * part["latency_s"].max()
        line = np.array([low, high])
        axis.fill_between(line, (1 - NEAR) * line, (1 + NEAR) * line, color="0.9", label=f"within {NEAR:.0%}")
        axis.plot(line, line, color="0.5", lw=0.9, ls=":")
        for colour, (count, here) in zip(sns.color_palette("colorblind", 8), part.groupby("num_devices"), strict=False):
            chosen = here["chosen"].astype(str) == "True"
            for mark, which in ((dict(mfc="none"), ~chosen), (dict(), chosen)):
                label = f"{count:g} devices" if not mark else None
                axis.plot(
                    here.loc[which, "latency_s"], here.loc[which, "predicted_s"], "o", ms=4, color=colour, label=label,
                    **mark,
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="Measured latency (s)")
        ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5) if low <= tick <= high]
        whole_ticks(axis, ticks)
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        error = (part["predicted_s"] / part["latency_s"] - 1).abs()
        axis.set_title(f"{MODEL_NAMES.get(model, model)}: median error {error.median():.1%} of {len(part)} rows")
    axes[0].set_ylabel("Predicted latency (s)")
    figure.suptitle("Cost model against measurement; filled: the chosen plan, hollow: its rivals", fontsize=10)
    legend_below(figure, axes[0])
    return figure


def unequal(frame: pd.DataFrame) -> Figure:
    """Unequal devices: the planned split against even ones, and what no split can beat."""
    rows = need(checked_rows(frame), "unequal", "measured splits")
    figure, axes = panels(1, width=6.4)
    axis = axes[0]
    splits, rates = list(dict.fromkeys(rows["split"])), sorted(rows["bandwidth_mbps"].unique(), reverse=True)
    colours = dict(zip(splits, [COLOURS["bp+auto"], COLOURS["sp"], COLOURS["tp"]], strict=False))
    step = 0.84 / len(splits)
    for i, split in enumerate(splits):
        part = rows[rows["split"] == split].set_index("bandwidth_mbps").reindex(rates)
        places = np.arange(len(rates)) - 0.42 + step * (i + 0.5)
        bars = axis.bar(places, part["latency_s"], 0.92 * step, color=colours[split], label=split)
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axis.axhline(rows["ideal_s"].iloc[0], color="0.2", lw=1.6, ls=(0, (1, 1)), label="work / summed speed")
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.grid(False, axis="x")
    axis.set(xlabel="Bandwidth (Mbps)", ylabel="Latency (s)")
    model = rows["model"].iloc[0]
    axis.set_title(f"{MODEL_NAMES.get(model, model)} on devices of speed {rows['speeds'].iloc[0]}")
    legend_below(figure, axis, columns=2)
    return figure


def trace(frame: pd.DataFrame) -> Figure:
    """Requests while the link drops and recovers: what each policy had spent by then, and the plan in use."""
    rows = need(frame, "trace", "requests")
    policies = list(dict.fromkeys(rows["policy"]))
    figure, axes = panel_grid(3, 1, width=7.6, height=2.1)
    total, plans, link = axes[:, 0]
    palette = sns.color_palette("colorblind", 10)
    for i, policy in enumerate(policies):
        part = rows[rows["policy"] == policy].sort_values("request")
        look = dict(color=COLOURS["bp+auto"], lw=2.2) if policy == "adaptive" else dict(color=palette[i], lw=1.2)
        spent = part["latency_s"].cumsum()
        total.plot(part["request"], spent, label=f"{policy}: {spent.iloc[-1]:.1f} s", **look)
    own = rows[rows["policy"] == "adaptive"].sort_values("request")
    names = list(dict.fromkeys(own["plan"]))
    lengths = sorted(own["seq_len"].unique())
    for i, length in enumerate(lengths):
        here = own[own["seq_len"] == length]
        label, colour = f"{length:g} tokens", sns.color_palette("viridis", len(lengths))[i]
        plans.plot(here["request"], [names.index(plan) for plan in here["plan"]], "o", ms=4, color=colour, label=label)
    plans.set_yticks(range(len(names)), [name.replace(" on ", "\non ") for name in names], fontsize=8)
    plans.set_ylim(-0.5, len(names) - 0.5)
    plans.legend(loc="center right")
    link.step(own["request"], own["bandwidth_mbps"], where="post", color="0.2", lw=1.4, label="link")
    link.plot(own["request"], own["estimate_mbps"], color=COLOURS["tp"], lw=1.2, label="estimate, before the request")
    rates = sorted(own["bandwidth_mbps"].unique())
    link.set(yscale="log", ylabel="Mbps", xlabel="Request")
    link.minorticks_off()
    link.set_yticks(rates, [f"{rate:g}" for rate in rates])
    link.legend(loc="lower right")
    total.set_ylabel("Seconds spent")
    total.legend(loc="upper left")
    plans.set_ylabel("Plan in use")
    first = rows.iloc[0]
    devices = f"{first['num_devices']:g} x {first['device']}"
    name = MODEL_NAMES.get(first["model"], first["model"])
    figure.suptitle(f"{name} on {devices}: mixed requests while the link changes", fontsize=10)
    return figure


def generation(frame: pd.DataFrame) -> Figure:
    """Seconds to the first token and of each further one, by method and bandwidth; rings are predictions."""
    rows = need(checked_rows(frame), "generation", "texts")
    methods, rates = list(dict.fromkeys(rows["method"])), sorted(rows["bandwidth_mbps"].unique(), reverse=True)
    figure, axes = panels(2, width=4.4, sharey=False)
    step = 0.84 / len(methods)
    for axis, column, title in (
        (axes[0], "first_token_s", "First token (prompt)"),
        (axes[1], "token_s", "Each further token"),
    ):
        for i, method in enumerate(methods):
            part = rows[rows["method"] == method].groupby("bandwidth_mbps")[[column, f"predicted_{column}"]].median()
            # one device uses no link: the same at every rate
            part = part.reindex(rates) if method != "single" else part.reindex(rates, method="nearest")
            places = np.arange(len(rates)) - 0.42 + step * (i + 0.5)
            look = dict(color=COLOURS.get(method, "0.5"), label=METHOD_NAMES.get(method, method))
            bars = axis.bar(places, 1e3 * part[column], 0.92 * step, **look)
            axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
            axis.plot(places, 1e3 * part[f"predicted_{column}"], "o", ms=6, mfc="none", mec="0.2")
        axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axis.grid(False, axis="x")
        axis.set(title=title, xlabel="Bandwidth (Mbps)")
    axes[0].set_ylabel("Milliseconds")
    first = rows.iloc[0]
    name = MODEL_NAMES.get(first["model"], first["model"])
    figure.suptitle(f"{name}: greedy text on {rows['num_devices'].max():g} devices; rings: predicted", fontsize=10)
    legend_below(figure, axes[0])
    return figure


def perplexity(frame: pd.DataFrame) -> Figure:
    """Perplexity of a small GPT-2 over Nb and over Ndiv, on held-out text; the dotted line is the original's."""
    rows = need(frame[frame["perplexity"].notna()], "perplexity", "trained models").copy()
    rows["nb"] = pd.to_numeric(rows["num_original_layers"], errors="coerce")
    rows["ndiv"] = pd.to_numeric(rows["num_divisions"], errors="coerce")
    original = rows[rows["ndiv"].isna()]
    figure, axes = panels(2, width=3.6)
    for axis, (key, fixed, title) in zip(
        axes, [("nb", "ndiv", "Nb (Ndiv = 4)"), ("ndiv", "nb", "Ndiv (Nb = 4)")], strict=True
    ):
        line = rows[rows[fixed] == 4].groupby(key)["perplexity"].mean()
        axis.plot(line.index, line.values, "o-", color=COLOURS["bp+auto"], label="decoupled")
        if len(original):
            axis.axhline(original["perplexity"].mean(), color="0.3", ls=":", label="original")
        if len(line):
            whole_ticks(axis, sorted(line.index))
        axis.set_xlabel(title)
    axes[0].set_ylabel("Perplexity (lower is better)")
    figure.suptitle("A small GPT-2 trained alike, original and decoupled", fontsize=10)
    legend_below(figure, axes[0])
    return figure


def scale_out(frame: pd.DataFrame) -> Figure:
    """Predicted speedup over one device, past what this machine can emulate."""
    rows = need(frame[frame["speedup"].notna()], "scale_out", "predictions")
    models = list(dict.fromkeys(rows["model"]))
    figure, axes = panels(len(models), width=3.4)
    lengths = sorted(rows["seq_len"].unique())
    colours = dict(zip(lengths, sns.color_palette("viridis", len(lengths)), strict=True))
    for axis, model in zip(axes, models, strict=True):
        part = rows[rows["model"] == model]
        keys = part[["seq_len", "bandwidth_mbps"]].drop_duplicates().sort_values(["bandwidth_mbps", "seq_len"])
        for length, rate in keys.itertuples(index=False):
            line = part[(part["seq_len"] == length) & (part["bandwidth_mbps"] == rate)].sort_values("num_devices")
            style = "-" if rate == part["bandwidth_mbps"].max() else ":"
            label = f"{length:g} tokens, {rate:g} Mbps"
            axis.plot(line["num_devices"], line["speedup"], style, marker="o", ms=3, color=colours[length], label=label)
        counts = sorted(part["num_devices"].unique())
        axis.plot(counts, counts, color="0.6", lw=0.9, ls="--", label="ideal")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        whole_ticks(axis, counts)
        axis.set_yticks(counts, [f"{count:g}" for count in counts])
        axis.set(xlabel="Devices", title=MODEL_NAMES.get(model, model))
    axes[0].set_ylabel("Speedup over one device")
    figure.suptitle("Past this machine: predicted by the cost model, not measured", fontsize=10)
    legend_below(figure, max(axes, key=lambda axis: len(axis.lines)), columns=4)
    return figure


def choices_by_bandwidth(frame: pd.DataFrame) -> Figure:
    """How far the chosen plan lies above the best measured one, in each cell of the grid."""
    rows = need(frame, "choice_cells", "cells")
    models = list(dict.fromkeys(rows["model"]))
    figure, axes = panels(len(models), width=4.2)
    for axis, model in zip(axes, models, strict=True):
        part = rows[rows["model"] == model]
        for colour, (count, here) in zip(sns.color_palette("colorblind", 8), part.groupby("num_devices"), strict=False):
            jitter = 1 + 0.03 * (here["seq_len"].rank(method="dense") - 2)
            axis.plot(
                here["bandwidth_mbps"] * jitter, 100 * (here["over_best"] - 1), "o", ms=5, color=colour,
                label=f"{count:g} devices",
            )  # fmt: skip
        axis.axhline(3, color="0.3", lw=1, ls="--", label="3%")
        bandwidth_axis(axis, part["bandwidth_mbps"])
        axis.set_title(MODEL_NAMES.get(model, model))
    axes[0].set_ylabel("Chosen over best measured (%)")
    figure.suptitle("What the choice costs against the best of the measured plans", fontsize=10)
    legend_below(figure, axes[0])
    return figure
