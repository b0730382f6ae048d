"""Booster: sub-models calibrated one after the other by distillation (CoFormer 2025, Algorithm 1, lines 12 to 15).

Each training sample i of M has a weight w_i. Sub-model n is trained on Eq. 14,

    L_i = 1/2 [CE(student, y_i) + CE(student, y_t,i)],   the batch's mean of w_i L_i,

with y_t the large model's own decision (DeiT's hard distillation), and the weights are updated by its losses, Eq. 13:

    w_i <- w_i exp[(1/M - 1) L_i].

As printed, samples that a sub-model gets wrong weigh less for the next one, which is the opposite of boosting
(docs/findings.md, "CoFormer's equations"). The rule is therefore a choice (`RULES`):

    "boosting"   the sign turned: hard samples weigh more. L is measured in ln C, what guessing among C classes costs,
                 and cut at 1, so that one round raises a sample exp(strength) times over another at most. The default.
    "published"  Eq. 13 as printed, with L before its weight.
    "none"       all weights stay: the sub-models are distilled independently of each other.

Weights start at 1 and are normalised to mean 1, where the paper starts at 1/M and states no normalisation: their ratios
are the same, and the loss keeps its size whatever M is.
"""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from detransformer.coformer.tasks import BoostTask
from detransformer.files import atomic_write
from detransformer.training.config import (
    PRECISIONS,
    StepRecipe,
    config_hash,
    not_negative,
    one_of,
    positive,
)
from detransformer.training.hardware import place, resolve_precision
from detransformer.training.loop import Run, fit, micro_batches
from detransformer.training.results import as_result, read_result, write_result

RULES = ("boosting", "published", "none")
TARGETS = ("hard", "soft")
UNRELATED = ("_name_or_path", "architectures", "transformers_version", "dtype")  # to what a configuration computes


@dataclass(frozen=True, kw_only=True)
class BoostConfig(StepRecipe):
    """How each sub-model is calibrated; sub-model n has its own order of samples.

    Args:
        rule: of the weights, see the module; one of `RULES`.
        strength: of `"boosting"`: how far one round may raise a sample, as an exponent.
        target: the large model's `"hard"` decision (Eq. 14), or its `"soft"` probabilities in place of it (Hinton et
            al. 2015: temperature squared times the divergence).
        temperature: of soft targets.
    """

    learning_rate: float = positive(5e-4)
    weight_decay: float = not_negative(0.05)
    rule: str = one_of("boosting", RULES)
    strength: float = positive(1.0)
    target: str = one_of("hard", TARGETS)
    temperature: float = positive(2.0)
    mixed_precision: str = one_of("auto", PRECISIONS)


@dataclass(frozen=True)
class BoostResult:
    """A calibrated sub-model: `checkpoint` is a Hugging Face model folder, `history` has a row a step.

    `score` is of the test samples, `train_loss` the mean of L_i over all training samples after calibration,
    `agreement` the share of them (times 100) decided as the large model does; `weight_range` and `effective_rows`,
    (sum w)^2 / sum w^2, describe the weights it was trained with.
    """

    number: int
    checkpoint: Path
    history: pd.DataFrame
    score: float
    metric: str
    train_loss: float
    agreement: float
    weight_range: tuple[float, float]
    effective_rows: float
    num_steps: int
    num_parameters: int
    seconds: float
    rule: str
    target: str
    seed: int
    precision: str
    task: str
    identity: str


