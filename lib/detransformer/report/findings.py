"""One sentence for each thing that a run's accuracy tables say: means kept, differences, trends, wire, variants."""

import pandas as pd

from detransformer.record.run import RunFolder
from detransformer.record.verdict import NOT_TESTED
from detransformer.report.accuracy import (
    FIXED,
    KEPT_PERCENT,
    MLM,
    ROW_COLUMNS,
    chance_beyond_noise,
    completed,
    learned,
    mean_score,
    trends,
)
from detransformer.report.tables import MODEL_NAMES


def findings(run: RunFolder) -> list[str]:
    """One sentence for each thing that the accuracy tables of `run` say; what was not run is left out."""
    table = run.load_table("table_iii")
    sentences = [*_kept_sentences(table), *_difference_sentences(table), *_trend_sentences(table)]
    for name, make in (("wire_accuracy", _wire_sentences), ("placements", _placement_sentences),
                       ("calibration", _calibration_sentences)):  # fmt: skip
        if run.has_table(name):
            sentences += make(run.load_table(name))
    return sentences


def mean_lines(table: pd.DataFrame) -> list[str]:
    """A line a model that was run: mean over its tasks with the share of the original's, and perplexity."""
    means = mean_score(table)
    means = means[(means["over"] == "all") & means["obtained"].notna()]
    cells = completed(table)
    text = cells.loc[cells["task"] == MLM, [*ROW_COLUMNS, "obtained_mean"]]
    means = means.merge(text, on=ROW_COLUMNS, how="left")
    lines = ["| model | tasks | mean, published (% of original) | mean, obtained (% of original) | perplexity |"]
    lines += ["|---|---|---|---|---|"]
    for row in means.itertuples():
        error = "" if pd.isna(row.share_std_error) else f" ± {row.share_std_error:.1f}"
        published = f"{row.published:.1f} ({row.published_share:.1f}%)"
        untested = f", {NOT_TESTED}" if row.judged == NOT_TESTED else ""
        obtained = f"{row.obtained:.1f} ({row.obtained_share:.1f}{error}%{untested})"
        perplexity = "-" if pd.isna(row.obtained_mean) else f"{row.obtained_mean:.1f}"
        lines.append(f"| {_structure(row)} | {row.num_tasks} | {published} | {obtained} | {perplexity} |")
    return lines


def _kept_sentences(table: pd.DataFrame) -> list[str]:
    """Whether Nb=4, Ndiv=4 keeps its share of the original's mean, over all tasks and over the learned ones."""
    means = mean_score(table)
    means = means[
        (means["num_original_layers"] == FIXED) & (means["num_divisions"] == FIXED) & means["obtained"].notna()
    ]
    sentences = []
    for model, rows in means.groupby("model", sort=False):
        name = f"{MODEL_NAMES.get(model, model)} Nb={FIXED}, Ndiv={FIXED}"
        for row in rows.drop_duplicates("tasks").itertuples():
            which = "all tasks" if row.over == "all" else f"the tasks learned ({row.tasks})"
            claim = f"{name}, at least {KEPT_PERCENT:g}% of the original's mean over {which}: {row.judged}"
            if row.judged == NOT_TESTED:
                sentences.append(f"{claim}, since not all of them are learned, or by one seed.")
            else:
                shares = f"{row.obtained_share:.1f} ± {row.share_std_error:.1f}%, published {row.published_share:.1f}%"
                sentences.append(f"{claim} ({shares}).")
    chance = [task for task, cells in _ran(table).groupby("task", sort=False) if not learned(cells).any()]
    if chance:
        sentences.append(f"Not learned by any model at this scale, so not tested: {', '.join(chance)}.")
    return sentences


