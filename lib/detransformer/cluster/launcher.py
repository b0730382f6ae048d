"""Starts the workers of a session: imports once what all of them need, then forks them.

Importing torch and transformers keeps a processor busy for seconds, so four or eight workers that each did so would
take a session's first minute. Forking is safe here because nothing has started a thread, or opened a socket, before.
Told on the command line what workers to start; says on stdout their process ids, and later with which code each ended.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import traceback

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Forks the workers that the command line lists, and waits for their ends."""
    workers = json.loads(sys.argv[1])  # each: arguments (of `serve`), stdin, stdout, log
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the session, which ends the workers

    import detransformer.cluster.jobs  # noqa: F401  what the workers need

    gc.freeze()  # what was imported stays: workers need not search it for garbage, which takes half a second

    ranks = {}
    for rank, worker in enumerate(workers):
        pid = os.fork()
        if pid == 0:
            _work(worker, workers)
        ranks[pid] = rank
    for worker in workers:
        os.close(worker["stdin"])
        os.close(worker["stdout"])
    print(json.dumps({"pids": list(ranks)}), flush=True)
    while ranks:
        pid, status = os.wait()
        print(json.dumps({"rank": ranks.pop(pid), "code": os.waitstatus_to_exitcode(status)}), flush=True)


def die_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def torchrun() -> None:
    """torchrun, in this process, which ends with its parent; its arguments are those of the command line."""
    die_with_parent()
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous
    from torch.distributed.run import main

    from detransformer.cluster.stores import BoundRendezvous

    static_tcp_rendezvous.StaticTCPRendezvous = BoundRendezvous
    main(sys.argv[1:])


def _work(worker: dict, workers: list[dict]) -> None:
    """The forked process: its own pipes and log, nobody else's, then the worker. Does not return."""
    try:
        die_with_parent()
        log = os.open(worker["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for descriptor, place in ((worker["stdin"], 0), (worker["stdout"], 1), (log, 2)):
            os.dup2(descriptor, place)
        os.close(log)
        for other in workers:
            os.close(other["stdin"])
            os.close(other["stdout"])
        from detransformer.cluster.worker import serve

        serve(**worker["arguments"])
        os._exit(0)  # gloo's threads would otherwise wait for peers that are gone
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