def update_weights(
    weights: np.ndarray,
    losses: np.ndarray,
    rule: str,
    num_classes: int,
    strength: float = 1.0,
    normalise: bool = True,
) -> np.ndarray:
    """The weights [M] for the next sub-model (Eq. 13), from those of the last one and its losses [M].

    Args:
        normalise: to mean 1; without it, `"published"` is Eq. 13 to the letter.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown: choose one of {', '.join(RULES)}.")
    if not np.isfinite(losses).all():
        raise ValueError(f"{int((~np.isfinite(losses)).sum())} of {len(losses)} losses are not finite: train again.")
    weights, losses = np.asarray(weights, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    decay = 1 / len(weights) - 1  # about -1
    if rule == "published":
        # The largest factor is 1 before normalisation, which the subtraction changes by a common factor only.
        exponents = decay * (losses - losses.min() if normalise else losses)
    elif rule == "boosting":
        exponents = -decay * strength * np.minimum(losses / math.log(num_classes), 1.0)
    else:
        exponents = np.zeros_like(losses)
    updated = weights * np.exp(exponents)
    return updated / updated.mean() if normalise else updated


def sample_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: str = "hard",
    temperature: float = 2.0,
) -> torch.Tensor:
    """L_i of Eq. 14 before its weight: logits and teacher_logits [B, C], labels [B] -> [B], in float32."""
    logits, teacher_logits = logits.float(), teacher_logits.float()
    truth = F.cross_entropy(logits, labels, reduction="none")
    if target == "hard":
        taught = F.cross_entropy(logits, teacher_logits.argmax(-1), reduction="none")
    else:
        ours, theirs = (F.log_softmax(x / temperature, dim=-1) for x in (logits, teacher_logits))
        taught = temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return (truth + taught) / 2


class BoostLoss(nn.Module):
    """A sub-model and the mean of w_i L_i as one module."""

    def __init__(self, model: nn.Module, config: BoostConfig):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, labels, teacher_logits, sample_weights, **inputs) -> torch.Tensor:
        logits = self.model(**inputs).logits
        losses = sample_losses(logits, labels, teacher_logits, self.config.target, self.config.temperature)
        return (sample_weights * losses).mean()


class WeightedBatches:
    """A task's training batches with labels, the large model's logits [M, C] and weights [M]."""

    def __init__(self, task: BoostTask, teacher_logits: np.ndarray, weights: np.ndarray, seed: int):
        self.task, self.seed = task, seed
        self.labels, self.teacher_logits = torch.from_numpy(task.train_labels), torch.from_numpy(teacher_logits)
        self.weights = torch.from_numpy(weights).float()

    def train_batch(self, index: int, batch_size: int) -> dict[str, torch.Tensor]:
        batch = self.task.train_batch(self.seed, index, batch_size)
        rows = torch.from_numpy(batch.rows)
        return batch.inputs | {
            "labels": self.labels[rows],
            "teacher_logits": self.teacher_logits[rows],
            "sample_weights": self.weights[rows],
        }


def boost(
    sub_models: Sequence[PreTrainedModel],
    teacher: PreTrainedModel,
    task: BoostTask,
    config: BoostConfig,
    output_dir: str | Path,
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[BoostResult]:
    """Calibrates each sub-model in turn into `output_dir/sub-model-N-*/` (model/, history.csv, result.json).

    The models given stay as they are; `load_calibrated` reads the calibrated ones. A finished sub-model is not trained
    again as long as nothing it depends on has changed (its first weights, the large model's, task, configuration and,
    unless the rule is `"none"`, the sub-models before it); an interrupted one goes on.

    Args:
        sub_models: models with `.logits` [B, C], in the order of calibration, as they were decomposed.
        teacher: the large model, fine-tuned on the task.
        on_step: `on_step(number, step, loss)` is called after each step of sub-model `number`, from 1.

    Raises:
        ValueError: without sub-models, for damaged files, or a loss that is not finite.
    """
    if not sub_models:
        raise ValueError("there are no sub-models to calibrate: decompose the large model first.")
    precision = resolve_precision(config.mixed_precision)
    resolved = dataclasses.replace(config, mixed_precision=precision)
    taught = teacher_logits(teacher, task, Path(output_dir), precision)
    decided = taught.argmax(-1)
    said = decided if config.target == "hard" else taught
    base = config_hash("boost", resolved, task.name, task.fingerprint, hashlib.sha256(said).hexdigest())
    weights, before, results = np.ones(len(task.train_labels)), base, []
    for number, sub_model in enumerate(sub_models, start=1):
        identity = config_hash(before, number, weights_hash(sub_model))
        folder = Path(output_dir) / f"sub-model-{number}-{identity[:6]}"
        report = None if on_step is None else partial(on_step, number)
        run = Run(f"sub-model {number}", folder, identity, report)
        record = read_result(run)
        if record is None:
            record = _calibrate(sub_model, number, taught, weights, task, resolved, run)
        results.append(as_result(BoostResult, run, record, weight_range=tuple(record["weight_range"])))
        if config.rule != "none":
            losses = _read_array(folder / "losses.npz", "losses", weights.shape, f"delete {folder}")
            weights = update_weights(weights, losses, config.rule, task.num_classes, config.strength)
            before = identity
    return results


def _calibrate(sub_model, number, taught, weights, task, config, run: Run) -> dict:
    model = copy.deepcopy(sub_model)
    seed = config.seed + number - 1
    batches = micro_batches(WeightedBatches(task, taught, weights, seed).train_batch, config)
    set_seed(seed + 1)  # dropout
    trained = fit(BoostLoss(model, config), batches, config, config.num_steps, run)
    ours = predict(model, task, "train")  # in the number format it was trained in, which is the fast one
    losses = sample_losses(
        *(torch.from_numpy(array) for array in (ours, task.train_labels, taught)), config.target, config.temperature
    ).numpy()
    score = task.score(predict(model, task, "test").argmax(-1))
    trained.restore_float32()
    record = {
        "number": number,
        "score": score,
        "metric": task.metric,
        "train_loss": float(losses.mean()),
        "agreement": 100 * float((ours.argmax(-1) == taught.argmax(-1)).mean()),
        "weight_range": [float(weights.min()), float(weights.max())],
        "effective_rows": float(weights.sum() ** 2 / (weights**2).sum()),
        "num_steps": config.num_steps,
        "num_parameters": model.num_parameters(),
        "rule": config.rule,
        "target": config.target,
        "seed": config.seed,
        "precision": config.mixed_precision,
        "task": task.name,
        "config": dataclasses.asdict(config),
    }
    with atomic_write(run.folder / "losses.npz", "wb") as file:
        np.savez(file, losses=losses.astype(np.float32))
    return write_result(run, trained, record, "samples", config.global_batch_size, model.save_pretrained)


def load_calibrated(results: Sequence[BoostResult], sub_models: Sequence[PreTrainedModel]) -> list[PreTrainedModel]:
    """The calibrated models of `results`, of the classes of `sub_models`, in eval mode."""
    pairs = zip(results, sub_models, strict=True)
    return [type(sub_model).from_pretrained(result.checkpoint).eval() for result, sub_model in pairs]


@torch.no_grad()
def predict(model: nn.Module, task: BoostTask, split: str, batch_size: int = 250) -> np.ndarray:
    """Logits float32 [N, C] of all samples of `split`, by number, in the model's own number format."""
    labels = getattr(task, f"{split}_labels")
    logits = np.empty((len(labels), task.num_classes), dtype=np.float32)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    with tqdm(total=len(labels), desc=f"{task.name} {split}", unit="sample", leave=False) as bar:
        for batch in task.ordered_batches(split, batch_size):
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            logits[batch.rows] = model(**inputs).logits.float().cpu().numpy()
            bar.update(len(batch.rows))
    model.train(was_training)
    return logits


