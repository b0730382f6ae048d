"""Table III and its noise: scores over seeds, differences to the original model, means over tasks, and trends.

Pure functions of the rows of fine-tuning runs (table `accuracy_runs`) and of pre-trained models (table `pretraining`).
The same seed means the same data order and the same initial head weights, so seeds of two models are paired. "Beyond
noise" means everywhere: further from zero than two standard errors over the seeds. With two seeds chance alone passes
this in three cases of ten (by Student's t), and of 45 differences some always pass.
"""

import math

import numpy as np
import pandas as pd

from detransformer.record.intervals import NUM_ERRORS, around
from detransformer.record.verdict import Verdict

ROW_COLUMNS = ["model", "num_original_layers", "num_divisions"]
COLUMNS = [*ROW_COLUMNS, "task", "published", "published_difference", "obtained_mean", "obtained_std"]
COLUMNS += ["obtained_difference", "num_seeds", "difference_std_error", "beyond_noise", "valid_loss"]
COLUMNS += ["majority_score", "train_rows", "eval_rows", "source", "status", "metric"]
PUBLISHED_STRUCTURE = {"attention_width": "full", "original_placement": "last"}
# Table III's tasks in its order, and what they are scored by.
METRICS = {"CoLA": "mcc", "SST-2": "accuracy", "MRPC": "accuracy", "MNLI": "accuracy", "SQuAD": "exact_match"}
MLM = "MLM"  # the sixth column, ours: perplexity of held-out text, lower is better
MARGINS = {"exact_match": 10.0, "f1": 10.0}  # metric -> least points above guessing that count as learned
MARGIN = 1.0  # the same, for other metrics
KEPT_PERCENT = 98.0  # of the original's mean score: "comparable accuracy"
FIXED = 4  # Nb of the trend over Ndiv, and Ndiv of the trend over Nb (Section IV-B)
TRENDS = {  # name -> (varying column, fixed column, one step)
    "Nb": ("num_original_layers", "num_divisions", "original layer"),
    "Ndiv": ("num_divisions", "num_original_layers", "doubling of Ndiv"),
}


# --- Rows --------------------------------------------------------------------------------------------------------


def structure_names(rows: pd.DataFrame) -> list[str]:
    """A name for each row's structure: `original`, `Nb=4, Ndiv=4`, or with its variant, `Nb=4, Ndiv=4, narrow`."""
    names = []
    for row in rows.to_dict("records"):
        variant = [row[name] for name, value in PUBLISHED_STRUCTURE.items() if row.get(name, value) != value]
        is_decoupled = not pd.isna(row["num_divisions"])
        name = f"Nb={row['num_original_layers']:g}, Ndiv={row['num_divisions']:g}" if is_decoupled else "original"
        names.append(", ".join([name, *variant]))
    return names


