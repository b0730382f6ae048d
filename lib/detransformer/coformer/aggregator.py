"""Aggregators: one prediction from N sub-models' features or logits (CoFormer 2025, Eq. 2, Eq. 6 and Table IV).

| kind | made of | what a device sends | learned |
|---|---|---|---|
| `coformer` | X_agg = Pool(W Concat(X_1, .., X_N) + b), then the task's head (Eq. 2) | one token's features | yes |
| `attention` | self-attention over the N projected features, mean, head (Vaswani et al. 2017) | as `coformer` | yes |
| `senet` | features gated by squeeze and excitation, projected, head (Hu et al. 2018) | as `coformer` | yes |
| `average` | mean of the sub-models' probabilities | logits | no |
| `majority` | most votes; ties go to the class of the largest summed probability | logits | no |

In the paper, Pool is the mean over the S tokens. Classifiers of BERT and ViT read only their first token and those of
GPT-2 the last, so features of calibrated classifiers say most there: Pool takes this token. Pool and projection are
both linear and commute, so a device pools before it sends, which is exact and takes S times fewer bytes.

A device may be missing (`present`). Learned kinds then use the mean of the training samples' features, stored with the
weights; `average` and `majority` leave it out.

Shapes: B samples, S tokens, N sub-models, d_n their widths, d_agg their sum, d_i the width after projection, C classes.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

SENET_REDUCTION = 16  # Hu et al. 2018, Section 3.2


def features_and_logits(sub_model: PreTrainedModel, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(X_n [B, d_n], logits [B, C]) of one forward pass of a classifier of transformers.

    X_n are the features of the token that its head reads: for GPT-2 the last that `attention_mask` [B, S] counts, for
    BERT and ViT the first.
    """
    seen = []
    handle = sub_model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        logits = sub_model(**inputs).logits
    finally:
        handle.remove()
    (features,) = seen  # [B, S, d_n]
    if not sub_model.config.model_type.endswith("gpt2"):
        return features[:, 0], logits
    mask = inputs.get("attention_mask", features.new_ones(features.shape[:2]))
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return features[torch.arange(len(features), device=features.device), last], logits


class Aggregator(nn.Module):
    """The common part of all kinds: which sub-models are present, and a stand-in for missing ones.

    A learned kind has `build`, which makes its layers, and `fuse`, from features of all sub-models [B, d_n] to logits
    [B, C]. The others have `vote`, from probabilities [B, N, C] and weights [B, N, 1], 1 if present, to logits [B, C].

    Args:
        widths: d_n of each sub-model.
        num_labels: C.
    """

    kind: str
    learned = True

    def __init__(self, widths: Sequence[int], num_labels: int):
        super().__init__()
        self.widths, self.num_labels = tuple(widths), num_labels
        self.hidden_size = max(widths)  # d_i, the central device's
        if self.learned:
            self.register_buffer("mean", torch.zeros(sum(widths)))  # of the training samples' features, all sub-models
            self.build()

    def set_means(self, features: Sequence[torch.Tensor]) -> None:
        """Stores the mean of training samples' features [M, d_n]."""
        self.mean.copy_(torch.cat([x.mean(0) for x in features]))

    def forward(
        self, answers: Sequence[torch.Tensor], present: Sequence[bool] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, C]; for `average` log of the mean probabilities, for `majority` votes plus a fraction for ties.

        Args:
            answers: of each sub-model its features [B, d_n] for learned kinds, its logits [B, C] for the others;
                anything of that shape if it is missing.
            present: which sub-models answered, one or more, [N] or, by sample, [B, N]; None: all.
        """
        here = torch.as_tensor([True] * len(answers) if present is None else present, dtype=torch.bool)
        here = here.to(answers[0].device).expand(len(answers[0]), -1).unsqueeze(-1)  # [B, N, 1]
        if self.learned:
            means = self.mean.to(answers[0].dtype).split(self.widths)
            parts = enumerate(zip(answers, means, strict=True))
            return self.fuse([torch.where(here[:, n], x, mean) for n, (x, mean) in parts])
        return self.vote(torch.stack([x.float().softmax(-1) for x in answers], dim=1), here.float())


class CoFormerAggregator(Aggregator):
    """Eq. 2: Concat, Linear(d_agg -> d_i), head."""

    kind = "coformer"

    def build(self) -> None:
        self.projection = nn.Linear(sum(self.widths), self.hidden_size)
        self.head = nn.Linear(self.hidden_size, self.num_labels)

    def fuse(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.head(self.projection(torch.cat(features, dim=-1)))


class AttentionAggregator(Aggregator):
    """Each sub-model's features projected to d_i, one head of attention among the N, residual, mean, head."""

    kind = "attention"

    def build(self) -> None:
        self.projections = nn.ModuleList([nn.Linear(width, self.hidden_size) for width in self.widths])
        self.query, self.key, self.value = (nn.Linear(self.hidden_size, self.hidden_size) for _ in range(3))
        self.output = nn.Linear(self.hidden_size, self.hidden_size)
        self.head = nn.Linear(self.hidden_size, self.num_labels)

    def fuse(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = torch.stack([project(x) for project, x in zip(self.projections, features, strict=True)], 1)  # [B, N, d_i]
        attended = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head((x + self.output(attended)).mean(1))


class SENetAggregator(Aggregator):
    """A gate in 0..1 for each of the d_agg features (squeeze to d_agg / 16, excite), Linear(d_agg -> d_i), head."""

    kind = "senet"

    def build(self) -> None:
        self.squeeze = nn.Linear(sum(self.widths), squeezed_width(self.widths))
        self.excite = nn.Linear(squeezed_width(self.widths), sum(self.widths))
        self.projection = nn.Linear(sum(self.widths), self.hidden_size)
        self.head = nn.Linear(self.hidden_size, self.num_labels)

    def fuse(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = torch.cat(features, dim=-1)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x))))
        return self.head(self.projection(gate * x))


