"""The front of a service, which runs on the first device: it answers requests as long as that device is up.

One thread plans, gives batches to the workers (`cluster.fleet`) and answers each request once. If a batch's group
breaks, the remaining devices get its requests again, one by one.
"""

import itertools
import json
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import PretrainedConfig

from detransformer.answers import check_inputs, end_tokens
from detransformer.cluster.devices import DeviceError
from detransformer.cluster.fleet import START_S, Fleet, JobFailed
from detransformer.cluster.hosts import ANSWERING, Hosts
from detransformer.cluster.request import Request
from detransformer.cluster.spec import ClusterSpec
from detransformer.models.configuration import generates
from detransformer.opening import open_checkpoint
from detransformer.parallel.draw import Sampling
from detransformer.service.speeds import Patience, Speeds
from detransformer.service.waiting import EXAMPLES, Asked, Expired, Unanswered, Waiting, join_rows

TRY_AGAIN_S = 60.0  # until a slow device is tried again
KEPT_EVENTS, KEPT_SECONDS = 1000, 2000


@dataclass(frozen=True)
class Event:
    """A change of the devices, as a sentence; `at` is of `time.monotonic`. `kind`: lost, meeting, differing, slow,
    usual, short or serving."""

    at: float
    kind: str
    sentence: str
    devices: tuple[str, ...] = ()


