"""What a finished training run leaves in its folder: model/, history.csv, and result.json to find it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from detransformer.files import atomic_folder, atomic_write
from detransformer.training.loop import Progress, Run


def read_result(run: Run) -> dict | None:
    """The record of the run's result.json; None where it is not finished, or another run's.

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
    """Writes what is to stay, result.json last since it says that all is there; the checkpoint goes.

    Args:
        record: what is known of the run; identity and seconds are added.
        unit, per_step: history.csv has a row a step: step, `unit` (tokens, images, ..) seen so far, train_loss.
        save: each writes its part of the model into the folder given; without any no model is kept.

    Returns:
        The record as it was written.
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
    """A finished run: what its result.json says, an attribute each, `identity` and `seconds` among them.

    Beside these stand `checkpoint`, the Hugging Face folder of its model, and `history`, a frame with a row a step.
    """


def as_result(run: Run, record: dict, **known) -> Result:
    """The run of `record` (its result.json); what is `known` stands for what the record says."""
    made = {"checkpoint": run.folder / "model", "history": pd.read_csv(run.folder / "history.csv")}
    return Result(**record | made | known)
