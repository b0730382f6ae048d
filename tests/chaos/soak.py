"""A session under load for long, with a fault at random a minute."""

import contextlib
import random
import time
from collections.abc import Callable

import pandas as pd
import psutil
from tests.chaos.faults import FAULTS
from tests.chaos.rounds import Clients, calm, field_of

from detransformer.cluster.spec import ClusterSpec
from detransformer.service.session import Session

MAX_GROWTH = 0.02  # promised: of memory, after the warm-up
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
    for agent in session.hosts.agents.values():
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
