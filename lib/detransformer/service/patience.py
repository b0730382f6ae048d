"""How long a batch may stand still although every device gives signs of life.

Small signs pass where large messages do not: a path that drops frames of full size, a stream whose bytes were damaged
beyond what TCP's checksum tells. Nobody is to blame that the leader could name; all meet anew, and the batch is asked
once more.
"""

import math
import statistics
import time
from collections import deque

STALL_S = 10.0
TIMES = 10  # as long as batches of its kind usually take: a device may have become slow
RECENT = 20  # batches, of which the median is the usual one
FIRST = 2  # batches of a kind that load weights and fill caches: these have the time limit of a message


class Patience:
    """On the leader: what the batch that is under way may take, by what others of its kind took."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._recent: dict[str, deque[tuple[float, int]]] = {}  # kind -> seconds, tokens
        self._batch = ("", 0, 0.0)  # kind, tokens and beginning of the one that is under way
        self.due = math.inf  # on the monotonic clock

    def begin(self, kind: str, num_tokens: int) -> None:
        """A batch of `kind`, such as share a plan and the number of tokens to make, has begun."""
        began = time.monotonic()
        self._batch = (kind, num_tokens, began)
        self.due = began + self.limit_s(kind, num_tokens)

    def end(self) -> None:
        """The batch that had begun is answered."""
        kind, num_tokens, began = self._batch
        seconds, self.due = time.monotonic() - began, math.inf
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] > FIRST:
            self._recent.setdefault(kind, deque(maxlen=RECENT)).append((seconds, num_tokens))

    def limit_s(self, kind: str, num_tokens: int) -> float:
        """Seconds; infinite until enough is known of `kind`."""
        if kind not in self._recent:
            return math.inf
        seconds, tokens = statistics.median_high(self._recent[kind])
        return STALL_S + TIMES * seconds * max(1.0, num_tokens / tokens)

    def forget(self) -> None:
        """Plans are made anew, and load their weights."""
        self._seen.clear()
        self._recent.clear()

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.due
