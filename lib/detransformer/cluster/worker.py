"""The worker of one device: joins the group that the front forms, takes a job, answers; until it is told to end.

It is started by `launcher` (forked, on an emulated cluster) or by `agent` (torchrun's elastic agent, on a real host).
One thread of it keeps the line to the front: heartbeats, orders, and the end when the front has gone. A worker belongs
to one group in its life: where the group breaks, it ends and another one is started.
"""

import contextlib
import importlib
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load, save

from detransformer.cluster.hello import End, meet
from detransformer.cluster.jobs import WorkerState
from detransformer.cluster.line import BEAT_S, Line, Message
from detransformer.machine import die_with_parent

COLLECTIVE_ERRORS = ("peer", "gloo", "timed out", "timeout", "broken pipe", "connection")  # words in them


def work(job: Mapping[str, Any], device: int, starter: int = 0) -> None:
    """What a worker does; never returns.

    Args:
        job: what whoever starts workers says to all of a host, as `hosts.Hosts` and `session` make it.
        device: which device of the cluster this is.
        starter: the process with which this one has to end, where that is not its parent.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front, which ends its workers
    words = os.dup(1)  # what the user of this host is to read
    os.dup2(2, 1)  # stray prints of libraries go to the log
    end = End(job, device, words, starter)
    signal.signal(signal.SIGTERM, lambda *_: end())
    line = meet(job, device, end)
    heard, wakes = socket.socketpair()  # from now on SIGTERM is heard by the thread, whatever the main one is doing
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
    Lifeline(job, line, orders, end, heard).start()
    state = None
    while True:
        header, payload = orders.get()
        try:
            if "group" in header:
                state = join(job, device, header)
                line.send({"ready": header["group"]})
            else:
                result, tensors = perform(state, header, payload)
                line.send({"job": header["job"], "result": result}, save(tensors) if tensors else b"")
        except Exception as error:  # the front decides
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
                sys.stderr.flush()
            sentence, own = blame(error)
            with contextlib.suppress(OSError):
                line.send({"error": sentence, "own": own, **({"job": header["job"]} if "job" in header else {})})


def join(job: Mapping[str, Any], device: int, told: Mapping[str, Any]) -> WorkerState:
    """This worker's place in the group of the devices that `told` lists."""
    devices, rank = told["devices"], told["devices"].index(device)
    os.environ["GLOO_SOCKET_IFNAME"] = job["interface"]
    threads = job["threads"] or torch.get_num_threads()
    state = WorkerState.join(
        rank, len(devices), told["store"], rank == 0, job["interface"], threads, job.get("arrivals", ""),
        f"group{told['group']}", timedelta(seconds=job["message_s"]),
    )  # fmt: skip
    state.device, state.home = device, {**job, "group": devices}
    return state


def perform(state: WorkerState, header: Mapping[str, Any], payload: bytes) -> tuple[Any, dict[str, torch.Tensor]]:
    """The result of a job and, apart, its tensors."""
    arguments = dict(header["arguments"])
    if payload:
        arguments["inputs"] = load(payload)
    result = resolve(header["call"], state.home.get("jobs", "detransformer."))(state, **arguments)
    tensors = result.pop("tensors", {}) if isinstance(result, dict) else {}
    return result, tensors


def resolve(name: str, allowed: str = "detransformer.") -> Callable[..., Any]:
    """The function that a job names: "package.module:function", or one of `cluster.jobs`.

    Raises:
        ValueError: for a module whose name does not begin with `allowed`.
    """
    module, _, function = name.rpartition(":")
    module = module or "detransformer.cluster.jobs"
    if not module.startswith(allowed) or function.startswith("_"):
        raise ValueError(f"{name} is no job: name a public function of {allowed}, such as run_plan of cluster.jobs.")
    return getattr(importlib.import_module(module), function)


def blame(error: Exception) -> tuple[str, bool]:
    """An error in a sentence, and whether it is this worker's own; that of a collective is a peer's, or the link's."""
    text = " ".join(str(error).split())
    own = not (isinstance(error, RuntimeError) and any(word in text.lower() for word in COLLECTIVE_ERRORS))
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:300]}"), own


class Lifeline(threading.Thread):
    """Keeps the line to the front while the main thread computes: beats, passes orders on, and ends this worker."""

    def __init__(
        self,
        job: Mapping[str, Any],
        line: Line,
        orders: queue.SimpleQueue,
        end: End,
        heard: socket.socket,
    ):
        super().__init__(daemon=True)
        self._first, self._silence_s = job["first"], job["silence_s"]
        self._line, self._orders, self._end = line, orders, end
        self._selector = selectors.DefaultSelector()
        self._selector.register(line, selectors.EVENT_READ, "line")
        self._selector.register(heard, selectors.EVENT_READ, "term")

    def run(self) -> None:
        first = f"{self._first}, the first device,"
        for message in self._line.unread:
            self._take(message)
        while True:
            for key, _ in self._selector.select(BEAT_S / 2):
                if key.data == "term":
                    self._line.tell({"error": "it was interrupted", "own": True})
                    self._end()
                else:
                    messages = self._line.receive()
                    if messages is None:
                        self._end("lost", f"{first} is lost: its process ended.")
                    for message in messages:
                        self._take(message)
            self._line.beat()
            self._end.alive()
            if time.monotonic() - self._line.heard_at > self._silence_s:
                why = f"{first} has been silent for {self._silence_s:g} s: it is off, or its network is down."
                self._end("lost", why)

    def _take(self, message: Message) -> None:
        header = message.header
        if "again" in header:
            self._end()
        elif "end" in header:
            self._end(header["end"], header["sentence"])
        elif "say" in header:
            self._end.say(header["say"])
        else:
            self._orders.put(message)
