"""A session broken on purpose, under load.

Real processes on emulated devices. Clients ask all the time, each request's answer is known, and what is counted is
what a user would see: requests lost, answered wrongly or twice, how long until the culprit is named, and until the next
answer.
"""

import bisect
import contextlib
import shutil
import subprocess
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from tests.chaos.faults import FAULTS, STEP, Fault, Field, clock_variables
from transformers import BertConfig, BertForSequenceClassification

from detransformer.cluster.agent import FAILURES_S
from detransformer.cluster.spec import ClusterSpec
from detransformer.machine import cpu_model, now, usable_cores
from detransformer.record.provenance import commit
from detransformer.service.session import Event, Session
from detransformer.service.waiting import Expired, QueueFull

NAMED_S = 5.0  # promised: from a fault to the sentence that names the device, at most
SERVED_S = 20.0  # promised: until the next answer, at most
TOLERANCE = 1e-4
CALM_S = 3.0  # answered without a break, before the next fault
GIVE_UP_S = 90.0
DEADLINE_S = 120.0
IMPATIENT, HURRY_S = 5, 1.0  # one request in so many wants its answer that soon, and may be told that there is none
NUM_INPUTS, MAX_TOKENS = 40, 24


# --- Load --------------------------------------------------------------------------------------------------------


class Clients:
    """Threads that ask one request after another, each of which has one right answer.

    Each asks again `period_s` after it asked last, or as soon as it has its answer, if that took longer. One request in
    five is in a hurry: it is not lost when no answer comes in time, if that is said.
    """

    def __init__(self, session: Session, model: torch.nn.Module, num_clients: int = 2, period_s: float = 0.08):
        generator = torch.Generator().manual_seed(0)
        self.session, self.period_s = session, period_s
        lengths = torch.randint(1, MAX_TOKENS + 1, (NUM_INPUTS,), generator=generator).tolist()
        size = model.config.vocab_size
        self.inputs = [torch.randint(size, (1, length), generator=generator) for length in lengths]
        with torch.inference_mode():
            self.expected = [model(input_ids=ids).logits for ids in self.inputs]
        self.asked = self.answered = self.wrong = self.lost = self.full = self.expired = 0
        self._answered_twice = session.counts["twice"]
        self.last_at = 0.0
        self.answered_at, self.seconds = array("d"), array("d")  # small: they grow for as long as a soak lasts
        self.errors: list[str] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(num_clients)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S + 10)

    @property
    def twice(self) -> int:
        """Requests that the session answered, and later once more."""
        return self.session.counts["twice"] - self._answered_twice

    def next_answer(self, since: float) -> float | None:
        """When the first answer after `since` came, if one has."""
        with self._lock:
            first = bisect.bisect(self.answered_at, since)
            return self.answered_at[first] if first < len(self.answered_at) else None

    def _run(self, number: int) -> None:
        count, started = number, time.monotonic()
        while not self._stop.wait(max(0.0, started + self.period_s - time.monotonic())):
            count += 7
            which = count % NUM_INPUTS
            started, hurry = time.monotonic(), count % IMPATIENT == 0
            try:
                future = self.session.submit({"input_ids": self.inputs[which]}, HURRY_S if hurry else DEADLINE_S)
                with self._lock:
                    self.asked += 1
                logits = future.result(DEADLINE_S + 5)["logits"]
            except QueueFull as error:
                self.full += 1
                self._stop.wait(error.retry_after_s)
                continue
            except Exception as error:
                with self._lock:
                    if hurry and isinstance(error, Expired):
                        self.expired += 1
                        continue
                    self.lost += 1
                    self.errors.append(f"{type(error).__name__}: {error}")
                continue
            with self._lock:
                now = time.monotonic()
                self.answered += 1
                self.wrong += float((logits - self.expected[which]).abs().max()) > TOLERANCE
                self.last_at = now
                self.answered_at.append(now)
                self.seconds.append(now - started)


# --- Rounds ------------------------------------------------------------------------------------------------------


def play(fault: Fault, place: Field, clients: Clients) -> dict:
    """One round: the fault, and what became of it, as a row."""
    place = place.of(fault)
    session, name = place.session, place.session.spec.names[place.device]
    calm(clients)
    before = (clients.asked, clients.lost, clients.wrong, clients.twice)
    began = time.monotonic()
    fault.begin(place)
    ended = False
    named_s = served_s = None
    while time.monotonic() - began < GIVE_UP_S:
        if not ended and time.monotonic() - began >= fault.hold_s:
            fault.end(place)
            ended = True
        named = next((e for e in list(session.events) if is_named(e, fault, name, began)), None)
        if named and named_s is None:
            named_s = named.at - began
        if served_s is None and (named or not fault.names):
            answered_at = clients.next_answer(named.at if named else began)
            served_s = answered_at and answered_at - began
        if ended and served_s is not None and clients.last_at > began + fault.hold_s:
            break
        time.sleep(0.05)
    if not ended:
        fault.end(place)
    calm(clients)
    slowest = max(clients.seconds[bisect.bisect(clients.answered_at, began) :], default=float("nan"))
    return {
        "fault": fault.name,
        "named_s": named_s,
        "served_s": served_s,
        "slowest_s": slowest,
        "requests": clients.asked - before[0],
        "lost": clients.lost - before[1],
        "wrong": clients.wrong - before[2],
        "twice": clients.twice - before[3],
        "held": (named_s is not None and named_s <= NAMED_S or not fault.names)
        and served_s is not None
        and served_s <= SERVED_S
        and (clients.lost, clients.wrong, clients.twice) == before[1:],
    }


