"""A session broken on purpose, under load: `python -m detransformer.service.chaos`, or `make chaos`.

Real processes on emulated devices. Clients ask all the time, each request's answer is known, and what is counted is
what a user would see: requests lost, answered wrongly or twice, how long until the culprit is named, and until the next
answer.
"""

import argparse
import bisect
import contextlib
import functools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import psutil
import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from detransformer.cluster.network import can_emulate
from detransformer.cluster.spec import ClusterSpec
from detransformer.machine import cpu_model, now, usable_cores
from detransformer.record.provenance import own_commit
from detransformer.record.run import RunFolder
from detransformer.report.figures import draw
from detransformer.service.agent import FAILURES_S
from detransformer.service.faults import FAULTS, STEP, Fault, Field, clock_variables
from detransformer.service.promises import MAX_GROWTH, NAMED_S, SERVED_S
from detransformer.service.session import Event, Expired, QueueFull, Session

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
    lost_at = [event.at for event in list(session.events) if event.kind == "lost"]
    time.sleep(max(0.0, max(lost_at, default=0.0) + FAILURES_S - time.monotonic()))


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


# --- Soak --------------------------------------------------------------------------------------------------------

SAMPLE_S = 10.0
LOAD = 0.8  # of what the session can answer
NUM_CLIENTS = 8
WARM = 0.2  # of the time, after which memory is to stay as it is


def run_soak(
    spec: ClusterSpec, names: list[str], minutes: float, every_s: float = 60.0, say: Callable[[str], None] = print
) -> tuple[pd.DataFrame, dict]:
    """Load for `minutes`, a fault at random every `every_s`.

    Returns:
        Samples, taken while all devices serve (`resident`, and seconds and requests answered so far), and what came
        of it: requests a second that it can answer and that were, `p50_s`, `p99_s`, growth of memory as shares, and
        counts of requests and faults.
    """
    chosen = random.Random(0)
    with field_of(spec, len(spec.members) - 1, names, say) as (place, model):
        with Clients(place.session, model, NUM_CLIENTS, period_s=0.0) as clients:
            time.sleep(SAMPLE_S)
        capacity = clients.answered / SAMPLE_S
        say(f"it answers {capacity:.1f} requests a second; {LOAD:.0%} of that from now on")
        rows, faults, ends = [], 0, None
        with Clients(place.session, model, NUM_CLIENTS, period_s=NUM_CLIENTS / (LOAD * capacity)) as clients:
            began, next_fault = time.monotonic(), time.monotonic() + every_s / 2
            while time.monotonic() - began < 60 * minutes:
                now = time.monotonic()
                if ends and now >= ends[0]:
                    ends[1](ends[2])
                    ends = None
                if ends is None and now >= next_fault and place.session.serving:
                    fault = FAULTS[chosen.choice(names)]
                    faults, next_fault, hit = faults + 1, now + every_s, place.of(fault)
                    say(f"{now - began:.0f} s: {fault.name}")
                    fault.begin(hit)
                    ends = (now + fault.hold_s, fault.end, hit)
                due = not rows or now - began >= rows[-1]["seconds"] + SAMPLE_S
                if due and place.session.wait_for_all(0):
                    rows.append({"seconds": now - began, **resident(place.session), "answered": clients.answered})
                time.sleep(0.2)
            lasted_s = time.monotonic() - began
            if ends:
                ends[1](ends[2])
            calm(clients)
    samples = pd.DataFrame(rows)
    rates = {"capacity_per_s": capacity, "answered_per_s": clients.answered / lasted_s}
    return samples, rates | soak_result(samples, clients) | {"faults": faults}


def resident(session: Session) -> dict[str, float]:
    """MiB of memory that is the processes' own: the front's, and that of all agents, fork servers and workers; and how
    many threads and open files the front has."""
    front = psutil.Process()
    devices = 0.0
    for agent in session.post.agents.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    devices += process.memory_full_info().uss
    return {
        "front_mib": front.memory_full_info().uss / 2**20,
        "devices_mib": devices / 2**20,
        "front_threads": front.num_threads(),
        "front_files": front.num_fds(),
    }


