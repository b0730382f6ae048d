"""One device's process: joins the group, then answers jobs until its input ends.

Started by `cluster.session` on an emulated or loopback cluster (jobs as JSON lines on stdin, replies on stdout). It
enters its network namespace before anything opens a socket. Nothing on the wire or in the pipes is pickled.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback

HEARTBEAT_S = 1.0
_PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--num-ranks", type=int, required=True)
    parser.add_argument("--master", required=True, help="ADDRESS:PORT of rank 0")
    parser.add_argument("--interface", required=True, help="network interface that carries the collectives")
    parser.add_argument("--namespace", default="", help="network namespace to enter first")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a worker must not outlive its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the pipes
    if arguments.namespace:
        from detransformer.cluster.network import enter_namespace

        enter_namespace(arguments.namespace)
    os.environ["GLOO_SOCKET_IFNAME"] = arguments.interface
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

    from detransformer.cluster.jobs import JOBS, WorkerState

    state = WorkerState.join(
        arguments.rank, arguments.num_ranks, arguments.master, arguments.interface, arguments.threads
    )
    reply({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            reply({"result": JOBS[job.pop("op")](state, **job)})
        except Exception as error:  # reported to the parent, which decides
            traceback.print_exc(file=sys.stderr)
            reply({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # gloo's threads would otherwise wait for peers that are gone


if __name__ == "__main__":
    main()
