"""Task rows as token features: sentences (or pairs) with a label, SQuAD as overlapping windows with answer positions.

Rows of similar length share a batch, so there is little padding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from detransformer.training.config import FinetuneConfig
from detransformer.training.data import TaskRows, TrainingData
from detransformer.training.data.tasks import Task

POOL_BATCHES = 16  # batches sorted by length together


@dataclass(frozen=True)
class Feature:
    """One input of a model; for SQuAD also its tokens' places in the context.

    `label` is a class, or (start, end) token positions of the answer, (0, 0) if the window does not contain it.
    """

    tokens: np.ndarray
    types: np.ndarray
    label: int | tuple[int, int]
    row: int
    offsets: np.ndarray | None = None  # [T, 2] characters; (-1, -1) outside the context


@dataclass(frozen=True)
class PreparedTask:
    """Features of both splits, and the rows they come from."""

    rows: TaskRows
    train: list[Feature]
    validation: list[Feature]


def prepared_task(data: TrainingData, task: str, config: FinetuneConfig) -> PreparedTask:
    """Both splits of a task as features, tokenised once in this process for all models and seeds."""
    return _prepared(data, task, config.max_train_rows, config.max_eval_rows, config.seq_len, config.stride)


@cache
def _prepared(data, task: str, max_train_rows, max_eval_rows, seq_len: int, doc_stride: int) -> PreparedTask:
    return prepare_task(data.task(task, max_train_rows, max_eval_rows), data.tokenizer, seq_len, doc_stride)


def prepare_task(rows: TaskRows, tokenizer: Tokenizer, seq_len: int, doc_stride: int) -> PreparedTask:
    """Both splits of a task as features; questions in windows that overlap by `doc_stride` tokens."""
    if rows.task.is_question_answering:
        parts = [question_features(part, tokenizer, seq_len, doc_stride) for part in (rows.train, rows.validation)]
    else:
        parts = [sentence_features(part, rows.task, tokenizer, seq_len) for part in (rows.train, rows.validation)]
    return PreparedTask(rows, *parts)


def sentence_features(rows, task: Task, tokenizer: Tokenizer, seq_len: int) -> list[Feature]:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: truncation is a tokenizer's state
    tokenizer.enable_truncation(seq_len)
    columns = [rows[name] for name in task.columns]
    texts = list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))
    encodings = tokenizer.encode_batch(texts)
    return [
        Feature(np.array(e.ids, dtype=np.int32), np.array(e.type_ids, dtype=np.int8), int(label), row)
        for row, (e, label) in enumerate(zip(encodings, rows["label"], strict=True))
    ]


def question_features(rows, tokenizer: Tokenizer, seq_len: int, doc_stride: int) -> list[Feature]:
    """Windows `[CLS] question [SEP] part of the context [SEP]` that overlap by `doc_stride` tokens."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    questions = []
    for question, encoding in zip(
        rows["question"], tokenizer.encode_batch(list(rows["question"]), add_special_tokens=False), strict=True
    ):
        limit = seq_len // 3  # a longer question leaves no room for the context
        questions.append(question if len(encoding) <= limit else question[: encoding.offsets[limit - 1][1]])
    tokenizer.enable_truncation(seq_len, stride=doc_stride, strategy="only_second")
    features = []
    encodings = tokenizer.encode_batch(list(zip(questions, rows["context"], strict=True)))
    for row, (encoding, answers) in enumerate(zip(encodings, rows["answers"], strict=True)):
        start = answers["answer_start"][0]
        end = start + len(answers["text"][0])
        for window in (encoding, *encoding.overflowing):
            in_context = np.array([s == 1 for s in window.sequence_ids])
            offsets = np.where(in_context[:, None], np.array(window.offsets), -1).astype(np.int32)
            features.append(
                Feature(
                    np.array(window.ids, dtype=np.int32),
                    np.array(window.type_ids, dtype=np.int8),
                    answer_positions(offsets, start, end),
                    row,
                    offsets,
                )
            )
    return features


def answer_positions(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First and last token that touch characters start..end; (0, 0) if the window does not contain all of them."""
    inside = offsets[:, 0] >= 0
    if not inside.any() or offsets[inside][0, 0] > start or offsets[inside][-1, 1] < end:
        return 0, 0
    touching = np.flatnonzero(inside & (offsets[:, 0] < end) & (offsets[:, 1] > start))
    return (int(touching[0]), int(touching[-1])) if len(touching) else (0, 0)


def collate(features: Sequence[Feature], pad: int) -> dict[str, torch.Tensor]:
    """Features as padded tensors [B, T]: input_ids, token_type_ids, attention_mask and the labels."""

    def padded(rows: Iterator[np.ndarray], value: int) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], True, value)

    batch = {
        "input_ids": padded((f.tokens for f in features), pad),
        "token_type_ids": padded((f.types for f in features), 0),
        "attention_mask": padded((np.ones_like(f.tokens) for f in features), 0),
    }
    labels = torch.tensor([f.label for f in features])  # [B], or [B, 2] of answers
    if labels.dim() == 2:
        return batch | {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    return batch | {"labels": labels}


class LengthGrouped:
    """Row numbers of each step: epochs are shuffled, sorted by length in pools, and their batches shuffled again.

    A function of (seed, step); an epoch's last batch may be smaller.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self.epoch_batches = lru_cache(maxsize=1)(self._epoch_batches)

    def rows(self, step: int) -> np.ndarray:
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.epoch_batches(epoch)[number]

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of each batch of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), self.batch_size * POOL_BATCHES):
            pool = order[start : start + self.batch_size * POOL_BATCHES]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def by_length(features: Sequence[Feature], batch_size: int) -> Iterator[list[int]]:
    """All feature numbers once, longest first."""
    order = sorted(range(len(features)), key=lambda i: -len(features[i].tokens))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def best_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, in_context: torch.Tensor, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best answer span of each window, exactly: all [B, T] logits -> (start [B], end [B], score [B]).

    A span lies in the context (`in_context` [B, T]) and has 1..max_tokens tokens.
    """
    low = torch.finfo(start_logits.dtype).min / 4
    start = start_logits.masked_fill(~in_context, low)
    end = end_logits.masked_fill(~in_context, low)
    length = start.shape[1]
    scores = start.unsqueeze(2) + end.unsqueeze(1)  # [B, T, T]
    allowed = torch.ones(length, length, dtype=torch.bool, device=start.device).triu().tril(max_tokens - 1)
    best = scores.masked_fill(~allowed, 2 * low).flatten(1).max(dim=1)
    return best.indices // length, best.indices % length, best.values
