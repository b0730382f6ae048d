"""torchrun's elastic agent on one host: it starts the worker of this host's device and restarts it when it has ended.

The agent is torch's own, with a static rendezvous of this host alone; the front (`fleet`) decides who belongs to the
group. torch's dynamic rendezvous unpickles whatever anyone writes into its store, and compares the clocks of hosts.
Workers are forked from a server that has already imported torch, which saves seconds in every recovery. If two
in a row failed early, the agent and this server begin anew, too: the cause may be theirs.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

from detransformer.cluster.hello import ENDED, await_message, meet, write_end
from detransformer.cluster.roster import how_ended
from detransformer.machine import die_with_parent

HUNG_S = 10  # a worker without a heartbeat for so many seconds is killed
FAILURES_S = 20.0  # a worker that failed sooner is restarted after a delay, which doubles each time
DELAY_S, MAX_DELAY_S = 1.0, 60.0
MONITOR_S = 0.1


def main() -> None:
    """The process that `hosts` starts; arguments: the job's file, the device, and this host's folder of the model.

    A fourth argument is the delay in seconds before the next worker.
    """
    die_with_parent()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # fork servers of its earlier lives
            pass
    path, device, model, *delay = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8")) | {"model": model}
    os.environ |= {
        "OMP_NUM_THREADS": str(job["threads"] or os.cpu_count()),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",  # the agent then reads no ranks from a store
        "DETRANSFORMER_PRELOADED_MODEL": model,
    }
    multiprocessing.set_forkserver_preload(["detransformer.cluster.preload"])
    forkserver.ensure_running()  # it imports while this process does
    delay_s = keep(job, int(device), *map(float, delay))
    if delay_s:
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, path, device, model, str(delay_s)])


def keep(job: dict, device: int, delay_s: float = 0.0) -> float:
    """Runs the worker of `device` after `delay_s`; if the job `stays`, restarts it until two in a row fail early.

    Returns the delay in seconds until a further one may be started; 0 if there shall be none.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from detransformer.cluster.worker import work

    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    here = RendezvousParameters("static", endpoint, f"device{device}", 1, 1, rank=0)
    spec = WorkerSpec(
        role="worker",
        local_world_size=1,
        entrypoint=work,
        args=(job, device, os.getpid()),
        rdzv_handler=get_rendezvous_handler(here),
        max_restarts=0,  # one run of the agent per worker, so that its exit code is known
        monitor_interval=MONITOR_S,
    )
    sign = Path(f"{job['alive']}{device}")
    time.sleep(delay_s)
    while True:
        sign.touch()
        started = time.monotonic()
        agent = LocalElasticAgent(spec, DefaultLogsSpecs(os.devnull), "forkserver", shutdown_timeout=2)
        ended = threading.Event()
        threading.Thread(target=_watch, args=(agent, sign, ended), daemon=True).start()
        failures = agent.run().failures
        ended.set()
        code = next(iter(failures.values())).exitcode if failures else ENDED
        if not job["stays"]:
            if code != ENDED:
                _report(job, device, code)
            return 0.0
        failed_early = code != ENDED and time.monotonic() - started < FAILURES_S
        if failed_early and delay_s:
            return min(2 * delay_s, MAX_DELAY_S)
        delay_s = DELAY_S if failed_early else 0.0
        time.sleep(delay_s)


def _watch(agent, sign: Path, ended: threading.Event) -> None:
    """Kills the agent's worker when its heartbeat stops: a process that hangs does not end by itself."""
    seen, silent_s = None, 0  # seconds in which this process looked: it may have been held up itself
    while not ended.wait(1.0):
        stamp = sign.stat().st_mtime_ns
        silent_s = silent_s + 1 if stamp == seen else 0
        seen = stamp
        if silent_s > HUNG_S:
            silent_s = 0
            pid = agent.get_worker_group().workers[0].id
            if pid:
                os.kill(int(pid), signal.SIGKILL)


def _report(job: dict, device: int, code: int) -> None:
    """Reports the worker's exit code to the front, and writes the front's answer for this host's user."""
    try:
        line = meet(job)
        line.send({"ended": device, "code": code})
        answer = await_message(line)
        write_end(job["end"], answer["end"], answer["sentence"])
    except (OSError, LookupError):
        write_end(job["end"], "lost", f"the worker of this host {how_ended(code)}.")


if __name__ == "__main__":
    main()