class Session:
    """A model served by the devices of a cluster; a context manager.

    Args:
        spec: of the cluster file; its devices are emulated on this machine unless `own` says which one this host is.
        model: folder of the checkpoint.
        plan: fields of a `Plan` for all devices, used while all are present. If None, or while one is away, the session
            plans for the present ones; requests that do not fit these wait for the others.
        method: as `detransformer run --method`.
        seq_len: length in tokens to plan for.
        max_waiting: most requests that wait; further ones are refused.
        max_batch: most rows of a batch.
        on_event: called with a sentence when devices come, are lost or are back.
        hosts: further arguments of `cluster.hosts.Hosts`: how devices are emulated, or which one this host is.
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
        on_event: Callable[[str], None] = lambda sentence: None,
        **hosts: Any,
    ):
        self.spec, self.model = spec, str(model)
        self.config: PretrainedConfig = open_checkpoint(model).config
        self.defaults = Request(plan=plan, method=method, repeats=1)
        self.max_batch, self.max_waiting = max_batch, max_waiting
        spec.profile(self.config)  # raises errors before anything starts
        self.hosts = Hosts(spec, self.model, **hosts)
        self.fleet: Fleet | None = None
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._waiting = Waiting(max_waiting, max_batch)
        self.counts = self._waiting.counts
        self.seconds: deque[float] = deque(maxlen=KEPT_SECONDS)  # from asking to the answer
        self._on_event = on_event
        self._stop = threading.Event()
        self._seq_len = seq_len
        self._plans: dict[str, Mapping] = {}  # of the serving group, by request
        self._group, self._number = (), 0  # the devices that serve, or did last, and their group's number
        self._patience, self._speeds = Patience(), Speeds()
        self._slow_since = 0.0
        self._short = False  # whether requests wait for devices that are away
        self._thread: threading.Thread | None = None

    # --- What users call ---

    def __enter__(self) -> "Session":
        try:
            where = self.hosts.listen(), self.hosts.store, self.hosts.job["secret"]
            self.fleet = Fleet(self.spec.names, *where, stays=True, on_event=self._say)
            self.hosts.start()
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
            with self.fleet.changed:
                if not self.fleet.changed.wait_for(lambda: self.serving, START_S):
                    raise Unanswered(f"the devices did not start within {START_S:.0f} s: {self.hosts.last_words()}")
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
        max_new_tokens: int = Request.max_new_tokens,
        sampling: Sequence[Sampling] = (),
        on_token: Callable[[list[int]], None] | None = None,
    ) -> Future:
        """The future of the outputs of `inputs`, tensors [B, T] by name; padded on the right, for a GPT-2 on the left.

        Its result is a dict of tensors, as from `jobs.run_plan` or `jobs.generate`, or it raises `Expired`,
        `Unanswered`, `ValueError` if the model does not take the input, or `JobFailed` if the job fails at it.
        Cancelling it stops generation.

        Args:
            sampling: for a GPT-2, how each row's tokens are chosen; by default they are the likeliest.
            on_token: called with the next token of each row when it is made, in a thread that must not block.

        Raises:
            QueueFull: if `max_waiting` requests wait already.
            ValueError: for inputs that the model does not take.
        """
        self._check(inputs, max_new_tokens)
        request = replace(self.defaults, max_new_tokens=max_new_tokens)
        asked = Asked(request, inputs, time.monotonic() + deadline_s, sampling, on_token)
        self._waiting.add(asked)
        return asked.future

    def __call__(self, inputs: Mapping[str, torch.Tensor], deadline_s: float = 60.0, **options) -> dict:
        """As `submit`, but waits for the outputs."""
        future = self.submit(inputs, deadline_s, **options)
        try:
            return future.result(deadline_s + 1)
        except TimeoutError:
            raise Expired(f"no answer within {deadline_s:g} s.") from None

    @property
    def present(self) -> tuple[int, ...]:
        """The devices that serve, or did last."""
        return self.fleet.devices or self._group if self.fleet else ()

    @property
    def serving(self) -> bool:
        """Whether devices are present to answer."""
        return bool(self.fleet and self.fleet.devices) and not self._short and not self._stop.is_set()

    def wait_for_all(self, timeout_s: float = 60.0) -> bool:
        """Waits until all devices of the cluster serve; returns whether they do."""
        with self.fleet.changed:
            everyone = len(self.spec.members)
            return self.fleet.changed.wait_for(lambda: self.serving and len(self.present) == everyone, timeout_s)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Ends agents and workers; requests that still wait raise `Unanswered`."""
        self._stop.set()
        if self.fleet:
            self.fleet.close(wait_s=0)
        self.hosts.close()
        if self._thread:
            self._thread.join(10)
        self._waiting.close()

    def _check(self, inputs: Mapping[str, torch.Tensor], new: int) -> None:
        if set(inputs) - set(EXAMPLES):
            raise ValueError(f"inputs {sorted(set(inputs) - set(EXAMPLES))} are not known; give {', '.join(EXAMPLES)}.")
        check_inputs(self.config, inputs, new if generates(self.config) else 0)
        size = len(inputs["input_ids"])
        if size > self.max_batch:
            raise ValueError(f"{size} rows are asked for at once; give {self.max_batch} at most.")

    # --- The thread that asks the workers ---

    def _serve(self) -> None:
        while not self._stop.is_set():
            number, group = self.fleet.number, self.fleet.devices
            if group and number != self._number:
                self._number, self._group, self._short = number, group, False
                self._speeds = Speeds()
                self._plan_anew()
            if group and not self._short:
                if batch := self._waiting.take():
                    self._answer(batch)
            else:
                self._waiting.drop_expired()
                time.sleep(0.05)

    def _answer(self, batch: list[Asked]) -> None:
        """Asks the workers, and queues again what they did not answer."""
        for asked in batch:
            asked.attempts += 1
        try:
            self._ask(batch)
        except DeviceError:  # the fleet has announced the lost device or the regrouping
            pass
        except JobFailed as error:
            if len(batch) == 1:  # else each is asked alone, which shows which one fails
                self.counts["failed"] += 1
                batch[0].settle(error=error)
        except Exception:
            traceback.print_exc()
        self._waiting.ask_again(batch, self.events[-1].sentence if self.events else "")

    def _ask(self, batch: list[Asked]) -> None:
        """Answers each request of `batch`, unless the present devices cannot.

        Raises:
            DeviceError: if the group broke meanwhile.
        """
        started = time.monotonic()
        left = generates(self.config)
        plan = self._plan(batch[0].request)
        if "postponed" in plan:
            self._short = True
            for asked in batch:
                asked.attempts -= 1  # this was no attempt
            return self._say("short", f"requests wait for the devices that are away: {plan['postponed']}", ())
        self.counts["batches"] += 1
        if "refused" in plan:
            for asked in batch:
                asked.settle(error=ValueError(plan["refused"]))
            return None
        inputs = join_rows([asked.inputs for asked in batch], left)
        kind, num_tokens = json.dumps(plan["job"]), inputs["input_ids"].numel()
        told = {"job": plan["job"] | (self._how_to_generate(batch) if left else {})}
        told |= {name: self.hosts.job[name] for name in ("paced", "time_scale")}
        answers = self.fleet.run(
            f"{ANSWERING}:answer", told, save(inputs), timeout_s=self._patience.limit_s(kind, num_tokens),
            number=self._number, meanwhile=lambda: self._between(batch), on_part=_hearing(batch),
        )  # fmt: skip
        took_s, outputs = time.monotonic() - started, load(answers[plan["last"]][1])
        share = outputs["tokens"].shape[1] / batch[0].request.max_new_tokens if left else 1  # it may have ended early
        self._patience.took(kind, num_tokens, took_s / share)
        self.seconds.extend(self._waiting.settle(batch, outputs, left, took_s))
        self._compare_speeds(took_s, {device: result["compute_s"] for device, (result, _) in answers.items()})
        return None

    def _how_to_generate(self, batch: list[Asked]) -> dict:
        """Arguments of `jobs.generate` that differ between requests under one plan."""
        rows = [row for asked in batch for row in asked.sampling or [Sampling()] * asked.size]
        return {
            "sampling": [asdict(row) for row in rows],
            "stop_tokens": end_tokens(self.config),
            "tells": any(asked.on_token for asked in batch),
        }

    def _between(self, batch: list[Asked]) -> None:
        """Runs while the workers answer: expires late requests, and ends rows that nobody needs."""
        self._waiting.drop_expired()
        rows = [asked for asked in batch for _ in range(asked.size)]
        if (unwanted := [row for row, asked in enumerate(rows) if asked.future.done()]) and generates(self.config):
            self.fleet.enough(unwanted)

    def _plan(self, request: Request) -> Mapping:
        """The present devices' plan for requests of this kind; made once, for the length `seq_len` of the session.

        A given plan is for all devices: while one is away, the rest get another one.
        """
        if len(self._group) < len(self.spec.members):
            request = replace(request, plan=None)
        asked = asdict(request)
        key = json.dumps(asked)
        if key not in self._plans:
            told = {"request": asked, "seq_len": self._seq_len, "slower": self._speeds.factors}
            options = dict(devices=[0], number=self._number, meanwhile=self._waiting.drop_expired)
            (plan, _) = self.fleet.run(f"{ANSWERING}:plan", told, **options)[0]
            if "job" in plan and not generates(self.config):
                plan["job"]["warmup"] = 0  # the first requests warm workers up
            self._plans[key] = plan
        return self._plans[key]

    def _plan_anew(self) -> None:
        self._plans.clear()
        self._patience = Patience()

    def _compare_speeds(self, batch_s: float, compute_s: Mapping[int, Sequence[float] | None]) -> None:
        """Replans if a device has become slow, and tries it again after a while."""
        changed = self._speeds.observe(batch_s, {device: times for device, times in compute_s.items() if times})
        if any(factor > 1 for factor in changed.values()):
            self._slow_since = time.monotonic()
        elif self._speeds.factors and time.monotonic() - self._slow_since > TRY_AGAIN_S:
            changed |= dict.fromkeys(self._speeds.forget(), 1.0)
        for device, factor in changed.items():
            name = self.spec.names[device]
            words = f"takes {factor:.1f} times as long as usual" if factor > 1 else "is planned for as usual again"
            self._say("slow" if factor > 1 else "usual", f"{name} {words}", (name,))
        if changed:
            self._plan_anew()

    def _say(self, kind: str, sentence: str, devices: tuple[str, ...]) -> None:
        if kind == "waiting":
            return
        self.counts["losses"] += len(devices) if kind == "lost" else 0
        self.events.append(Event(time.monotonic(), kind, sentence, tuple(devices)))
        self._on_event(sentence)


def _hearing(batch: list[Asked]) -> Callable[[list[int]], None]:
    """Gives each request of `batch` its rows' tokens [B], one step after another."""
    steps = itertools.count()

    def hear(tokens: list[int]) -> None:
        step, first = next(steps), 0
        for asked in batch:
            asked.hear(step, tokens[first : first + asked.size])
            first += asked.size

    return hear
