"""The files of a finished training run: model/, history.csv, and result.json to find it again.

Many runs make a table: of pre-trained models, and of fine-tuning. `tables.accuracy` compares their rows (Table III, its
noise).
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from detransformer.files import atomic_folder, atomic_write
from detransformer.training.loop import Progress, Run

ROW_COLUMNS = ["model", "num_original_layers", "num_divisions"]
VARIANT_COLUMNS = ["attention_width", "original_placement"]


def read_result(run: Run) -> dict | None:
    """The record of the run's result.json; None if it is not finished, or another run's.

    Raises:
        ValueError: if the file is damaged.
    """
    path = run.folder / "result.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: damaged ({error.msg}); delete it to train again.") from error
    return record if record.get("identity") == run.identity else None


def write_result(
    run: Run,
    trained: Progress,
    record: dict,
    unit: str,
    per_step: int,
    *save: Callable[[Path], object],
) -> dict:
    """Writes the files, result.json last since it marks the run as finished; then deletes the checkpoint.

    Args:
        record: facts about the run; identity and seconds are added.
        unit, per_step: history.csv has a row a step: step, `unit` (tokens, images, ..) seen so far, train_loss.
        save: each writes its part of the model into the given folder; without any, no model is kept.

    Returns:
        The record as written.
    """
    folder = run.folder
    record = {"identity": run.identity, **record, "seconds": round(trained.seconds, 3)}
    (folder / "result.json").unlink(missing_ok=True)
    if save:
        with atomic_folder(folder / "model") as temporary:
            for write in save:
                write(temporary)
    steps = range(1, len(trained.losses) + 1)
    history = {"step": steps, unit: [step * per_step for step in steps], "train_loss": trained.losses}
    with atomic_write(folder / "history.csv") as file:
        pd.DataFrame(history).to_csv(file, index=False)
    with atomic_write(folder / "result.json") as file:
        json.dump(record, file, indent=1)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return record


class Result(SimpleNamespace):
    """A finished run: the fields of its result.json as attributes, including `identity` and `seconds`.

    Also `checkpoint`, the Hugging Face folder of its model, and `history`, a frame with a row a step.
    """


def as_result(run: Run, record: dict, **known) -> Result:
    """The run of `record` (its result.json); `known` fields replace those of the record."""
    made = {"checkpoint": run.folder / "model", "history": pd.read_csv(run.folder / "history.csv")}
    return Result(**record | made | known)


# Tables -----------------------------------------------------------------------------------------------------------


def pretraining_table(results: Iterable[Result]) -> pd.DataFrame:
    """One row for each pre-trained model: structure, seed, data, speed, held-out loss, and the scale in words.

    unigram_loss and unigram_perplexity are those of word frequencies alone on the same held-out tokens.
    """
    frame = pd.DataFrame(vars(result) | vars(result.row) | {"row": result.row.label} for result in results)
    frame["first_loss"] = [history["train_loss"].iloc[0] for history in frame["history"]]
    frame["last_loss"] = [history["train_loss"].tail(10).mean() for history in frame["history"]]
    frame["tokens_per_s"] = frame["tokens"] / frame["seconds"]
    frame["perplexity"], frame["unigram_perplexity"] = np.exp(frame["valid_loss"]), np.exp(frame["unigram_loss"])
    columns = ["row", *ROW_COLUMNS, *VARIANT_COLUMNS, "seed", "hidden_size", "num_steps", "tokens", "first_loss"]
    columns += ["last_loss", "valid_loss", "unigram_loss", "perplexity", "unigram_perplexity", "valid_tokens"]
    return nullable(frame[[*columns, "seconds", "tokens_per_s", "precision", "source", "note"]])


def accuracy_table(records: list[dict]) -> pd.DataFrame:
    """One row for each fine-tuning run: the model, task, seed, score (times 100) and where the rows came from.

    Columns that only some runs have come last: the variant of the structure, the pre-training's seed, the number format
    of training, and `score_FORMAT`, the same trained model scored with that number format on the wire.
    """
    frame = pd.DataFrame(records)
    columns = ["row", *ROW_COLUMNS, "task", "metric", "seed", "score", "majority_score"]
    columns += ["accuracy", "mcc", "exact_match", "f1", "train_loss"]
    columns += ["num_steps", "train_rows", "eval_rows", "seconds", "source", "note", "pretraining"]
    optional = [*VARIANT_COLUMNS, "pretraining_seed", "precision"]
    optional += [name for name in frame.columns if name.startswith("score_")]
    return nullable(frame.reindex(columns=columns + [name for name in optional if name in frame]))


def nullable(frame: pd.DataFrame) -> pd.DataFrame:
    """Nb and Ndiv as whole numbers, empty for the original model."""
    return frame.astype({"num_original_layers": "Int64", "num_divisions": "Int64"})
