"""What batches usually take: which device has become slow, and how long a batch may stand still.

A device's compute is compared with its own usual, and with how the others fare. It is summed over a window of batches,
and taken relative to what the profile says of the same work. One batch that was held up does not make a device slow.
A device that stands still now and then is found, which the median of batches too short to be hit each time would miss.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

BATCHES, WINDOW_S = 3, 2.0  # a window has as many, and lasted as long, at least
IGNORED = 2  # first batches of a device: what happens only once is not usual
SLOW = 3.0  # times the usual, the others' change taken out
USUAL = 1.5  # below which a slow one is as it was
STALL_S = 10.0  # small signs of life pass where large messages do not: a batch may stand still for so long
TIMES = 10  # and as many times as long as batches of its kind usually take: a device may have become slow
RECENT = 20  # batches, of which the median is the usual one
FIRST = 2  # batches of a kind that load weights and fill caches: these have the time limit of a message
FIRST_S = 600.0


class Speeds:
    """`factors`: by how much each device is slower than usual, 1 where it is not; all by number, from 0."""

    def __init__(self, num_devices: int):
        self.factors = [1.0] * num_devices
        self._windows = [Window() for _ in range(num_devices)]
        self._usual: list[float | None] = [None] * num_devices

    def observe(self, batch_s: float, spent_s: Sequence[float], expected_s: Sequence[float]) -> dict[int, float]:
        """Takes in a batch: how long it took, each device's seconds of compute, and what the profile says of them.

        Devices without a part in the batch have NaN.

        Returns:
            device -> new factor, of those that have become slow, or are as usual again.
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
        """Slow devices count as usual again, so that they are tried; returns which."""
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
    """What a batch may take, by what others of its kind took."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._recent: dict[str, deque[tuple[float, int]]] = {}  # kind -> seconds, tokens

    def took(self, kind: str, num_tokens: int, seconds: float) -> None:
        """A batch of `kind`, such as share a plan and the number of tokens to make, is answered."""
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] > FIRST:
            self._recent.setdefault(kind, deque(maxlen=RECENT)).append((seconds, num_tokens))

    def limit_s(self, kind: str, num_tokens: int) -> float:
        """Seconds that a batch may take; long until enough is known of `kind`."""
        if kind not in self._recent:
            return FIRST_S
        seconds, tokens = statistics.median_high(self._recent[kind])
        return STALL_S + TIMES * seconds * max(1.0, num_tokens / tokens)