def soak_result(samples: pd.DataFrame, clients: Clients) -> dict:
    """Latencies, growth between the first and the last fifth of the samples after the warm-up, and counts."""
    seconds = sorted(clients.seconds)
    warm = samples[samples["seconds"] >= WARM * samples["seconds"].max()]
    part = max(1, len(warm) // 5)
    growth = {
        f"{what}_growth": float(warm[f"{what}_mib"].tail(part).median() / warm[f"{what}_mib"].head(part).median() - 1)
        for what in ("front", "devices")
    }
    return {
        "p50_s": seconds[len(seconds) // 2],
        "p99_s": seconds[int(0.99 * (len(seconds) - 1))],
        "slowest_s": seconds[-1],
        **growth,
        "asked": clients.asked,
        "answered": clients.answered,
        "full": clients.full,
        "expired": clients.expired,
        "lost": clients.lost,
        "wrong": clients.wrong,
        "twice": clients.twice,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="examples/jetsons.yaml")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead: load so long, a fault a minute")
    parser.add_argument("--output", default="results/chaos")
    given = parser.parse_args()
    names = given.faults.split(",")
    unknown = [name for name in names if name not in FAULTS]
    if unknown or given.rounds < 1:
        parser.error(f"faults are {', '.join(FAULTS)}, rounds 1 or more; not {', '.join(unknown) or given.rounds}")
    possible = {name: FAULTS[name].possible() for name in names}
    reasons = {name: why for name, (can, why) in possible.items() if not can}
    names = [name for name in names if name not in reasons]
    try:
        spec = ClusterSpec.load(given.cluster)
        if not spec.emulated:
            raise ValueError(f"{given.cluster} is of real hosts: give a file with `emulated: true`.")
        if not can_emulate()[0]:
            raise ValueError(f"{can_emulate()[1]}: run it as root.")
        if not names:
            raise ValueError(f"none of these faults can be made here: {reasons}.")
    except ValueError as error:
        parser.error(str(error))
    note = on() + "".join(f" Not run: {name}, {why}." for name, why in reasons.items())
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so unwinds
    run = RunFolder(given.output)
    try:
        held = (soak if given.soak else chaos)(spec, names, given, run, functools.partial(print, flush=True), note)
    except KeyboardInterrupt:
        sys.exit("interrupted" + ("" if given.soak else ": rounds that were played are kept, the same command goes on"))
    draw(run, "soak" if given.soak else "faults")
    print((run.tables / f"{'soak' if given.soak else 'chaos'}.md").read_text(encoding="utf-8"))
    sys.exit(0 if held else 1)


def chaos(
    spec: ClusterSpec, names: list[str], given: argparse.Namespace, run: RunFolder, say: Callable, note: str
) -> bool:
    """All rounds, saved; whether everything was as promised."""
    note = f"Seconds: the longest of all rounds. Promised: named in {NAMED_S:g} s, served in {SERVED_S:g} s. {note}"
    kept = run.load_table("chaos_rounds").to_dict("records") if run.has_table("chaos_rounds") else []
    if kept:
        say(f"{len(kept)} rounds of an earlier call are kept; delete {run.tables}/chaos_rounds.csv to begin anew")

    def keep(rows: list[dict]) -> pd.DataFrame:
        return run.save_table(pd.DataFrame(rows), "chaos_rounds", note=note)

    rows = keep(run_chaos(spec, names, given.rounds, say, kept, keep))
    return bool(run.save_table(summary(rows), "chaos", note=note)["held"].all())


def soak(
    spec: ClusterSpec, names: list[str], given: argparse.Namespace, run: RunFolder, say: Callable, note: str
) -> bool:
    """The soak, saved; whether nothing was lost, wrong or answered twice, and memory stayed as it was."""
    samples, result = run_soak(spec, names, given.soak, say=say)
    note = (
        f"{given.soak:g} minutes, asked at {LOAD:.0%} of what it can answer undisturbed (answered: "
        f"{result['answered_per_s'] / result['capacity_per_s']:.0%}), a fault a minute. Growth: of memory, after the "
        f"first {WARM:.0%} of them; promised: {MAX_GROWTH:.0%} at most. {note}"
    )
    grown = max(result["front_growth"], result["devices_growth"]) > MAX_GROWTH
    result = {
        "minutes": given.soak,
        **result,
        "held": not (result["lost"] or result["wrong"] or result["twice"] or grown),
    }
    run.save_table(samples, "soak_samples", note=note)
    run.save_table(pd.DataFrame([result]), "soak", note=note)
    return result["held"]


def on() -> str:
    return f"On {cpu_model()}, {usable_cores()} cores; emulated devices, computing as fast as that does."


def made_by() -> dict[str, str]:
    """When a row was measured, on what, and with which commit."""
    return {"date": now(), "hardware": f"{usable_cores()} cores ({cpu_model()})", "commit": own_commit()["commit"]}


if __name__ == "__main__":
    main()
