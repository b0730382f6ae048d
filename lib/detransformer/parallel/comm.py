"""Collectives over gloo: the only file that calls them. Counts calls and bytes by kind.

Bytes are those a rank sends under the ring algorithm (P ranks): all_reduce 2 (P-1)/P of the tensor, all_gather P-1
times its own part. An observer is told before and after each collective; pacing and timing live there, not here.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist


class Observer(Protocol):
    """Told where compute ends and communication begins."""

    def before(self, kind: str, num_bytes: int) -> None: ...

    def after(self, kind: str, num_bytes: int) -> None: ...


class Comm:
    """The collectives of one group of ranks; with one rank every collective is the identity and counts nothing."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, num_ranks: int, observer: Observer | None = None):
        self.group = group
        self.rank = rank
        self.num_ranks = num_ranks
        self.observer = observer
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def reset(self) -> None:
        self.counts.clear()
        self.bytes.clear()

    def _run(self, kind: str, num_bytes: int, collective) -> None:
        self.counts[kind] += 1
        self.bytes[kind] += num_bytes
        if self.observer:
            self.observer.before(kind, num_bytes)
        collective()
        if self.observer:
            self.observer.after(kind, num_bytes)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the ranks, in place."""
        if self.num_ranks > 1:
            num_bytes = 2 * (self.num_ranks - 1) * x.nbytes // self.num_ranks
            self._run("all_reduce", num_bytes, lambda: dist.all_reduce(x, group=self.group))
        return x

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenates every rank's `x` [sizes[rank], ...] along the first axis: [sum(sizes), ...].

        gloo wants equal parts: shorter ones are padded to the longest, and the padding is cut off again.
        """
        if self.num_ranks == 1:
            return x
        longest = max(sizes)
        if len(x) < longest:
            x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        gathered = x.new_empty(self.num_ranks * longest, *x.shape[1:])
        part = x.contiguous()
        self._run(
            "all_gather",
            (self.num_ranks - 1) * part.nbytes,
            lambda: dist.all_gather_single(gathered, part, group=self.group),
        )
        if min(sizes) == longest:
            return gathered
        return torch.cat([gathered[r * longest : r * longest + size] for r, size in enumerate(sizes)])

    def send(self, x: torch.Tensor, to_rank: int) -> None:
        x = x.contiguous()
        self._run("send", x.nbytes, lambda: dist.send(x, group=self.group, group_dst=to_rank))

    def receive(self, x: torch.Tensor, from_rank: int) -> torch.Tensor:
        """Fills `x` with what `from_rank` sends."""
        self._run("receive", x.nbytes, lambda: dist.recv(x, group=self.group, group_src=from_rank))
        return x

    def barrier(self) -> None:
        """Waits for all ranks; neither counted nor observed, as it is no part of inference."""
        if self.num_ranks > 1:
            dist.barrier(group=self.group)
