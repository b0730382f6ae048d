"""Table III with the published values beside what was trained, variants of the structure, wire formats.

Pure functions of results and frames; the published values come in as a frame. What the long Table III says (means,
trends, what is beyond noise) is counted in `report.accuracy`, which figures and the README use without torch.
"""

import pandas as pd

from detransformer.record.intervals import NUM_ERRORS
from detransformer.report.accuracy import (
    MLM,
    PUBLISHED_COLUMNS,
    PUBLISHED_STRUCTURE,
    ROW_COLUMNS,
    chance_beyond_noise,
    learned,
    mean_score,
    paired_std_error,
    published_structure,
    trend_notes,
    trends,
    with_differences,
    with_structure,
)
from detransformer.training.config import ModelRow
from detransformer.training.data.tasks import TASKS
from detransformer.training.summary import _nullable

__all__ = [
    "learned",
    "mean_score",
    "of_row",
    "placement_table",
    "table_iii",
    "table_note",
    "trend_notes",
    "trends",
    "width_table",
    "wire_table",
]

VARIANT_COLUMNS = [*ROW_COLUMNS, *PUBLISHED_STRUCTURE]
WIRE_LIMIT = 0.3  # points that a number format on the wire may cost
SHOWN_METRIC = {"CoLA": "mcc", "SST-2": "accuracy", "MRPC": "accuracy", "MNLI": "accuracy", "SQuAD": "exact_match"}


