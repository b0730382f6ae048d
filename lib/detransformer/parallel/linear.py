"""Linear maps whose weights lie as the product reads them fastest.

`torch.nn.Linear` keeps its weight output-major, [out, in], which costs the product of few rows by a large matrix up to
half its speed or more: with 32 rows, 44 instead of 101 GFLOP/s for 3072 -> 768, 82 instead of 125 for 768 -> 768 (one
core of a 2.5 GHz Xeon, MKL). Shares of a layer have few rows or narrow outputs, so weights are kept input-major. Rows
of a multiple of 4 KiB fall on the same cache sets and are padded (94 instead of 64 GFLOP/s for 768 -> 3072).
"""

import torch

_PADDING = 16  # numbers, one cache line of float32
_BAD_STRIDE_BYTES = 4096


def input_major(weight: torch.Tensor) -> torch.Tensor:
    """[..., out, in] -> [..., in, out], each row contiguous, padded where its length would be unlucky."""
    return _laid_out(weight.transpose(-1, -2))


def padded(weight: torch.Tensor) -> torch.Tensor:
    """[..., in, out] as it is, or in a copy with padded rows where their length would be unlucky."""
    unlucky = weight.shape[-1] * weight.itemsize % _BAD_STRIDE_BYTES == 0
    return _laid_out(weight) if unlucky else weight


def _laid_out(weight: torch.Tensor) -> torch.Tensor:
    *leading, num_out = weight.shape
    stride = num_out
    if num_out * weight.itemsize % _BAD_STRIDE_BYTES == 0:
        stride += _PADDING
    return weight.new_zeros(*leading, stride)[..., :num_out].copy_(weight)


class Linear:
    """x [..., in] -> [..., out]; the bias, where there is one, is added by the product itself."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """`weight` is [in, out]: see `input_major`."""
        self.weight = weight
        self.bias = bias

    def part(self, outputs: tuple[int, int] | None = None, inputs: tuple[int, int] | None = None) -> "Linear":
        """A view of outputs, or inputs, start..stop; partial sums, of some inputs, have no bias."""
        if inputs:
            return Linear(self.weight[slice(*inputs)])
        return Linear(self.weight[:, slice(*outputs)], self.bias[slice(*outputs)])

    def __call__(self, x: torch.Tensor, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The outputs start..stop, or all."""
        weight, rows = self.weight[:, start:stop], x.flatten(0, -2)  # also of no inputs: a device without a head
        y = rows @ weight if self.bias is None else torch.addmm(self.bias[start:stop], rows, weight)
        return y.view(*x.shape[:-1], y.shape[-1])


class StackedLinear:
    """One linear map for each of p sub-blocks: x [p, rows, in] -> [p, rows, out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        """`weight` is [p, in, out], `bias` [p, out]."""
        self.weight = weight
        self.bias = bias

    def part(self, start: int, stop: int) -> "StackedLinear":
        """A view of sub-blocks start..stop."""
        return StackedLinear(self.weight[start:stop], self.bias[start:stop])

    def __call__(self, x: torch.Tensor, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The outputs start..stop, or all."""
        weight, bias = self.weight[..., start:stop], self.bias[:, start:stop]
        if len(x) == 1:  # one sub-block a device: a plain product is faster than a batch of one
            return torch.addmm(bias[0], x[0], weight[0]).unsqueeze(0)
        return torch.baddbmm(bias.unsqueeze(1), x, weight)
