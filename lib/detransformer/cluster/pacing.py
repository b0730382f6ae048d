"""Pacing and timing: how a fast host emulates a slow device.

A compute segment between two collectives ends no sooner than the device's profile says: the pacer sleeps for the rest
of it. The host's contention disappears in that sleep as long as the host is faster; otherwise the excess is an
*overrun*, which is recorded and makes the row invalid if it is large. Collectives take the real network's time. On a
modelled link the real collective runs too, over loopback, and ends no sooner than the link's profile says, counted from
the arrival of the last rank (`Arrivals`).

All workers of an emulated session share one host and so one clock: `time.perf_counter` is CLOCK_MONOTONIC there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SPIN_S = 0.0002  # time.sleep wakes this much late, so the last part of a wait is a busy loop
POINT_TO_POINT = ("send", "receive")
Event = tuple[str, float, float]  # (compute, wait or a collective; start; stop), in seconds of the host's clock


def sleep_until(deadline: float) -> None:
    """Returns at `deadline` (of `time.perf_counter`), within some microseconds."""
    remaining = deadline - time.perf_counter()
    if remaining > _SPIN_S:
        time.sleep(remaining - _SPIN_S)
    while time.perf_counter() < deadline:
        pass


def burn_until(deadline: float) -> None:
    """As `sleep_until`, but computes products until then, of some 50 microseconds each."""
    import torch  # not at the top: most users of this module only sleep

    x, y = torch.ones(32, 256), torch.ones(256, 256)
    while time.perf_counter() < deadline - 1e-4:
        x @ y
    while time.perf_counter() < deadline:
        pass


class Arrivals:
    """The time at which each rank reached its n-th collective, send or start, in a small file that all workers map.

    A rank writes before it enters the real collective, and reads the others' entries after it: by then all have
    written. The entries form a ring, so a sender may be far ahead of its receiver.
    """

    NUM_SLOTS = 4096
    FAMILIES = ("group", "send", "start")

    def __init__(self, path: str | Path, num_ranks: int, create: bool = False):
        """Opens the file at `path`, or makes it."""
        shape = (len(self.FAMILIES), num_ranks, self.NUM_SLOTS)
        self._times = np.memmap(path, np.float64, "w+" if create else "r+", shape=shape)

    def write(self, family: str, rank: int, count: int, seconds: float) -> None:
        """Notes that the `count`-th collective of `family` began on `rank` at `seconds`."""
        self._times[self.FAMILIES.index(family), rank, count % self.NUM_SLOTS] = seconds

    def last(self, family: str, ranks: Sequence[int], count: int) -> float:
        """When the last of `ranks` began its `count`-th collective of `family`."""
        return max(float(self._times[self.FAMILIES.index(family), rank, count % self.NUM_SLOTS]) for rank in ranks)


@dataclass(eq=False)
class Pacer:
    """Observes one device's collectives, sleeps as the device's profile says, and keeps the events.

    Args:
        segment_s: modelled seconds of each compute segment between launches and waits; None: no pacing (real hosts,
            warm-up).
        link_s: modelled seconds of each collective, in the order of their launches; None: the network is real.
        arrivals: with `link_s`: the session's file with the start of each transfer.
        rank, devices: this device's place among `devices`, the ranks in `arrivals`. It sends to the next one, and
            receives from the one before.
        burns: the rest of a segment computes products instead of sleeping: other threads on this core then compete
            with compute, as on a device, which is busy for the whole segment.

    `events` are those of this request. `modelled_s` sums the modelled seconds, `overrun_s` the time by which they were
    exceeded.
    """

    segment_s: Sequence[float] | None = None
    link_s: Sequence[float] | None = None
    arrivals: Arrivals | None = None
    rank: int = 0
    devices: Sequence[int] = (0,)
    burns: bool = False

    def __post_init__(self):
        assert self.link_s is None or self.arrivals, "a modelled transfer starts when the last rank has arrived"
        self._pass = burn_until if self.burns else sleep_until
        self._counts = {"group": 0, "send": 0, "receive": 0}  # over all requests, alike on all ranks
        self.reset()

    def reset(self) -> None:
        """Forgets the events and sums of earlier requests."""
        self.compute_s = self.overrun_s = self.modelled_s = 0.0
        self.events: list[Event] = []
        self.launched: list[tuple[str, float, int]] = []  # (kind, when, its count) of this request
        self._link_free_at: list[float] = []  # on a modelled link: when each group collective has left it

    def begin(self) -> None:
        """Starts a request."""
        self.launched.clear()
        self._link_free_at.clear()
        self._segment = 0
        self._late_s = 0.0
        self._since = time.perf_counter()

    def _end_segment(self) -> None:
        """Ends compute no sooner than modelled. The next segment may make up for a late one."""
        start, now = self._since, time.perf_counter()
        if self.segment_s is not None:
            assert self._segment < len(self.segment_s), "the executor made more collectives than the cost model lists"
            seconds = self.segment_s[self._segment]
            self.modelled_s += seconds
            late_s = max(0.0, now - start - seconds)
            self.overrun_s += max(0.0, late_s - self._late_s)  # the previous segment's lateness counts once
            self._late_s = late_s
            self._pass(start + seconds)
            now = start + seconds
        self.compute_s += now - start
        self.events.append(("compute", start, now))
        self._segment += 1
        self._since = now

    def launch(self, kind: str, num_bytes: int) -> int:
        """A collective is launched; returns its number in this request."""
        self._end_segment()
        family = kind if kind in POINT_TO_POINT else "group"
        count, now = self._counts[family], time.perf_counter()
        if self.arrivals is not None and kind != "receive":
            self.arrivals.write(family, self.devices[self.rank], count, now)
        self.launched.append((kind, now, count))
        self._counts[family] += 1
        return len(self.launched) - 1

    def before_wait(self, number: int) -> None:
        """Compute begins to wait for collective `number`."""
        self._end_segment()
        self._since, self._late_s = time.perf_counter(), 0.0

    def after_wait(self, number: int) -> None:
        """Collective `number` has ended; on a modelled link its result arrives no sooner than modelled."""
        if self.link_s is not None:
            deadline = self._arrives_at(number)
            self.modelled_s += max(0.0, deadline - self._since)
            self.overrun_s += max(0.0, time.perf_counter() - max(deadline, self._since))
            sleep_until(deadline)
        now = time.perf_counter()
        began = min(max(self._began(number), self._since), now)
        parts = ("wait", self._since, began), (self.launched[number][0], began, now)
        self.events += [part for part in parts if part[2] > part[1]]
        self._since = now

    def _began(self, number: int) -> float:
        """When collective `number` of this request began to move bytes: when the last device launched it.

        A message from one device to the next begins when its sender launches it.
        """
        kind, launched, count = self.launched[number]
        if kind == "send" or self.arrivals is None:
            return launched
        if kind == "receive":
            return self.arrivals.last("send", [self.devices[self.rank - 1]], count)
        return self.arrivals.last("group", self.devices, count)

    def _arrives_at(self, number: int) -> float:
        """When collective `number` of this request ends on a modelled link, which carries them in launch order.

        A message from one device to the next travels even while its receiver is busy.
        """
        if self.launched[number][0] in POINT_TO_POINT:
            return self._began(number) + self.link_s[number]
        for n in range(len(self._link_free_at), number + 1):
            begins = max([self._began(n), *self._link_free_at[-1:]])
            self._link_free_at.append(begins + self.link_s[n])
        return self._link_free_at[number]

    def end(self) -> None:
        """Ends a request."""
        self._end_segment()
        all_made = self.segment_s is None or self._segment == len(self.segment_s)
        assert all_made, "the executor made fewer collectives than the cost model lists"


def seconds_of(events: Sequence[Event]) -> dict[str, float]:
    """Sums of `compute_s`, `wait_s` and `comm_s` of one device's events."""
    sums = {"compute_s": 0.0, "wait_s": 0.0, "comm_s": 0.0}
    for what, start, stop in events:
        sums[f"{what}_s" if what in ("compute", "wait") else "comm_s"] += stop - start
    return sums


def timeline_rows(events: Sequence[Sequence[Event]], time_scale: float = 1.0) -> list[dict]:
    """Rows of rank, what, start_s, stop_s from all devices' events, in their own seconds since the first start."""
    first = min((own[0][1] for own in events if own), default=0.0)
    rows = []
    for rank, own in enumerate(events):
        for what, start, stop in own:
            start_s, stop_s = (round((at - first) / time_scale, 6) for at in (start, stop))
            rows.append({"rank": rank, "what": what, "start_s": start_s, "stop_s": stop_s})
    return rows
