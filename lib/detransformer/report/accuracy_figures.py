"""Figures of accuracy and training: Table III with its spread, variants, calibration. Table in, Figure out.

A published value is hollow, an obtained one filled; error bars are standard errors over seeds unless a legend says
otherwise.
"""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from detransformer.report.accuracy import (
    FIXED,
    MLM,
    TRENDS,
    completed,
    is_original,
    mean_score,
    published_structure,
    std_errors,
)
from detransformer.report.canvas import need, panel_grid, panels, whole_ticks
from detransformer.report.tables import MODEL_NAMES

OBTAINED, PUBLISHED, MARKED = "C0", "0.35", "#d55e00"
WIRE_LOOKS = {"bfloat16": ("o", "#029e73"), "int8": ("s", "#d55e00")}
METHOD_LOOKS = {  # of a calibration: colour, line style
    "distilled": ("#0173b2", "-"),
    "plain": ("#de8f05", "-"),
    "none": ("0.35", ":"),
    "from scratch": ("#029e73", "--"),
}
LINES = ("none", "from scratch")  # a loss without a length of calibration
TEACHER = "#d55e00"


def table_iii(frame: pd.DataFrame) -> Figure:
    """Table III as trends over Nb (Ndiv=4) and Ndiv (Nb=4): each task, their mean, and perplexity of held-out text.

    Scores are differences to the original in points, so that two scales fit one axis; perplexity stands as it is.
    """
    cells = completed(frame)
    cells = need(cells[cells["obtained_mean"].notna() | cells["published"].notna()], "table_iii", "any row")
    cells = _one_model(cells)
    model = cells["model"].iloc[0]
    lines = _trend_cells(cells)
    figure, grid = panel_grid(len(TRENDS), len(lines), width=1.95, height=2.2)
    for column, (task, line) in enumerate(lines.items()):
        for row, (trend, (varies, fixed, _)) in enumerate(TRENDS.items()):
            axis = grid[row][column]
            _draw_trend(axis, line, varies, fixed)
            if trend == "Ndiv":
                axis.set_xscale("log", base=2)
            whole_ticks(axis, sorted(line.loc[line[fixed] == FIXED, varies].dropna().unique()))
            axis.margins(x=0.12)
            axis.set_xlabel(f"{trend} ({'Ndiv' if trend == 'Nb' else 'Nb'} = {FIXED})")
            if row == 0:
                metric = line["metric"].iloc[0]
                axis.set_title(task + (f"\n({metric.replace('_', ' ')})" if metric else ""))
            if column == 0:
                axis.set_ylabel("Points, minus original")
    band = (
        Line2D([], [], color=OBTAINED, ls=":", lw=1),
        Patch(color=OBTAINED, alpha=0.15, lw=0),
    )
    handles = [
        Line2D([], [], marker="D", mfc="none", color=PUBLISHED, ls="--", lw=0.9),
        Line2D([], [], marker="o", color=OBTAINED, ms=4),
        band,
    ]
    labels = ["published (one seed a cell)", "obtained, mean ± standard error over seeds", "original, obtained alike"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"Decoupled {MODEL_NAMES.get(model, model)} by structure (paper Table III)", fontsize=10)
    return figure


