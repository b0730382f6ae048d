"""Aggregators: one prediction from N sub-models' features or logits (CoFormer 2025, Eq. 2, Eq. 6 and Table IV).

| kind | made of | what a device sends | learned |
|---|---|---|---|
| `coformer` | X_agg = Pool(W Concat(X_1, .., X_N) + b), then the task's head (Eq. 2) | pooled features | yes |
| `attention` | self-attention over the N projected features, mean, head (Vaswani et al. 2017) | pooled features | yes |
| `senet` | features of all gated by squeeze and excitation, projected, head (Hu et al. 2018) | pooled features | yes |
| `average` | mean of the sub-models' probabilities | logits | no |
| `majority` | most votes; of classes with as many votes the one of the largest summed probability | logits | no |

Pool is the mean over S tokens and the projection is linear, so they commute: a device may pool before it sends, which
is exact and S times fewer bytes (`pool_features`). The gate of `senet` is a function of pooled features, so the same
holds. `attention` always attends to pooled features: over all tokens it would cost S times the bytes.

Published is the mean (`POOLINGS`). Classifiers of BERT and ViT read the first token only and those of GPT-2 the last,
so sub-models that were calibrated as classifiers say most there, and an aggregator of frozen ones learns more from it.
To pick a token is linear as well and commutes alike.

A device may be missing (`present`). For the learned kinds its features are then the mean of the training samples', kept
with the weights; for `average` and `majority` it is left out.

Shapes: B samples, S tokens, N sub-models, d_n their widths, d_agg their sum, d_i the width after projection, C classes.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from detransformer.files import atomic_folder, atomic_write

Present = Sequence[bool] | torch.Tensor | None
POOLINGS = ("mean", "first", "last")
SENET_REDUCTION = 16  # Hu et al. 2018, Section 3.2


def pool_features(
    features: torch.Tensor, attention_mask: torch.Tensor | None = None, pooling: str = "mean"
) -> torch.Tensor:
    """One vector of all tokens, [B, S, d] -> [B, d]; what is [B, d] stays.

    Args:
        attention_mask: [B, S] of the tokens that count; None counts all.
        pooling: their `"mean"`, or the `"first"` (BERT's and ViT's [CLS]) or `"last"` of them (GPT-2's).
    """
    _check_pooling(pooling)
    if features.dim() == 2:
        return features
    if pooling != "mean":
        if attention_mask is None:
            return features[:, 0 if pooling == "first" else -1]
        counts = attention_mask.long()
        at = counts.argmax(1) if pooling == "first" else counts.shape[1] - 1 - counts.flip(1).argmax(1)
        return features[torch.arange(len(features), device=features.device), at]
    if attention_mask is None:
        return features.mean(1)
    counts = attention_mask.to(features.dtype).unsqueeze(-1)  # [B, S, 1]
    return (features * counts).sum(1) / counts.sum(1).clamp(min=1)


class Aggregator(nn.Module):
    """What all kinds share: who is present, and what stands in for who is not.

    Args:
        widths: d_n of each sub-model.
        num_labels: C.
        hidden_size: d_i; None is the widest sub-model's, which is then the central device.
        pooling: what devices send of their tokens, as in `pool_features`.
    """

    kind: str
    learned = True

    def __init__(self, widths: Sequence[int], num_labels: int, hidden_size: int | None = None, pooling: str = "mean"):
        super().__init__()
        _check_pooling(pooling)
        if not widths or min(widths) < 1 or num_labels < 2:
            raise ValueError(
                f"widths={list(widths)}, num_labels={num_labels}: give a width above 0 for each of one or more "
                "sub-models, and two classes or more."
            )
        if hidden_size is not None and hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size} is below 1: give a width, or None for the widest sub-model's.")
        self.widths, self.num_labels, self.pooling = tuple(widths), num_labels, pooling
        self.hidden_size = hidden_size or max(widths)
        if self.learned:
            for number, width in enumerate(self.widths):
                self.register_buffer(f"mean_{number}", torch.zeros(width))

    @property
    def means(self) -> list[torch.Tensor]:
        """Mean features of the training samples, [d_n] each."""
        return [getattr(self, f"mean_{number}") for number in range(len(self.widths))]

    def set_means(self, features: Sequence[torch.Tensor]) -> None:
        """From training samples' features [M, d_n] or [M, S, d_n]."""
        for mean, x in zip(self.means, features, strict=True):
            mean.copy_(self.pool(x).mean(0))

    def pool(self, features: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What a device sends: `pool_features` as this aggregator was trained."""
        return pool_features(features, attention_mask, self.pooling)

    def forward(
        self,
        features: Sequence[torch.Tensor | None] | None,
        logits: Sequence[torch.Tensor | None] | None = None,
        present: Present = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, C]; of `average` the log of the mean probabilities, of `majority` votes plus a fraction for ties.

        Args:
            features: of each sub-model [B, S, d_n], or pooled [B, d_n]; None for one that is missing. Read by the
                learned kinds only.
            logits: of each sub-model [B, C]; None for one that is missing. Read by the others only.
            present: which sub-models answered, [N] or, by sample, [B, N]; None takes all that are not None.
            attention_mask: [B, S] of tokens that count, for features that are not pooled.

        Raises:
            ValueError: for another number of sub-models, other widths, or samples without any sub-model.
        """
        answers = self._checked(features if self.learned else logits)
        here = self._present(answers, present)  # [B, N]
        if self.learned:
            return self.fuse(self._filled(answers, here), attention_mask)
        known = [torch.zeros_like(_first(answers)) if x is None else x for x in answers]
        return self.vote(torch.stack([x.float().softmax(-1) for x in known], dim=1), here)

    def fuse(self, features: list[torch.Tensor], attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Of the learned kinds: features of all sub-models -> logits [B, C]."""
        raise NotImplementedError

    def vote(self, probabilities: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Of the others: probabilities [B, N, C], present [B, N] -> logits [B, C]."""
        raise NotImplementedError

    def _checked(self, answers) -> list[torch.Tensor | None]:
        what = "features" if self.learned else "logits"
        if answers is None or len(answers) != len(self.widths):
            number = "none" if answers is None else len(answers)
            raise ValueError(f"{what} of {number} sub-models for an aggregator of {len(self.widths)}: give one each.")
        if all(x is None for x in answers):
            raise ValueError(f"no sub-model's {what} are here: at least one must be.")
        first = _first(answers)
        for number, (x, width) in enumerate(zip(answers, self.widths, strict=True), start=1):
            expected = width if self.learned else self.num_labels
            if x is not None and (x.shape[-1] != expected or x.shape[:-1] != first.shape[:-1]):
                raise ValueError(
                    f"{what} of sub-model {number} are {list(x.shape)} where {[*first.shape[:-1], expected]} is "
                    "expected: give all sub-models the same samples, pooled or not pooled alike."
                )
        return list(answers)

    def _present(self, answers: list[torch.Tensor | None], present: Present) -> torch.Tensor:
        first = _first(answers)
        given = torch.tensor([x is not None for x in answers], device=first.device)
        shape = (len(first), len(self.widths))
        if present is None:
            return given.expand(shape)
        here = torch.as_tensor(present, dtype=torch.bool, device=first.device)
        if here.shape not in (shape[1:], shape):
            raise ValueError(f"present is {list(here.shape)}: give {[shape[1]]}, or {list(shape)} by sample.")
        here = here.expand(shape)
        if (here & ~given).any():
            number = int((here & ~given).any(0).nonzero()[0]) + 1
            raise ValueError(f"sub-model {number} is said to be present and nothing of it is given.")
        if not here.any(1).all():
            raise ValueError("no sub-model is present for some samples: at least one must be.")
        return here

    def _filled(self, features: list[torch.Tensor | None], present: torch.Tensor) -> list[torch.Tensor]:
        """Features with the training mean where a sub-model is missing."""
        first, filled = _first(features), []
        for number, (x, mean) in enumerate(zip(features, self.means, strict=True)):
            mean = mean.to(first.dtype).expand(*first.shape[:-1], -1)
            here = present[:, number].reshape(-1, *[1] * (first.dim() - 1))
            filled.append(mean if x is None else torch.where(here, x, mean))
        return filled


def _first(answers: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return next(x for x in answers if x is not None)


class CoFormerAggregator(Aggregator):
    """Eq. 2: Concat, Linear(d_agg -> d_i), Pool, head; in this order for features [B, S, d_n]."""

    kind = "coformer"

    def __init__(self, widths: Sequence[int], num_labels: int, hidden_size: int | None = None, pooling: str = "mean"):
        super().__init__(widths, num_labels, hidden_size, pooling)
        self.projection = nn.Linear(sum(widths), self.hidden_size)
        self.head = nn.Linear(self.hidden_size, num_labels)

    def fuse(self, features: list[torch.Tensor], attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.head(self.pool(self.projection(torch.cat(features, dim=-1)), attention_mask))


class AttentionAggregator(Aggregator):
    """Each sub-model's pooled features projected to d_i, one head of attention among the N, residual, mean, head."""

    kind = "attention"

    def __init__(self, widths: Sequence[int], num_labels: int, hidden_size: int | None = None, pooling: str = "mean"):
        super().__init__(widths, num_labels, hidden_size, pooling)
        self.projections = nn.ModuleList([nn.Linear(width, self.hidden_size) for width in widths])
        self.query, self.key, self.value = (nn.Linear(self.hidden_size, self.hidden_size) for _ in range(3))
        self.output = nn.Linear(self.hidden_size, self.hidden_size)
        self.head = nn.Linear(self.hidden_size, num_labels)

    def fuse(self, features: list[torch.Tensor], attention_mask: torch.Tensor | None) -> torch.Tensor:
        pooled = [self.pool(x, attention_mask) for x in features]
        x = torch.stack([project(p) for project, p in zip(self.projections, pooled, strict=True)], 1)  # [B, N, d_i]
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(self.hidden_size)  # [B, N, N]
        x = x + self.output(scores.softmax(-1) @ self.value(x))
        return self.head(x.mean(1))


class SENetAggregator(Aggregator):
    """A gate in 0..1 for each of the d_agg features (squeeze to d_agg / 16, excite), Linear(d_agg -> d_i), head."""

    kind = "senet"

    def __init__(self, widths: Sequence[int], num_labels: int, hidden_size: int | None = None, pooling: str = "mean"):
        super().__init__(widths, num_labels, hidden_size, pooling)
        self.squeeze = nn.Linear(sum(widths), squeezed_width(widths))
        self.excite = nn.Linear(squeezed_width(widths), sum(widths))
        self.projection = nn.Linear(sum(widths), self.hidden_size)
        self.head = nn.Linear(self.hidden_size, num_labels)

    def fuse(self, features: list[torch.Tensor], attention_mask: torch.Tensor | None) -> torch.Tensor:
        x = self.pool(torch.cat(features, dim=-1), attention_mask)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x))))
        return self.head(self.projection(gate * x))


class AverageAggregator(Aggregator):
    """The mean of the probabilities of those present."""

    kind, learned = "average", False

    def vote(self, probabilities: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        weights = present.to(probabilities.dtype).unsqueeze(-1)  # [B, N, 1]
        mean = (probabilities * weights).sum(1) / weights.sum(1)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


class MajorityAggregator(Aggregator):
    """Votes of those present, and a fraction below 1 of a vote by summed probability that decides ties."""

    kind, learned = "majority", False

    def vote(self, probabilities: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        weights = present.to(probabilities.dtype).unsqueeze(-1)  # [B, N, 1]
        votes = F.one_hot(probabilities.argmax(-1), self.num_labels) * weights  # [B, N, C]
        summed = (probabilities * weights).sum(1)
        return votes.sum(1) + summed / (len(self.widths) + 1)


CLASSES = {
    made.kind: made
    for made in (CoFormerAggregator, AttentionAggregator, SENetAggregator, AverageAggregator, MajorityAggregator)
}
KINDS = tuple(CLASSES)


def make_aggregator(
    kind: str, widths: Sequence[int], num_labels: int, hidden_size: int | None = None, pooling: str = "mean"
) -> Aggregator:
    """A new aggregator of `kind`, one of `KINDS`."""
    check_kind(kind)
    return CLASSES[kind](widths, num_labels, hidden_size, pooling)


# Costs -----------------------------------------------------------------------------------------------------------


def squeezed_width(widths: Sequence[int]) -> int:
    return max(1, sum(widths) // SENET_REDUCTION)


def aggregator_flops(
    kind: str, widths: Sequence[int], num_labels: int, hidden_size: int | None = None, seq_len: int = 1
) -> int:
    """Operations on the central device for one sample.

    Learned kinds: 2 a multiplication and addition of matrix products, as Eq. 6 counts (2 S d_i d_agg for `coformer`,
    and the head); all else is left out. `average` and `majority`, which have no products: 4 a value for the softmax, 1
    a value for the sum, and for votes 1 more to find the largest.

    Args:
        seq_len: tokens of what devices send; 1 is pooled. The kinds that pool first cost the same either way.
    """
    check_kind(kind)
    num, total, hidden = len(widths), sum(widths), hidden_size or max(widths)
    head = 2 * hidden * num_labels
    if kind == "coformer":
        return 2 * seq_len * total * hidden + head
    if kind == "attention":
        return 2 * total * hidden + 4 * 2 * num * hidden**2 + 2 * 2 * num**2 * hidden + head
    if kind == "senet":
        return 2 * 2 * total * squeezed_width(widths) + 2 * total * hidden + head
    return (5 if kind == "average" else 6) * num * num_labels


def message_bytes(kind: str, width: int, num_labels: int, seq_len: int = 1, bytes_per_value: int = 4) -> int:
    """What one device sends for one sample: features [seq_len, width] (1 is pooled), or logits [C] where those do.

    Votes alone would be one number, and could not decide ties.
    """
    check_kind(kind)
    return bytes_per_value * (seq_len * width if CLASSES[kind].learned else num_labels)


def _check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is unknown: choose one of {', '.join(POOLINGS)}.")


def check_kind(kind: str) -> None:
    if kind not in CLASSES:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(KINDS)}.")


# One sub-model's features and logits ----------------------------------------------------------------------------


def features_and_logits(sub_model: PreTrainedModel, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(X_n [B, S, d_n], logits [B, C]) of one forward pass of a classifier of transformers."""
    seen = []
    handle = sub_model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        logits = sub_model(**inputs).logits
    finally:
        handle.remove()
    return seen[0], logits


# Files -----------------------------------------------------------------------------------------------------------


def save_aggregator(aggregator: Aggregator, folder: str | Path) -> None:
    """Writes aggregator.json (kind, sizes, pooling) and aggregator.safetensors (weights and means) into `folder`."""
    names = ("kind", "widths", "num_labels", "hidden_size", "pooling")
    with atomic_folder(folder) as temporary:
        save_file(aggregator.state_dict(), temporary / "aggregator.safetensors")
        with atomic_write(temporary / "aggregator.json") as file:
            json.dump({name: getattr(aggregator, name) for name in names}, file, indent=1)


def load_aggregator(folder: str | Path) -> Aggregator:
    """The aggregator that `save_aggregator` wrote, in eval mode.

    Raises:
        ValueError: that names the file and the remedy, where it is missing or damaged.
    """
    described, weights = Path(folder) / "aggregator.json", Path(folder) / "aggregator.safetensors"
    for path in (described, weights):
        if not path.is_file():
            raise ValueError(f"{path} is missing: give a folder that save_aggregator made.")
    try:
        aggregator = make_aggregator(**json.loads(described.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{described} is damaged ({error}): train the aggregator again.") from error
    try:
        aggregator.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} is damaged or of other sizes ({error}): train the aggregator again.") from error
    return aggregator.eval()
