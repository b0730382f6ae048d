"""Linear maps whose weights are laid out for the fastest product.

A share of a layer has few rows or narrow outputs, and a product of few rows takes as long as laying out and reading its
weights. oneDNN keeps weights in its own blocked layout (`packed`; notebook 04 measures both). What cannot be packed
(other number formats, views of a map that several plans share) is kept input-major, [in, out]; rows of a multiple of
4 KiB are padded, since such rows fall on the same cache sets.
"""

from collections.abc import Sequence
from functools import cache
from typing import Self

import torch
from torch.nn import functional as F

_PADDING = 16  # numbers, one cache line of float32
_BAD_STRIDE_BYTES = 4096
_TYPICAL_ROWS = 32  # oneDNN lays out for these; 8 to 128 rows run as fast as with their own layout
_MIN_PACKED = 2**14  # weights; with fewer, the call itself takes longer than the product


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """[..., in, out] with contiguous rows, padded if their length is a multiple of 4 KiB; not copied if it lies so."""
    *leading, num_out = weight.shape
    unlucky = num_out * weight.itemsize % _BAD_STRIDE_BYTES == 0
    if weight.is_contiguous() and not unlucky:
        return weight
    stride = num_out + _PADDING if unlucky else num_out
    return weight.new_zeros(*leading, stride)[..., :num_out].copy_(weight)


@cache
def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed products, and they are correct."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.linspace(-1, 1, 5 * 48).view(5, 48), torch.linspace(-1, 1, 64 * 48).view(64, 48)
    bias = torch.ones(64)
    try:
        return bool(torch.allclose(_product(x, _packed(weight), bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4))
    except (RuntimeError, AttributeError):
        return False


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _no_numbers(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of `weight`'s shape and dtype that takes no memory: a placeholder for a packed weight."""
    return weight.new_zeros(()).expand(weight.shape)


def _worth_packing(weight: torch.Tensor) -> bool:
    is_plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_plain and weight.shape[-1] * weight.shape[-2] >= _MIN_PACKED and can_pack()


class Linear:
    """x [..., in] -> [..., out]; the product itself adds the bias, if there is one."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, packed: Sequence[torch.Tensor] | None = None
    ):
        """`weight` is [in, out], see `laid_out`; `packed`, if given, is used instead of its numbers."""
        self.weight = weight
        self.bias = bias
        self.packed = packed

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, is_input_major: bool, packs: bool) -> Self:
        """From a weight as a checkpoint stores it, [in, out] or [out, in]; `packs`: pack it for oneDNN if that pays."""
        input_major, output_major = (weight, weight.mT) if is_input_major else (weight.mT, weight)
        if packs and len(weight) and _worth_packing(weight):
            packed = [_packed(block) for block in (output_major if weight.ndim == 3 else [output_major])]
            return cls(_no_numbers(input_major), bias, packed)
        return cls(laid_out(input_major), bias)

    def part(self, outputs: tuple[int, int] | None = None, inputs: tuple[int, int] | None = None) -> "Linear":
        """A view of outputs, or inputs, start..stop; some inputs give partial sums, without bias."""
        assert self.packed is None, "a packed map has no parts"
        if inputs:
            return Linear(self.weight[slice(*inputs)])
        return Linear(self.weight[:, slice(*outputs)], self.bias[slice(*outputs)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # also of no inputs: a device without a head
        if self.packed is not None:
            y = _product(rows, *self.packed, self.bias)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        y = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return y.view(*x.shape[:-1], y.shape[-1])


class StackedLinear(Linear):
    """A map for each of p sub-blocks: x [p, rows, in] -> [p, rows, out]; weight [p, in, out], bias [p, out]."""

    def part(self, start: int, stop: int) -> "StackedLinear":
        """A view of sub-blocks start..stop."""
        assert self.packed is None, "a packed map has no parts"
        return StackedLinear(self.weight[start:stop], self.bias[start:stop])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            ys = [_product(rows, weight, bias) for rows, weight, bias in zip(x, self.packed, self.bias, strict=True)]
            return torch.stack(ys) if len(ys) > 1 else ys[0].unsqueeze(0)
        if len(x) == 1:  # one sub-block a device: a plain product is faster than a batch of one
            return torch.addmm(self.bias[0], x[0], self.weight[0]).unsqueeze(0)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)
