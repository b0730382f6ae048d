"""The front of a service: requests in, answers out, for as long as the first device is there.

One thread hands batches to the leading worker (`worker`) and gives each request its answer, once: a batch whose
workers break is asked again, request by request, of those that are left.
"""

import contextlib
import os
import socket
import statistics
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from detransformer.cluster.answers import check_length
from detransformer.cluster.checkpoints import open_folder
from detransformer.cluster.rollcall import join_words
from detransformer.cluster.run import Request
from detransformer.cluster.spec import ClusterSpec
from detransformer.parallel.plan import is_decoder
from detransformer.service.line import Line, tensors_of
from detransformer.service.post import Post

START_S = 180.0
MAX_ATTEMPTS = 6
KEPT_EVENTS, KEPT_SECONDS = 1000, 2000
ANSWERED, POSTPONED, ENDED = "answered", "postponed", "ended"
EXAMPLES = ("input_ids", "attention_mask", "token_type_ids")


class QueueFull(Exception):
    """No room for another request; `retry_after_s` is when there may be."""

    def __init__(self, waiting: int, retry_after_s: float):
        super().__init__(f"{waiting} requests wait already: ask again in {retry_after_s:.0f} s.")
        self.retry_after_s = retry_after_s


class Expired(Exception):
    """A request that could not be answered by its deadline."""


class Unanswered(Exception):
    """A request whose attempts all broke off, or whose session has ended."""


@dataclass(frozen=True)
class Event:
    """What became of devices, in a sentence; `at` is of `time.monotonic`. `kind`: lost, meeting, differing, slow,
    usual, short or serving."""

    at: float
    kind: str
    sentence: str
    devices: tuple[str, ...] = ()


@dataclass(eq=False)  # tensors do not compare to one truth
class _Asked:
    request: Request
    inputs: dict[str, torch.Tensor]
    deadline: float
    future: Future = field(default_factory=Future)
    attempts: int = 0
    since: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        return len(self.inputs["input_ids"])

    def goes_with(self, other: "_Asked") -> bool:
        return self.request == other.request and not self.attempts and not other.attempts

    def settle(self, answer=None, error: Exception | None = None) -> bool:
        """Whether this is the first answer; a second one reaches nobody."""
        try:
            self.future.set_exception(error) if error else self.future.set_result(answer)
        except InvalidStateError:
            return self.future.cancelled()  # the caller has given it up
        return True


