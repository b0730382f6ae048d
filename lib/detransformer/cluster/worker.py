"""One device's process: joins the group, then answers jobs until its input ends.

Forked by `cluster.launcher` on an emulated or loopback cluster (jobs as JSON lines on stdin, replies on stdout). It
enters its network namespace before anything opens a socket. Nothing on the wire or in the pipes is pickled.
"""

import contextlib
import ctypes
import json
import os
import sys
import threading
import time
import traceback

from detransformer.cluster.jobs import WorkerState, find_job
from detransformer.cluster.network import enter_namespace

HEARTBEAT_S = 1.0
_PR_SET_TIMERSLACK = 29


def serve(
    rank: int,
    num_ranks: int,
    master: str,
    interface: str,
    namespace: str,
    threads: int,
    arrivals: str,
    core: int | None = None,
) -> None:
    """Works until stdin ends.

    Args:
        master: ADDRESS:PORT of rank 0.
        interface: the network interface that carries the collectives.
        namespace: the network namespace to enter first; empty for none.
        arrivals: the session's file of `pacing.Arrivals`.
        core: the one that this process, with all its threads, keeps to; None: any.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # ns; the default lets every sleep last 50 us longer
    if namespace:
        enter_namespace(namespace)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # stray prints of libraries go to the log, not among the replies
    lock = threading.Lock()

    def reply(message: dict) -> None:
        with lock:
            replies.write(json.dumps(message) + "\n")

    def beat() -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            while True:
                reply({"heartbeat": time.time()})
                time.sleep(HEARTBEAT_S)

    threading.Thread(target=beat, daemon=True).start()

    state = WorkerState.join(rank, num_ranks, master, rank == 0, interface, threads, arrivals)
    reply({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            reply({"result": find_job(job.pop("op"))(state, **job)})
        except Exception as error:  # reported to the parent, which decides
            traceback.print_exc(file=sys.stderr)
            reply({"error": f"{type(error).__name__}: {error}"})