def table_iii(
    runs: pd.DataFrame, published: pd.DataFrame, profile: str = "", pretraining: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Table III, one row a published cell: obtained mean and standard deviation over seeds, or why there is none.

    Beside them each cell's difference to the original of its model: published; obtained; its standard error, from the
    differences seed by seed where two or more seeds are common, else from both spreads; and whether it is beyond noise
    (more than two standard errors; empty where there is one seed). With `pretraining` each model gets a sixth cell,
    task MLM: perplexity (lower is better) and loss on held-out text, its spread over pre-training seeds where there are
    several. Rows of other structures than the published one are left out.

    Args:
        runs: `accuracy_table`'s rows; those of older runs have the published structure.
        published: the paper's table (data/published/table_iii.csv).
        profile: named in the status of cells that were not run.
        pretraining: `pretraining_table`'s rows.
    """
    missing = "not run" + (f" (profile {profile})" if profile else "")
    groups = _groups(published_structure(runs), [*ROW_COLUMNS, "task"])
    texts = {} if pretraining is None else _groups(published_structure(pretraining), ROW_COLUMNS)
    rows = []
    for _, line in published.iterrows():
        nb, ndiv = _number(line["num_original_layers_nb"]), _number(line["num_divisions_ndiv"])
        place = {"model": line["model"], "num_original_layers": nb, "num_divisions": ndiv}
        for task in TASKS:
            group, original = groups.get((line["model"], nb, ndiv, task)), groups.get((line["model"], None, None, task))
            value = float(line[PUBLISHED_COLUMNS[task]])
            rows.append(place | {"task": task, "published": value} | _scores(group, original, task, missing))
        if pretraining is not None:
            group, original = texts.get((line["model"], nb, ndiv)), texts.get((line["model"], None, None))
            rows.append(place | {"task": MLM, "published": None} | _perplexity(group, original, missing))
    frame = _nullable(pd.DataFrame(rows))
    floats = ["published", "obtained_mean", "obtained_std", "difference_std_error", "majority_score", "valid_loss"]
    frame = frame.astype(dict.fromkeys(floats, float) | {"train_rows": "Int64", "eval_rows": "Int64"})
    frame["difference_std_error"] = frame["difference_std_error"].where(frame["num_original_layers"].notna())
    frame = with_differences(frame)
    first = [*ROW_COLUMNS, "task", "metric", "published", "obtained_mean", "obtained_std", "published_difference"]
    first += ["obtained_difference", "difference_std_error", "beyond_noise"]
    frame = frame[first + [name for name in frame.columns if name not in first]]
    return frame if pretraining is not None else frame.drop(columns="valid_loss")


def table_note(runs: pd.DataFrame, pretraining: pd.DataFrame | None = None) -> str:
    """What stands under Table III: scale, data and rows in words, seeds, what is at chance, and what a mark means.

    With `pretraining`, `pretraining_table`'s rows, also the perplexity of word frequencies alone.
    """
    runs = published_structure(runs)
    lines = [f"Pre-training: {'; '.join(dict.fromkeys(runs['pretraining']))}."]
    for task, group in runs.groupby("task", sort=False):
        lines.append(f"{task}: {group['note'].iloc[0]}; seeds {group['seed'].nunique()}.")
    keys = [*ROW_COLUMNS, "task", "metric"]
    means = runs.groupby(keys, sort=False, dropna=False)[["score", "majority_score", "eval_rows"]].mean().reset_index()
    weak = [task for task, group in means.groupby("task", sort=False) if not learned(group).any()]
    if weak:
        lines.append(f"Not learned by any model at this scale, so without meaning: {', '.join(weak)}.")
    lines.append(
        "± is the standard deviation over fine-tuning seeds of one pre-trained model; what another pre-training would "
        "change is not in it. The published table is one seed a cell."
    )
    counts = sorted(set(runs.groupby("task")["seed"].nunique()) - {1})
    if counts:
        chances = ", ".join(f"{chance_beyond_noise(n):.0%} with {n} seeds" for n in counts)
        lines.append(
            f"Beyond noise: a difference of more than {NUM_ERRORS} standard errors over the seeds, which are paired. "
            f"Equal models pass that by chance in {chances}."
        )
    if pretraining is not None:
        frequencies = pretraining["unigram_perplexity"].mean()
        lines.append(f"Word frequencies alone have a perplexity of {frequencies:,.0f} on the same held-out tokens.")
    lines.append("SQuAD: the paper says Acc; shown is exact match, F1 is in accuracy_runs.")
    return "\n".join(lines)


def wire_table(runs: pd.DataFrame, limit: float = WIRE_LIMIT) -> pd.DataFrame:
    """What number formats on the wire cost a trained model in score: one row a model row, task and format.

    `change` is the mean over seeds of the score with that format minus the exact one, in points, of one model each;
    `largest_change` is the largest absolute one of a seed; `within` says whether the mean is no more than `limit`.
    Columns of `runs` called `score_FORMAT` count; without any the table is empty.
    """
    rows = []
    for column in (name for name in runs.columns if name.startswith("score_")):
        scored = with_structure(runs[runs[column].notna()])
        for keys, group in _groups(scored, [*VARIANT_COLUMNS, "task"]).items():
            change = group[column] - group["score"]
            error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else None
            rows.append(
                {"row": ModelRow(*keys[:-1]).label}
                | dict(zip([*VARIANT_COLUMNS, "task"], keys, strict=True))
                | {
                    "metric": group["metric"].iloc[0],
                    "wire": column.removeprefix("score_"),
                    "exact": group["score"].mean(),
                    "change": change.mean(),
                    "change_std_error": error,
                    "largest_change": change.abs().max(),
                    "num_seeds": len(change),
                    "limit": limit,
                    "within": bool(abs(change.mean()) <= limit),
                }
            )
    columns = ["row", *VARIANT_COLUMNS, "task", "metric", "wire", "exact", "change", "change_std_error"]
    frame = pd.DataFrame(rows, columns=[*columns, "largest_change", "num_seeds", "limit", "within"])
    return _nullable(frame).astype({"change_std_error": float})


def of_row(frame: pd.DataFrame, row: ModelRow) -> pd.DataFrame:
    """The rows of a table of models or runs that are of `row`, a `ModelRow`."""
    frame = with_structure(frame)
    same = frame["model"] == row.model
    for name in ("num_original_layers", "num_divisions"):
        wanted = getattr(row, name)
        same &= frame[name].isna() if wanted is None else (frame[name] == wanted).fillna(False)
    for name in ("attention_width", "original_placement"):
        same &= frame[name] == getattr(row, name)
    return frame[same]


def placement_table(pretraining: pd.DataFrame) -> pd.DataFrame:
    """Where the original layers stand, at equal Nb and Ndiv: held-out loss beside that of "last", as published."""
    return _variant_table(pretraining, "original_placement")


def width_table(pretraining: pd.DataFrame) -> pd.DataFrame:
    """Narrow beside full sub-blocks, at equal Nb and Ndiv: held-out loss of each."""
    return _variant_table(pretraining, "attention_width")


def _variant_table(pretraining: pd.DataFrame, varies: str) -> pd.DataFrame:
    """One row a structure of those that come in several kinds of `varies`, the published kind first.

    valid_loss and perplexity are means over pre-training seeds, valid_loss_std their spread; `difference` is the loss
    minus that of the published kind in nats, with its standard error (paired seeds) where there are several.
    """
    base, rows = PUBLISHED_STRUCTURE[varies], []
    decoupled = with_structure(pretraining[pretraining["num_original_layers"].notna()])
    alike = [name for name in VARIANT_COLUMNS if name != varies]
    for keys, group in _groups(decoupled, alike).items():
        kinds = dict(tuple(group.groupby(varies, sort=False)))
        if len(kinds) < 2:
            continue
        published = _by_seed(kinds[base], "valid_loss") if base in kinds else pd.Series(dtype=float)
        for kind in sorted(kinds, key=lambda kind: kind != base):
            losses = _by_seed(kinds[kind], "valid_loss")
            place = dict(zip(alike, keys, strict=True)) | {varies: kind}
            structure = [place[name] for name in VARIANT_COLUMNS]
            rows.append(
                {"row": ModelRow(*structure).label}
                | dict(zip(VARIANT_COLUMNS, structure, strict=True))
                | {
                    "num_seeds": len(losses),
                    "valid_loss": losses.mean(),
                    "valid_loss_std": losses.std(ddof=1),
                    "unigram_loss": kinds[kind]["unigram_loss"].mean(),
                    "perplexity": kinds[kind]["perplexity"].mean(),
                    "difference": losses.mean() - published.mean(),
                    "difference_std_error": None if kind == base else paired_std_error(losses, published),
                }
            )
    columns = ["row", *VARIANT_COLUMNS, "num_seeds", "valid_loss", "valid_loss_std", "unigram_loss", "perplexity"]
    columns.append("difference")
    frame = _nullable(pd.DataFrame(rows, columns=[*columns, "difference_std_error"]))
    return frame.astype({"difference_std_error": float})


def _scores(group: pd.DataFrame | None, original: pd.DataFrame | None, task: str, missing: str) -> dict:
    """A cell's columns from its runs and those of the original model."""
    found = group is not None
    scores = group["score"] if found else pd.Series(dtype=float)
    both = found and original is not None
    return {
        "metric": group["metric"].iloc[0] if found else SHOWN_METRIC[task],
        "obtained_mean": scores.mean() if found else None,
        "obtained_std": scores.std(ddof=1) if len(scores) > 1 else None,
        "difference_std_error": paired_std_error(_by_seed(group), _by_seed(original)) if both else None,
        "majority_score": group["majority_score"].iloc[0] if found else None,
        "num_seeds": len(scores),
        "published_seeds": 1,
        "train_rows": int(group["train_rows"].iloc[0]) if found else None,
        "eval_rows": int(group["eval_rows"].iloc[0]) if found else None,
        "source": group["source"].iloc[0] if found else None,
        "status": "measured" if found else missing,
        "valid_loss": None,
    }


def _perplexity(group: pd.DataFrame | None, original: pd.DataFrame | None, missing: str) -> dict:
    """The MLM cell's columns from the pre-training runs of the row and of the original model."""
    found = group is not None
    values = group["perplexity"] if found else pd.Series(dtype=float)
    both = found and original is not None
    error = paired_std_error(_by_seed(group, "perplexity"), _by_seed(original, "perplexity")) if both else None
    return {
        "metric": "perplexity",
        "obtained_mean": values.mean() if found else None,
        "obtained_std": values.std(ddof=1) if len(values) > 1 else None,
        "difference_std_error": error,
        "majority_score": None,
        "num_seeds": len(values),
        "published_seeds": 0,
        "train_rows": None,
        "eval_rows": None,
        "source": group["source"].iloc[0] if found else None,
        "status": "measured" if found else missing,
        "valid_loss": group["valid_loss"].mean() if found else None,
    }


def _by_seed(rows: pd.DataFrame, column: str = "score") -> pd.Series:
    """Values indexed by seed, or by both seeds where pre-training had several too."""
    rows = rows if "seed" in rows else rows.assign(seed=0)
    both = "pretraining_seed" in rows and rows["pretraining_seed"].notna().all()
    seeds = (
        [(p, s) for p, s in zip(rows["pretraining_seed"], rows["seed"], strict=True)] if both else list(rows["seed"])
    )
    return pd.Series(rows[column].to_numpy(dtype=float), index=pd.Index(seeds, tupleize_cols=False))


def _groups(rows: pd.DataFrame, keys: list[str]) -> dict[tuple, pd.DataFrame]:
    """Rows by `keys` in order of appearance, with None for the original model's Nb and Ndiv."""
    if not len(rows):
        return {}
    groups = _nullable(rows).groupby(keys, dropna=False, sort=False)
    return {tuple(_plain(part) for part in key): group for key, group in groups}


def _plain(part):
    if pd.isna(part):
        return None
    return part if isinstance(part, str) else int(part)


def _number(text) -> int | None:
    return None if str(text) == "original" else int(text)
