"""The elastic agent of one device: torchrun's, which keeps one worker and starts it anew with those that are there.

Five things differ from torchrun's command line. Workers are forked from a server that has imported torch already
(`entry`), which takes seconds off every recovery. One that hangs gets a second to end, not thirty, while all others
wait. The rendezvous listens at the cluster's address alone. Its state, which torch pickles, is signed with the
cluster's secret and read only where the signature is right. And times in it are of one clock (`clock`).
"""

import hmac
import os
import signal
import sys
import tempfile
import time
from collections import deque
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousError, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout, Token

from detransformer.cluster.stores import bound_store
from detransformer.service.clock import SharedClock, sign
from detransformer.service.entry import work

NAME = "detransformer"
KEEP_ALIVE_S, MAX_MISSED = 1, 3  # of an agent: then its host counts as gone
STORE_S = 10  # of the store that all meet at, to answer
LAST_CALL_S = 1.5  # for further devices, once the first has come: shorter, and a round forms without one that lives
JOIN_S, SHUTDOWN_S = 3600, 1
MONITOR_S = 0.1
RETRY_S = 0.5  # of an agent that waits for the first device
MAX_FAILURES, FAILURES_S = 2, 20.0
ENDINGS = {"lost": 3, "asked": 4}  # exit codes of a worker whose group broke, and of one that its agent ended


class SignedBackend(C10dRendezvousBackend):
    """The state of the rendezvous, signed: what was not written with `secret` counts as none, and is written over."""

    def __init__(self, store: dist.Store, run_id: str, secret: str):
        super().__init__(store, run_id)
        self._secret = secret.encode()

    @property
    def name(self) -> str:
        return NAME

    def _decode_state(self, base64_state: bytes) -> tuple[bytes, Token] | None:
        try:
            found = super()._decode_state(base64_state)
        except Exception:  # not base64
            found = (b"", base64_state)
        if found is None:
            return None
        signature, state = found[0][:32], found[0][32:]
        return (state, found[1]) if hmac.compare_digest(signature, sign(self._secret, state)) else None

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        stored = self._call_store("get", self._key)
        if self._decode_state(stored) is None:  # none yet, or a stranger's: what stands there is replaced
            token = stored
        result = super().set_state(sign(self._secret, state) + state, token)
        return result and (result[0], result[1], result[0] == state)


def rendezvous(job: dict, device: int) -> DynamicRendezvousHandler:
    """torch's dynamic rendezvous over a store at the first device's address, which the first device's agent keeps.

    Raises:
        OSError: where the address or port cannot be had.
        RuntimeError: where nothing answers there, or with another secret.
    """
    addresses, port = job["addresses"], job["port"]
    wait = timedelta(seconds=STORE_S)
    store = bound_store(addresses[0], port, None, device == 0, wait, wait_for_workers=False)
    dynamic_rendezvous.datetime = SharedClock(store, job["secret"], keeps=device == 0)
    seconds = {"join": JOIN_S, "last_call": LAST_CALL_S, "close": 5, "heartbeat": 5}
    return DynamicRendezvousHandler.from_backend(
        NAME, store, SignedBackend(store, NAME, job["secret"]), 1, len(addresses), addresses[device],
        RendezvousTimeout(**{name: timedelta(seconds=value) for name, value in seconds.items()}),
        KEEP_ALIVE_S, MAX_MISSED,
    )  # fmt: skip


class Agent(LocalElasticAgent):
    """torchrun's agent, which ends where its worker fails by itself again and again.

    Each new start of one worker is one for all, so a device without the memory for it would keep the others from
    serving. Without its agent it is left out, until `post` starts that again, after a while that doubles.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._failed_at: deque[float] = deque(maxlen=MAX_FAILURES)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode not in ENDINGS.values() for failure in result.failures.values()):
            self._failed_at.append(time.monotonic())
            if len(self._failed_at) == MAX_FAILURES and self._failed_at[-1] - self._failed_at[0] < FAILURES_S:
                print(f"{MAX_FAILURES} workers failed within {FAILURES_S:g} s", file=sys.stderr, flush=True)
                os._exit(1)  # the fork server and the worker end with it
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = SHUTDOWN_S) -> None:
        """As the base class, which for a new start always grants the half minute of its own default."""
        super()._shutdown(death_sig, timeout)


def run_agent(job: dict, path: str, device: int) -> None:
    """Keeps a worker on `device` of `job`, until it is killed.

    Where the first device's agent is gone, it waits for another: its fork server, which took long to start, stays.
    The job, which the file `path` holds: `addresses` of all devices, `port` of the rendezvous at the first, `secret`,
    and what `worker` wants.
    """
    with tempfile.TemporaryDirectory(prefix="detransformer-") as logs:
        while True:
            try:
                spec = WorkerSpec(
                    role=NAME,
                    local_world_size=1,
                    entrypoint=work,
                    args=(path,),
                    rdzv_handler=rendezvous(job, device),
                    max_restarts=10**9,
                    monitor_interval=MONITOR_S,
                    local_addr=job["addresses"][device],
                )
                Agent(spec, DefaultLogsSpecs(log_dir=logs), start_method="forkserver").run()
            except (RendezvousError, RuntimeError) as error:
                if device == 0:
                    raise
                print(f"meets the others anew: {error}", file=sys.stderr, flush=True)
                time.sleep(RETRY_S)
