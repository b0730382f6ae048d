"""Booster: sub-models calibrated one after the other by distillation (CoFormer 2025, Algorithm 1, lines 12 to 15).

Each training sample i of M has a weight w_i. Sub-model n is trained on Eq. 14,

    L_i = 1/2 [CE(student, y_i) + CE(student, y_t,i)],   the batch's mean of w_i L_i,

with y_t the large model's own decision (DeiT's hard distillation). Its losses then update the weights, Eq. 13:

    w_i <- w_i exp[(1/M - 1) L_i].

As printed, samples that a sub-model gets wrong weigh less for the next one, which is the opposite of boosting
(docs/findings.md, "CoFormer's equations"). So the rule is a choice (`RULES`):

    "boosting"   the sign reversed: hard samples weigh more. L is measured in ln C, the cost of guessing among C
                 classes, and cut at 1, so that one round raises a sample at most e times over another. The default.
    "published"  Eq. 13 as printed, with L before its weight.
    "none"       all weights stay: the sub-models are distilled independently of each other.

Weights start at 1 and are normalised to mean 1, where the paper starts at 1/M and states no normalisation: their ratios
are the same, and the size of the loss does not depend on M.
"""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from detransformer.coformer.outputs import collect_outputs, weights_hash
from detransformer.coformer.tasks import BoostTask
from detransformer.training.config import PRECISIONS, StepRecipe, config_hash, not_negative, one_of, positive
from detransformer.training.loop import Run, fit, micro_batches
from detransformer.training.results import Result, as_result, read_result, write_result

RULES = ("boosting", "published", "none")
TARGETS = ("hard", "soft")
TEMPERATURE = 2.0  # of soft targets


@dataclass(frozen=True, kw_only=True)
class BoostConfig(StepRecipe):
    """How each sub-model is calibrated; sub-model n has its own order of samples.

    Args:
        rule: how weights are updated, one of `RULES` (see the module).
        target: the large model's `"hard"` decision (Eq. 14), or its `"soft"` probabilities instead (Hinton et al.
            2015: `TEMPERATURE` squared times the divergence).
    """

    learning_rate: float = positive(5e-4)
    weight_decay: float = not_negative(0.05)
    rule: str = one_of("boosting", RULES)
    target: str = one_of("hard", TARGETS)
    mixed_precision: str = one_of("auto", PRECISIONS)


def update_weights(weights: np.ndarray, losses: np.ndarray, rule: str, num_classes: int) -> np.ndarray:
    """The weights [M] of mean 1 for the next sub-model (Eq. 13), from the last one's weights and losses [M]."""
    losses, decay = losses.astype(np.float64), 1 / len(weights) - 1  # about -1
    if rule == "none":
        return weights
    if rule == "published":
        exponents = decay * (losses - losses.min())  # else large losses would make all weights vanish
    else:
        exponents = -decay * np.minimum(losses / math.log(num_classes), 1.0)
    updated = weights * np.exp(exponents)
    return updated / updated.mean()


def sample_losses(
    logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor, target: str = "hard"
) -> torch.Tensor:
    """L_i of Eq. 14 before its weight: logits and teacher_logits [B, C], labels [B] -> [B], in float32."""
    logits, teacher_logits = logits.float(), teacher_logits.float()
    truth = F.cross_entropy(logits, labels, reduction="none")
    if target == "hard":
        taught = F.cross_entropy(logits, teacher_logits.argmax(-1), reduction="none")
    else:
        ours, theirs = (F.log_softmax(x / TEMPERATURE, dim=-1) for x in (logits, teacher_logits))
        taught = TEMPERATURE**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return (truth + taught) / 2


class BoostLoss(nn.Module):
    """A sub-model and the mean of w_i L_i as one module."""

    def __init__(self, model: nn.Module, target: str):
        super().__init__()
        self.model, self.target = model, target

    def forward(self, labels, teacher_logits, sample_weights, **inputs) -> torch.Tensor:
        losses = sample_losses(self.model(**inputs).logits, labels, teacher_logits, self.target)
        return (sample_weights * losses).mean()


def boost(
    sub_models: Sequence[PreTrainedModel],
    teacher: PreTrainedModel,
    task: BoostTask,
    config: BoostConfig,
    output_dir: str | Path,
) -> list[Result]:
    """Calibrates each sub-model in turn into `output_dir/sub-model-N-*/` (model/, history.csv, result.json).

    The given models are not changed. A finished sub-model is not trained again unless something it depends on has
    changed (its first weights, the large model's decisions, task, configuration and, unless the rule is `"none"`, the
    sub-models before it); an interrupted one is resumed.

    Args:
        sub_models: models with `.logits` [B, C], in the order of calibration, as they were decomposed.
        teacher: the large model, fine-tuned on the task, with its classes.

    Returns:
        For each sub-model: number, model (calibrated, in eval mode), task.

    Raises:
        ValueError: for damaged files, or a loss that is not finite.
    """
    (taught,) = collect_outputs([teacher], task, "train", output_dir).logits
    said = (taught.argmax(-1) if config.target == "hard" else taught).numpy()
    before = config_hash("calibration", config, task.name, task.fingerprint, hashlib.sha256(said).hexdigest())
    weights, results = np.ones(len(task.train_labels)), []
    for number, sub_model in enumerate(sub_models, start=1):
        identity = config_hash(before, number, weights_hash(sub_model))
        run = Run(f"sub-model {number}", Path(output_dir) / f"sub-model-{number}-{identity[:6]}", identity)
        record = read_result(run) or _calibrate(sub_model, number, taught, weights, task, config, run)
        model = type(sub_model).from_pretrained(run.folder / "model").eval()
        results.append(as_result(run, record, model=model))
        if config.rule != "none":
            said_now = collect_outputs([model], task, "train", output_dir)
            losses = sample_losses(said_now.logits[0], said_now.labels, taught, config.target).numpy()
            weights = update_weights(weights, losses, config.rule, task.num_classes)
            before = identity
    return results


def _calibrate(sub_model, number, taught, weights, task, config, run: Run) -> dict:
    model, seed = copy.deepcopy(sub_model), config.seed + number - 1
    sample_weights = torch.from_numpy(weights).float()

    def train_batch(index: int, batch_size: int) -> dict[str, torch.Tensor]:
        batch = task.train_batch(seed, index, batch_size)
        rows = batch.pop("rows")
        return batch | {"teacher_logits": taught[rows], "sample_weights": sample_weights[rows]}

    set_seed(seed + 1)  # dropout
    trained = fit(BoostLoss(model, config.target), micro_batches(train_batch, config), config, config.num_steps, run)
    record = {"number": number, "task": task.name, "config": dataclasses.asdict(config)}
    return write_result(run, trained, record, "samples", config.global_batch_size, model.save_pretrained)
