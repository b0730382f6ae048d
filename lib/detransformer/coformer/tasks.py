"""The data on which sub-models are calibrated: images or a GLUE task, M training samples with labels.

A batch is a dict of tensors: `rows` [B], the samples' indices in their split, `labels` [B], and a model's inputs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from detransformer.training.config import FinetuneConfig, config_hash
from detransformer.training.data import TrainingData
from detransformer.training.data.images import ImageData
from detransformer.training.data.tasks import get_task
from detransformer.training.features import LengthGrouped, by_length, collate, prepared_task
from detransformer.training.metrics import classification_scores


class ImageTask:
    """Classification of images, which are shifted and flipped; the large model decides on each image unchanged."""

    metric = "accuracy"

    def __init__(self, data: ImageData):
        self.data, self.name, self.num_classes = data, f"{data.name} images", data.num_classes
        self.fingerprint = data.fingerprint
        self.train_labels, self.test_labels = data.labels["train"], data.labels["test"]
        self.held_labels = data.labels.get("held")  # training samples that nothing is trained on

    def train_batch(self, seed: int, step: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Batch `step`, augmented; a function of its arguments."""
        return self.data.train_batch(seed, step, batch_size)

    def ordered_batches(self, split: str, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Every sample of `split` (`train`, `test` or `held`) once, unchanged."""
        return self.data.ordered_batches(split, batch_size)

    def score(self, predicted: np.ndarray) -> float:
        """The score of the test samples' predicted classes, times 100, by `metric`."""
        return 100 * float((predicted == self.test_labels).mean())


class TextTask:
    """A GLUE classification task, tokenised and batched as in fine-tuning; its methods are those of `ImageTask`.

    Args:
        config: only seq_len and the numbers of rows are used.
        input_names: the models' inputs; leave token_type_ids out for GPT-2.

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
        self._pad, self._names = data.special.pad, (*input_names, "labels")
        self._lengths = [len(feature.tokens) for feature in prepared.train]
        self._orders: dict[tuple[int, int], LengthGrouped] = {}
        self.name, self.num_classes, self.metric = task, len(self.task.labels), self.task.metric
        rows = [config.max_train_rows, config.max_eval_rows, config.seq_len, tuple(input_names)]
        self.fingerprint = config_hash(data.name, data.fingerprint, task, *rows)
        self.train_labels, self.test_labels = (
            np.array([feature.label for feature in features]) for features in self._features.values()
        )

    def train_batch(self, seed: int, step: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Batch `step`; the last of an epoch may be smaller."""
        key = (batch_size, seed)
        return self._batch("train", self._orders.setdefault(key, LengthGrouped(self._lengths, *key)).rows(step))

    def ordered_batches(self, split: str, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        return (self._batch(split, rows) for rows in by_length(self._features[split], batch_size))

    def score(self, predicted: np.ndarray) -> float:
        return classification_scores(self.task, predicted, self.test_labels)[self.metric]

    def _batch(self, split: str, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = collate([self._features[split][i] for i in rows], self._pad)
        return {"rows": torch.as_tensor(rows)} | {name: batch[name] for name in self._names}


BoostTask = ImageTask | TextTask
