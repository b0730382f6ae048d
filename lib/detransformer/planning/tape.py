"""A device's work for a request, recorded from the executor's own code: products, starts, waits, bytes, weights.

A layer runs under its strategy on meta tensors (shapes without numbers). Its `Comm` sends nothing and records each
start and wait; each matrix product is recorded where torch is called. So prices, the pacing of emulated devices and
execution follow one description. `planning.recorder` records layers, and keeps the recordings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.methods import ORIGINAL_LAYER_STRATEGY

WHOLE = ORIGINAL_LAYER_STRATEGY["single"]  # how one device runs a layer; its rate also holds for the model's ending


@dataclass(frozen=True)
class Compute:
    """One product; `weight_bytes` are read from memory.

    Small products run at another rate, which depends on the strategy, the device's share of the layer under it (0 to
    1), the request's tokens and the number of chunks.
    """

    flops: float
    weight_bytes: float = 0.0
    strategy: str = WHOLE
    share: float = 1.0
    tokens: int = 1
    num_chunks: int = 1


@dataclass(frozen=True)
class Start:
    """A collective begins; bytes that this rank sends and receives, as `parallel.comm` counts them."""

    kind: str
    num_bytes: int
    received_bytes: int = 0


@dataclass(frozen=True)
class Wait:
    """The device waits for the `number`-th collective that was started."""

    number: int


@dataclass(frozen=True)
class Pull:
    """The layer before must yield its next chunk here."""

    chunk: int


@dataclass(frozen=True)
class Arrive:
    """The layer waits here for a chunk that it has pulled."""

    chunk: int


Step = Compute | Start | Wait | Pull | Arrive


@dataclass(frozen=True, eq=False)
class Recording:
    """A layer's steps, cut where it yields a chunk; waits are numbered within it. Bytes of cached keys and values."""

    segments: tuple[tuple[Step, ...], ...]
    cache_bytes: int = 0


@lru_cache(2**14)
def without_numbers(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A meta tensor; one for each shape, since it has no content."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Tape(TorchFunctionMode):
    """Records steps; as a context, also each matrix product that is computed in it.

    The second factor of a product counts as a weight read from memory. Operations that change no shape are left out.
    """

    PRODUCTS = {  # index of the first of the two factors
        torch.addmm: 1,
        torch.baddbmm: 1,
        torch.matmul: 0,
        torch.mm: 0,
        torch.bmm: 0,
        torch.Tensor.matmul: 0,
        torch.Tensor.__matmul__: 0,
        F.linear: 0,
    }

    def __init__(self, **label: str | float):
        super().__init__()
        self.label = label  # fields of `Compute` that all products share
        self.steps: list[Step] = []
        self._num_started = 0

    def start(self, kind: str, num_bytes: int, received_bytes: int) -> int:
        """Records a start; returns its number."""
        self.steps.append(Start(kind, num_bytes, received_bytes))
        self._num_started += 1
        return self._num_started - 1

    def cut(self) -> tuple[Step, ...]:
        """The steps since the last cut."""
        steps, self.steps = tuple(self.steps), []
        return steps

    def arriving(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[Pending]:
        """Chunks of X of these shapes, as the layer before would yield them."""
        for number, shape in enumerate(shapes):
            self.steps.append(Pull(number))
            yield Pending(finish=lambda number=number, shape=shape: self._arrived(number, shape, dtype))
        self.steps.append(Pull(len(shapes)))

    def _arrived(self, number: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.steps.append(Arrive(number))
        return without_numbers(shape, dtype)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.layer_norm or function is F.gelu:
            return args[0]
        if function is F.scaled_dot_product_attention:
            q, k = args[:2]
            self._product(4 * q.numel() * k.shape[-2], 0)
            return without_numbers(q.shape, q.dtype)
        if function is torch.cat:  # slow in torch itself
            parts, dim = args[0], (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            shape = list(parts[0].shape)
            shape[dim] = sum(part.shape[dim] for part in parts)
            return without_numbers(tuple(shape), parts[0].dtype)
        place = self.PRODUCTS.get(function)
        if place is None:
            return function(*args, **(kwargs or {}))
        x, weight = args[place : place + 2]
        num_out = weight.shape[0] if function is F.linear else weight.shape[-1]
        result = without_numbers((*x.shape[:-1], num_out), x.dtype)
        self._product(2 * result.numel() * x.shape[-1], weight.nbytes)
        return result

    def _product(self, flops: int, weight_bytes: int) -> None:
        if flops:
            self.steps.append(Compute(flops, weight_bytes, **self.label))


class TapeComm(Comm):
    """One rank of several absent ones: right shapes, nothing sent, every start and wait on the tape."""

    def __init__(self, rank: int, num_ranks: int, tape: Tape):
        super().__init__(None, rank, num_ranks)
        self.tape = tape

    def _start(self, kind: str, num_bytes: int, received_bytes: int, run, result) -> Pending:
        number = self.tape.start(kind, num_bytes, received_bytes)

        def finish():
            self.tape.steps.append(Wait(number))
            return result()

        return Pending(finish=finish)

    def _write(self, x: torch.Tensor, wire: str, message: torch.Tensor) -> None:
        pass

    def _read(self, message: torch.Tensor, shape: Sequence[int], wire: str, dtype: torch.dtype) -> torch.Tensor:
        return without_numbers(tuple(shape), dtype)

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        return without_numbers((num_bytes,), torch.uint8)
