"""Results of training as tables: loss curves, accuracy of every run, and Table III with the published values beside.

Pure functions of results and frames; the published values come in as a frame.
"""

import math
from collections.abc import Iterable

import pandas as pd

from detransformer.training.data.tasks import TASKS

MARGIN = 1.0  # points above the most frequent label that count as learned
ROW_COLUMNS = ["model", "num_original_layers", "num_divisions"]
PUBLISHED_COLUMNS = {
    "CoLA": "cola_mcc",
    "SST-2": "sst2_acc",
    "MRPC": "mrpc_acc",
    "MNLI": "mnli_acc",
    "SQuAD": "squad_acc",
}
SHOWN_METRIC = {"CoLA": "mcc", "SST-2": "accuracy", "MRPC": "accuracy", "MNLI": "accuracy", "SQuAD": "exact_match"}


def loss_table(results: Iterable) -> pd.DataFrame:
    """One row a pre-training step of each `PretrainResult`: row, Nb, Ndiv, step, tokens, train_loss."""
    frames = []
    for result in results:
        frame = result.history.copy()
        frame.insert(0, "row", result.row.label)
        frame.insert(1, "num_original_layers", result.row.num_original_layers)
        frame.insert(2, "num_divisions", result.row.num_divisions)
        frames.append(frame)
    return _nullable(pd.concat(frames, ignore_index=True))


def pretraining_table(results: Iterable) -> pd.DataFrame:
    """One row a pre-trained model: what it saw, its held-out loss, and the scale in words."""
    return _nullable(
        pd.DataFrame(
            {
                "row": r.row.label,
                "model": r.row.model,
                "num_original_layers": r.row.num_original_layers,
                "num_divisions": r.row.num_divisions,
                "hidden_size": r.hidden_size,
                "num_steps": r.num_steps,
                "tokens": r.tokens,
                "first_loss": r.history["train_loss"].iloc[0],
                "last_loss": r.history["train_loss"].tail(10).mean(),
                "valid_loss": r.valid_loss,
                "perplexity": math.exp(min(r.valid_loss, 700.0)),
                "valid_tokens": r.valid_tokens,
                "seconds": r.seconds,
                "source": r.source,
                "note": r.note,
            }
            for r in results
        )
    )


def accuracy_table(records: list[dict]) -> pd.DataFrame:
    """One row a fine-tuning run: the model, task, seed, score (times 100) and where the rows came from."""
    columns = [
        *ROW_COLUMNS,
        "task",
        "metric",
        "seed",
        "score",
        "majority_score",
        "accuracy",
        "mcc",
        "exact_match",
        "f1",
        "train_loss",
    ]
    columns += ["num_steps", "train_rows", "eval_rows", "seconds", "source", "note", "pretraining"]
    return _nullable(pd.DataFrame(records).reindex(columns=columns))


def table_iii(runs: pd.DataFrame, published: pd.DataFrame, profile: str = "") -> pd.DataFrame:
    """Table III, one row a published cell: obtained mean and standard deviation over seeds, or why there is none.

    Args:
        runs: `accuracy_table`'s rows.
        published: the paper's table (data/expected/table_iii.csv).
        profile: named in the status of cells that were not run.
    """
    missing = "not run" + (f" (profile {profile})" if profile else "")
    keyed = runs.assign(**{name: runs[name].astype("Int64") for name in ROW_COLUMNS[1:]})
    groups = dict(tuple(keyed.groupby([*ROW_COLUMNS, "task"], dropna=False))) if len(runs) else {}
    groups = {tuple(None if pd.isna(part) else part for part in key): group for key, group in groups.items()}
    rows = []
    for _, line in published.iterrows():
        structure = [_number(line["num_original_layers_nb"]), _number(line["num_divisions_ndiv"])]
        for task in TASKS:
            group = groups.get((line["model"], *structure, task))
            found = group is not None
            scores = group["score"] if found else pd.Series(dtype=float)
            rows.append(
                {
                    "model": line["model"],
                    "num_original_layers": structure[0],
                    "num_divisions": structure[1],
                    "task": task,
                    "metric": group["metric"].iloc[0] if found else SHOWN_METRIC[task],
                    "published": float(line[PUBLISHED_COLUMNS[task]]),
                    "obtained_mean": scores.mean() if found else None,
                    "obtained_std": scores.std(ddof=1) if len(scores) > 1 else None,
                    "majority_score": group["majority_score"].iloc[0] if found else None,
                    "num_seeds": len(scores),
                    "train_rows": int(group["train_rows"].iloc[0]) if found else None,
                    "eval_rows": int(group["eval_rows"].iloc[0]) if found else None,
                    "source": group["source"].iloc[0] if found else None,
                    "status": "measured" if found else missing,
                }
            )
    frame = _nullable(pd.DataFrame(rows))
    floats = ["obtained_mean", "obtained_std", "majority_score"]
    return frame.astype({name: float for name in floats} | {"train_rows": "Int64", "eval_rows": "Int64"})


def table_note(runs: pd.DataFrame) -> str:
    """What stands under Table III: scale, data and rows in words."""
    lines = [f"Pre-training: {'; '.join(dict.fromkeys(runs['pretraining']))}."]
    for task, group in runs.groupby("task", sort=False):
        lines.append(f"{task}: {group['note'].iloc[0]}; seeds {group['seed'].nunique()}.")
    weak = [task for task, group in runs.groupby("task", sort=False) if not learned(group).any()]
    if weak:
        lines.append(f"No better than the most frequent label at this scale, so without meaning: {', '.join(weak)}.")
    lines.append("SQuAD: the paper says Acc; shown is exact match, F1 is in accuracy_runs.")
    return "\n".join(lines)


def learned(rows: pd.DataFrame) -> pd.Series:
    """Whether each row's score is above what the most frequent label scores."""
    scores = rows["score"] if "score" in rows else rows["obtained_mean"]
    return scores > rows["majority_score"] + MARGIN


def mean_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Decoupled minus original in points, over the tasks that the original learned: one row a measured decoupled model.

    Columns claim, expected (published), obtained (None where no task was learned), tasks.
    """
    measured = table[table["status"] == "measured"]
    rows = []
    for keys, group in measured[measured["num_original_layers"].notna()].groupby(ROW_COLUMNS, sort=False):
        original = measured[(measured["model"] == keys[0]) & measured["num_original_layers"].isna()]
        tasks = list(original.loc[learned(original), "task"])
        pairs = group.merge(original, on="task", suffixes=("", "_original"))
        pairs = pairs[pairs["task"].isin(tasks)] if tasks else pairs
        expected = (pairs["published"] - pairs["published_original"]).mean()
        obtained = (pairs["obtained_mean"] - pairs["obtained_mean_original"]).mean() if tasks else None
        claim = f"{keys[0]} Nb={keys[1]}, Ndiv={keys[2]} minus original, points"
        rows.append({"claim": claim, "expected": expected, "obtained": obtained, "tasks": ", ".join(tasks) or "none"})
    return pd.DataFrame(rows, columns=["claim", "expected", "obtained", "tasks"])


def _number(text) -> int | None:
    return None if str(text) == "original" else int(text)


def _nullable(frame: pd.DataFrame) -> pd.DataFrame:
    """Nb and Ndiv as whole numbers, empty for the original model."""
    return frame.astype({"num_original_layers": "Int64", "num_divisions": "Int64"})
