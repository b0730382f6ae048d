"""Training runs side by side, one process each: on a CPU, two runs of one thread outpace one run of two threads.

Workers stop when their parent does, also when it is killed; what they trained up to their last checkpoint is kept.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partialmethod
from queue import Empty
from typing import Any

import torch
from tqdm.auto import tqdm

from detransformer.machine import free_unused

REPORT_S = 0.5  # how often the parent looks

_report: Callable[[int], None] | None = None


def run_jobs(function: Callable, jobs: Sequence[tuple], num_jobs: int, title: str, total: int, unit: str) -> list[Any]:
    """`function(*job)` for each job, `num_jobs` at a time, started in the order given; results in that order.

    Args:
        function: importable; calls `advance(n)` as it goes on.
        total, unit: of the progress bar.

    Raises:
        ValueError: for num_jobs below 1; whatever a job raises, after the others were stopped.
    """
    if num_jobs < 1:
        raise ValueError(f"num_jobs={num_jobs} is below 1: give the number of runs side by side.")
    with tqdm(total=total, desc=title, unit=unit, mininterval=1.0) as bar:
        if num_jobs == 1:
            return _one_by_one(function, jobs, bar)
        return _side_by_side(function, jobs, min(num_jobs, len(jobs)), bar)


def advance(amount: int = 1) -> None:
    """A job says that it got `amount` further."""
    if _report is not None:
        _report(amount)


class StepCounter:
    """A training run's `on_step` that advances by its steps: those of an earlier try, or of a finished run, too."""

    def __init__(self, num_steps: int):
        self.num_steps, self.done = num_steps, 0

    def __enter__(self) -> "StepCounter":
        return self

    def __call__(self, step: int, loss: float) -> None:
        advance(step - self.done)
        self.done = step

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            advance(self.num_steps - self.done)


def _one_by_one(function: Callable, jobs: Sequence[tuple], bar) -> list[Any]:
    global _report
    _report = bar.update
    try:
        return [function(*job) for job in jobs]
    finally:
        _report = None


def _side_by_side(function: Callable, jobs: Sequence[tuple], num_jobs: int, bar) -> list[Any]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads without their state
    steps = context.Queue()
    threads = max(1, torch.get_num_threads() // num_jobs)
    with ProcessPoolExecutor(num_jobs, context, initializer=_start_worker, initargs=(steps, threads)) as pool:
        waiting = futures = [pool.submit(_work, function, job) for job in jobs]
        try:
            while waiting:
                done, waiting = wait(waiting, REPORT_S, FIRST_COMPLETED)
                _drain(steps, bar)
                for future in done:
                    future.result()  # raises what the job raised
        except BaseException:
            workers = list((pool._processes or {}).values())  # the pool forgets them when it is shut down
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:  # a run in progress goes on from its checkpoint
                worker.terminate()
            raise
    _drain(steps, bar)
    return [future.result() for future in futures]


def _drain(steps, bar) -> None:
    try:
        while True:
            bar.update(steps.get_nowait())
    except Empty:
        pass


def _work(function: Callable, job: tuple) -> Any:
    """A job, after which the process is as small as before: what training keeps for its next step adds up otherwise."""
    try:
        return function(*job)
    finally:
        free_unused()


def _start_worker(steps, num_threads: int) -> None:
    global _report
    _report = steps.put
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # the parent's bar speaks for all
    torch.set_num_threads(num_threads)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
