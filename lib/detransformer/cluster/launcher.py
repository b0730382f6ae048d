"""Starts the workers of an emulated cluster: imports once all that they need, then forks them.

Importing torch and transformers takes seconds of a processor for each worker that does so. Forking is safe here, since
no thread has been started and no socket opened before. Reports each worker's exit code to the front.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import traceback

from detransformer.cluster.hello import meet
from detransformer.files import last_words
from detransformer.machine import die_with_parent

_PR_SET_TIMERSLACK = 29


def main() -> None:
    """Forks a worker for each device that the command line lists, and waits until all have ended."""
    job = json.loads(sys.argv[1])  # for `worker.work`, with `places`: namespace, core and log of each device
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the session, which ends the workers

    import detransformer.cluster.worker  # noqa: F401  what the workers need

    gc.freeze()  # workers then skip the imports in garbage collections

    places = job.pop("places")
    devices = {}
    for device, place in enumerate(places):
        pid = os.fork()
        if pid == 0:
            _work(job, device, place)
        devices[pid] = device
    line = meet(job)
    while devices:
        pid, status = os.wait()
        device, code = devices.pop(pid), os.waitstatus_to_exitcode(status)
        line.send({"ended": device, "code": code, "words": last_words(places[device]["log"]) if code > 0 else ""})


def _work(job: dict, device: int, place: dict) -> None:
    """The forked process: enters its namespace, core and log, then works. Does not return."""
    from detransformer.cluster.network import enter_namespace
    from detransformer.cluster.worker import work

    try:
        log = os.open(place["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if place["core"] is not None:
            os.sched_setaffinity(0, {place["core"]})
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # ns; by default every sleep lasts 50 us longer
        if place["namespace"]:
            enter_namespace(place["namespace"])
        work(job, device)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
