"""Where an agent and its workers start. Imports nothing that takes time.

A device that comes back is of use only when its agent and the server that its workers are forked from have imported
torch and transformers, seconds of a fast processor and half a minute of a slow one: here both do so at once. And it
joins the others only then, so that a round they form with it is one in which its worker starts within an instant.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

from detransformer.cluster.launcher import die_with_parent

DEVICE = "DETRANSFORMER_DEVICE"  # environment variable: which device of the cluster file this is
AGENT = "DETRANSFORMER_AGENT"  # environment variable: the agent's process


def main() -> None:
    """The process that `post` starts: the job's file and the device are on the command line."""
    die_with_parent()
    path, device = sys.argv[1], int(sys.argv[2])
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    os.environ |= {
        DEVICE: str(device),
        AGENT: str(os.getpid()),
        "OMP_NUM_THREADS": str(job["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        # each round its own store: agents count their restarts apart, and would read each other's old addresses
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    multiprocessing.set_forkserver_preload(["detransformer.service.preload"])
    forkserver.ensure_running()  # and imports; meanwhile
    from detransformer.cluster.run import model_facts
    from detransformer.service.agent import run_agent

    with contextlib.suppress(ValueError):  # the worker says what is wrong with it
        model_facts(job["models"].get(str(device), job["model"]))  # large weights: the others need not wait for it
    ready = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    ready.start()
    ready.join()  # the first to be forked: all is imported
    run_agent(job, path, device)


def work(path: str) -> None:
    """The elastic agent's entry point in a forked process: `path` is the job's file. Returns never."""
    from detransformer.service import worker

    worker.work(path)
