"""What a changed model keeps of the original's scores: probes of frozen vectors, and fine-tuning, beside baselines.

Pure functions of the tables `probes` (one row a model and score) and `finetuned` (one row a fine-tuning run).
"""

import math
import re

import matplotlib.pyplot as plt
import pandas as pd

from detransformer.record.intervals import NUM_ERRORS, around
from detransformer.record.verdict import Verdict
from detransformer.tables.accuracy import learned, paired_std_error

KEPT_PERCENT = 97.0  # of the original's mean over the tasks it has learned
BASELINES = ("majority", "bag of words")
RANGE = ["difference_low", "difference_high"]


def finetuned_scores(runs: pd.DataFrame, original: str) -> pd.DataFrame:
    """One row a model and task: score (mean over seeds), difference to `original`, its interval, as table `probes`.

    The interval is two standard errors over paired seeds (the head's first weights, dropout, order of data).
    """
    rows = []
    for (row, task), group in runs.groupby(["row", "task"], sort=False):
        base = runs[(runs["row"] == original) & (runs["task"] == task)].set_index("seed")["score"]
        ours = group.set_index("seed")["score"]
        difference = ours.mean() - base.mean()
        error = math.nan if row == original or len(base) < 2 else paired_std_error(ours, base)
        low, high = around(difference, error)
        scores = {"score": ours.mean(), "score_std": ours.std(ddof=1), "num_seeds": len(ours)}
        apart = {"difference": difference, "difference_low": low, "difference_high": high}
        known = {name: group[name].iloc[0] for name in ("metric", "majority_score", "eval_rows", "train_rows", "note")}
        rows.append({"row": row, "task": task} | scores | apart | known)
    return pd.DataFrame(rows)


def wide(scores: pd.DataFrame) -> pd.DataFrame:
    """One line a model, one column a score; an arrow where a difference to the original is beyond its interval."""
    marks = ["▲" if low > 0 else "▼" if high < 0 else "" for low, high in scores[RANGE].itertuples(index=False)]
    texts = [f"{score:.1f} {mark}".strip() for score, mark in zip(scores["score"], marks, strict=True)]
    cells = scores.assign(cell=pd.Series(texts, scores.index, dtype=str))
    order = list(dict.fromkeys(scores["row"]))
    return (
        cells.pivot(index="row", columns="task", values="cell")
        .loc[order, list(dict.fromkeys(scores["task"]))]
        .fillna("")
    )


def kept(scores: pd.DataFrame, original: str) -> pd.DataFrame:
    """One row a model: its mean over the tasks that `original` has learned, as a share of the original's.

    Columns: row, num_tasks, mean, share (per cent), low, high, judged (share of `KEPT_PERCENT` or more). The interval
    adds the tasks' intervals as independent. Not tested where the original has learned nothing.
    """
    base = scores[scores["row"] == original].set_index("task")
    known = list(base.index[learned(base)]) if len(base) else []
    rows = []
    for row, group in scores.groupby("row", sort=False):
        cells = group.set_index("task").reindex(known)
        if row in BASELINES or not known or cells["score"].isna().any():
            continue
        mean, whole = cells["score"].mean(), base.loc[known, "score"].mean()
        spread = (cells["difference_high"] - cells["difference_low"]) / (2 * NUM_ERRORS)
        error = 100 * math.sqrt((spread**2).sum(skipna=False)) / len(known) / whole if row != original else math.nan
        low, high = around(100 * mean / whole, error)
        verdict = Verdict(
            f"{row}: share kept", KEPT_PERCENT, 100 * mean / whole, "measured", low=low, high=high, side="at least"
        )
        judged = "" if row == original else verdict.judged
        rows.append(
            {
                "row": row,
                "num_tasks": len(known),
                "mean": mean,
                "share": 100 * mean / whole,
                "low": low,
                "high": high,
                "judged": judged,
            }
        )
    columns = ["row", "num_tasks", "mean", "share", "low", "high", "judged"]
    return pd.DataFrame(rows, columns=columns).assign(tasks=", ".join(known))


def structure_of(label: str) -> str:
    """A row's structure, of a label such as `minilm Nb=2, Ndiv=4, 1,000,000 tokens` or `minilm, 3 layers, cut`."""
    return re.sub(r", (sliced|cut|closed form|[\d,]+ tokens)$", "", label)


def draw_differences(data: pd.DataFrame, **style: object) -> None:
    """One panel of a seaborn FacetGrid: a dot a model at its difference to the original, with its interval."""
    spread = [data["difference"] - data["difference_low"], data["difference_high"] - data["difference"]]
    plt.gca().errorbar(data["difference"], data["row"], xerr=spread, fmt="o", ms=4, lw=1, color="0.2")
    plt.gca().invert_yaxis()
