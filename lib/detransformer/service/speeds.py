"""The usual time of batches: finds devices that have become slow, and limits how long a batch may take.

A device's compute time is summed over a window of batches, relative to its profile's prediction, and compared with its
own usual ratio and with the other devices' change. One delayed batch does not make a device slow. The sum finds a
device that stalls now and then, which a median would miss if batches are too short to be hit each time.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

BATCHES, WINDOW_S = 3, 2.0  # a window has at least so many batches and seconds
IGNORED = 2  # first batches of a device: they do work that happens only once
SLOW = 3.0  # times the usual, relative to the others' change
USUAL = 1.5  # below this a slow device is as before
STALL_S = 10.0  # a batch may stall this long: heartbeats can pass where large messages do not
TIMES = 10  # and take this many times the usual time of its kind: a device may have become slow
RECENT = 20  # batches, whose median is the usual time
FIRST = 2  # batches of a kind that load weights and fill caches: their time limit is `FIRST_S`
FIRST_S = 600.0


class Speeds:
    """`factors`: how many times slower than usual each device is, 1 if it is not; by device number, from 0."""

    def __init__(self, num_devices: int):
        self.factors = [1.0] * num_devices
        self._windows = [Window() for _ in range(num_devices)]
        self._usual: list[float | None] = [None] * num_devices

    def observe(self, batch_s: float, spent_s: Sequence[float], expected_s: Sequence[float]) -> dict[int, float]:
        """Takes in a batch: its seconds, and each device's seconds of compute, as measured and as the profile predicts.

        Devices without a part in the batch have NaN.

        Returns:
            device -> new factor, for devices that have become slow or are as usual again.
        """
        for device, (spent, expected) in enumerate(zip(spent_s, expected_s, strict=True)):
            if math.isnan(spent) or not expected:
                continue
            window = self._windows[device]
            window.add(batch_s, spent, expected)
            if self._usual[device] is None and window.full:
                self._usual[device] = window.ratio
        now = {
            device: self._windows[device].ratio / usual
            for device, usual in enumerate(self._usual)
            if usual and self._windows[device].full
        }
        changed = {}
        for device, own in now.items():
            others = [other for number, other in now.items() if number != device]
            if not others:
                continue
            factor = own / statistics.median(others)
            if (self.factors[device] == 1 and factor > SLOW) or (self.factors[device] > 1 and factor < USUAL):
                self.factors[device] = changed[device] = factor if factor > SLOW else 1.0
        return changed

    def forget(self) -> list[int]:
        """Makes slow devices count as usual, so that they are tried again; returns them."""
        slow = [device for device, factor in enumerate(self.factors) if factor > 1]
        for device in slow:
            self.factors[device] = 1.0
            self._windows[device] = Window()
        return slow


class Window:
    """The last batches of a device."""

    def __init__(self) -> None:
        self._batches: deque[tuple[float, float, float]] = deque()
        self._ignored = 0

    def add(self, batch_s: float, spent_s: float, expected_s: float) -> None:
        if self._ignored < IGNORED:
            self._ignored += 1
            return
        self._batches.append((batch_s, spent_s, expected_s))
        while len(self._batches) > BATCHES and self._seconds - self._batches[0][0] >= WINDOW_S:
            self._batches.popleft()

    @property
    def _seconds(self) -> float:
        return sum(batch_s for batch_s, _, _ in self._batches)

    @property
    def full(self) -> bool:
        return len(self._batches) >= BATCHES and self._seconds >= WINDOW_S

    @property
    def ratio(self) -> float:
        """Seconds spent over seconds expected."""
        return sum(spent for _, spent, _ in self._batches) / sum(expected for _, _, expected in self._batches)


class Patience:
    """Limits the time of a batch by that of earlier batches of its kind."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._recent: dict[str, deque[tuple[float, int]]] = {}  # kind -> seconds, tokens

    def took(self, kind: str, num_tokens: int, seconds: float) -> None:
        """Notes the seconds of an answered batch. Batches of one `kind` share a plan and the number of new tokens."""
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] > FIRST:
            self._recent.setdefault(kind, deque(maxlen=RECENT)).append((seconds, num_tokens))

    def limit_s(self, kind: str, num_tokens: int) -> float:
        """Seconds that a batch may take; `FIRST_S` until enough batches of `kind` are known."""
        if kind not in self._recent:
            return FIRST_S
        seconds, tokens = statistics.median_high(self._recent[kind])
        return STALL_S + TIMES * seconds * max(1.0, num_tokens / tokens)
