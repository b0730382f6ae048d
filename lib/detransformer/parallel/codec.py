"""Writes tensors into messages and reads them back, in the number formats of `parallel.wire`.

A message is bytes. An int8 message carries its rows' scales in front of its numbers, so that both travel together.
Rows are the leading axes of a tensor (tokens, and q, k, v or sub-blocks where they travel in one message): a scale's
group is one token's features on one device, or fewer.
"""

import math
from collections.abc import Sequence

import torch


def encode(x: torch.Tensor, number_format: str, message: torch.Tensor) -> None:
    """Writes `x` [..., n] into `message` (uint8, of `message_bytes`)."""
    if number_format == "float32":
        message[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
    elif number_format == "bfloat16":
        message[: 2 * x.numel()].view(torch.bfloat16).view(x.shape).copy_(x)
    else:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(1, keepdim=True).float() / 127  # symmetric: zero stays zero
        message[: 4 * len(rows)].view(torch.float32).copy_(scale[:, 0])
        quantised = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
        message[4 * len(rows) : 4 * len(rows) + rows.numel()].view(torch.int8).view(rows.shape).copy_(quantised)


def decode(message: torch.Tensor, shape: Sequence[int], number_format: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `shape` that `message` carries; a view of the message where it needs no conversion."""
    numbers = math.prod(shape)
    if number_format == "float32":
        return message[: dtype.itemsize * numbers].view(dtype).view(*shape)
    if number_format == "bfloat16":
        return message[: 2 * numbers].view(torch.bfloat16).view(*shape).to(dtype)
    rows = math.prod(shape[:-1])
    scale = message[: 4 * rows].view(torch.float32).view(*shape[:-1], 1)
    return message[4 * rows : 4 * rows + numbers].view(torch.int8).view(*shape).to(dtype).mul_(scale)
