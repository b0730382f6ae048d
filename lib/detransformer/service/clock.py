"""One clock for the rendezvous: the first device's agent's, whatever each host's own says.

torch's dynamic rendezvous writes the time of day into its state and compares it with the other hosts'. A board whose
clock is an hour off takes all others for dead, or is taken for dead, and a Raspberry Pi's is off after each power cut
until it has asked a server. So each agent sets itself by the first one's monotonic clock, once, when it joins.
"""

import contextlib
import hmac
import threading
import time
from datetime import UTC, datetime, timedelta, tzinfo
from hashlib import sha256

import torch.distributed as dist

KEY = "clock"
TICK_S = 0.1  # between two signs of it: by as much clocks differ at most, and by the way of a message
WAIT_S = 10.0  # for the first device to give a sign
START = datetime(2000, 1, 1, tzinfo=UTC)  # of a clock that shows no date


def sign(secret: bytes, data: bytes) -> bytes:
    """32 bytes that only who knows `secret` can make of `data`."""
    return hmac.digest(secret, data, sha256)


class SharedClock:
    """What `dynamic_rendezvous` asks of `datetime`: `now`. `keeps`: this agent is the first device's.

    Raises:
        RuntimeError: where the first device gives no sign of its clock, or one that is not signed with `secret`.
    """

    def __init__(self, store: dist.Store, secret: str, keeps: bool):
        self._store, self._secret = store.clone(), secret.encode()
        self._ahead_s = 0.0  # of this host's
        if keeps:
            self._tell()
            threading.Thread(target=self._keep, daemon=True).start()
        else:
            self._ahead_s = self._ask()

    def now(self, tz: tzinfo | None = None) -> datetime:
        """The same instant on all devices; its date means nothing."""
        return START.astimezone(tz) + timedelta(seconds=time.monotonic() + self._ahead_s)

    def _keep(self) -> None:
        with contextlib.suppress(dist.DistError):  # the store has ended
            while True:
                time.sleep(TICK_S)
                self._tell()

    def _tell(self) -> None:
        shown = f"{time.monotonic():.6f}"
        self._store.set(KEY, f"{shown} {sign(self._secret, shown.encode()).hex()}")

    def _ask(self) -> float:
        """By how much the first device's clock is ahead: by its next sign, for the one that stands there may be old."""
        old, deadline = None, time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self._store.check([KEY]):
                told = self._store.get(KEY)
                now = time.monotonic()
                if old is not None and told != old:
                    shown, _, signature = told.partition(b" ")
                    if not hmac.compare_digest(signature, sign(self._secret, shown).hex().encode()):
                        raise RuntimeError("the first device's clock is not signed with this cluster's secret")
                    return float(shown) - now
                old = told
            time.sleep(TICK_S / 5)
        raise RuntimeError(f"the first device gave no sign of its clock within {WAIT_S:g} s")