def _difference_sentences(table: pd.DataFrame) -> list[str]:
    cells = _ran(table)
    if not len(cells):
        return []
    originals = cells[cells["num_original_layers"].isna()]
    known = originals.loc[learned(originals), ["model", "task"]]
    cells = cells[cells["beyond_noise"].notna()].merge(known, on=["model", "task"])
    if not len(cells):
        return ["No difference to the original can be judged: nothing is learned, or by one seed a cell."]
    beyond = cells[cells["beyond_noise"].astype(bool)]
    worse = int((beyond["obtained_difference"] < 0).sum())
    chance = sum(chance_beyond_noise(int(n)) for n in cells["num_seeds"])
    spread = completed(table)
    spread = spread.loc[(spread["task"] != MLM) & (spread["num_seeds"] > 1), "obtained_std"].median()
    return [
        f"Of {len(cells)} differences to the original on tasks that it has learned, {len(beyond)} are beyond noise "
        f"({worse} worse, {len(beyond) - worse} better); equal models would make about {chance:.0f}. "
        f"The seed alone moves a score by {spread:.1f} points (median standard deviation), "
        "and the published table is one seed a cell."
    ]


def _trend_sentences(table: pd.DataFrame) -> list[str]:
    sentences = []
    for (model, trend, at), rows in trends(table).groupby(["model", "trend", "at"], sort=False):
        if (rows["why"] == "not run").all():
            continue
        said = rows["judged"].where(rows["why"] == "", rows["judged"] + " (" + rows["why"] + ")")
        names = {words: list(part["task"]) for words, part in rows.groupby(said, sort=False)}
        parts = [f"{words}: {', '.join(tasks)}" for words, tasks in names.items()]
        what = "number of original layers" if trend == "Nb" else "number of divisions"
        sentences.append(f"{MODEL_NAMES.get(model, model)}, slope over the {what} ({at}): {'; '.join(parts)}.")
    return sentences


def _wire_sentences(table: pd.DataFrame) -> list[str]:
    parts = [
        f"{wire} by {rows['change'].abs().max():.2f} points at most ({int(_true(rows['within']).sum())} of {len(rows)} "
        f"within {rows['limit'].iloc[0]:g})"
        for wire, rows in table.groupby("wire", sort=False)
    ]
    return [f"Messages in other number formats change a task's mean score: {', '.join(parts)}."] if parts else []


def _placement_sentences(table: pd.DataFrame) -> list[str]:
    sentences = []
    for (nb, ndiv), rows in table.groupby(["num_original_layers", "num_divisions"], sort=False):
        rows = rows[rows["difference"].notna() & (rows["original_placement"] != "last")]
        parts = [f"{row.original_placement} {_with_error(row)}" for row in rows.itertuples()]
        if parts:
            place = f"Nb={nb:g}, Ndiv={ndiv:g}"
            sentences.append(
                f"Original layers elsewhere than last in their groups ({place}), held-out loss: {', '.join(parts)}."
            )
    return sentences


def _calibration_sentences(table: pd.DataFrame) -> list[str]:
    sentences = []
    for name, rows in table.groupby("row", sort=False):
        parts = []
        for method, line in rows[rows["valid_loss"].notna()].groupby("method", sort=False):
            last = line.loc[line["tokens"].idxmax()]
            parts.append(f"{method} {last['valid_loss']:.3f} ({last['tokens']:,.0f} tokens)")
        teacher = rows["teacher_valid_loss"].dropna()
        if len(teacher):
            parts.append(f"the original {teacher.iloc[0]:.3f}")
        if parts:
            sentences.append(f"{name}, held-out loss by how it was trained: {', '.join(parts)}.")
    return sentences


def _ran(table: pd.DataFrame) -> pd.DataFrame:
    cells = completed(table)
    return cells[(cells["task"] != MLM) & cells["obtained_mean"].notna()]


def _structure(row) -> str:
    name = MODEL_NAMES.get(row.model, row.model)
    return (
        f"{name} original"
        if pd.isna(row.num_divisions)
        else f"{name} Nb={row.num_original_layers}, Ndiv={row.num_divisions}"
    )


def _with_error(row) -> str:
    return f"{row.difference:+.3f}" + (
        "" if pd.isna(row.difference_std_error) else f" ± {row.difference_std_error:.3f}"
    )


def _true(values: pd.Series) -> pd.Series:
    return values.astype(str).str.lower() == "true"