def teacher_logits(teacher: PreTrainedModel, task: BoostTask, folder: Path, precision: str = "no") -> np.ndarray:
    """The large model's logits [M, C] of all training samples: computed once, then kept in `folder/teacher-*.npz`.

    Raises:
        ValueError: for another number of classes than the task's, or a damaged file.
    """
    if teacher.config.num_labels != task.num_classes:
        raise ValueError(
            f"the large model tells {teacher.config.num_labels} classes apart, {task.name} has {task.num_classes}: "
            "fine-tune it on this task first."
        )
    key = config_hash("teacher", weights_hash(teacher), task.name, task.fingerprint, precision)
    path = folder / f"teacher-{key}.npz"
    if not path.exists():
        model = copy.deepcopy(teacher)
        place(model, precision)
        if precision == "bf16-weights":
            model.to(torch.bfloat16)
        with atomic_write(path, "wb") as file:
            np.savez(file, logits=predict(model, task, "train"))
    return _read_array(path, "logits", (len(task.train_labels), task.num_classes), "delete it")


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits over a model's class, configuration and weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    if isinstance(model, PreTrainedModel):
        told = {name: value for name, value in model.config.to_dict().items() if name not in UNRELATED}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _read_array(path: Path, name: str, shape: tuple[int, ...], remedy: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file[name]
        if array.shape != shape:
            raise ValueError(f"{name} is {list(array.shape)}, not {list(shape)}")
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise ValueError(f"{path} is damaged ({error}): {remedy} and it is computed again.") from error
    return array
