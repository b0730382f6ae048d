"""Decoupled layers are fitted to the original ones in closed form, before any gradient step.

A slice of a layer's weights leaves out the contributions of the other slices, although hidden units are correlated and
one slice says much about the others. So ridge regression fits each linear map of a sub-block anew to the original
layer's output at that place, given the sub-block's input: Q, K, V and FFN-in from its slice, both output projections
from its context and its activations. For every unit, LayerNorm gets the scale and shift that come closest to the
original's output. Layers are fitted from first to last on the student's own inputs, original ones too, so that a layer
compensates for the errors of those before it. Text is read once, without gradients.

Shapes: B sequences of a batch, T tokens, M = B T, P sub-blocks, d slice, D hidden, A attention width, I intermediate.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from detransformer.models.naming import Naming, layers_of, naming_of
from detransformer.models.stacked import merge_hidden, split_hidden

BATCH = 16  # sequences at once
RIDGE = 1e-4  # added to the inputs' second moments, relative to their mean

Pairs = Iterable[tuple[torch.Tensor, list[torch.Tensor]]]  # inputs [P, M, in], targets [P, M, out] of each map


@torch.no_grad()
def refit(student: PreTrainedModel, teacher: PreTrainedModel, sequences: torch.Tensor) -> None:
    """Fits the decoupled layers of `student` in place.

    Args:
        student: a decoupled encoder without a head, sliced from `teacher`, float32, in eval mode.
        teacher: the original encoder, in the same format and mode.
        sequences: token ids [N, T] without padding.
    """
    theirs = [teacher.embeddings(ids) for ids in sequences.split(BATCH)]
    ours = list(theirs)
    naming = naming_of(teacher.config)
    activation = ACT2FN[getattr(teacher.config, naming.activation)]
    pairs = zip(layers_of(student), layers_of(teacher), strict=True)
    for layer, original in tqdm(list(pairs), desc="closed form", unit="layer", leave=False):
        if hasattr(layer, "num_divisions"):
            ours, theirs = fit_layer(layer, original, naming, activation, ours, theirs)
        else:
            ours, theirs = [layer(x) for x in ours], [original(x) for x in theirs]


@torch.no_grad()
def fit_layer(
    layer: nn.Module,
    original: nn.Module,
    naming: Naming,
    activation: Callable[[torch.Tensor], torch.Tensor],
    ours: list[torch.Tensor],
    theirs: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Fits a decoupled layer to map `ours` to the original layer's output for `theirs`; returns both outputs.

    Args:
        naming: the names of both layers' parts.
        activation: the FFN's.
        ours, theirs: batches of hidden states [B, T, D].
    """
    blocks = layer.num_divisions

    def both(name: str) -> tuple[nn.Module, nn.Module]:
        return layer.get_submodule(name), original.get_submodule(name)

    def cut(states: torch.Tensor) -> torch.Tensor:  # [B, T, D] -> [P, M, d]
        return split_hidden(states, blocks)

    def shared(states: torch.Tensor) -> torch.Tensor:  # [B, T, n] -> [P, M, n]
        return states.flatten(0, 1).expand(blocks, -1, -1)

    qkv = [both(name) for name in naming.qkv]
    out, full_out = both(naming.out)
    norm, full_norm = both(naming.attention_norm)
    ffn_in, full_ffn_in = both(naming.ffn_in)
    ffn_out, full_ffn_out = both(naming.ffn_out)
    last_norm, full_last_norm = both(naming.ffn_norm)
    attended = [full_out(_given(full_out, original.attention, x)) + x for x in theirs]
    middles = [full_norm(x) for x in attended]
    xs, sizes = [cut(x) for x in ours], [len(x) for x in ours]
    if qkv[0][0].bias.numel() == blocks * qkv[0][1].bias.numel():  # narrow heads would need only a part of the targets
        _regress(
            [m for m, _ in qkv], ((x, [shared(full(t)) for _, full in qkv]) for x, t in zip(xs, theirs, strict=True))
        )
    contexts = [_given(out, layer.attention, x, batch_size=size) for x, size in zip(xs, sizes, strict=True)]
    _regress([out], ((c, [cut(t) - x]) for c, t, x in zip(contexts, attended, xs, strict=True)))
    added = [out(c) + x for c, x in zip(contexts, xs, strict=True)]
    _rescale(norm, ((x, cut(y)) for x, y in zip(added, middles, strict=True)))
    ys = [norm(x) for x in added]
    del contexts, added, attended
    inners = [full_ffn_in(y) for y in middles]
    _regress([ffn_in], ((y, [shared(u)]) for y, u in zip(ys, inners, strict=True)))
    added = [full_ffn_out(activation(u)) + y for u, y in zip(inners, middles, strict=True)]
    del inners, middles
    _regress([ffn_out], ((activation(ffn_in(y)), [cut(t) - y]) for y, t in zip(ys, added, strict=True)))
    outputs = [full_last_norm(x) for x in added]
    sums = [ffn_out(activation(ffn_in(y))) + y for y in ys]
    _rescale(last_norm, ((x, cut(y)) for x, y in zip(sums, outputs, strict=True)))
    merged = [merge_hidden(last_norm(x), size) for x, size in zip(sums, sizes, strict=True)]
    return merged, outputs


def _given(part: nn.Module, attention: nn.Module, x: torch.Tensor, **options) -> torch.Tensor:
    """The input of `part` when `attention` is called with `x`: the context, before the output projection."""
    seen: list[torch.Tensor] = []
    hook = part.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    attention(x, **options)
    hook.remove()
    return seen[0]


def _regress(maps: list[nn.Module], pairs: Pairs) -> None:
    """Fits each of `maps`, which read the same inputs, by ridge regression (normal equations in float64)."""
    moments, products = 0.0, [0.0] * len(maps)
    for inputs, targets in pairs:
        inputs = nn.functional.pad(inputs, (0, 1), value=1.0)  # the bias
        moments = moments + (inputs.mT @ inputs).double()
        products = [done + (inputs.mT @ target).double() for done, target in zip(products, targets, strict=True)]
    diagonal = moments.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1)
    ridge = (RIDGE * diagonal)[:, None, None] * torch.eye(moments.shape[-1], dtype=moments.dtype)
    factor = torch.linalg.cholesky(moments + ridge)
    for each, product in zip(maps, products, strict=True):
        solved = torch.cholesky_solve(product, factor).mT  # [P, out, in + 1]
        each.weight.copy_(solved[..., :-1].view_as(each.weight))
        each.bias.copy_(solved[..., -1].view_as(each.bias))


def _rescale(norm: nn.Module, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Scale and shift of each unit by least squares: inputs and targets [P, M, d]."""
    count, sums = 0, 0.0
    for inputs, target in pairs:
        normed = nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=norm.eps)
        count += inputs.shape[1]
        parts = (normed, target, normed * target, normed.square())
        sums = sums + torch.stack([part.sum(1).double() for part in parts])
    x, y, xy, xx = sums / count
    scale = (xy - x * y) / (xx - x.square()).clamp(min=1e-12)
    norm.weight.copy_(scale.view_as(norm.weight))
    norm.bias.copy_((y - scale * x).view_as(norm.bias))
