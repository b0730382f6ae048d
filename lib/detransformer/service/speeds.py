"""The usual time of batches: finds devices that have become slow, and limits how long a batch may take.

A device's compute time is summed over a window of batches, relative to its profile's prediction, and compared with its
own usual ratio, that of the first full window, and with the other devices' change. One delayed batch does not make a
device slow. The sum finds a device that stalls now and then, which a median would miss if batches are too short to be
hit each time.
"""

import statistics
from collections import Counter, deque
from collections.abc import Mapping

BATCHES, WINDOW_S = 3, 2.0  # a window has at least so many batches and seconds
IGNORED = 2  # first batches: they do work that happens only once
SLOW = 3.0  # times the usual, relative to the others' change
USUAL = 1.5  # below this a slow device is as before
STALL_S = 10.0  # a batch may stall this long: heartbeats can pass where large messages do not
TIMES = 10  # and take this many times the usual time of its kind: a device may have become slow
RECENT = 20  # batches, whose median is the usual time
FIRST = 2  # batches of a kind that load weights and fill caches: their time limit is `FIRST_S`
FIRST_S = 600.0


class Speeds:
    """`factors`: how many times slower than usual a device is, for devices that are slow."""

    def __init__(self) -> None:
        self.factors: dict[int, float] = {}
        self._usual: dict[int, float] = {}  # device -> its usual ratio
        self._window: deque[tuple[float, Mapping[int, tuple[float, float]]]] = deque()  # arguments of `observe`
        self._num_ignored = 0

    def observe(self, batch_s: float, compute_s: Mapping[int, tuple[float, float]]) -> dict[int, float]:
        """Takes in a batch: its seconds, and by device its seconds of compute, measured and by the profile.

        Returns:
            device -> new factor, for devices that have become slow, and 1 for those that are as usual again.
        """
        if self._num_ignored < IGNORED:
            self._num_ignored += 1
            return {}
        self._window.append((batch_s, compute_s))
        while len(self._window) > BATCHES and self._seconds - self._window[0][0] >= WINDOW_S:
            self._window.popleft()
        if len(self._window) < BATCHES or self._seconds < WINDOW_S:
            return {}
        now = {}  # device -> seconds spent over seconds expected, relative to the usual
        for device in sorted(set().union(*(batch for _, batch in self._window))):
            times = [batch[device] for _, batch in self._window if device in batch]
            if len(times) >= BATCHES:
                ratio = sum(spent for spent, _ in times) / sum(expected for _, expected in times)
                now[device] = ratio / self._usual.setdefault(device, ratio)
        changed = {}
        for device, own in now.items():
            others = [other for number, other in now.items() if number != device]
            if not others:
                continue
            factor = own / statistics.median(others)
            if device not in self.factors and factor > SLOW:
                self.factors[device] = changed[device] = factor
            elif device in self.factors and factor < USUAL:
                del self.factors[device]
                changed[device] = 1.0
        return changed

    @property
    def _seconds(self) -> float:
        return sum(batch_s for batch_s, _ in self._window)

    def forget(self) -> list[int]:
        """Makes slow devices count as usual, so that they are tried again; returns them."""
        slow = list(self.factors)
        self.factors.clear()
        self._window.clear()
        self._num_ignored = 0
        return slow


class Patience:
    """Limits the time of a batch by that of earlier batches of its kind."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._recent: dict[str, deque[tuple[float, int]]] = {}  # kind -> seconds, tokens

    def took(self, kind: str, num_tokens: int, seconds: float) -> None:
        """Notes the seconds of an answered batch. Batches of one `kind` share a plan and the number of new tokens."""
        self._seen[kind] += 1
        if self._seen[kind] > FIRST:
            self._recent.setdefault(kind, deque(maxlen=RECENT)).append((seconds, num_tokens))

    def limit_s(self, kind: str, num_tokens: int) -> float:
        """Seconds that a batch may take; `FIRST_S` until enough batches of `kind` are known."""
        if kind not in self._recent:
            return FIRST_S
        seconds, tokens = statistics.median_high(self._recent[kind])
        return STALL_S + TIMES * seconds * max(1.0, num_tokens / tokens)
