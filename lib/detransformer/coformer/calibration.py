"""Calibration of a policy's sub-models, and their aggregator (CoFormer 2025, Algorithm 1, lines 11 to 16).

An aggregator is trained on the outputs of frozen sub-models, and scored with sub-models missing.

Shapes: B samples of a batch, M of a split, N sub-models, d_n their widths, C classes.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from detransformer.coformer.aggregator import Aggregator, make_aggregator
from detransformer.coformer.booster import BoostConfig, boost
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.outputs import Outputs, collect_outputs
from detransformer.coformer.policy import Policy
from detransformer.coformer.tasks import BoostTask
from detransformer.training.config import Recipe, checked, fraction, not_negative, positive
from detransformer.training.loop import Run, fit
from detransformer.training.results import Result


@dataclass(frozen=True, kw_only=True)
class AggregatorConfig(Recipe):
    """How an aggregator is trained on features of frozen sub-models.

    Args:
        num_epochs, batch_size: passes over all samples, samples in a step.
        label_smoothing: share of a label that is spread over all classes.
        drop: probability that a sub-model counts as missing, by sample; at least one stays. Training with it above 0
            loses less when a device fails.
    """

    num_epochs: float = positive(40.0)
    batch_size: int = positive(128)
    learning_rate: float = positive(3e-3)
    weight_decay: float = not_negative(0.05)
    max_grad_norm: float | None = positive(None)
    label_smoothing: float = fraction(0.0)
    drop: float = checked(0.0, lambda share: 0 <= share < 1, "is outside 0..1 (1 excluded): give less than 1")


class AggregatorLoss(nn.Module):
    """An aggregator and its mean cross-entropy as one module."""

    def __init__(self, model: Aggregator, label_smoothing: float):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, labels: torch.Tensor, present: torch.Tensor | None = None, **features) -> torch.Tensor:
        """labels [B], present [B, N] and features [B, d_n] of each sub-model, by its number -> mean loss."""
        logits = self.model(list(features.values()), present=present)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def train_aggregator(
    kind: str,
    outputs: Outputs,
    num_labels: int,
    config: AggregatorConfig,
    seed: int = 0,
    start: Aggregator | None = None,
) -> tuple[Aggregator, list[float]]:
    """An aggregator trained on the features and labels of `outputs`, in eval mode, and the loss of each step.

    `average` and `majority` have nothing to learn and are returned unchanged.

    Args:
        num_labels: C.
        start: a trained aggregator of this kind to continue from, e.g. with `drop` above 0; it is not changed.
    """
    set_seed(seed)
    aggregator = make_aggregator(kind, outputs.widths, num_labels) if start is None else copy.deepcopy(start)
    if not aggregator.learned:
        return aggregator.eval(), []
    aggregator.set_means(outputs.features)
    num_rows = len(outputs.labels)
    per_epoch = math.ceil(num_rows / config.batch_size)

    def batches(step: int) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
        epoch, number = divmod(step, per_epoch)
        order = np.random.default_rng([seed, 0, epoch]).permutation(num_rows)
        rows = torch.from_numpy(order[number * config.batch_size : (number + 1) * config.batch_size])
        batch = {"labels": outputs.labels[rows]} | {str(n): x[rows] for n, x in enumerate(outputs.features)}
        if config.drop:
            batch["present"] = random_presence(len(rows), len(outputs.features), config.drop, [seed, 1, step])
        yield 1.0, batch

    num_steps = max(1, round(config.num_epochs * per_epoch))
    objective = AggregatorLoss(aggregator, config.label_smoothing)
    trained = fit(objective, batches, config, num_steps, Run(f"{kind} aggregator"))
    return aggregator.cpu().eval(), trained.losses


def random_presence(num_rows: int, num_models: int, drop: float, seed: list[int]) -> torch.Tensor:
    """[B, N], each False with probability `drop`; if all of a row would be, one stays True."""
    rng = np.random.default_rng(seed)
    present = rng.random((num_rows, num_models)) >= drop
    kept = rng.integers(num_models, size=num_rows)
    nobody = ~present.any(1)
    present[nobody, kept[nobody]] = True
    return torch.from_numpy(present)


@torch.no_grad()
def ensemble_accuracy(aggregator: Aggregator, outputs: Outputs, present: Sequence[bool] | None = None) -> float:
    """Accuracy times 100 over the samples of `outputs`; `present` as in `Aggregator.forward`."""
    decided = aggregator(outputs.answers(aggregator), present).argmax(-1)
    return 100 * int((decided == outputs.labels).sum()) / len(outputs.labels)


def missing_table(aggregator: Aggregator, outputs: Outputs) -> pd.DataFrame:
    """Accuracy with all sub-models and without each: columns missing (0 for none, else from 1) and accuracy."""
    num = len(aggregator.widths)
    present = [[number != missing for number in range(1, num + 1)] for missing in range(num + 1 if num > 1 else 1)]
    accuracies = [ensemble_accuracy(aggregator, outputs, here) for here in present]
    return pd.DataFrame({"missing": range(len(present)), "accuracy": accuracies})


@dataclass(frozen=True)
class Calibrated:
    """Calibrated sub-models of one policy, and their aggregator.

    Args:
        boosted: the sub-models, in the devices' order.
        train, test: the sub-models' outputs for all samples.
        scores: each sub-model's own score on the test samples, by the task's metric, times 100.
        aggregator: of the requested kind.
        accuracy: the ensemble's on the test samples, times 100.
        held_out_accuracy: on training samples that nothing was trained on; NaN if the task holds none out.
    """

    boosted: list[Result]
    train: Outputs
    test: Outputs
    scores: list[float]
    aggregator: Aggregator
    accuracy: float
    held_out_accuracy: float


def calibrate_policy(
    model: PreTrainedModel,
    policy: Policy,
    task: BoostTask,
    boosting: BoostConfig,
    aggregation: AggregatorConfig,
    output_dir: str | Path,
    kind: str = "coformer",
) -> Calibrated:
    """Decomposes `model` by `policy`, boosts its sub-models, trains an aggregator; resumable, kept in `output_dir`.

    Args:
        kind: the aggregator's.

    Raises:
        ValueError: for a policy outside C1-C4, or as `boost`.
    """
    boosted = boost(decompose(model, policy), model, task, boosting, output_dir)

    def outputs(split: str) -> Outputs:
        return collect_outputs([result.model for result in boosted], task, split, output_dir)

    train, test = outputs("train"), outputs("test")
    scores = [task.score(logits.argmax(-1).numpy()) for logits in test.logits]
    aggregator, _ = train_aggregator(kind, train, task.num_classes, aggregation, boosting.seed)
    held_out = math.nan if task.held_labels is None else ensemble_accuracy(aggregator, outputs("held"))
    accuracy = ensemble_accuracy(aggregator, test)
    return Calibrated(boosted, train, test, scores, aggregator, accuracy, held_out)
