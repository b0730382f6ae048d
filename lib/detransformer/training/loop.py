"""The one training loop: trains a module whose forward pass is its loss by a recipe, and resumes after interruptions.

Data position and learning rate are functions of the step, and dropout's random state is in the checkpoint, so an
interrupted run ends like an uninterrupted one. SIGINT and SIGTERM take effect between two steps, after a checkpoint.
"""

import math
import multiprocessing
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from detransformer.machine import keep_freed_memory
from detransformer.training.config import Recipe, StepRecipe
from detransformer.training.hardware import place
from detransformer.training.optim import MasterWeights, learning_rate, make_optimizer

Batches = Callable[[int], Iterable[tuple[float, dict[str, torch.Tensor]]]]  # step -> its (share, micro-batch) pairs


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        title: of the progress bar and of errors.
        folder: the run's folder; checkpoints are in `folder/checkpoint`. None keeps none.
        identity: hash of all that makes the run; a checkpoint of another run is not resumed.
    """

    title: str
    folder: Path | None = None
    identity: str = ""


class Objective(nn.Module):
    """A model and its loss as one module: `loss(model, **batch)` is the mean loss of a micro-batch."""

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model, **batch)


class Progress:
    """What `fit` returns: the loss of each step and the total seconds; saved with a checkpoint."""

    def __init__(self):
        self.seconds, self.losses = 0.0, []

    @property
    def step(self) -> int:
        return len(self.losses)

    def state_dict(self) -> dict:
        return {"seconds": self.seconds, "losses": list(self.losses)}

    def load_state_dict(self, state: dict) -> None:
        self.seconds, self.losses = state["seconds"], list(state["losses"])


def fit(objective: nn.Module, batches: Batches, recipe: Recipe, num_steps: int, run: Run) -> Progress:
    """Trains `objective.model` in place and leaves it in float32.

    Args:
        objective: an `Objective`, or another module of that form.
        batches: a step's micro-batches as a function of its number; the shares of a step add up to 1.
        recipe: optimizer, schedule, clipping, number format, seconds between checkpoints.
        run: its title, and where its checkpoints are; its last checkpoint is resumed.

    Raises:
        ValueError: if the loss is not finite, a checkpoint is damaged, or several processes were launched together.
    """
    keep_freed_memory()
    model = objective.model
    place(model, recipe.mixed_precision)  # first: accelerate would wait for other processes
    accelerator = Accelerator(mixed_precision="no")  # one for the process: it would refuse another for the next run
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.mixed_precision == "bf16")
    copies = MasterWeights(model) if recipe.mixed_precision == "bf16-weights" else None
    progress = Progress()
    weights = model.parameters() if copies is None else copies.copies
    names = (name for name, _ in model.named_parameters())
    optimizer = make_optimizer(zip(names, weights, strict=True), recipe)
    if copies is not None:
        copies.attach(optimizer)
        accelerator.register_for_checkpointing(copies)
    accelerator.register_for_checkpointing(progress)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    checkpoints = None if run.folder is None else Checkpoints(run.folder / "checkpoint", run.identity, accelerator)
    if checkpoints is not None:
        checkpoints.resume()
    objective.train()
    silent = multiprocessing.parent_process() is not None  # of runs side by side only the parent shows a bar
    bar = tqdm(
        total=num_steps, initial=progress.step, desc=run.title, unit="step", mininterval=1.0, leave=None, disable=silent
    )
    with bar, _signals() as signals:
        while progress.step < num_steps and not signals:
            start_s, loss = time.perf_counter(), torch.zeros((), device=accelerator.device)
            rate = learning_rate(progress.step, num_steps, recipe.learning_rate, recipe.warmup, recipe.decay_power)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for share, batch in batches(progress.step):
                batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                with autocast:
                    part = objective(**batch) * share
                accelerator.backward(part)
                loss += part.detach()
            if recipe.max_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            model.zero_grad()
            progress.losses.append(loss.item())
            progress.seconds += time.perf_counter() - start_s
            if not math.isfinite(progress.losses[-1]):
                raise ValueError(
                    f"{run.title}: the loss is {progress.losses[-1]} at step {progress.step}; lower "
                    f"learning_rate={recipe.learning_rate}, or look for inputs that are not finite."
                )
            bar.update()
            bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", refresh=False)
            if checkpoints is not None and (signals or checkpoints.age_s >= recipe.checkpoint_every_s):
                checkpoints.save(progress.step)
    if signals:
        signal.raise_signal(signals[0])
    if copies is not None:
        copies.restore_float32()
    return progress


def micro_batches(train_batch: Callable[[int, int], dict[str, torch.Tensor]], recipe: StepRecipe) -> Batches:
    """The stream `train_batch(number, size)`, in equal micro-batches of each step."""
    count = recipe.num_micro_batches

    def of_step(step: int) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
        for number in range(step * count, (step + 1) * count):
            yield 1 / count, train_batch(number, recipe.micro_batch_size)

    return of_step


class Checkpoints:
    """Model, optimizer, random states and progress as accelerate saves them, in `folder/IDENTITY-STEP`.

    A checkpoint is written under another name and renamed when complete; then the one before it is deleted.
    """

    def __init__(self, folder: Path, identity: str, accelerator: Accelerator):
        self.folder, self.identity, self.accelerator = folder, identity, accelerator
        self._last_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self._last_s

    def save(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        before = list(self.folder.iterdir())
        new = self.folder / "new"
        shutil.rmtree(new, ignore_errors=True)
        self.accelerator.save_state(str(new), safe_serialization=False)  # tied weights stay tied
        new.rename(self.folder / f"{self.identity}-{step}")
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
        self._last_s = time.monotonic()

    def resume(self) -> None:
        """Loads the last checkpoint of this run, if there is one.

        Raises:
            ValueError: if it is damaged.
        """
        saved = self.folder.glob(f"{self.identity}-*")
        last = max(saved, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        if last is None:
            return
        try:
            self.accelerator.load_state(str(last))
        except Exception as error:  # torch and pickle each have their own
            raise ValueError(
                f"checkpoint {last} cannot be read ({type(error).__name__}): delete that folder to start again."
            ) from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs; does nothing in a thread that may not handle signals."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame) -> None:
        received.append(number)
        signal.signal(number, before[number])  # a second signal takes effect at once

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
