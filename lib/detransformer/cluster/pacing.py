"""Pacing and timing: how a fast host stands in for a slow device.

A compute segment between two collectives ends no sooner than the device's profile says it would on that device: the
pacer sleeps for the rest. The host's contention disappears in that sleep, as long as the host is faster; where it is
not, the excess is an *overrun*, which is recorded and makes the row invalid if it is large. The time of a collective is
the real network's. On a modelled link the real collective runs too, over loopback, and ends no sooner than the link's
profile says, counted from the moment when the last rank had arrived (`Arrivals`).

All workers of an emulated session share one host and so one clock: `time.perf_counter` is CLOCK_MONOTONIC there.
"""

import mmap
import time
from collections.abc import Sequence
from pathlib import Path

_SPIN_S = 0.0002  # time.sleep wakes this much late; the last part is waited for awake
POINT_TO_POINT = ("send", "receive")


def sleep_until(deadline: float) -> None:
    """Returns at `deadline`, of `time.perf_counter`, to some microseconds; the last moments are spent awake."""
    remaining = deadline - time.perf_counter()
    if remaining > _SPIN_S:
        time.sleep(remaining - _SPIN_S)
    while time.perf_counter() < deadline:
        pass


def burn_until(deadline: float) -> None:
    """Returns at `deadline` as `sleep_until`, having computed products all the while, each some 50 microseconds."""
    import torch  # late: what only sleeps need not load it

    x, y = torch.ones(32, 256), torch.ones(256, 256)
    while time.perf_counter() < deadline - 1e-4:
        x @ y
    while time.perf_counter() < deadline:
        pass


class Arrivals:
    """When each rank came to its n-th collective, send or start: a small file that all workers of a session map.

    A rank writes before it enters the real collective, and reads the others' entries after it: by then all have
    written. Entries are used in turn, so a sender may be far ahead of its receiver.
    """

    NUM_SLOTS = 4096
    FAMILIES = ("group", "send", "start")

    def __init__(self, path: str | Path, num_ranks: int):
        """Opens the file; `create` makes it."""
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), self._size(num_ranks))
        self._times = memoryview(self._map).cast("d", (len(self.FAMILIES), num_ranks, self.NUM_SLOTS))

    @classmethod
    def _size(cls, num_ranks: int) -> int:
        return 8 * len(cls.FAMILIES) * num_ranks * cls.NUM_SLOTS

    @classmethod
    def create(cls, path: str | Path, num_ranks: int) -> None:
        with open(path, "wb") as file:
            file.truncate(cls._size(num_ranks))

    def write(self, family: str, rank: int, count: int, seconds: float) -> None:
        """The `count`-th of this family begins on `rank` at `seconds`."""
        self._times[self.FAMILIES.index(family), rank, count % self.NUM_SLOTS] = seconds

    def read(self, family: str, rank: int, count: int) -> float:
        return self._times[self.FAMILIES.index(family), rank, count % self.NUM_SLOTS]

    def last(self, family: str, ranks: Sequence[int], count: int) -> float:
        """When the last of `ranks` came."""
        return max(self.read(family, rank, count) for rank in ranks)