def table_iii_noise(frame: pd.DataFrame) -> Figure:
    """Every seed's score as a dot, one line a model row; the band is the original's mean ± standard deviation."""
    runs = published_structure(need(frame[frame["score"].notna()], "accuracy_runs", "scores"))
    runs = _one_model(runs).assign(row=lambda rows: _row_names(rows))
    names, tasks = list(dict.fromkeys(runs["row"])), list(dict.fromkeys(runs["task"]))
    figure, grid = panel_grid(1, len(tasks), width=2.3, height=0.32 * len(names) + 1.3)
    for axis, task in zip(grid[0], tasks, strict=True):
        cells = runs[runs["task"] == task]
        scores = cells.loc[is_original(cells), "score"]
        if len(scores):
            axis.axvline(scores.mean(), color=PUBLISHED, lw=1, ls=":")
        if len(scores) > 1:
            spread = scores.std(ddof=1)
            axis.axvspan(scores.mean() - spread, scores.mean() + spread, color=PUBLISHED, alpha=0.15, lw=0)
        low, high, label = cells["score"].min(), cells["score"].max(), cells["majority_score"].iloc[0]
        if task != "SQuAD" and low - label <= max(high - low, 1):  # near enough not to squeeze the dots
            axis.axvline(label, color=MARKED, lw=1, ls="--")
        for place, name in enumerate(names):
            scores = cells.loc[cells["row"] == name, "score"]
            axis.plot(scores, [place] * len(scores), "o", ms=5, color=OBTAINED, alpha=0.55, mew=0)
            axis.plot(scores.mean(), place, "|", ms=13, mew=1.8, color="0.1")
        axis.set_yticks(range(len(names)), names if axis is grid[0][0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        if np.ptp(axis.get_xlim()) < 2:  # points; seeds that all score alike
            axis.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
        axis.set_xlabel(str(cells["metric"].iloc[0]).replace("_", " ") + " (x100)")
        axis.set_title(f"{task}, {_count(cells.groupby('row')['seed'].nunique(), 'seed')}")
    handles = [
        Line2D([], [], marker="o", ls="none", color=OBTAINED, alpha=0.55, mew=0, ms=5),
        Line2D([], [], marker="|", ls="none", color="0.1", ms=11, mew=1.8),
        (Line2D([], [], color=PUBLISHED, ls=":", lw=1), Patch(color=PUBLISHED, alpha=0.15, lw=0)),
        Line2D([], [], color=MARKED, ls="--", lw=1),
    ]
    labels = [
        "one seed",
        "mean of seeds",
        "original: mean ± standard deviation of a seed",
        "most frequent label (where near)",
    ]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("What one seed says: the same pre-trained model, fine-tuned again", fontsize=10)
    return figure


def calibration(frame: pd.DataFrame) -> Figure:
    """Held-out loss of a decoupled model over the tokens it was calibrated on, with the teacher's and from scratch."""
    rows = need(frame[frame["valid_loss"].notna()], "calibration", "valid_loss")
    names = list(dict.fromkeys(rows["row"]))
    figure, axes = panels(len(names), width=4.4)
    for axis, name in zip(axes, names, strict=True):
        part = rows[rows["row"] == name]
        calibrated = (part["tokens"] > 0) & ~part["method"].isin(LINES)
        starts = list(dict.fromkeys(part.loc[calibrated, "start"].astype(str)))
        for (method, start), line in part.groupby(["method", part["start"].astype(str)], sort=False):
            colour, style = METHOD_LOOKS.get(method, ("C4", "-"))
            trained = line[line["tokens"] > 0].sort_values("tokens")
            label = _method_label(method, start, trained, len(starts) > 1)
            if method in LINES or not len(trained):
                axis.axhline(line["valid_loss"].min(), color=colour, ls=style, lw=1.3, label=label)
                axis.plot(trained["tokens"], trained["valid_loss"], "D", color=colour, ms=5)
            else:
                marker = "os^v"[starts.index(start) % 4]
                axis.plot(
                    trained["tokens"], trained["valid_loss"], style, marker=marker, ms=5, color=colour, label=label
                )
        teacher = part["teacher_valid_loss"].dropna()
        if len(teacher):
            axis.axhline(teacher.iloc[0], color=TEACHER, ls="-.", lw=1.3, label="original (teacher)")
        axis.set_xscale("log")
        axis.set(xlabel="Tokens of calibration", title=str(name))
        if axis is axes[0]:
            axis.set_ylabel("Held-out loss (nats a masked token)")
    handles, labels = [], []
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2 * len(names), len(labels)))
    figure.suptitle("Decoupling a trained model, then training it on", fontsize=10)
    return figure


def placements(frame: pd.DataFrame) -> Figure:
    """Held-out loss by where the original layers stand, with the difference to "last", as published."""
    rows = need(frame[frame["valid_loss"].notna()], "placements", "valid_loss")
    keys = ["model", "num_original_layers", "num_divisions", "attention_width"]
    groups = list(rows.groupby(keys, sort=False))
    figure, axes = panels(len(groups), width=3.4)
    for axis, ((model, nb, ndiv, width), group) in zip(axes, groups, strict=True):
        places = range(len(group))
        spread = group["valid_loss_std"] / group["num_seeds"] ** 0.5
        colours = [PUBLISHED if kind == "last" else OBTAINED for kind in group["original_placement"]]
        for place, row, colour, error in zip(places, group.itertuples(), colours, spread.fillna(0), strict=True):
            axis.errorbar(place, row.valid_loss, yerr=error, fmt="o", color=colour, ms=6, capsize=3)
            words = "" if row.original_placement == "last" or pd.isna(row.difference) else f"{row.difference:+.3f}"
            axis.annotate(words, (place, row.valid_loss), (7, 0), textcoords="offset points", va="center", fontsize=8)
        last = group.loc[group["original_placement"] == "last", "valid_loss"]
        if len(last):
            axis.axhline(last.iloc[0], color=PUBLISHED, lw=1, ls=":")
        axis.set_xticks(places, group["original_placement"])
        axis.set_xlim(-0.5, len(group) - 0.2)
        axis.margins(y=0.2)
        narrow = "" if width == "full" else f", {width}"
        axis.set_title(
            f"{MODEL_NAMES.get(model, model)} Nb={nb:g}, Ndiv={ndiv:g}{narrow}\n{_count(group['num_seeds'], 'seed')}"
        )
    axes[0].set_ylabel("Held-out loss (nats a masked token)")
    figure.supxlabel("Where the original layers stand", fontsize=9)
    figure.suptitle("Same Nb and Ndiv, other places; grey: as published", fontsize=10)
    return figure


