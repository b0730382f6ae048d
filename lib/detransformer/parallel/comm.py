"""Collectives over gloo: the only file that calls them. Counts calls and bytes by kind.

Each collective is started and waited for later, so that compute can go on meanwhile; `start_...` returns a `Pending`.
One thread runs them in order, so the first to start gets the link first.
Bytes are those that a rank sends (P ranks): all_reduce 2 (P-1)/P of the tensor (ring), all_gather P-1 times its own
message, all_to_all and reduce_scatter one message to each other rank, gather its own message (the receiving rank:
what it receives). An observer is told of starts and waits; pacing and timing live there, not here.
`transfers` lists (kind, bytes, seconds) of each collective, timed from when this rank could begin; this includes
waiting for slower peers.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from detransformer.parallel.codec import decode, encode
from detransformer.parallel.partition import split
from detransformer.parallel.wire import message_bytes


class Observer(Protocol):
    """Told when compute stops for communication. Waits may come in another order than starts."""

    def launch(self, kind: str, num_bytes: int) -> int:
        """Called before a collective starts; returns a number that its wait will carry."""

    def before_wait(self, number: int) -> None: ...

    def after_wait(self, number: int) -> None: ...


class Pending:
    """A value that may still be under way: `wait` returns it. `Pending(x)` is ready at once."""

    def __init__(self, value: Any = None, finish: Callable | None = None):
        self._value, self._finish = value, finish

    def wait(self):
        if self._finish is not None:
            self._value, self._finish = self._finish(), None
        return self._value

    def then(self, change: Callable) -> "Pending":
        """A `Pending` of `change(value)`, applied when it is waited for."""
        return Pending(finish=lambda: change(self.wait()))


class Comm:
    """The collectives of one group of ranks; with one rank every collective is the identity and counts nothing.

    `wire` is a format of `parallel.wire`.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, num_ranks: int):
        self.group = group
        self.rank = rank
        self.num_ranks = num_ranks
        self.observer: Observer | None = None
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.transfers: list[tuple[str, int, float]] = []  # (kind, bytes, seconds) of each
        self._runner = ThreadPoolExecutor(1, "collectives") if num_ranks > 1 else None

    def reset(self) -> None:
        self.counts.clear()
        self.bytes.clear()
        self.transfers.clear()

    @contextmanager
    def observed(self, kind: str, num_bytes: int) -> Iterator[None]:
        """Around one collective that blocks: counts it and tells the observer."""
        number = self._launch(kind, num_bytes)
        if self.observer:
            self.observer.before_wait(number)
        yield
        if self.observer:
            self.observer.after_wait(number)

    def _launch(self, kind: str, num_bytes: int) -> int:
        self.counts[kind] += 1
        self.bytes[kind] += num_bytes
        return self.observer.launch(kind, num_bytes) if self.observer else 0

    def _start(
        self, kind: str, num_bytes: int, received_bytes: int, run: Callable[[], None], result: Callable
    ) -> Pending:
        """`run()` performs the collective, `result()` is its value; bytes are those this rank sends and receives."""
        number = self._launch(kind, num_bytes)

        def timed() -> None:
            start = time.perf_counter()
            run()
            self.transfers.append((kind, num_bytes, time.perf_counter() - start))

        running = self._runner.submit(torch.inference_mode()(timed))

        def finish():
            if self.observer:
                self.observer.before_wait(number)
            running.result()
            if self.observer:
                self.observer.after_wait(number)
            return result()

        return Pending(finish=finish)

    def start_all_reduce(self, x: torch.Tensor, wire: str = "float32") -> Pending:
        """Sum of `x` [..., n] over ranks: in place in float32, else a reduce_scatter of rows and an all_gather."""
        if self.num_ranks == 1:
            return Pending(x)
        if wire == "float32":
            num_bytes = 2 * (self.num_ranks - 1) * x.nbytes // self.num_ranks
            run = partial(dist.all_reduce, x, group=self.group)
            return self._start("all_reduce", num_bytes, num_bytes, run, lambda: x)
        sizes = split(x.numel() // x.shape[-1], [1.0] * self.num_ranks)
        parts = x.view(-1, x.shape[-1]).split(sizes)
        shapes = [(size, x.shape[-1]) for size in sizes]

        def gather(own: torch.Tensor) -> torch.Tensor:
            return torch.cat(self.start_all_gather(own, shapes, wire).wait()).view(x.shape)

        return self.start_reduce_scatter(parts, wire).then(gather)

    def start_reduce_scatter(self, parts: Sequence[torch.Tensor], wire: str = "float32") -> Pending:
        """`parts[r]` is for rank r; returns the sum of all ranks' parts for this one.

        Uses point-to-point messages: gloo's own reduce_scatter is an all_reduce, with twice the bytes.
        """
        own = parts[self.rank]
        if self.num_ranks == 1:
            return Pending(own)
        received = self._exchange("reduce_scatter", parts, [own.shape] * self.num_ranks, wire)
        return received.then(lambda every: torch.stack(every).sum(0))  # in rank order: the same sum on every run

    def start_all_gather(self, x: torch.Tensor, shapes: Sequence[Sequence[int]], wire: str = "float32") -> Pending:
        """Every rank's `x`, which has `shapes[rank]`, as a list in rank order; shapes may differ."""
        if self.num_ranks == 1:
            return Pending([x])
        dtype, sizes = x.dtype, [message_bytes(shape, wire, x.itemsize) for shape in shapes]
        gathered = self._buffer(sum(sizes)).split(sizes)
        own = gathered[self.rank]
        self._write(x, wire, own)
        return self._start(
            "all_gather",
            (self.num_ranks - 1) * len(own),
            sum(sizes) - len(own),
            lambda: self._swap([own] * self.num_ranks, gathered),
            lambda: [self._read(message, shape, wire, dtype) for message, shape in zip(gathered, shapes, strict=True)],
        )

    def start_all_to_all(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], wire: str = "float32"
    ) -> Pending:
        """Sends `parts[r]` to rank r; returns what each rank sent here, `shapes[r]`, as a list in rank order."""
        if self.num_ranks == 1:
            return Pending(list(parts))
        return self._exchange("all_to_all", parts, shapes, wire)

    def _exchange(self, kind: str, parts, shapes, wire: str) -> Pending:
        itemsize, dtype, own = parts[0].itemsize, parts[0].dtype, parts[self.rank]
        sent = [message_bytes(part.shape, wire, itemsize) for part in parts]
        got = [message_bytes(shape, wire, itemsize) for shape in shapes]
        sent[self.rank] = got[self.rank] = 0  # the own part stays here, as computed
        outgoing, incoming = self._buffer(sum(sent)), self._buffer(sum(got))
        for rank, message in enumerate(outgoing.split(sent)):
            if rank != self.rank and parts[rank].numel():
                self._write(parts[rank], wire, message)
        return self._start(
            kind,
            sum(sent),
            sum(got),
            lambda: self._swap(outgoing.split(sent), incoming.split(got)),
            lambda: [
                own if rank == self.rank else self._read(message, shapes[rank], wire, dtype)
                for rank, message in enumerate(incoming.split(got))
            ],
        )

    def _swap(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> None:
        """In round k each rank sends to the k-th after it and receives from the k-th before it, one message at a time.

        gloo's own all_to_all posts all messages at once; on links that are full both ways, acknowledgements then queue
        behind data. Its all_gather needs equal parts.
        """
        for k in range(1, self.num_ranks):
            target, source = (self.rank + k) % self.num_ranks, (self.rank - k) % self.num_ranks
            works = []
            if len(incoming[source]):
                works.append(dist.irecv(incoming[source], group=self.group, group_src=source))
            if len(outgoing[target]):
                works.append(dist.isend(outgoing[target], group=self.group, group_dst=target))
            for work in works:
                work.wait()

    def start_gather(
        self, x: torch.Tensor, shapes: Sequence[Sequence[int]], root: int, timeout_s: float, absent: Sequence[int] = ()
    ) -> Pending:
        """Every rank's `x`, which has `shapes[rank]`, at `root` as a list in rank order; None on the other ranks.

        `absent` ranks are not asked: the list has None for them. It also has None for a rank that is lost, or whose
        message has not come within `timeout_s`; do not ask that rank again, since its late message would be taken for
        its next one.
        """
        if self.num_ranks == 1:
            return Pending([x])
        sizes = [message_bytes(shape, "float32", x.itemsize) for shape in shapes]
        if self.rank != root:
            message = self._buffer(sizes[self.rank])
            self._write(x, "float32", message)
            run = partial(dist.send, message, group=self.group, group_dst=root)
            return self._start("gather", len(message), 0, run, lambda: None)
        sizes[root] = 0
        incoming, present = self._buffer(sum(sizes)).split(sizes), {root: x}

        def collect() -> None:
            deadline, works = time.monotonic() + timeout_s, {}
            asked = [rank for rank in range(self.num_ranks) if rank not in (root, *absent)]
            for rank in asked:  # all at once, so that none waits for another
                with suppress(RuntimeError):  # gloo's error of a lost or late peer
                    works[rank] = dist.irecv(incoming[rank], group=self.group, group_src=rank)
            for rank, work in works.items():
                with suppress(RuntimeError):
                    work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
                    present[rank] = self._read(incoming[rank], shapes[rank], "float32", x.dtype)

        every = range(self.num_ranks)
        return self._start("gather", sum(sizes), sum(sizes), collect, lambda: [present.get(rank) for rank in every])

    def send(self, x: torch.Tensor, to_rank: int, wire: str = "float32") -> None:
        message = self._buffer(message_bytes(x.shape, wire, x.itemsize))
        self._write(x, wire, message)
        with self.observed("send", message.nbytes):
            dist.send(message, group=self.group, group_dst=to_rank)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, from_rank: int, wire: str = "float32") -> torch.Tensor:
        """The tensor of `shape` that `from_rank` sends."""
        message = self._buffer(message_bytes(shape, wire, dtype.itemsize))
        with self.observed("receive", message.nbytes):
            dist.recv(message, group=self.group, group_src=from_rank)
        return self._read(message, shape, wire, dtype)

    def barrier(self) -> None:
        """Waits for all ranks; neither counted nor observed, since it is not part of inference."""
        if self.num_ranks > 1:
            dist.barrier(group=self.group)

    _write, _read = staticmethod(encode), staticmethod(decode)

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        """Memory of a message; zeroed, so that padding never holds denormals."""
        return torch.zeros(num_bytes, dtype=torch.uint8)