class Pacer:
    """Observes one device's collectives; sleeps where it is told to and keeps the events.

    Args:
        segment_s: modelled seconds of each compute segment, between launches and waits; None paces nothing
            (real hosts, and warm-up).
        link_s: modelled seconds of each collective, in the order of their launches; None where the network is real.
        arrivals: with `link_s`: the session's, from which the transfer's start is read.
        rank, devices: this device's place among `devices`, which `arrivals` numbers. Sends go to the next one, receives
            come from the one before.
        burns: the rest of a segment is spent in products, not asleep: what else runs on this core then competes with
            compute, as it does on a device, which is busy for the whole segment.

    `events` are (what, start, stop, launched) of this request on the host's clock; a collective's are its wait and when
    it was launched. `overrun_s` is by how much what was modelled (`modelled_s`) came late.
    """

    def __init__(
        self,
        segment_s: Sequence[float] | None = None,
        link_s: Sequence[float] | None = None,
        arrivals: Arrivals | None = None,
        rank: int = 0,
        devices: Sequence[int] = (0,),
        burns: bool = False,
    ):
        assert link_s is None or arrivals is not None, "a modelled transfer starts when the last rank has arrived"
        self.segment_s = segment_s
        self.link_s = link_s
        self.arrivals = arrivals
        self.rank, self.devices = rank, devices
        self._pass = burn_until if burns else sleep_until
        self._counts = {"group": 0, "send": 0, "receive": 0}  # over all requests, alike on all ranks
        self.reset()

    def reset(self) -> None:
        self.compute_s = self.overrun_s = self.modelled_s = 0.0
        self.events: list[tuple[str, float, float, float]] = []
        self.launched: list[tuple[str, int, float, int]] = []  # (kind, bytes, when, its count) of this request
        self._link_free_at: list[float] = []  # on a modelled link: when each group collective has left it

    def begin(self) -> None:
        """A request starts."""
        self.launched.clear()
        self._link_free_at.clear()
        self._segment = 0
        self._late_s = 0.0
        self._since = time.perf_counter()

    def _end_segment(self) -> None:
        """Ends compute no sooner than modelled. What came late may be caught up in the next segment of compute."""
        start, now = self._since, time.perf_counter()
        if self.segment_s is not None:
            assert self._segment < len(self.segment_s), "the executor made more collectives than the cost model lists"
            seconds = self.segment_s[self._segment]
            self.modelled_s += seconds
            late_s = max(0.0, now - start - seconds)
            self.overrun_s += max(0.0, late_s - self._late_s)  # what it was late already is not counted again
            self._late_s = late_s
            self._pass(start + seconds)
            now = start + seconds
        self.compute_s += now - start
        self.events.append(("compute", start, now, start))
        self._segment += 1
        self._since = now

    def launch(self, kind: str, num_bytes: int) -> int:
        self._end_segment()
        family = kind if kind in POINT_TO_POINT else "group"
        count, now = self._counts[family], time.perf_counter()
        if self.arrivals is not None and kind != "receive":
            self.arrivals.write(family, self.devices[self.rank], count, now)
        self.launched.append((kind, num_bytes, now, count))
        self._counts[family] += 1
        return len(self.launched) - 1

    def before_wait(self, number: int) -> None:
        self._end_segment()
        self._since, self._late_s = time.perf_counter(), 0.0

    def after_wait(self, number: int) -> None:
        kind, _, launched, _ = self.launched[number]
        if self.link_s is not None:
            deadline = self._arrives_at(number)
            self.modelled_s += max(0.0, deadline - self._since)
            self.overrun_s += max(0.0, time.perf_counter() - max(deadline, self._since))
            sleep_until(deadline)
        now = time.perf_counter()
        self.events.append((kind, self._since, now, launched))
        self._since = now

    def _arrives_at(self, number: int) -> float:
        """When collective `number` of this request is through, on a modelled link: one after another, as launched.

        A message from one device to the next travels also while its receiver is still busy.
        """
        kind, _, launched, count = self.launched[number]
        if kind == "send":
            return launched + self.link_s[number]
        if kind == "receive":
            return self.arrivals.read("send", self.devices[self.rank - 1], count) + self.link_s[number]
        for n in range(len(self._link_free_at), number + 1):
            begins = max([self.arrivals.last("group", self.devices, self.launched[n][3]), *self._link_free_at[-1:]])
            self._link_free_at.append(begins + self.link_s[n])
        return self._link_free_at[number]

    def end(self) -> None:
        """The request is answered."""
        self._end_segment()
        assert self.segment_s is None or self._segment == len(self.segment_s), (
            "fewer collectives than the cost model lists"
        )
