"""Checkpoints of a training run: model, optimizer, random states, step and history, replaced as a whole.

The data position and the learning rate are functions of the step, so nothing else is needed to go on exactly.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from detransformer.files import atomic_write


class Progress:
    """Where a run is: steps done, seconds spent, loss of each step. Saved by accelerate with the rest."""

    def __init__(self):
        self.step, self.seconds, self.losses = 0, 0.0, []

    def state_dict(self) -> dict:
        return {"step": self.step, "seconds": self.seconds, "losses": list(self.losses)}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds, self.losses = state["step"], state["seconds"], list(state["losses"])


class Checkpointer:
    """Saves every `every_s` seconds into `folder`, and finds the last whole checkpoint again.

    Args:
        identity: hash of what is trained; a checkpoint of something else is removed, not resumed.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, progress: Progress, every_s: float, identity: str):
        self.folder, self.accelerator, self.progress = folder, accelerator, progress
        self.every_s, self.identity = every_s, identity
        accelerator.register_for_checkpointing(progress)
        self._last_s = time.monotonic()

    def resume(self) -> bool:
        """Loads the last checkpoint of this very run; False if there is none."""
        old = self.folder.with_name(self.folder.name + ".old")
        if not self.folder.exists() and old.exists():  # stopped between the two renames of `save`
            if self.accelerator.is_main_process:
                old.rename(self.folder)
            self.accelerator.wait_for_everyone()
        name = self.folder / "identity.json"
        if not name.exists() or json.loads(name.read_text())["identity"] != self.identity:
            return False
        try:
            self.accelerator.load_state(str(self.folder))
        except Exception as error:  # torch, pickle and safetensors each have their own
            raise ValueError(
                f"checkpoint {self.folder} cannot be read ({type(error).__name__}): delete that folder to start again."
            ) from error
        return True

    def save_if_due(self) -> None:
        due = time.monotonic() - self._last_s >= self.every_s
        if self.accelerator.num_processes > 1:  # the main process decides for all
            due = bool(broadcast(torch.tensor(int(due), device=self.accelerator.device)).item())
        if due:
            self.save()

    def save(self) -> None:
        """Writes beside the old checkpoint, then takes its place: a stop at any moment leaves one whole."""
        main, new = self.accelerator.is_main_process, self.folder.with_name(self.folder.name + ".new")
        old = self.folder.with_name(self.folder.name + ".old")
        if main:
            shutil.rmtree(new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(new), safe_serialization=False)  # tied weights stay tied
        self.accelerator.wait_for_everyone()
        if main:
            (new / "identity.json").write_text(json.dumps({"identity": self.identity}))
            shutil.rmtree(old, ignore_errors=True)
            if self.folder.exists():
                self.folder.rename(old)
            new.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._last_s = time.monotonic()

    def remove(self) -> None:
        if self.accelerator.is_main_process:
            for suffix in ("", ".new", ".old"):
                shutil.rmtree(self.folder.with_name(self.folder.name + suffix), ignore_errors=True)


def read_result(path: Path, identity: str) -> dict | None:
    """The result at `path` if it is of this very run, else None.

    Raises:
        ValueError: if the file is damaged.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: damaged ({error.msg}); delete it to train again.") from error
    return result if result.get("identity") == identity else None


def write_result(path: Path, result: dict) -> None:
    with atomic_write(path) as file:
        json.dump(result, file, indent=1)


def as_result(kind: type, folder: Path, record: dict, **known):
    """`record` of result.json as a `kind`, a dataclass whose `checkpoint` is model/ and whose `history` is history.csv.

    Fields in `known` are not read from the record.
    """
    read = {"checkpoint": folder / "model", "history": pd.read_csv(folder / "history.csv")} | known
    return kind(**read, **{f.name: record[f.name] for f in dataclasses.fields(kind) if f.name not in read})


def write_history(folder: Path, progress: Progress, amount: str, per_step: int) -> None:
    """Writes history.csv, a row a step: step, `amount` (tokens, images, ..) so far, train_loss."""
    steps = range(1, len(progress.losses) + 1)
    history = {"step": steps, amount: [step * per_step for step in steps], "train_loss": progress.losses}
    with atomic_write(folder / "history.csv") as file:
        pd.DataFrame(history).to_csv(file, index=False)
