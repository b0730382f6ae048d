"""Messages as bytes: writes and reads tensors in the formats of `parallel.wire`."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from detransformer.parallel.wire import CODES, GROUP, SEGMENT, VECTOR, means_shape, vq_parts

KMEANS_ROUNDS = 5  # of Lloyd's algorithm, which makes a message's codebook

Shape = Sequence[int]


def encode(x: torch.Tensor, wire: str, message: torch.Tensor) -> None:
    """Writes `x` [..., n] into `message` (uint8, of `message_bytes`), in a format of `parallel.wire`."""
    if not x.numel():
        return
    match wire:
        case "float32":  # the numbers as computed
            message[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        case "bfloat16":
            message[: 2 * x.numel()].view(torch.bfloat16).view(x.shape).copy_(x)
        case "int8":
            _write_int8(x, message)
        case "int4":
            _write_int4(x, message)
        case "means8":
            means = [segment.mean(1, keepdim=True) for segment in x.split(SEGMENT, dim=1)]
            _write_int8(torch.cat(means, dim=1), message)
        case "vq4":
            _write_vq4(x, message)


def decode(message: torch.Tensor, shape: Shape, wire: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `shape` in `message`; a view of the message if it needs no conversion."""
    numbers = math.prod(shape)
    if not numbers:
        return message.new_zeros(shape, dtype=dtype)
    match wire:
        case "float32":
            return message[: dtype.itemsize * numbers].view(dtype).view(*shape)
        case "bfloat16":
            return message[: 2 * numbers].view(torch.bfloat16).view(*shape).to(dtype)
        case "int8":
            return _read_int8(message, shape, dtype)
        case "int4":
            return _read_int4(message, shape, dtype)
        case "means8":
            # Attention to equal keys adds up, so a mean weighs as much as its tokens together (Prism's scaled softmax).
            means = _read_int8(message, means_shape(shape), dtype)
            return means.repeat_interleave(SEGMENT, dim=1)[:, : shape[1]]
        case "vq4":
            return _read_vq4(message, shape, dtype)


def _write_int8(x: torch.Tensor, message: torch.Tensor) -> None:
    """One scale a row, all in front of the numbers, so that both travel together.

    Rows are the leading axes of a tensor (tokens, and q, k, v or sub-blocks if they travel in one message): one scale
    covers one token's features on one device, or fewer.
    """
    rows = x.reshape(-1, x.shape[-1])
    scale = rows.abs().amax(1, keepdim=True).float() / 127  # symmetric: zero stays zero
    message[: 4 * len(rows)].view(torch.float32).copy_(scale[:, 0])
    quantised = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    message[4 * len(rows) : 4 * len(rows) + rows.numel()].view(torch.int8).view(rows.shape).copy_(quantised)


def _read_int8(message: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    numbers, rows = math.prod(shape), math.prod(shape[:-1])
    scale = message[: 4 * rows].view(torch.float32).view(*shape[:-1], 1)
    return message[4 * rows : 4 * rows + numbers].view(torch.int8).view(*shape).to(dtype).mul_(scale)


def _write_int4(x: torch.Tensor, message: torch.Tensor) -> None:
    """A bfloat16 scale for each `GROUP` numbers of a row, all scales in front; two numbers a byte, from -7 to 7."""
    groups = F.pad(x.reshape(-1, x.shape[-1]), (0, -x.shape[-1] % GROUP)).view(-1, GROUP)
    scale = (groups.abs().amax(1, keepdim=True) / 7).bfloat16()
    message[: 2 * len(groups)].view(torch.bfloat16).copy_(scale[:, 0])
    quantised = (groups / scale.float().clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-7, 7)
    _pack(quantised.add_(8).to(torch.uint8), message[2 * len(groups) :])


def _read_int4(message: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    groups = math.prod(shape[:-1]) * -(-shape[-1] // GROUP)
    scale = message[: 2 * groups].view(torch.bfloat16).view(-1, 1).to(dtype)
    numbers = _unpack(message[2 * groups :], GROUP * groups).view(-1, GROUP).to(dtype).sub_(8).mul_(scale)
    return numbers.view(*shape[:-1], -1)[..., : shape[-1]]


def _write_vq4(x: torch.Tensor, message: torch.Tensor) -> None:
    """K and V [2, t, B, n]: their mean tokens in int8, codebooks, and a code for each vector of the differences."""
    mean, books, codes = message[: sum(vq_parts(x.shape))].split(vq_parts(x.shape))
    _write_int8(x.mean(1, keepdim=True), mean)
    rest = (x - _read_int8(mean, means_shape(x.shape, x.shape[1]), x.dtype)).float()
    vectors = F.pad(rest, (0, -x.shape[-1] % VECTOR)).reshape(len(x), -1, VECTOR)
    made = torch.stack([_codebook(part) for part in vectors]).bfloat16()
    books.view(torch.bfloat16).view(made.shape).copy_(made)
    _pack(torch.cdist(vectors, made.float()).argmin(-1).to(torch.uint8).flatten(), codes)


def _read_vq4(message: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    mean, books, codes = message[: sum(vq_parts(shape))].split(vq_parts(shape))
    books = books.view(torch.bfloat16).view(shape[0], CODES, VECTOR).to(dtype)
    width = -(-shape[-1] // VECTOR)
    chosen = _unpack(codes, math.prod(shape[:-1]) * width).long().view(shape[0], -1)
    rest = torch.stack([book[own] for book, own in zip(books, chosen, strict=True)])
    rest = rest.view(*shape[:-1], VECTOR * width)[..., : shape[-1]]
    return rest + _read_int8(mean, means_shape(shape, shape[1]), dtype)


def _codebook(vectors: torch.Tensor) -> torch.Tensor:
    """`CODES` vectors [CODES, VECTOR] that represent `vectors` [N, VECTOR]: k-means from evenly spaced ones."""
    book = vectors[torch.linspace(0, len(vectors) - 1, CODES, device=vectors.device).long()]
    for _ in range(KMEANS_ROUNDS):
        nearest = torch.cdist(vectors, book).argmin(1)
        sums = torch.zeros_like(book).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=CODES).unsqueeze(1)
        book = torch.where(counts > 0, sums / counts.clamp_min(1), book)
    return book


def _pack(numbers: torch.Tensor, message: torch.Tensor) -> None:
    """Writes numbers from 0 to 15 (uint8) into the front of `message`, two a byte, the first one low."""
    pairs = F.pad(numbers.flatten(), (0, numbers.numel() % 2)).view(-1, 2)
    message[: len(pairs)].copy_(pairs[:, 0] | pairs[:, 1] << 4)


def _unpack(message: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` numbers that `_pack` wrote."""
    packed = message[: -(-count // 2)]
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten()[:count]
