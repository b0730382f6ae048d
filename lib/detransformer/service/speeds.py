"""Which device has become slow: each one's compute against its own usual, and against how the others fare.

Compute is summed over a window of batches, and compared with what the profile says of the same work. One batch that
was held up does not make a device slow, and a device that stands still now and then is not overlooked, as it would be
by the median of batches too short to be hit each time.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

BATCHES, WINDOW_S = 3, 2.0  # a window has as many, and lasted as long, at least
IGNORED = 2  # first batches of a device: what happens only once is not usual
SLOW = 3.0  # times the usual, the others' change taken out
USUAL = 1.5  # below which a slow one is as it was


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
