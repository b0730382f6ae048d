"""The studies of notebook 02: losses by step, and the cost of number formats on the wire and of other structures."""

import math
from collections.abc import Iterable

import pandas as pd

from detransformer.record.run import RunFolder
from detransformer.tables.accuracy import (
    PUBLISHED_STRUCTURE,
    ROW_COLUMNS,
    compared,
    is_original,
    structure_names,
)
from detransformer.training.results import VARIANT_COLUMNS, Result, accuracy_table, nullable

LOSS_POINTS = 200  # training losses shown for each model
WIRE_LIMIT = 0.3  # points that a number format on the wire may cost


def loss_table(results: Iterable[Result]) -> pd.DataFrame:
    """Training losses of each pre-trained model: row, Nb, Ndiv, step, tokens, train_loss.

    In longer runs a row is the mean over as many steps as leave `LOSS_POINTS` rows, labelled with the last step.
    """
    frames = []
    for result in results:
        window = -(-len(result.history) // LOSS_POINTS)
        parts = result.history.groupby((result.history["step"] - 1) // window)
        frame = parts.agg({"step": "max", "tokens": "max", "train_loss": "mean"})
        structure = {name: getattr(result.row, name) for name in ROW_COLUMNS[1:]}
        frames.append(frame.assign(row=result.row.label, **structure))
    columns = ["row", *ROW_COLUMNS[1:], "step", "tokens", "train_loss"]
    return nullable(pd.concat(frames, ignore_index=True)[columns])


def published_runs(run: RunFolder) -> pd.DataFrame:
    """The fine-tuning runs of the paper's structures, with column `structure`; no rows if there are none."""
    rows = run.load_table("accuracy_runs") if run.has_table("accuracy_runs") else accuracy_table([])
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *VARIANT_COLUMNS])))
    rows = rows[(rows["attention_width"] == "full") & (rows["original_placement"] == "last")]
    return rows.assign(structure=structure_names(rows))


def wire_table(runs: pd.DataFrame, limit: float = WIRE_LIMIT) -> pd.DataFrame:
    """The cost of number formats on the wire to a trained model's score: one row a model row, task and format.

    `change` is the mean over seeds of the score with that format minus the exact score, in points, of one model each;
    `largest_change` is the largest absolute change of a seed; `within` says whether the mean is no more than `limit`.
    Formats come from columns `score_FORMAT` of `runs`; without any the table is empty.
    """
    formats = [name for name in runs if name.startswith("score_")]
    keys = [*ROW_COLUMNS, *PUBLISHED_STRUCTURE, "task", "metric"]
    scored = runs.melt([*keys, "seed", "score"], formats, "wire", "rounded").dropna(subset="rounded")
    scored = scored.assign(wire=scored["wire"].str.removeprefix("score_"), change=scored["rounded"] - scored["score"])
    table = scored.groupby([*keys, "wire"], dropna=False, sort=False).agg(
        exact=("score", "mean"),
        change=("change", "mean"),
        change_std_error=("change", "sem"),
        largest_change=("change", lambda change: change.abs().max()),
        num_seeds=("change", "size"),
    ).reset_index()  # fmt: skip
    table.insert(0, "row", [f"{m} {name}" for m, name in zip(table["model"], structure_names(table), strict=True)])
    return table.assign(limit=limit, within=table["change"].abs() <= limit)


def variant_table(pretraining: pd.DataFrame, varies: str) -> pd.DataFrame:
    """One row for each structure that comes in several kinds of `varies`, the published kind first.

    `varies` is `original_placement` (where the original layers stand) or `attention_width` (narrow beside full
    sub-blocks). valid_loss and perplexity are means over pre-training seeds, valid_loss_std their spread; `difference`
    is the loss minus the published kind's in nats, with its standard error (paired seeds) if there are several.
    """
    base, rows = PUBLISHED_STRUCTURE[varies], []
    alike = [name for name in (*ROW_COLUMNS, *PUBLISHED_STRUCTURE) if name != varies]
    for keys, group in pretraining[~is_original(pretraining)].groupby(alike, sort=False):
        kinds = {kind: part.set_index("seed") for kind, part in group.groupby(varies, sort=False)}
        if len(kinds) < 2 or base not in kinds:
            continue
        for kind in sorted(kinds, key=lambda kind: kind != base):
            made = compared(kinds[kind]["valid_loss"], kinds[base]["valid_loss"])
            row = dict(zip(alike, keys, strict=True)) | {varies: kind} | made
            row |= {"valid_loss": made["mean"], "valid_loss_std": made["std"]}
            rows.append(row | {name: kinds[kind][name].mean() for name in ("unigram_loss", "perplexity")})
            if kind == base:
                rows[-1]["difference_std_error"] = math.nan
    columns = [*ROW_COLUMNS, *PUBLISHED_STRUCTURE, "num_seeds", "valid_loss", "valid_loss_std", "unigram_loss"]
    table = pd.DataFrame(rows, columns=[*columns, "perplexity", "difference", "difference_std_error"])
    table.insert(0, "row", [f"{m} {name}" for m, name in zip(table["model"], structure_names(table), strict=True)])
    return table


def data_note(runs: pd.DataFrame) -> str:
    """In words: the scale of pre-training, and the data, rows and seeds of each task."""
    lines = [f"Pre-training: {'; '.join(dict.fromkeys(runs['pretraining']))}."]
    for task, group in runs.groupby("task", sort=False):
        lines.append(f"{task}: {group['note'].iloc[0]}; seeds {group['seed'].nunique()}.")
    return " ".join(lines)
