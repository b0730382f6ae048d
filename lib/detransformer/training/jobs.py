"""Training runs side by side, one process each: on a CPU, two runs of one thread outpace one run of two threads.

Workers stop when their parent stops or is killed; what they trained up to their last checkpoint is kept.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm.auto import tqdm

from detransformer.machine import free_unused


def run_jobs(function: Callable, jobs: Sequence[tuple], num_jobs: int, title: str) -> list[Any]:
    """`function(*job)` for each job, `num_jobs` at a time, started in the given order; results in that order.

    Raises:
        ValueError: for num_jobs below 1; also whatever a job raises, after the others were stopped.
    """
    if num_jobs < 1:
        raise ValueError(f"num_jobs={num_jobs} is below 1: give the number of runs side by side.")
    look = dict(desc=title, total=len(jobs), unit="run", leave=len(jobs) > 1)
    if num_jobs == 1:
        return [function(*job) for job in tqdm(jobs, **look)]
    # Workers are forked from a process that has imported the library and done nothing else: a fork of this process
    # would inherit PyTorch's threads without their state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detransformer.training"])
    threads = max(1, torch.get_num_threads() // num_jobs)
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(num_jobs, context, initializer=_start_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(_work, function, job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), **look):
                future.result()  # raises what the job raised
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                if worker not in others:  # a run in progress saves a checkpoint before it ends
                    worker.terminate()
            raise
    return [future.result() for future in futures]


def _work(function: Callable, job: tuple) -> Any:
    """Runs a job, then frees what training keeps for its next step, which would add up over jobs."""
    try:
        return function(*job)
    finally:
        free_unused()


def _start_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
