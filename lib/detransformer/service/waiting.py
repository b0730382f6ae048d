"""The queue of requests: each has a deadline and gets one answer; some are batched, padded to one length."""

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from detransformer.cluster.request import Request
from detransformer.parallel.draw import Sampling

MAX_ATTEMPTS = 6
EXAMPLES = ("input_ids", "attention_mask", "token_type_ids")


class QueueFull(Exception):
    """The queue is full; it may have room after `retry_after_s`."""

    def __init__(self, waiting: int, retry_after_s: float):
        super().__init__(f"{waiting} requests wait already: ask again in {retry_after_s:.0f} s.")
        self.retry_after_s = retry_after_s


class Expired(Exception):
    """A request had no answer by its deadline."""


class Unanswered(Exception):
    """All attempts to answer a request failed, or its session has ended."""


@dataclass(eq=False)  # comparing tensors gives no single bool
class Asked:
    """A request, its tensors [B, T] by name, and the future of its answer.

    `sampling`: how each row's tokens are chosen; `on_token` is called with each row's next token.
    """

    request: Request
    inputs: Mapping[str, torch.Tensor]
    deadline: float
    sampling: Sequence[Sampling] = ()
    on_token: Callable[[list[int]], None] | None = None
    future: Future = field(default_factory=Future)
    attempts: int = 0
    since: float = field(default_factory=time.monotonic)
    told: list[list[int]] = field(default_factory=list)  # tokens that `on_token` has received
    torn: Unanswered | None = None  # set if the answer begins with other tokens than those

    @property
    def size(self) -> int:
        return len(self.inputs["input_ids"])

    def goes_with(self, other: "Asked") -> bool:
        """Whether both may share a batch; a request whose batch broke is asked alone."""
        return self.request == other.request and not self.attempts and not other.attempts

    def hear(self, step: int, tokens: list[int]) -> None:
        """Takes in each row's token at `step`, from 0; after a group broke, passes on only the steps that are new."""
        if self.on_token is None or self.future.done():
            return
        if step == len(self.told):
            self.told.append(tokens)
            self.on_token(tokens)
        elif self.told[step] != tokens:  # another number of devices rounds differently
            self.torn = Unanswered("the devices changed, and their tokens differ from those sent already.")

    def settle(self, answer=None, error: Exception | None = None) -> bool:
        """Sets the answer or error; returns False if there was one already, which then stays."""
        error = error or self.torn
        try:
            self.future.set_exception(error) if error else self.future.set_result(answer)
        except InvalidStateError:
            return self.future.cancelled()  # by the caller
        return True


class Waiting:
    """The queue of requests; any thread may add, one takes. `counts`: how many were answered, refused and so on."""

    def __init__(self, max_waiting: int, max_batch: int):
        self.counts: Counter[str] = Counter()
        self._max_waiting, self._max_batch = max_waiting, max_batch
        self._queue: deque[Asked] = deque()  # those of broken batches before all others
        self._changed = threading.Condition()
        self._row_s: deque[float] = deque(maxlen=32)  # of the last batches
        self._closed = False

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, asked: Asked) -> None:
        """
        Raises:
            QueueFull: if `max_waiting` requests wait already.
            Unanswered: after `close`.
        """
        with self._changed:
            if self._closed:
                raise Unanswered("the session has ended.")
            if len(self) >= self._max_waiting:
                self.counts["refused"] += 1
                row_s = statistics.fmean(self._row_s) if self._row_s else 1.0
                raise QueueFull(len(self), max(1.0, len(self) * row_s))
            self.counts["accepted"] += 1
            self._queue.append(asked)
            self._changed.notify()

    def take(self) -> list[Asked]:
        """The next batch; empty if no request came for a moment."""
        with self._changed:
            if not len(self) and not self._closed:
                self._changed.wait(0.1)
        self.drop_expired()
        with self._changed:
            batch: list[Asked] = []
            while self._queue and (not batch or self._joins(batch, self._queue[0])):
                batch.append(self._queue.popleft())
            return batch

    def _joins(self, batch: list[Asked], asked: Asked) -> bool:
        return batch[0].goes_with(asked) and sum(a.size for a in batch) + asked.size <= self._max_batch

    def settle(self, batch: list[Asked], outputs: Mapping[str, torch.Tensor], left: bool, took_s: float) -> list[float]:
        """Gives each request of `batch` its rows of `outputs`; returns the seconds since each was asked."""
        first = 0
        for asked in batch:
            length = asked.inputs["input_ids"].shape[1]
            rows = {name: tensor[first : first + asked.size] for name, tensor in outputs.items()}
            first += asked.size
            self.counts["twice"] += not asked.settle(rows if left else cut(rows, length))
            self.counts["answered"] += 1
            self.counts["retried"] += asked.attempts > 1
        self._row_s.append(took_s / first)
        return [time.monotonic() - asked.since for asked in batch]

    def ask_again(self, batch: list[Asked], why: str) -> None:
        """Puts a broken batch's requests without an answer before all others; `why`: how the last attempt ended."""
        for asked in reversed(batch):
            if asked.future.done():
                continue
            if asked.attempts >= MAX_ATTEMPTS:
                asked.settle(error=Unanswered(f"{MAX_ATTEMPTS} attempts to answer failed; the last: {why}"))
                self.counts["unanswered"] += 1
            else:
                with self._changed:
                    self._queue.appendleft(asked)

    def drop_expired(self) -> None:
        """Ends requests whose deadline has passed, with `Expired`, and cancelled ones."""
        now = time.monotonic()
        with self._changed:
            for asked in [a for a in self._queue if a.deadline < now or a.future.cancelled()]:
                self._queue.remove(asked)
                self.counts["expired"] += 1
                asked.settle(error=Expired("no answer by the deadline."))

    def close(self) -> None:
        """Ends all waiting requests with `Unanswered`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for asked in self._queue:
                asked.settle(error=Unanswered("the session has ended."))


def join_rows(parts: Sequence[Mapping[str, torch.Tensor]], left: bool) -> dict[str, torch.Tensor]:
    """Joins inputs [B, T] of several requests, padded to the longest with mask 0 (`left`: before the tokens)."""
    parts = [{"attention_mask": torch.ones_like(part["input_ids"]), **part} for part in parts]
    joined = {}
    for name in EXAMPLES:
        if any(name in part for part in parts):
            rows = [row for part in parts for row in part.get(name, torch.zeros_like(part["input_ids"]))]
            joined[name] = pad_sequence(rows, batch_first=True, padding_side="left" if left else "right")
    return joined


def cut(outputs: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """One request's outputs without padding: [B, T, ...] cut to its own T."""
    return {name: tensor[:, :length] if tensor.ndim == 3 else tensor for name, tensor in outputs.items()}
