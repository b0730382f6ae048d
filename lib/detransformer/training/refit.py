"""Decoupled layers fitted to the original ones in closed form, before any gradient step.

A slice of a layer's weights leaves out what the other slices would have contributed, although hidden units are
correlated and one slice says much of the others. So each linear map of a sub-block is fitted anew by ridge regression
to what the original layer computes at that place, given what the sub-block sees: Q, K, V and FFN-in from its slice,
both output projections from its context and its activations. Each LayerNorm gets the scale and shift of every unit that
come closest to the original's output. Layers are fitted from first to last on the student's own inputs: a layer makes
up for the errors of those before it. Each map reads the text once; no gradients.

Shapes: B sequences of a batch, T tokens, M = B T, P sub-blocks, d slice, D hidden, A attention width, I intermediate.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from detransformer.models import layer_kinds
from detransformer.models.decoupled_bert import BatchedLayerNorm, BatchedLinear, DecoupledBertLayer, split_hidden

BATCH = 16  # sequences at once
RIDGE = 1e-4  # added to the inputs' second moments, relative to their mean

Pairs = Iterable[tuple[torch.Tensor, list[torch.Tensor]]]  # inputs [P, M, in], targets [P, M, out] of each map


@dataclass(frozen=True)
class Batch:
    """A student's input slices [P, M, d] of a layer, and all that the original layer makes of its own input.

    `qkv` [P, M, D] each, `inner` [P, M, I]: the same for each sub-block; `attended` (output projection and residual),
    `middle` (after the first LayerNorm), `added` (FFN and residual), `output`: slices [P, M, d].
    """

    size: int
    x: torch.Tensor
    qkv: list[torch.Tensor]
    attended: torch.Tensor
    middle: torch.Tensor
    inner: torch.Tensor
    added: torch.Tensor
    output: torch.Tensor


@torch.no_grad()
def refit(student: PreTrainedModel, teacher: PreTrainedModel, sequences: torch.Tensor) -> None:
    """Fits the decoupled layers of `student` in place.

    Args:
        student: a decoupled BERT encoder, sliced from `teacher`, float32, in eval mode; original layers stay.
        teacher: the original encoder, as well.
        sequences: token ids [N, T] without padding.
    """
    theirs = [teacher.embeddings(ids) for ids in sequences.split(BATCH)]
    ours = list(theirs)
    layers = list(zip(student.encoder.layer, teacher.encoder.layer, layer_kinds(student.config), strict=True))
    for layer, original, kind in tqdm(layers, desc="closed form", unit="layer", leave=False):
        if kind == "decoupled":
            fit_layer(layer, original, ours, theirs)
        ours, theirs = [layer(x) for x in ours], [original(x) for x in theirs]


@torch.no_grad()
def fit_layer(
    layer: DecoupledBertLayer, original: nn.Module, ours: list[torch.Tensor], theirs: list[torch.Tensor]
) -> None:
    """Fits a decoupled layer, given `ours` [B, T, D], to the original layer's output for `theirs` [B, T, D]."""
    attention, mixed = layer.attention, layer.attention.output
    inputs = [attention.self.query, attention.self.key, attention.self.value]

    def read() -> Iterator[Batch]:
        return (_read(layer, original, mine, their) for mine, their in zip(ours, theirs, strict=True))

    def context(at: Batch) -> torch.Tensor:
        return attention.self(at.x, at.size)[0]

    def middle(at: Batch) -> torch.Tensor:
        return mixed(context(at), at.x)

    if inputs[0].weight.shape[1] == layer_width(layer):  # narrow heads would need a part of the targets: they stay
        _regress(inputs, ((at.x, at.qkv) for at in read()))
    _regress([mixed.dense], ((context(at), [at.attended - at.x]) for at in read()))
    _rescale(mixed.LayerNorm, ((mixed.dense(context(at)) + at.x, at.middle) for at in read()))
    _regress([layer.intermediate.dense], ((middle(at), [at.inner]) for at in read()))

    def inner_pairs() -> Pairs:
        for at in read():
            y = middle(at)
            yield layer.intermediate(y), [at.added - y]

    _regress([layer.output.dense], inner_pairs())

    def outer_pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for at in read():
            y = middle(at)
            yield layer.output.dense(layer.intermediate(y)) + y, at.output

    _rescale(layer.output.LayerNorm, outer_pairs())


def layer_width(layer: DecoupledBertLayer) -> int:
    """D, the hidden size of a decoupled layer."""
    return layer.output.dense.bias.numel()


def _read(layer: DecoupledBertLayer, original: nn.Module, mine: torch.Tensor, x: torch.Tensor) -> Batch:
    def cut(states: torch.Tensor) -> torch.Tensor:
        return split_hidden(states, layer.num_divisions)

    def shared(states: torch.Tensor) -> torch.Tensor:
        return states.flatten(0, 1).expand(layer.num_divisions, -1, -1)

    qkv = [shared(getattr(original.attention.self, name)(x)) for name in ("query", "key", "value")]
    attended = original.attention.output.dense(original.attention.self(x)[0]) + x
    middle = original.attention.output.LayerNorm(attended)
    inner = original.intermediate.dense(middle)
    added = original.output.dense(original.intermediate.intermediate_act_fn(inner)) + middle
    output = original.output.LayerNorm(added)
    slices = {"attended": cut(attended), "middle": cut(middle), "added": cut(added), "output": cut(output)}
    return Batch(size=len(x), x=cut(mine), qkv=qkv, inner=shared(inner), **slices)


def _regress(maps: list[BatchedLinear], pairs: Pairs) -> None:
    """Ridge regression of each of `maps`, which read the same inputs, by the normal equations in float64."""
    moments, products = 0.0, [0.0] * len(maps)
    for inputs, targets in pairs:
        inputs = nn.functional.pad(inputs, (0, 1), value=1.0)  # the bias
        moments = moments + (inputs.mT @ inputs).double()
        products = [done + (inputs.mT @ target).double() for done, target in zip(products, targets, strict=True)]
    diagonal = moments.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1)
    ridge = (RIDGE * diagonal)[:, None, None] * torch.eye(moments.shape[-1], dtype=moments.dtype)
    factor = torch.linalg.cholesky(moments + ridge)
    for each, product in zip(maps, products, strict=True):
        solved = torch.cholesky_solve(product, factor).mT.to(each.weight.dtype)  # [P, out, in + 1]
        each.weight.copy_(solved[..., :-1])
        each.bias.copy_(solved[..., -1])


def _rescale(norm: BatchedLayerNorm, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Scale and shift of each unit by least squares: inputs and targets [P, M, d]."""
    count, sums = 0, 0.0
    for inputs, target in pairs:
        normed = nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=norm.eps)
        count += inputs.shape[1]
        parts = (normed, target, normed * target, normed.square())
        sums = sums + torch.stack([part.sum(1).double() for part in parts])
    x, y, xy, xx = sums / count
    scale = (xy - x * y) / (xx - x.square()).clamp(min=1e-12)
    norm.weight.copy_(scale)
    norm.bias.copy_(y - scale * x)