class Session:
    """A model served by the devices of a cluster; a context manager.

    Args:
        spec: the cluster file's; its devices are emulated on this machine unless `own` says which one this host is.
        model: folder of the checkpoint.
        plan: fields of a `Plan` for all devices, taken while all are there; None, or while one is away: planned for
            those that are there. Requests that these cannot hold wait for the others.
        method: as `detransformer run --method`.
        seq_len: length in tokens that is planned for.
        max_waiting: requests that wait at most; another is refused.
        max_batch: rows of a batch at most.
        on_event: is told, in a sentence, when devices come, are lost or are back.
        post: further arguments are of `Post`: how devices are emulated, or which one this host is.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        model: str,
        plan: dict | None = None,
        method: str = "auto",
        seq_len: int = 128,
        max_waiting: int = 64,
        max_batch: int = 8,
        on_event: Callable[[str], None] | None = None,
        **post: Any,
    ):
        self.spec, self.model = spec, str(model)
        self.config: PretrainedConfig = open_folder(model).config
        self.defaults = Request(plan=plan, method=method, repeats=1)
        self.max_batch = max_batch
        self.post = Post(spec, self.model, seq_len=seq_len, **post)
        self.present: tuple[int, ...] = ()
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.counts: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()  # of the batches
        self.seconds: deque[float] = deque(maxlen=KEPT_SECONDS)  # from asking to the answer
        self._on_event, self._max_waiting = on_event, max_waiting
        self._waiting: deque[_Asked] = deque()
        self._again: deque[_Asked] = deque()  # of broken batches, before all others
        self._changed = threading.Condition()
        self._stop, self._ready = threading.Event(), threading.Event()
        self._answered_s: deque[float] = deque(maxlen=32)  # of the last batches, a row
        self._known_lost: set[int] = set()
        self._thread: threading.Thread | None = None

    # --- What users call ---

    def __enter__(self) -> "Session":
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.post.front)
        os.chmod(self.post.front, 0o600)
        self._listener.listen()
        try:
            self.post.start()
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
            if not self._ready.wait(START_S):
                raise Unanswered(f"the devices did not start within {START_S:.0f} s: {self.post.last_words()}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def submit(
        self,
        inputs: Mapping[str, torch.Tensor],
        deadline_s: float = 60.0,
        max_new_tokens: int | None = None,
    ) -> Future:
        """The future of the outputs of `inputs`, tensors [B, T] by name; padded on the right, a GPT-2's on the left.

        It becomes a dict of tensors, as `jobs.run_plan` or `jobs.generate` give them, or raises `Expired`,
        `Unanswered`, or `ValueError` where the model does not take the input.

        Raises:
            QueueFull: when `max_waiting` requests wait already.
            ValueError: for input_ids of another shape or out of the vocabulary.
        """
        new = max_new_tokens if max_new_tokens is not None else self.defaults.max_new_tokens
        request = replace(self.defaults, max_new_tokens=new)
        asked = _Asked(request, self._checked(inputs, new), time.monotonic() + deadline_s)
        with self._changed:
            if self._stop.is_set():
                raise Unanswered("the session has ended.")
            if len(self._waiting) >= self._max_waiting:
                self.counts["refused"] += 1
                raise QueueFull(len(self._waiting), self.retry_after_s)
            self.counts["accepted"] += 1
            self._waiting.append(asked)
            self._changed.notify()
        return asked.future

    def __call__(self, inputs: Mapping[str, torch.Tensor], deadline_s: float = 60.0, **options) -> dict:
        """`submit`, and waits."""
        future = self.submit(inputs, deadline_s, **options)
        try:
            return future.result(deadline_s + 1)
        except TimeoutError:
            raise Expired(f"no answer within {deadline_s:g} s.") from None

    @property
    def retry_after_s(self) -> float:
        """When there may be room for another request."""
        row_s = statistics.fmean(self._answered_s) if self._answered_s else 1.0
        return max(1.0, len(self._waiting) * row_s)

    @property
    def serving(self) -> bool:
        return self._ready.is_set() and not self._stop.is_set()

    def wait_for_all(self, timeout_s: float = 60.0) -> bool:
        """Waits until all devices of the cluster serve; whether they do."""
        deadline = time.monotonic() + timeout_s
        while not (self.serving and len(self.present) == len(self.spec.members)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._again)

    def close(self) -> None:
        """Ends agents and workers; requests that still wait get `Unanswered`."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.post.close()
        if self._thread:
            self._thread.join(10)
        for asked in [*self._again, *self._waiting]:
            asked.settle(error=Unanswered("the session has ended."))

    def _checked(self, inputs: Mapping[str, torch.Tensor], new: int) -> dict[str, torch.Tensor]:
        ids = inputs.get("input_ids")
        if ids is None or ids.ndim != 2 or not ids.numel():
            shape = None if ids is None else list(ids.shape)
            raise ValueError(f"input_ids are of shape {shape}; give [rows, tokens], one of each at least.")
        if set(inputs) - set(EXAMPLES):
            raise ValueError(f"inputs {sorted(set(inputs) - set(EXAMPLES))} are not known; give {', '.join(EXAMPLES)}.")
        if any(tensor.shape != ids.shape for tensor in inputs.values()):
            raise ValueError(
                f"attention_mask and token_type_ids are of other shapes than input_ids, {list(ids.shape)}."
            )
        low, high, size = int(ids.min()), int(ids.max()), self.config.vocab_size
        if low < 0 or high >= size:
            raise ValueError(f"input_ids go from {low} to {high}; the model's vocabulary from 0 to {size - 1}.")
        check_length(self.config, ids.shape[1], new if is_decoder(self.config) else 0)
        if len(ids) > self.max_batch:
            raise ValueError(f"{len(ids)} rows are asked for at once; give {self.max_batch} at most.")
        mask = inputs.get("attention_mask")
        return {"attention_mask": torch.ones_like(ids) if mask is None else mask, **inputs}

    # --- The thread that asks the leading worker ---

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._listener.settimeout(0.2)
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                self._drop_expired()
                continue
            except OSError:
                return
            connection.settimeout(None)
            line = Line(connection)
            try:
                self._lead(line)
            except Exception as error:  # the leader's process has ended, in general; in any case, on with another
                if not isinstance(error, (OSError, ValueError, KeyError)):
                    traceback.print_exc()
                if not self._stop.is_set() and not self._had_last_words(line):
                    self._tell_lost({0: "is gone: its process ended"})
            finally:
                self._ready.clear()
                line.close()

    def _lead(self, line: Line) -> None:
        """Asks one leader until it ends."""
        while not line.waits(0.2):
            self._drop_expired()
            if self._stop.is_set():
                return
        hello, _ = line.receive()
        if self._heard(hello):
            return
        self._tell_serving(tuple(hello["here"]), {int(d): what for d, what in hello["differing"].items()})
        self._ready.set()
        number = 0
        while not self._stop.is_set():
            batch = self._next_batch()
            if not batch:
                if line.waits(0) and self._heard(line.receive()[0]):
                    return
                continue
            number += 1
            try:
                outcome = self._ask(line, batch, number)
            except Exception:
                self._retry(batch)
                raise
            if outcome != ANSWERED:
                self._retry(batch)
            if outcome == ENDED or (outcome == POSTPONED and self._wait_for_others(line)):
                return

    def _wait_for_others(self, line: Line) -> bool:
        """Until the leader has something to say; whether it ends with that. Nothing is served meanwhile."""
        self._ready.clear()
        while not line.waits(0.2):
            self._drop_expired()
            if self._stop.is_set():
                return True
        return self._heard(line.receive()[0])

    def _ask(self, line: Line, batch: list[_Asked], number: int) -> str:
        """What became of `batch`: ANSWERED; POSTPONED, where too few devices are left for it; ENDED, the leader."""
        started = time.monotonic()
        left = is_decoder(self.config)
        for asked in batch:
            asked.attempts += 1
        line.send({"id": number, "request": asdict(batch[0].request)}, join_rows([a.inputs for a in batch], left))
        while True:
            while not line.waits(0.2):
                self._drop_expired()
            header, payload = line.receive()
            if self._heard(header):
                return ENDED
            if header.get("id") == number:
                break
        if "postponed" in header:
            for asked in batch:
                asked.attempts -= 1  # it was not one
            self._say("short", f"requests wait for the devices that are away: {header['postponed']}", [])
            return POSTPONED
        self.counts["batches"] += 1
        self.methods[header.get("method", "refused")] += 1
        if "refused" in header:
            for asked in batch:
                asked.settle(error=ValueError(header["refused"]))
            return ANSWERED
        outputs = tensors_of(payload)
        now = time.monotonic()
        first = 0
        for asked in batch:
            length = asked.inputs["input_ids"].shape[1]
            rows = {name: tensor[first : first + asked.size] for name, tensor in outputs.items()}
            first += asked.size
            self.counts["twice"] += not asked.settle(rows if left else cut(rows, length))
            self.counts["answered"] += 1
            self.counts["retried"] += asked.attempts > 1
            self.seconds.append(now - asked.since)
        self._answered_s.append((now - started) / first)
        return ANSWERED

    def _next_batch(self) -> list[_Asked]:
        """Requests to ask together; none where none came for a moment."""
        with self._changed:
            if not self._again and not self._waiting:
                self._changed.wait(0.1)
        self._drop_expired()
        with self._changed:
            if self._again:
                return [self._again.popleft()]
            batch: list[_Asked] = []
            while self._waiting and (
                not batch
                or (batch[0].goes_with(self._waiting[0]) and rows_of(batch) + self._waiting[0].size <= self.max_batch)
            ):
                batch.append(self._waiting.popleft())
            return batch

    def _retry(self, batch: list[_Asked]) -> None:
        for asked in reversed(batch):
            if asked.future.done():
                continue
            if asked.attempts >= MAX_ATTEMPTS:
                why = self.events[-1].sentence if self.events else ""
                asked.settle(error=Unanswered(f"{MAX_ATTEMPTS} attempts to answer broke off; the last: {why}"))
                self.counts["unanswered"] += 1
            else:
                self._again.appendleft(asked)

    def _drop_expired(self) -> None:
        now = time.monotonic()
        with self._changed:
            for line in (self._again, self._waiting):
                for asked in [a for a in line if a.deadline < now or a.future.cancelled()]:
                    line.remove(asked)
                    self.counts["expired"] += 1
                    asked.settle(error=Expired("no answer by the deadline."))

    # --- What became of devices ---

    def _heard(self, header: dict) -> bool:
        """Passes on what the leader says of devices; whether it ends with that."""
        for device, factor in header.get("slow", {}).items():
            name = self.spec.names[int(device)]
            words = f"takes {factor:.1f} times as long as usual" if factor > 1 else "is planned for as usual again"
            self._say("slow" if factor > 1 else "usual", f"{name} {words}", [name])
        if "gone" not in header:
            return False
        gone = {int(device): why for device, why in header["gone"].items()}
        if gone:
            self._tell_lost(gone)
        else:
            self._say("meeting", header.get("why", "the devices meet anew"), [])
        return True

    def _had_last_words(self, line: Line) -> bool:
        """Whether the leader said why it ended, unread because a batch was on its way to it; passes that on."""
        with contextlib.suppress(OSError, ValueError):
            while line.waits(0):
                if self._heard(line.receive()[0]):
                    return True
        return False

    def _tell_lost(self, gone: Mapping[int, str]) -> None:
        names = self.spec.names
        self._known_lost |= set(gone)
        self.counts["losses"] += len(gone)
        self._say("lost", "; ".join(f"{names[d]} {why}" for d, why in gone.items()), [names[d] for d in gone])

    def _tell_serving(self, here: tuple[int, ...], differing: Mapping[int, str]) -> None:
        names, parts = self.spec.names, []
        unnamed = [d for d in self.present if d not in here and d not in self._known_lost]
        if unnamed:
            self._tell_lost({d: "is not there" for d in unnamed})
        back = [d for d in here if d in self._known_lost]
        if back:
            parts.append(f"{join_words([names[d] for d in back])} back")
        self._known_lost -= set(here)
        for device, what in differing.items():
            self._say("differing", f"{names[device]} has other {what} of the model: left out", [names[device]])
        fit = [d for d in here if d not in differing]
        self.present = tuple(fit)
        parts.append(f"serving on {join_words([names[d] for d in fit])}")
        self._say("serving", "; ".join(parts), [names[d] for d in fit])

    def _say(self, kind: str, sentence: str, devices: list[str]) -> None:
        self.events.append(Event(time.monotonic(), kind, sentence, tuple(devices)))
        if self._on_event:
            self._on_event(sentence)


def rows_of(batch: list[_Asked]) -> int:
    return sum(asked.size for asked in batch)


def join_rows(parts: list[dict[str, torch.Tensor]], left: bool) -> dict[str, torch.Tensor]:
    """Inputs [B, T] of several requests as one, padded (`left`: before the tokens) to the longest, the mask being 0."""
    length = max(part["input_ids"].shape[1] for part in parts)
    joined = {}
    for name in EXAMPLES:
        if not any(name in part for part in parts):
            continue
        rows = []
        for part in parts:
            tensor = part.get(name, torch.zeros_like(part["input_ids"]))
            missing = length - tensor.shape[1]
            rows.append(torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing)))
        joined[name] = torch.cat(rows)
    return joined


def cut(outputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Outputs of one request without the rows that padding made: [B, T, ...] to its own T."""
    return {name: tensor[:, :length] if tensor.ndim == 3 else tensor for name, tensor in outputs.items()}