def wire_accuracy(frame: pd.DataFrame) -> Figure:
    """Change of a trained model's score by the number format on the wire, in points, with the band that is allowed."""
    rows = need(frame[frame["change"].notna()], "wire_accuracy", "change")
    names, formats = list(dict.fromkeys(rows["row"])), list(dict.fromkeys(rows["wire"]))
    tasks = list(dict.fromkeys(rows["task"]))
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure, grid = panel_grid(lines, columns, width=3.4, height=2.4)
    for axis in grid.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(grid.flat, names, strict=False):
        limit = rows["limit"].iloc[0]
        axis.axhspan(-limit, limit, color="0.35", alpha=0.12, lw=0)
        axis.axhline(0, color="0.35", lw=1, ls=":")
        for index, wire in enumerate(formats):
            marker, colour = WIRE_LOOKS.get(wire, ("^", "C4"))
            part = rows[(rows["row"] == name) & (rows["wire"] == wire)]
            places = [tasks.index(task) + 0.24 * (index - (len(formats) - 1) / 2) for task in part["task"]]
            error = part["change_std_error"].fillna(0)
            axis.errorbar(places, part["change"], yerr=error, fmt=marker, color=colour, ms=5, capsize=2, label=wire)
            for place, largest in zip(places, part["largest_change"], strict=True):
                axis.plot([place, place], [-largest, largest], "_", color=colour, ms=7, alpha=0.5)
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_title(str(name))
    for line in grid:
        line[0].set_ylabel("Points, minus exact")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    handles += [Line2D([], [], marker="_", ls="none", color="0.35"), Patch(color="0.35", alpha=0.12, lw=0)]
    labels += ["± largest change of a seed", f"± {rows['limit'].iloc[0]:g} points"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("Score with other number formats on the wire (mean ± standard error over seeds)", fontsize=10)
    return figure


def _one_model(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of BERT-Base, or of the first model where there is none."""
    model = "bert-base" if (rows["model"] == "bert-base").any() else rows["model"].iloc[0]
    return rows[rows["model"] == model]


def _trend_cells(cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By task, then `mean`, then MLM: shown and published values, error, and the original's error around `level`."""
    keys = ["num_original_layers", "num_divisions", "metric"]
    lines = {}
    for task, line in cells.groupby("task", sort=False):
        line = line.assign(error=std_errors(line))
        base = line[is_original(line)]
        shown = "obtained_mean" if task == MLM else "obtained_difference"
        level = base["obtained_mean"].mean() if task == MLM else 0.0
        made = line[keys].assign(shown=line[shown], published=line["published_difference"], error=line["error"])
        lines[task] = made.assign(level=level if len(base) else float("nan"), level_error=base["error"].mean())
    means = mean_score(cells)
    means = means[means["over"] == "all"]
    base = means[means["num_original_layers"].isna()]
    made = means.assign(metric="points", error=means["obtained_std_error"])[[*keys, "error"]]
    made = made.assign(
        shown=means["obtained"] * (1 - 100 / means["obtained_share"]),
        published=means["published"] * (1 - 100 / means["published_share"]),
        level=0.0,
        level_error=base["obtained_std_error"].mean(),
    )
    text = lines.pop(MLM, None)
    lines["Mean"] = made
    return lines | ({MLM: text} if text is not None and text["shown"].notna().any() else {})


def _draw_trend(axis: Axes, line: pd.DataFrame, varies: str, fixed: str) -> None:
    level, error = line["level"].iloc[0], line["level_error"].iloc[0]
    if pd.notna(level):
        axis.axhline(level, color=OBTAINED, lw=1, ls=":")
    if pd.notna(error):
        axis.axhspan(level - error, level + error, color=OBTAINED, alpha=0.15, lw=0)
    points = line[(line[fixed] == FIXED) & line[varies].notna()].sort_values(varies)
    place = points[varies].astype(float)
    if points["published"].notna().any():
        axis.plot(place, points["published"].astype(float), "D--", mfc="none", color=PUBLISHED, ms=5, lw=0.9)
    measured = points["shown"].notna()
    axis.errorbar(
        place[measured],
        points.loc[measured, "shown"].astype(float),
        yerr=points.loc[measured, "error"].fillna(0),
        fmt="o-",
        color=OBTAINED,
        ms=4,
        capsize=2,
    )


def _row_names(rows: pd.DataFrame) -> list[str]:
    return [
        "original"
        if pd.isna(row.num_original_layers)
        else f"Nb={row.num_original_layers:g}, Ndiv={row.num_divisions:g}"
        for row in rows.itertuples()
    ]


def _method_label(method: str, start: str, trained: pd.DataFrame, several: bool) -> str:
    if method == "none":
        return f"not trained on ({start})"
    if method == "from scratch":
        tokens = f", {trained['tokens'].max():,.0f} tokens" if len(trained) else ""
        return f"from scratch{tokens}"
    return f"{method} from {start}" if several else method


def _count(counts: pd.Series, noun: str) -> str:
    """`3 seeds`, or `2 to 5 seeds` where rows differ."""
    low, high = int(counts.min()), int(counts.max())
    words = str(high) if low == high else f"{low} to {high}"
    return f"{words} {noun}{'' if high == 1 else 's'}"
