"""Aggregators trained on what frozen sub-models say, computed once, and scored with sub-models missing.

Shapes: B samples of a batch, M of a split, N sub-models, d_n their widths, C classes.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from detransformer.coformer.aggregator import (
    Aggregator,
    features_and_logits,
    make_aggregator,
    pool_features,
)
from detransformer.coformer.booster import weights_hash
from detransformer.coformer.tasks import BoostTask
from detransformer.files import atomic_write
from detransformer.training.config import Recipe, config_hash, fraction, not_negative, positive
from detransformer.training.loop import Run, fit

# What sub-models say, computed once ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """Pooled features [M, d_n] and logits [M, C] of each sub-model over the samples of a split, and the labels [M]."""

    features: list[torch.Tensor]
    logits: list[torch.Tensor]
    labels: torch.Tensor
    pooling: str = "mean"

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.features)

    @property
    def accuracies(self) -> list[float]:
        """Of each sub-model alone, times 100."""
        return [100 * float((logits.argmax(-1) == self.labels).float().mean()) for logits in self.logits]


@torch.no_grad()
def collect_outputs(
    sub_models: Sequence[PreTrainedModel],
    task: BoostTask,
    split: str,
    cache_dir: str | Path | None = None,
    batch_size: int = 250,
    pooling: str = "mean",
) -> Outputs:
    """What each sub-model says of every sample of `split` (`train`, `test` or `held`), float32, by number.

    Args:
        pooling: as in `pool_features`.
        cache_dir: where each sub-model's part is kept, and found again for the same weights and samples.

    Raises:
        ValueError: for a damaged file there.
    """
    labels = torch.from_numpy(getattr(task, f"{split}_labels"))
    parts = []
    for number, sub_model in enumerate(sub_models, start=1):
        path = None
        if cache_dir is not None:
            key = config_hash("outputs", weights_hash(sub_model), task.name, task.fingerprint, split, pooling)
            path = Path(cache_dir) / f"outputs-{split}-{key}.safetensors"
        if path is not None and path.exists():
            parts.append(_read_tensors(path, ("features", "logits")))
            continue
        device, was_training, part = next(sub_model.parameters()).device, sub_model.training, {}
        sub_model.eval()
        with tqdm(total=len(labels), desc=f"sub-model {number} {split}", unit="sample", leave=False) as bar:
            for batch in task.ordered_batches(split, batch_size):
                inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
                features, logits = features_and_logits(sub_model, inputs)
                rows = torch.from_numpy(batch.rows)
                pooled = pool_features(features.float(), inputs.get("attention_mask"), pooling)
                for name, x in (("features", pooled), ("logits", logits)):
                    part.setdefault(name, torch.empty(len(labels), x.shape[-1]))[rows] = x.float().cpu()
                bar.update(len(rows))
        sub_model.train(was_training)
        if path is not None:
            _write_tensors(path, part)
        parts.append(part)
    return Outputs([part["features"] for part in parts], [part["logits"] for part in parts], labels, pooling)


# Training and scores ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AggregatorConfig(Recipe):
    """How an aggregator is trained on features of frozen sub-models.

    Args:
        num_epochs, batch_size: times all samples are seen, samples a step.
        label_smoothing: share of a label that is spread over all classes.
        drop: probability that a sub-model is taken for missing, by sample; at least one stays. Above 0, what is
            trained loses less where a device fails.
    """

    num_epochs: float = positive(40.0)
    batch_size: int = positive(128)
    learning_rate: float = positive(3e-3)
    weight_decay: float = not_negative(0.05)
    max_grad_norm: float | None = positive(None)
    label_smoothing: float = fraction(0.0)
    drop: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop} is outside 0..1 (1 excluded): sub-models must be there at times.")


class AggregatorLoss(nn.Module):
    """An aggregator and its mean cross-entropy as one module."""

    def __init__(self, model: Aggregator, label_smoothing: float):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, labels: torch.Tensor, present: torch.Tensor | None = None, **features) -> torch.Tensor:
        """labels [B], present [B, N] and, by the sub-model's number, pooled features [B, d_n] -> mean loss."""
        logits = self.model(list(features.values()), present=present)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class AggregatorResult:
    """A trained aggregator in eval mode, and its history: step, train_loss."""

    aggregator: Aggregator
    history: pd.DataFrame


