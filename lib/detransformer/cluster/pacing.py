"""Pacing and timing: how a fast host stands in for a slow device.

A compute segment between two collectives ends no sooner than the device's profile says it would on that device: the
pacer sleeps for the rest. The host's contention disappears in that sleep, as long as the host is faster; where it is
not, the excess is an *overrun*, which is recorded and makes the row invalid if it is large. The time of a collective is
the real network's, or, on a modelled link, at least what the link's profile says.
"""

import time
from collections.abc import Callable, Sequence

_SPIN_S = 0.0002  # time.sleep wakes this much late; the last part is waited for awake


def sleep_until(deadline: float) -> None:
    remaining = deadline - time.perf_counter()
    if remaining > _SPIN_S:
        time.sleep(remaining - _SPIN_S)
    while time.perf_counter() < deadline:
        pass


class Pacer:
    """Observes one device's collectives; sleeps where it is told to and keeps the sums.

    Args:
        segment_s: modelled seconds of each compute segment, one more than there are collectives; None paces nothing
            (real hosts, and warm-up).
        link_s: modelled seconds of a collective `(kind, num_bytes) -> s`; None where the network is real.
    """

    def __init__(self, segment_s: Sequence[float] | None = None, link_s: Callable[[str, int], float] | None = None):
        self.segment_s = segment_s
        self.link_s = link_s
        self.reset()

    def reset(self) -> None:
        self.compute_s = self.comm_s = self.overrun_s = 0.0
        self.events: list[tuple[str, float, float]] = []  # (what, start, stop) on this host's clock

    def begin(self) -> None:
        """A request starts."""
        self._segment = 0
        self._since = time.perf_counter()

    def _end_segment(self) -> None:
        if self.segment_s is not None:
            assert self._segment < len(self.segment_s), "the executor made more collectives than the cost model lists"
            deadline = self._since + self.segment_s[self._segment]
            self.overrun_s += max(0.0, time.perf_counter() - deadline)
            sleep_until(deadline)
        now = time.perf_counter()
        self.compute_s += now - self._since
        self.events.append(("compute", self._since, now))
        self._segment += 1
        self._since = now

    def before(self, kind: str, num_bytes: int) -> None:
        self._end_segment()

    def after(self, kind: str, num_bytes: int) -> None:
        if self.link_s is not None:
            # The real collective ends once its last rank has come; the modelled transfer starts then.
            sleep_until(time.perf_counter() + self.link_s(kind, num_bytes))
        now = time.perf_counter()
        self.comm_s += now - self._since
        self.events.append((kind, self._since, now))
        self._since = now

    def end(self) -> None:
        """The request is answered."""
        self._end_segment()
        assert self.segment_s is None or self._segment == len(self.segment_s), (
            "fewer collectives than the cost model lists"
        )
