"""What Table III says once it has seeds: differences to the original, means over tasks, trends, and their spread.

Pure functions of the long table (one row a model row and task, `training.table_iii`), without torch, so that notebooks,
figures and the README count alike. A table of an older run that lacks a column is completed by `completed`.

"Beyond noise" is one rule everywhere: further from zero than two standard errors over the seeds. With two seeds chance
alone passes it in three cases of ten (`chance_beyond_noise`), and of 45 differences some always pass.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from detransformer.record.intervals import NUM_ERRORS, around
from detransformer.record.verdict import NOISE, NOT_TESTED, Verdict

ROW_COLUMNS = ["model", "num_original_layers", "num_divisions"]
PUBLISHED_STRUCTURE = {"attention_width": "full", "original_placement": "last"}
PUBLISHED_COLUMNS = {  # Table III's tasks in its order, and their columns in data/published/table_iii.csv
    "CoLA": "cola_mcc",
    "SST-2": "sst2_acc",
    "MRPC": "mrpc_acc",
    "MNLI": "mnli_acc",
    "SQuAD": "squad_acc",
}
MLM = "MLM"  # the sixth column, ours: perplexity of held-out text, lower is better
MARGINS = {"exact_match": 10.0, "f1": 10.0}  # points above guessing that count as learned, at least, by metric
MARGIN = 1.0  # the same, of other metrics
KEPT_PERCENT = 98.0  # of the original's mean score: "comparable accuracy"
FIXED = 4  # Nb of the trend over Ndiv, and Ndiv of the trend over Nb (Section IV-B)
TRENDS = {  # name: (varies, is fixed, one step)
    "Nb": ("num_original_layers", "num_divisions", "original layer"),
    "Ndiv": ("num_divisions", "num_original_layers", "doubling of Ndiv"),
}
COMPARED = ["published_difference", "obtained_difference", "difference_std_error", "beyond_noise"]


def chance_beyond_noise(num_seeds: int) -> float:
    """How often two equal models of `num_seeds` paired seeds differ by more than two standard errors (Student's t)."""
    from scipy.stats import t  # slow to import, and figures need not wait for it

    return float(2 * t.sf(NUM_ERRORS, num_seeds - 1))


def paired_std_error(ours: pd.Series, originals: pd.Series) -> float:
    """Standard error of mean(ours) - mean(originals), two series of scores by seed; NaN where one seed is all there is.

    The same seed means the same data order and the same first weights of the head, so seeds that both have are paired;
    with fewer than two of them the two spreads are added as if independent.
    """
    ours, originals = (scores.dropna().groupby(level=0).mean() for scores in (ours, originals))
    pairs = (ours - originals).dropna()
    if len(pairs) >= 2:
        return float(pairs.std(ddof=1) / len(pairs) ** 0.5)
    if min(len(ours), len(originals)) < 2:
        return math.nan
    return math.hypot(*(scores.std(ddof=1) / len(scores) ** 0.5 for scores in (ours, originals)))


def learned(rows: pd.DataFrame) -> pd.Series:
    """Whether each row's score is above what guessing scores: the most frequent label, or, of questions, no answer.

    Above by a margin (`MARGINS`; a few exact answers among a thousand questions are luck) and by two standard errors
    that the size of the validation set alone makes: with n rows a Matthews correlation of nothing has 1/sqrt(n), a
    share p has sqrt(p (1 - p) / n).
    """
    scores = rows["score"] if "score" in rows else rows["obtained_mean"]
    num_rows = rows["eval_rows"] if "eval_rows" in rows else pd.Series(float("nan"), rows.index)
    share = rows["majority_score"].astype(float) / 100
    variance = (share * (1 - share)).where(rows["metric"].str.lower() != "mcc", 1.0)
    error = 100 * np.sqrt(variance / num_rows.astype(float))
    margin = rows["metric"].str.lower().map(MARGINS).fillna(MARGIN)
    above = (NUM_ERRORS * error).fillna(0).clip(lower=margin)
    return scores.astype(float) > rows["majority_score"].astype(float) + above


def with_structure(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with the columns of the structure's variant; where they lack, it is the published one."""
    for name, value in PUBLISHED_STRUCTURE.items():
        rows = rows.assign(**{name: rows[name].fillna(value) if name in rows else value})
    return rows


def published_structure(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have the published structure, not a variant of it."""
    rows = with_structure(rows)
    return rows[(rows[list(PUBLISHED_STRUCTURE)] == pd.Series(PUBLISHED_STRUCTURE)).all(axis=1)]


def lower_is_better(task: str) -> bool:
    """Whether less is better in a task: in pre-training's masked-LM loss, in no task with a score."""
    return task == MLM


def std_errors(rows: pd.DataFrame) -> pd.Series:
    """Standard errors of the obtained means; NaN where one seed is all there is."""
    seeds = rows["num_seeds"].astype(float)
    return (rows["obtained_std"].astype(float) / seeds**0.5).where(seeds > 1)


def is_original(table: pd.DataFrame) -> pd.Series:
    """Which rows are of the unmodified model: they name no number of original layers."""
    return table["num_original_layers"].isna()


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """`table` as `training.table_iii` makes it, whether just made, read from CSV, or of a run before it had seeds.

    Nb and Ndiv become whole numbers, empty for the original; missing columns are added, differences computed.
    """
    frame = table.copy()
    for name in ROW_COLUMNS[1:]:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("Int64")
    for name in (
        "published",
        "obtained_mean",
        "obtained_std",
        "num_seeds",
        "majority_score",
        "eval_rows",
        "valid_loss",
    ):
        frame[name] = pd.to_numeric(frame[name]) if name in frame else float("nan")
    if "metric" not in frame:
        frame["metric"] = ""
    if set(COMPARED) <= set(frame.columns):
        return frame.assign(beyond_noise=_booleans(frame["beyond_noise"]))
    return with_differences(frame)


def with_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Adds each row's difference to the original of its model and task: published, obtained, error, beyond noise.

    `difference_std_error` is kept where the table has it (from paired seeds), else made of the two spreads. All four
    are empty for the original itself.
    """
    keys = ["model", "task"]
    wanted = ["published", "obtained_mean", "obtained_std", "num_seeds"]
    originals = table.loc[is_original(table), [*keys, *wanted]].drop_duplicates(keys)
    base = table[keys].merge(originals, on=keys, how="left").set_index(table.index)
    decoupled = ~is_original(table)
    frame = table.copy()
    frame["published_difference"] = (table["published"] - base["published"]).where(decoupled)
    frame["obtained_difference"] = (table["obtained_mean"] - base["obtained_mean"]).astype(float).where(decoupled)
    if "difference_std_error" not in table:
        frame["difference_std_error"] = np.hypot(std_errors(table), std_errors(base)).where(decoupled)
    error = frame["difference_std_error"]
    beyond = (frame["obtained_difference"].abs() > NUM_ERRORS * error).astype("boolean")
    frame["beyond_noise"] = beyond.where(error.notna() & frame["obtained_difference"].notna())
    return frame


def mean_score(table: pd.DataFrame, kept_percent: float = KEPT_PERCENT) -> pd.DataFrame:
    """One row a model and kind of mean: over the tasks measured (`all`), and over those the original learned.

    Columns: over, tasks, num_tasks; published, published_share (per cent of the original's mean of the same tasks);
    obtained, obtained_std_error, obtained_share, share_std_error; judged (by `record.verdict`): whether the share is
    `kept_percent` or more, not tested unless the original has learned all these tasks and there are several seeds. The
    error is of the fine-tuning seeds, tasks counted as independent.
    """
    frame = completed(table)
    frame = frame[frame["task"] != MLM]
    rows = []
    for structure, cells in frame.groupby(ROW_COLUMNS, sort=False, dropna=False):
        cells = cells.set_index("task")
        base = frame[(frame["model"] == structure[0]) & is_original(frame)].set_index("task").reindex(cells.index)
        both = cells["obtained_mean"].notna() & base["obtained_mean"].notna()
        for over, chosen in (("all", both), ("learned", both & learned(base))):
            shown = (
                chosen if chosen.any() or over == "learned" else chosen | True
            )  # what was not run is published still
            row = {"over": over, "tasks": ", ".join(cells.index[shown]) or "none", "num_tasks": int(chosen.sum())}
            row |= _shares(cells[shown], base[shown], is_base=pd.isna(structure[1]))
            tested = chosen.any() and bool(learned(base[chosen]).all())
            row["judged"] = "" if pd.isna(structure[1]) else _kept(row, kept_percent, tested)
            rows.append(dict(zip(ROW_COLUMNS, structure, strict=True)) | row)
    return pd.DataFrame(rows).astype(dict.fromkeys(ROW_COLUMNS[1:], "Int64"))


def _shares(cells: pd.DataFrame, base: pd.DataFrame, is_base: bool) -> dict[str, float]:
    """Means over the tasks of `cells`, and their shares of the original's (`base`, same tasks) in per cent."""
    names = {"published": "published", "obtained": "obtained_mean"}
    means = {name: float(cells[column].mean(skipna=False)) for name, column in names.items()}
    originals = {name: float(base[column].mean(skipna=False)) or math.nan for name, column in names.items()}
    error = math.nan
    if not is_base:  # share = 1 + difference / original: errors of the paired difference and of the divisor
        less = means["obtained"] / originals["obtained"] - 1
        error = math.hypot(_mean_error(cells["difference_std_error"]), less * _mean_error(std_errors(base)))
    return {
        "published": means["published"],
        "published_share": 100 * means["published"] / originals["published"],
        "obtained": means["obtained"],
        "obtained_std_error": _mean_error(std_errors(cells)),
        "obtained_share": 100 * means["obtained"] / originals["obtained"],
        "share_std_error": 100 * error / originals["obtained"],
    }


def trends(table: pd.DataFrame) -> pd.DataFrame:
    """How scores change with Nb (at Ndiv=4) and with Ndiv (at Nb=4): one row a model, trend and task, `mean` and MLM.

    `published_slope` and `obtained_slope` are of straight lines by least squares, in points an original layer or a
    doubling of Ndiv (MLM: in perplexity), over the points that were measured; `slope_std_error` is over the seeds,
    rows counted as independent; `one_seed_std_error` is what it would be with one seed a cell, as published.
    `published_rank` and `obtained_rank` are rank correlations. MLM has no published value: it is expected to go the way
    of the published mean. judged: by `record.verdict`; where it is "not tested", why: one seed | at chance (no row has
    learned the task) | not run (fewer than two points).
    """
    frame = completed(table)
    frame["error"] = std_errors(frame)
    rows = []
    for model in dict.fromkeys(frame["model"]):
        of_model = frame[frame["model"] == model]
        for trend, (varies, fixed, step) in TRENDS.items():
            line = of_model[(of_model[fixed] == FIXED) & of_model[varies].notna()].sort_values(varies, kind="stable")
            if line[varies].nunique() < 2:
                continue
            place = {"model": model, "trend": trend, "at": f"{'Ndiv' if trend == 'Nb' else 'Nb'}={FIXED}", "step": step}
            chance = _at_chance(pd.concat([line, of_model[is_original(of_model)]]))
            for task, points in _trend_lines(line, varies, chance):
                found = _slopes(points, trend)
                found["why"] = _why_untested(found, task in chance or (task == "mean" and bool(chance)))
                rows.append(place | {"task": task} | found)
    columns = ["model", "trend", "at", "step", "task", "points", "published_slope", "published_rank", "obtained_slope"]
    columns += ["slope_std_error", "one_seed_std_error", "obtained_rank", "num_seeds", "judged", "why"]
    frame = pd.DataFrame(rows, columns=[*columns, "expected_sign"])
    means = frame[frame["task"] == "mean"].set_index(["model", "trend"])["published_slope"]
    for index, row in frame[frame["task"] == MLM].iterrows():
        sign = -np.sign(means.get((row["model"], row["trend"]), float("nan")))
        frame.loc[index, "expected_sign"] = sign
    frame["judged"] = [_slope_verdict(row) for row in frame.itertuples()]
    return frame


def _slope_verdict(row) -> str:
    low, high = around(row.obtained_slope, row.slope_std_error)
    known = dict(kind="measured", low=low, high=high, tested=not row.why)
    if row.task == MLM:  # no published slope, only the side it should be on
        side = "below" if row.expected_sign < 0 else "above"
        return Verdict(row.task, 0.0, row.obtained_slope, side=side, **known).judged
    return Verdict(row.task, row.published_slope, row.obtained_slope, neutral=0.0, **known).judged


def trend_notes(trends: pd.DataFrame) -> list[str]:
    """What `trends` says, in sentences for a list: what went as published, then each deviation with its spread."""
    notes = []
    for (model, trend, at), rows in trends.groupby(["model", "trend", "at"], sort=False):
        place = f"{model} over {trend} ({at})"
        if (rows["why"] == "not run").all():
            notes.append(f"{place}: not run.")
            continue
        held = [f"{row.task} {_slope(row)}" for row in rows.itertuples() if _goes_as_published(row)]
        unit = f"a step is one {rows['step'].iloc[0]}"
        tested = rows[rows["judged"] != NOT_TESTED]
        if len(tested):
            notes.append(f"{place}: {len(held)} of {len(tested)} lines go as published, {unit}{_listed(held)}.")
        else:
            notes.append(f"{place}: no line can be tested, {unit}.")
        notes += [
            f"{place}, {row.task}: {_deviation(row)}" for row in tested.itertuples() if not _goes_as_published(row)
        ]
        for why, words in (
            ("one seed", "one seed, so without a spread and not tested"),
            ("at chance", "not learned by any row, or a mean over such, so their slopes mean nothing"),
            ("not run", "fewer than two points were measured"),
        ):
            part = rows[rows["why"] == why]
            names = [f"{row.task} {_slope(row)}" if why == "one seed" else row.task for row in part.itertuples()]
            if names:
                notes.append(f"{place}: {', '.join(names)}: {words}.")
    return notes


def _goes_as_published(row) -> bool:
    """Whether a tested slope is beyond noise and on the published side."""
    return row.judged not in (NOISE, NOT_TESTED, "does not hold")


def _deviation(row) -> str:
    """A sentence on one trend that is against the published one or within noise."""
    unit = "perplexity" if row.task == MLM else "points"
    obtained = f"{row.obtained_slope:+.2f} ± {row.slope_std_error:.2f} {unit} a step"
    if row.task == MLM:
        expected = f"the published mean's trend lets it {'fall' if row.expected_sign < 0 else 'rise'}"
    else:
        expected = f"published {row.published_slope:+.2f}"
    if row.judged == NOISE:
        text = f"{expected}, obtained {obtained}: no more than {NUM_ERRORS} standard errors, so the seeds explain it."
    else:
        errors = abs(row.obtained_slope) / row.slope_std_error if row.slope_std_error else float("inf")
        text = f"against: {expected}, obtained {obtained}, {errors:.1f} standard errors the other way"
        text += f" (seeds: {row.num_seeds:g})."
    if row.task != MLM and row.one_seed_std_error == row.one_seed_std_error:
        near = abs(row.published_slope) <= NUM_ERRORS * row.one_seed_std_error
        text += f" With one seed a cell, as published, our spread would make ± {row.one_seed_std_error:.2f}: "
        text += "the published slope is within that noise too." if near else "the published slope is beyond that noise."
    return text


def _slope(row) -> str:
    error = "" if pd.isna(row.slope_std_error) else f" ± {row.slope_std_error:.2f}"
    published = "" if pd.isna(row.published_slope) else f" (published {row.published_slope:+.2f})"
    return f"{row.obtained_slope:+.2f}{error}{published}"


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def _trend_lines(line: pd.DataFrame, varies: str, chance: set[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """(task, points) of every task, of their mean, of the mean of the learned, and of MLM; points by what varies."""
    line = line.rename(columns={"obtained_mean": "obtained", "obtained_std": "std"}).set_index(varies)
    wanted = ["published", "obtained", "std", "error", "num_seeds"]
    parts = {task: cells[wanted] for task, cells in line.groupby("task", sort=False)}
    tasks = [task for task in parts if task != MLM]
    yield from ((task, parts[task]) for task in tasks)
    yield "mean", _mean_points([parts[task] for task in tasks])
    known = [task for task in tasks if task not in chance]
    if known and len(known) < len(tasks):
        yield "mean of learned", _mean_points([parts[task] for task in known])
    if MLM in parts:
        yield MLM, parts[MLM]


def _mean_points(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """The mean over those tasks that were measured anywhere on the line; empty at points that lack one of them."""
    parts = [part for part in parts if part["obtained"].notna().any()] or parts
    mean = {name: sum(part[name] for part in parts) / len(parts) for name in ("published", "obtained")}
    mean |= {name: sum(part[name] ** 2 for part in parts) ** 0.5 / len(parts) for name in ("std", "error")}
    return pd.DataFrame(mean | {"num_seeds": pd.concat([part["num_seeds"] for part in parts], axis=1).min(axis=1)})


def _slopes(points: pd.DataFrame, trend: str) -> dict:
    measured = points[points["obtained"].notna()]
    used = measured if len(measured) > 1 else points
    place = pd.Series(used.index.astype(float), used.index)
    place = place if trend == "Nb" else np.log2(place)
    weights = (place - place.mean()) / ((place - place.mean()) ** 2).sum()
    slopes = {name: (weights * used[name].astype(float)).sum(skipna=False) for name in ("published", "obtained")}
    return {
        "points": ", ".join(str(x) for x in measured.index),
        "published_slope": slopes["published"],
        "published_rank": _rank_correlation(place, used["published"]),
        "obtained_slope": slopes["obtained"],
        "slope_std_error": ((weights * used["error"]) ** 2).sum(skipna=False) ** 0.5,
        "one_seed_std_error": ((weights * used["std"]) ** 2).sum(skipna=False) ** 0.5,
        "obtained_rank": _rank_correlation(place, used["obtained"]),
        "num_seeds": measured["num_seeds"].min() if len(measured) else 0,
        "expected_sign": np.sign(slopes["published"]),
    }


def _why_untested(found: dict, is_chance: bool) -> str:
    """Why a slope says nothing; empty where it can be judged."""
    if pd.isna(found["obtained_slope"]):
        return "not run"
    if is_chance:
        return "at chance"
    return "one seed" if pd.isna(found["slope_std_error"]) else ""


def _at_chance(cells: pd.DataFrame) -> set[str]:
    """Tasks that were run and that no row has learned."""
    ran = cells[(cells["task"] != MLM) & cells["obtained_mean"].notna() & cells["majority_score"].notna()]
    return {task for task, group in ran.groupby("task") if not learned(group).any()}


def _kept(row: dict, kept_percent: float, tested: bool) -> str:
    low, high = around(row["obtained_share"], row["share_std_error"])
    known = dict(kind="measured", low=low, high=high, tested=tested and low == low)
    return Verdict("share kept", kept_percent, row["obtained_share"], side="at least", **known).judged


def _mean_error(errors) -> float:
    """Standard error of a mean of independent values; NaN where one of them has none."""
    errors = [float(error) for error in errors]
    return math.sqrt(sum(error**2 for error in errors)) / len(errors) if errors else float("nan")


def _rank_correlation(place: pd.Series, values: pd.Series) -> float:
    ranks = pd.DataFrame({"place": place.rank(), "values": values.astype(float).rank()}).dropna()
    flat = len(ranks) < 2 or ranks["values"].nunique() < 2
    return float("nan") if flat else float(ranks["place"].corr(ranks["values"]))


def _booleans(values: pd.Series) -> pd.Series:
    """True, False or missing from what a CSV file keeps of them."""
    words = values.astype(str).str.lower().map({"true": True, "false": False})
    return words.astype("boolean")