def train_aggregator(
    kind: str,
    features: Sequence[torch.Tensor],
    labels: torch.Tensor,
    config: AggregatorConfig,
    seed: int = 0,
    *,
    num_labels: int | None = None,
    hidden_size: int | None = None,
    pooling: str = "mean",
    start: Aggregator | None = None,
) -> AggregatorResult:
    """Trains an aggregator on pooled features [M, d_n] of frozen sub-models and labels [M].

    `average` and `majority` have nothing to learn and come back as they are made.

    Args:
        num_labels: C; None is the largest label and one.
        hidden_size: d_i; None is the widest sub-model's.
        pooling: that of the features; the aggregator remembers it for devices.
        start: a trained aggregator to go on from, e.g. with `drop` above 0; it stays as it is.

    Raises:
        ValueError: for features that are not pooled or not of as many samples as there are labels.
    """
    for number, x in enumerate(features, start=1):
        if x.dim() != 2 or len(x) != len(labels):
            raise ValueError(
                f"features of sub-model {number} are {list(x.shape)} for {len(labels)} labels: give pooled features "
                "[M, d_n] of the same samples."
            )
    widths = tuple(x.shape[1] for x in features)
    if start is not None and (start.kind, start.widths, start.pooling) != (kind, widths, pooling):
        raise ValueError(
            f"the aggregator to start from is {start.kind} of {list(start.widths)}, pooling {start.pooling}, not "
            f"{kind} of {list(widths)}, pooling {pooling}: give one of this kind."
        )
    set_seed(seed)
    if start is None:
        aggregator = make_aggregator(kind, widths, num_labels or int(labels.max()) + 1, hidden_size, pooling)
    else:
        aggregator = copy.deepcopy(start)
    if not aggregator.learned:
        return AggregatorResult(aggregator.eval(), pd.DataFrame({"step": [], "train_loss": []}))
    aggregator.set_means(features)
    per_epoch = math.ceil(len(labels) / config.batch_size)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, 0, epoch]).permutation(len(labels))

    def batches(step: int) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
        epoch, number = divmod(step, per_epoch)
        rows = torch.from_numpy(order(epoch)[number * config.batch_size : (number + 1) * config.batch_size])
        batch = {"labels": labels[rows]} | {str(n): x[rows] for n, x in enumerate(features)}
        if config.drop:
            batch["present"] = random_presence(len(rows), len(features), config.drop, [seed, 1, step])
        yield 1.0, batch

    num_steps = max(1, round(config.num_epochs * per_epoch))
    objective = AggregatorLoss(aggregator, config.label_smoothing)
    trained = fit(objective, batches, config, num_steps, Run(f"{kind} aggregator"))
    trained.restore_float32()
    history = pd.DataFrame({"step": range(1, num_steps + 1), "train_loss": trained.losses})
    return AggregatorResult(aggregator.cpu().eval(), history)


def random_presence(num_rows: int, num_models: int, drop: float, seed: list[int]) -> torch.Tensor:
    """[B, N] of which each is False with probability `drop`; where all would be, one stays."""
    rng = np.random.default_rng(seed)
    present = rng.random((num_rows, num_models)) >= drop
    kept = rng.integers(num_models, size=num_rows)
    nobody = ~present.any(1)
    present[nobody, kept[nobody]] = True
    return torch.from_numpy(present)


@torch.no_grad()
def ensemble_accuracy(
    aggregator: Aggregator,
    features: Sequence[torch.Tensor | None] | None,
    logits: Sequence[torch.Tensor | None] | None,
    labels: torch.Tensor,
    present: Sequence[bool] | None = None,
    batch_size: int = 1024,
) -> float:
    """Accuracy times 100; arguments as the aggregator's, of M samples."""
    right = 0
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        answers = [None if x is None else [None if t is None else t[part] for t in x] for x in (features, logits)]
        right += int((aggregator(*answers, present=present).argmax(-1) == labels[part]).sum())
    return 100 * right / len(labels)


def missing_table(aggregator: Aggregator, outputs: Outputs) -> pd.DataFrame:
    """Accuracy with all sub-models and without each: columns kind, missing (0 for none, else from 1), accuracy."""
    num, rows = len(aggregator.widths), []
    for missing in range(num + 1 if num > 1 else 1):
        present = [number != missing for number in range(1, num + 1)]
        accuracy = ensemble_accuracy(aggregator, outputs.features, outputs.logits, outputs.labels, present)
        rows.append({"kind": aggregator.kind, "missing": missing, "accuracy": accuracy})
    return pd.DataFrame(rows)


# Files -----------------------------------------------------------------------------------------------------------


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_write(path, "wb") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _read_tensors(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and it is computed again.") from error