class AverageAggregator(Aggregator):
    """The mean of the probabilities of the sub-models present."""

    kind, learned = "average", False

    def vote(self, probabilities: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        mean = (probabilities * weights).sum(1) / weights.sum(1)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


class MajorityAggregator(Aggregator):
    """Votes of the sub-models present, plus a fraction of a vote by summed probability that decides ties."""

    kind, learned = "majority", False

    def vote(self, probabilities: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        votes = F.one_hot(probabilities.argmax(-1), self.num_labels) * weights  # [B, N, C]
        return votes.sum(1) + (probabilities * weights).sum(1) / (len(self.widths) + 1)


CLASSES = {
    made.kind: made
    for made in (CoFormerAggregator, AttentionAggregator, SENetAggregator, AverageAggregator, MajorityAggregator)
}
KINDS = tuple(CLASSES)


def make_aggregator(kind: str, widths: Sequence[int], num_labels: int) -> Aggregator:
    """A new aggregator of `kind`, one of `KINDS`."""
    if kind not in CLASSES:
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(KINDS)}.")
    return CLASSES[kind](widths, num_labels)


def squeezed_width(widths: Sequence[int]) -> int:
    """Width of `senet`'s gate between squeezing and exciting."""
    return max(1, sum(widths) // SENET_REDUCTION)


def aggregator_flops(kind: str, widths: Sequence[int], num_labels: int, hidden_size: int | None = None) -> int:
    """Operations on the central device for one sample.

    Learned kinds: 2 per multiplication and addition of matrix products, as Eq. 6 counts (2 d_i d_agg for `coformer`,
    and the head); all else is left out. `average` and `majority`, which have no products: 4 a value for the softmax, 1
    a value for the sum, and for votes 1 more to find the largest.
    """
    num, total, hidden = len(widths), sum(widths), hidden_size or max(widths)
    head = 2 * hidden * num_labels
    return {
        "coformer": 2 * total * hidden + head,
        "attention": 2 * total * hidden + 4 * 2 * num * hidden**2 + 2 * 2 * num**2 * hidden + head,
        "senet": 2 * 2 * total * squeezed_width(widths) + 2 * total * hidden + head,
        "average": 5 * num * num_labels,
        "majority": 6 * num * num_labels,
    }[kind]