def published_structure(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the published structure, not a variant of it."""
    return rows[(rows[list(PUBLISHED_STRUCTURE)] == pd.Series(PUBLISHED_STRUCTURE)).all(axis=1)]


def is_original(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of the unmodified model: those without a number of original layers."""
    return rows["num_original_layers"].isna()


def learned(rows: pd.DataFrame) -> pd.Series:
    """Whether each row's score is above that of guessing the most frequent label or, for questions, no answer.

    It must be above by a margin (`MARGINS`; a few exact answers among a thousand questions are luck) and by two
    standard errors from the size n of the validation set: 1/sqrt(n) for a Matthews correlation of zero,
    sqrt(p (1 - p) / n) for a share p.
    """
    scores = rows["score"] if "score" in rows else rows["obtained_mean"]
    share = rows["majority_score"].astype(float) / 100
    variance = (share * (1 - share)).where(rows["metric"] != "mcc", 1.0)
    error = 100 * np.sqrt(variance / rows["eval_rows"].astype(float))
    margin = rows["metric"].map(MARGINS).fillna(MARGIN)
    above = (NUM_ERRORS * error).fillna(0).clip(lower=margin)
    return scores.astype(float) > rows["majority_score"].astype(float) + above


def compared(ours: pd.Series, originals: pd.Series) -> dict[str, float]:
    """Mean and standard deviation of scores by seed, number of seeds, difference to the original's mean, and its error.

    The error is that of the differences of common seeds, NaN for a single one; without `originals` both are NaN.
    """
    return {
        "mean": ours.mean(),
        "std": ours.std(),
        "num_seeds": len(ours),
        "difference": ours.mean() - originals.mean(),
        "difference_std_error": (ours - originals).sem(),
    }


# --- Table III ---------------------------------------------------------------------------------------------------


def table_iii(
    runs: pd.DataFrame, published: pd.DataFrame, profile: str = "", pretraining: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Table III, one row per published cell: obtained mean and standard deviation over seeds, or why there is none.

    Also each cell's difference to its model's original: published; obtained; its standard error, from the differences
    by seed; and whether it is beyond noise (empty for one seed). With `pretraining` each model gets a sixth cell, task
    MLM: perplexity (lower is better) and loss on held-out text. Rows of other structures than the published one are
    left out.

    Args:
        runs: one row per fine-tuning run (`training.accuracy_table`).
        published: the paper's table (data/published/table_iii.csv).
        profile: named in the status of cells that were not run.
        pretraining: one row per pre-trained model (`training.pretraining_table`).
    """
    scored, keys, by_seed = _scores(runs, pretraining), [*ROW_COLUMNS, "task"], ["model", "task", "seed"]
    originals = scored.loc[is_original(scored), [*by_seed, "score"]].rename(columns={"score": "base"})
    scored = scored.merge(originals, "left", on=by_seed)
    scored["apart"] = (scored["score"] - scored["base"]).mask(is_original(scored))
    found = scored.groupby(keys, dropna=False, as_index=False).agg(
        obtained_mean=("score", "mean"),
        obtained_std=("score", "std"),
        num_seeds=("score", "size"),
        difference_std_error=("apart", "sem"),
        valid_loss=("valid_loss", "mean"),
        **{name: (name, "first") for name in ("majority_score", "train_rows", "eval_rows", "source")},
    )
    tasks = [*METRICS, *([] if pretraining is None else [MLM])]
    table = published_cells(published, tasks).merge(found, "left", on=keys)
    base = table[["model", "task"]].merge(table[is_original(table)], "left", on=["model", "task"])
    for name, value in (("published_difference", "published"), ("obtained_difference", "obtained_mean")):
        table[name] = (table[value] - base[value]).mask(is_original(table))
    error = table["difference_std_error"]
    table["beyond_noise"] = (table["obtained_difference"].abs() > NUM_ERRORS * error).mask(error.isna())
    table["num_seeds"] = table["num_seeds"].fillna(0).astype(int)
    not_run = f"not run (profile {profile})" if profile else "not run"
    table["status"] = np.where(table["num_seeds"] > 0, "measured", not_run)
    table["metric"] = table["task"].map(METRICS | {MLM: "perplexity"})
    return typed(table[COLUMNS])


def published_cells(published: pd.DataFrame, tasks: list[str]) -> pd.DataFrame:
    """The paper's table in long form, row by row: model, Nb, Ndiv (empty for the original), task, published."""
    named = published.set_axis([*ROW_COLUMNS, *METRICS], axis=1).assign(**{MLM: math.nan})
    cells = named.melt(ROW_COLUMNS, tasks, "task", "published", ignore_index=False).sort_index(kind="stable")
    for name in ROW_COLUMNS[1:]:
        cells[name] = pd.to_numeric(cells[name].replace("original", None)).astype(float)
    return cells.reset_index(drop=True)


def _scores(runs: pd.DataFrame, pretraining: pd.DataFrame | None) -> pd.DataFrame:
    """One row per score, including MLM's perplexities; `seed` includes the pre-training's seed if all rows have one."""
    runs = published_structure(runs).assign(valid_loss=math.nan)
    if "pretraining_seed" in runs and runs["pretraining_seed"].notna().all():
        runs["seed"] = list(zip(runs["pretraining_seed"], runs["seed"], strict=True))
    if pretraining is not None:
        texts = published_structure(pretraining)
        unknown = dict.fromkeys(("majority_score", "train_rows", "eval_rows"), math.nan)
        runs = pd.concat([runs, texts.assign(task=MLM, score=texts["perplexity"], **unknown)])
    return runs.astype(dict.fromkeys(ROW_COLUMNS[1:], float))


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """`table_iii` with its types from before saving: Nb and Ndiv integers, `beyond_noise` true, false or missing."""
    kinds = dict.fromkeys(ROW_COLUMNS[1:], "Int64") | {"beyond_noise": "boolean"}
    return table.astype(kinds)


def std_errors(rows: pd.DataFrame) -> pd.Series:
    """Standard errors of the obtained means; NaN for a single seed."""
    return rows["obtained_std"].astype(float) / rows["num_seeds"].astype(float) ** 0.5


def scores_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Table III in the paper's form, each cell `published / obtained ± standard deviation over seeds`.

    An arrow marks cells that are better (up) or worse (down) than the original beyond noise.
    """
    rows = typed(table)
    better = (rows["obtained_difference"] > 0) != (rows["task"] == MLM)
    marks = np.where(rows["beyond_noise"].fillna(False), np.where(better, " ▲", " ▼"), "")
    published = ["" if value != value else f"{value:.2f} / " for value in rows["published"]]
    spread = [f" ± {value:.2f}" if value == value else "" for value in rows["obtained_std"]]
    obtained = ["not run" if mean != mean else f"{mean:.2f}" for mean in rows["obtained_mean"]]
    cells = ["".join(parts) for parts in zip(published, obtained, spread, marks, strict=True)]
    rows = rows.assign(structure=structure_names(rows), cell=cells, task=rows["task"].replace(MLM, "perplexity"))
    wide = rows.pivot(index=["model", "structure"], columns="task", values="cell")
    order = rows[["model", "structure"]].drop_duplicates()
    return wide.loc[pd.MultiIndex.from_frame(order), list(dict.fromkeys(rows["task"]))]


# --- Means and trends --------------------------------------------------------------------------------------------


def mean_score(table: pd.DataFrame) -> pd.DataFrame:
    """One row per model and kind of mean: over the measured tasks (`all`), and over those that the original learned.

    Columns: over, tasks, num_tasks; published, published_share (per cent of the original's mean of the same tasks);
    obtained, obtained_std_error, obtained_share, share_std_error; judged (by `record.verdict`): whether the share is
    `KEPT_PERCENT` or more, not tested unless the original has learned all these tasks and there are several seeds. The
    errors are over the fine-tuning seeds, with tasks counted as independent.
    """
    frame = typed(table)
    frame = frame[frame["task"] != MLM]
    frame = frame.assign(learned=learned(frame), std_error=std_errors(frame))
    rows = []
    for structure, cells in frame.groupby(ROW_COLUMNS, sort=False, dropna=False):
        base = frame[(frame["model"] == structure[0]) & is_original(frame)]
        cells = cells.merge(base, on="task", suffixes=("", "_base"))
        both = cells["obtained_mean"].notna() & cells["obtained_mean_base"].notna()
        for over, chosen in (("all", both), ("learned", both & cells["learned_base"])):
            # The published mean stays if nothing was run.
            shown = cells[chosen] if chosen.any() or over == "learned" else cells
            row = {"over": over, "tasks": ", ".join(shown["task"]) or "none", "num_tasks": int(chosen.sum())}
            row |= _shares(shown, is_base=pd.isna(structure[1]))
            tested = chosen.any() and bool(shown["learned_base"].all())
            low, high = around(row["obtained_share"], row["share_std_error"])
            known = dict(kind="measured", low=low, high=high, side="at least", tested=tested and low == low)
            verdict = Verdict("share kept", KEPT_PERCENT, row["obtained_share"], **known)
            row["judged"] = "" if pd.isna(structure[1]) else verdict.judged
            rows.append(dict(zip(ROW_COLUMNS, structure, strict=True)) | row)
    return pd.DataFrame(rows).astype(dict.fromkeys(ROW_COLUMNS[1:], "Int64"))


def _shares(cells: pd.DataFrame, is_base: bool) -> dict[str, float]:
    """Means over tasks, and their per cent of the original's, whose columns end in `_base`."""
    names = ("published", "obtained_mean", "published_base", "obtained_mean_base")
    published, obtained, *originals = (float(cells[name].mean(skipna=False)) for name in names)
    originally_published, original = (mean or math.nan for mean in originals)
    error = math.nan
    if not is_base:  # share = 1 + difference / original: errors of the paired difference and of the divisor
        less = obtained / original - 1
        error = math.hypot(_mean_error(cells["difference_std_error"]), less * _mean_error(cells["std_error_base"]))
    return {
        "published": published,
        "published_share": 100 * published / originally_published,
        "obtained": obtained,
        "obtained_std_error": _mean_error(cells["std_error"]),
        "obtained_share": 100 * obtained / original,
        "share_std_error": 100 * error / original,
    }


def _mean_error(errors: pd.Series) -> float:
    """Standard error of a mean of independent values; NaN if one of them has none."""
    return float((errors**2).sum(skipna=False) ** 0.5 / len(errors)) if len(errors) else math.nan


def trends(table: pd.DataFrame) -> pd.DataFrame:
    """How scores change with Nb (at Ndiv=4) and Ndiv (at Nb=4): a row per model, trend and task, `mean` and MLM.

    `published_slope` and `obtained_slope` are least-squares slopes over the measured points, in points per original
    layer or per doubling of Ndiv (MLM: in perplexity); `slope_std_error` is over the seeds, with rows counted as
    independent. MLM has no published value: since lower is better, its slope should have the opposite sign of the
    published mean's. judged: by `record.verdict`; `why` it is not tested: one seed | at chance (no row has learned the
    task) | not run (fewer than two points).
    """
    frame = typed(table)
    frame["error"] = std_errors(frame)
    rows = []
    for model, of_model in frame.groupby("model", sort=False):
        for trend, (varies, fixed, step) in TRENDS.items():
            line = of_model[(of_model[fixed] == FIXED) & of_model[varies].notna()].sort_values(varies, kind="stable")
            if line[varies].nunique() < 2:
                continue
            place = {"model": model, "trend": trend, "at": f"{'Ndiv' if trend == 'Nb' else 'Nb'}={FIXED}", "step": step}
            ran = pd.concat([line, of_model[is_original(of_model)]]).dropna(subset=["obtained_mean", "majority_score"])
            chance = {task for task, cells in ran.groupby("task") if not learned(cells).any()}
            found = [_slopes(task, points, trend, chance) for task, points in _lines(line, varies, chance).items()]
            mean = next(row["published_slope"] for row in found if row["task"] == "mean")
            rows += [place | row | {"judged": _slope_verdict(row, mean)} for row in found]
    return pd.DataFrame(rows)


def _lines(line: pd.DataFrame, varies: str, chance: set[str]) -> dict[str, pd.DataFrame]:
    """Task -> points by what varies: every task, and the means of all (without MLM) and of the learned ones."""
    line = line.rename(columns={"obtained_mean": "obtained"})
    lines = {task: cells.set_index(varies) for task, cells in line.groupby("task", sort=False)}
    tasks = line[line["task"] != MLM]
    known = tasks[~tasks["task"].isin(chance)]
    lines["mean"] = _mean_points(tasks, varies)
    if 0 < len(known) < len(tasks):
        lines["mean of learned"] = _mean_points(known, varies)
    return lines


def _mean_points(cells: pd.DataFrame, varies: str) -> pd.DataFrame:
    """The mean over all tasks that were measured anywhere on the line; empty at points that lack one of them."""
    measured = cells.groupby("task")["obtained"].transform("count") > 0
    means = dict.fromkeys(("published", "obtained"), lambda values: values.mean(skipna=False))
    cells = cells[measured] if measured.any() else cells
    return cells.groupby(varies).agg(means | {"error": _mean_error, "num_seeds": "min"})


def _slopes(task: str, points: pd.DataFrame, trend: str, chance: set[str]) -> dict:
    """Least-squares slopes of one line, their error, and why they say nothing, if so."""
    measured = points[points["obtained"].notna()]
    used = measured if len(measured) > 1 else points
    place = pd.Series(used.index.astype(float), used.index)
    place = place if trend == "Nb" else np.log2(place)
    weights = (place - place.mean()) / ((place - place.mean()) ** 2).sum()
    slopes = {name: (weights * used[name].astype(float)).sum(skipna=False) for name in ("published", "obtained")}
    error = ((weights * used["error"]) ** 2).sum(skipna=False) ** 0.5
    at_chance = task in chance or (task == "mean" and bool(chance))
    reasons = [(pd.isna(slopes["obtained"]), "not run"), (at_chance, "at chance"), (pd.isna(error), "one seed")]
    return {
        "task": task,
        "points": ", ".join(str(x) for x in measured.index),
        "published_slope": slopes["published"],
        "obtained_slope": slopes["obtained"],
        "slope_std_error": error,
        "num_seeds": measured["num_seeds"].min() if len(measured) else 0,
        "why": next((why for is_so, why in reasons if is_so), ""),
    }


def _slope_verdict(row: dict, published_mean: float) -> str:
    low, high = around(row["obtained_slope"], row["slope_std_error"])
    known = dict(kind="measured", low=low, high=high, tested=not row["why"])
    if row["task"] == MLM:  # no published slope, only the side it should be on
        side = "below" if published_mean > 0 else "above"
        return Verdict(row["task"], 0.0, row["obtained_slope"], side=side, **known).judged
    return Verdict(row["task"], row["published_slope"], row["obtained_slope"], neutral=0.0, **known).judged
