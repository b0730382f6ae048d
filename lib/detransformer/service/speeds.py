"""Which device has become slow: each one's compute against its own usual, and against how the others fare."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

KEPT = 5  # batches
SLOW = 3.0  # times the usual, the others' change taken out
USUAL = 1.5  # below which a slow one is as it was


class Speeds:
    """`factors`: by how much each device is slower than usual, 1 where it is not; all by number, from 0."""

    def __init__(self, num_devices: int):
        self.factors = [1.0] * num_devices
        self._recent: list[deque[float]] = [deque(maxlen=KEPT) for _ in range(num_devices)]
        self._usual: list[float | None] = [None] * num_devices

    def observe(self, ratios: Sequence[float]) -> dict[int, float]:
        """Takes in a batch: seconds of compute over what the profile says, NaN for a device without a part.

        Returns:
            device -> new factor, of those that have become slow, or are as usual again.
        """
        for device, ratio in enumerate(ratios):
            if math.isnan(ratio):
                continue
            self._recent[device].append(ratio)
            if self._usual[device] is None and len(self._recent[device]) == KEPT:
                self._usual[device] = statistics.median(self._recent[device])
        now = {
            device: statistics.median(recent) / self._usual[device]
            for device, recent in enumerate(self._recent)
            if self._usual[device]
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
            self._recent[device].clear()
        return slow
