"""What sub-models are calibrated on: images or a GLUE task, as batches that say which samples they hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from detransformer.training.config import FinetuneConfig, config_hash
from detransformer.training.data import TrainingData
from detransformer.training.data.images import ImageData
from detransformer.training.data.tasks import get_task
from detransformer.training.features import LengthGrouped, by_length, collate
from detransformer.training.finetuning import prepared_task
from detransformer.training.metrics import classification_scores


@dataclass(frozen=True)
class Batch:
    """Samples of a task: their numbers [B] in the split, and what a model reads."""

    rows: np.ndarray
    inputs: dict[str, torch.Tensor]


class BoostTask(Protocol):
    """What is learned: M training samples with labels, as batches that say which samples they hold."""

    name: str
    fingerprint: str
    num_classes: int
    metric: str
    train_labels: np.ndarray  # int64 [M]
    test_labels: np.ndarray
    held_labels: np.ndarray | None  # of training samples that nothing is trained on, where there are any

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """A function of its arguments; augmented where the task augments."""
        ...

    def ordered_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every sample of `split` (`train`, `test` or `held`) once, in any order, not augmented."""
        ...

    def score(self, predicted: np.ndarray) -> float:
        """Of the test samples' predicted classes, times 100, by `metric`."""
        ...


class ImageTask:
    """Classification of images.

    Args:
        padding, flip: augmentation, as in `ImageConfig`. The large model's decision is that for the image as it is.
    """

    metric = "accuracy"

    def __init__(self, data: ImageData, padding: int = 4, flip: bool = True):
        self.data, self.padding, self.flip = data, padding, flip
        self.name, self.num_classes = f"{data.name} images", data.num_classes
        self.fingerprint = f"{data.fingerprint}-{padding}-{flip}"
        self.train_labels, self.test_labels = data.train_labels, data.test_labels
        self.held_labels = data.held_labels

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        return self._batch(self.data.train_batch(seed, step, batch_size, self.padding, self.flip))

    def ordered_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        return map(self._batch, self.data.ordered_batches(split, batch_size))

    def score(self, predicted: np.ndarray) -> float:
        return 100 * float((predicted == self.test_labels).mean())

    @staticmethod
    def _batch(batch: dict[str, torch.Tensor]) -> Batch:
        return Batch(batch["rows"].numpy(), {"pixel_values": batch["pixel_values"]})


class TextTask:
    """A GLUE classification task, tokenised and batched as in fine-tuning.

    Args:
        config: of which seq_len and the numbers of rows are read.
        input_names: what the models take; leave token_type_ids out for GPT-2.

    Raises:
        ValueError: for a task without classes.
    """

    held_labels = None

    def __init__(
        self,
        data: TrainingData,
        task: str,
        config: FinetuneConfig,
        input_names: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask"),
    ):
        self.task = get_task(task)
        if self.task.is_question_answering:
            raise ValueError(f"{task} has no classes to boost on: choose CoLA, SST-2, MRPC or MNLI.")
        prepared = prepared_task(data, task, config)
        self._features = {"train": prepared.train, "test": prepared.validation}
        self._pad, self._input_names = data.special.pad, tuple(input_names)
        self._lengths = [len(feature.tokens) for feature in prepared.train]
        self._orders: dict[tuple[int, int], LengthGrouped] = {}
        self.name, self.num_classes, self.metric = task, len(self.task.labels), self.task.metric
        rows = [config.max_train_rows, config.max_eval_rows, config.seq_len, self._input_names]
        self.fingerprint = config_hash(data.name, data.fingerprint, task, *rows)
        self.train_labels, self.test_labels = (
            np.array([feature.label for feature in features]) for features in self._features.values()
        )

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Batch `step`; the last of an epoch may be smaller."""
        key = (batch_size, seed)
        order = self._orders.setdefault(key, LengthGrouped(self._lengths, *key))
        return self._batch("train", order.rows(step))

    def ordered_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        for rows in by_length(self._features[split], batch_size):
            yield self._batch(split, np.array(rows))

    def score(self, predicted: np.ndarray) -> float:
        return classification_scores(self.task, predicted, self.test_labels)[self.metric]

    def _batch(self, split: str, rows: np.ndarray) -> Batch:
        batch = collate([self._features[split][i] for i in rows], self._pad)
        return Batch(rows, {name: batch[name] for name in self._input_names})