def is_named(event: Event, fault: Fault, name: str, began: float) -> bool:
    return event.at >= began and event.kind == fault.kind and name in event.devices


def calm(clients: Clients) -> None:
    """Waits until all devices serve and requests have been answered for a while."""
    session, since, deadline = clients.session, time.monotonic(), time.monotonic() + GIVE_UP_S
    while time.monotonic() < deadline:
        if not session.wait_for_all(0) or time.monotonic() - clients.last_at > CALM_S:
            since = time.monotonic()
        if time.monotonic() - since > CALM_S:
            return
        time.sleep(0.1)


def rest(session: Session) -> None:
    """Until a device may be lost again: one that fails sooner is left out for a while, which would be another fault."""
    changed_at = [event.at for event in list(session.events) if event.kind in ("lost", "serving")]
    time.sleep(max(0.0, max(changed_at, default=0.0) + FAILURES_S - time.monotonic()))


@contextlib.contextmanager
def field_of(
    spec: ClusterSpec, device: int, names: Sequence[str], say: Callable[[str], None]
) -> Iterator[tuple[Field, torch.nn.Module]]:
    """A session of a small classifier on `spec`, its files on a disk of 16 MiB where this machine permits one.

    `names`: the faults that are to come to `device`. `say` is told what the session says, and when.
    """
    began = time.monotonic()

    def tell(sentence: str) -> None:
        say(f"{time.monotonic() - began:7.1f} s  {sentence}")

    with tempfile.TemporaryDirectory(prefix="detransformer-chaos-") as folder:
        model = small_model()
        first, copy, disk = (Path(folder) / name for name in ("model", "copy", "disk"))
        model.save_pretrained(first)
        shutil.copytree(first, copy)
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]
        mounted = not subprocess.run(mount, capture_output=True).returncode
        kept, tempfile.tempdir = tempfile.tempdir, str(disk)
        clock = Path(folder) / "clock"
        options = {
            "models": {device: str(copy)},
            "variables": {device: clock_variables(clock)} if STEP in names else {},
        }
        try:
            with Session(spec, str(first), method="tp", paced=False, on_event=tell, **options) as session:
                session.wait_for_all()
                yield Field(session, device, copy, clock), model
        finally:
            tempfile.tempdir = kept
            if mounted:
                subprocess.run(["umount", "-l", disk], check=False)


def small_model() -> torch.nn.Module:
    """A classifier of random weights, the same each time."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=6, intermediate_size=96, vocab_size=101,
        max_position_embeddings=64, initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def run_chaos(
    spec: ClusterSpec,
    names: list[str],
    rounds: int,
    say: Callable[[str], None] = print,
    kept: Sequence[dict] = (),
    keep: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """Every fault `rounds` times, in turn, as rows; `kept` are rows of an earlier call, `keep` is given all so far."""
    rows, done = list(kept), {(row["fault"], row["round"]) for row in kept}
    device = len(spec.members) - 1
    with field_of(spec, device, names, say) as (place, model), Clients(place.session, model) as clients:
        for number in range(rounds):
            for name in (name for name in names if (name, number + 1) not in done):
                row = play(FAULTS[name], place, clients) | {"round": number + 1, **made_by()}
                rows.append(row)
                keep(rows)
                rest(place.session)
                say(f"{number + 1}/{rounds} {name}: {shown(row)}")
        if clients.errors:
            say("; ".join(dict.fromkeys(clients.errors)))
    return rows


def shown(row: dict) -> str:
    times = [
        f"{what} after {row[key]:.1f} s" for what, key in (("named", "named_s"), ("served", "served_s")) if row[key]
    ]
    counts = ", ".join(f"{row[key]} {key}" for key in ("requests", "lost", "wrong", "twice"))
    return f"{', '.join(times) or 'neither named nor served'}; {counts}{'' if row['held'] else '  <- not as promised'}"


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a fault: rounds, the longest times, and what was lost."""
    grouped = rows.groupby("fault", sort=False)
    return grouped.agg(
        rounds=("round", "size"),
        named_s=("named_s", "max"),
        served_s=("served_s", "max"),
        slowest_s=("slowest_s", "max"),
        requests=("requests", "sum"),
        lost=("lost", "sum"),
        wrong=("wrong", "sum"),
        twice=("twice", "sum"),
        held=("held", "all"),
    ).reset_index()


def made_by() -> dict[str, str]:
    """When a row was measured, on what, and with which commit."""
    return {"date": now(), "hardware": f"{usable_cores()} cores ({cpu_model()})", "commit": commit()["commit"]}
