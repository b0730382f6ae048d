"""The worker of one device: it joins the group that the front forms, takes jobs and answers them until told to end.

The launcher forks it (emulated cluster), or torchrun's elastic agent starts it (real host). One thread keeps the line
to the front: it sends heartbeats, takes orders, and ends this process when the front is gone. A worker belongs to one
group in its life: when the group breaks, the worker ends and another one is started.
"""

import contextlib
import importlib
import os
import queue
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save

from detransformer.cluster.hello import End, meet
from detransformer.cluster.jobs import WorkerState, warm_up_libraries
from detransformer.cluster.line import BEAT_S, DEVICE, PEER, REQUEST, Line, Message, listen
from detransformer.cluster.pacing import Arrivals
from detransformer.machine import die_with_parent

COLLECTIVE_ERRORS = ("peer", "gloo", "timed out", "timeout", "broken pipe", "connection")  # words in their messages
MEMORY_ERRORS = ("allocate memory", "out of memory")  # words in torch's RuntimeErrors


def work(job: Mapping[str, Any], device: int, starter: int = 0) -> None:
    """Runs this worker; never returns.

    Args:
        job: settings common to all workers of a host, made by `hosts.Hosts` or `session.EmulatedCluster`.
        device: this worker's device in the cluster.
        starter: id of the process with which this one must end, if that is not its parent.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front, which ends its workers
    words = os.dup(1)  # for the user of this host
    os.dup2(2, 1)  # stray prints of libraries go to the log
    end = End(job, device, words, starter)

    def meanwhile(attempt: int) -> None:
        if attempt == 0:
            end.say(f"waiting for {job['first']}, the first device")
        end.alive()

    try:
        line = meet(job, device, meanwhile)
    except ConnectionError as error:
        end("lost", str(error))
    orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
    enough: dict[int, list[int]] = {}
    threading.Thread(target=keep_line, args=(job, line, orders, end, enough), daemon=True).start()
    state = None
    while True:
        header, payload = orders.get()
        try:
            if "group" in header:
                state = join(job, device, header)
                line.send({"ready": header["group"]})
            else:
                number = header["job"]
                state.tell, state.enough = partial(_tell, line, number), partial(enough.get, number, ())
                result, tensors = perform(state, header, payload)
                line.send({"job": header["job"], "result": result}, save(tensors) if tensors else b"")
        except Exception as error:  # the front decides
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
                sys.stderr.flush()
            sentence, whose = blame(error)
            if whose == REQUEST and "job" not in header:
                whose = DEVICE
            with contextlib.suppress(OSError):
                line.send({"error": sentence, "whose": whose, **({"job": header["job"]} if "job" in header else {})})


def _tell(line: Line, job: int, part: Any) -> None:
    with contextlib.suppress(OSError):  # a closed line ends this process anyway
        line.send({"job": job, "part": part})


def join(job: Mapping[str, Any], device: int, order: Mapping[str, Any]) -> WorkerState:
    """Joins the group of the front's `order`: the group's number, its devices by rank, the store's address."""
    devices, wait = order["devices"], timedelta(seconds=job["message_s"])
    rank, num_ranks = devices.index(device), len(devices)
    os.environ["GLOO_SOCKET_IFNAME"] = job["interface"]
    torch.set_num_threads(job["threads"] or torch.get_num_threads())
    store = bound_store(order["store"], num_ranks, rank == 0, wait)
    named = dist.PrefixStore(f"group{order['group']}", store)
    dist.init_process_group("gloo", store=named, rank=rank, world_size=num_ranks, timeout=wait)
    groups = {tuple(range(n)): dist.new_group(list(range(n)), timeout=wait) for n in range(2, num_ranks + 1)}
    warm_up_libraries()
    arrivals = Arrivals(job["arrivals"], num_ranks) if job.get("arrivals") else None
    home = {**job, "group": devices}
    return WorkerState(rank, job["interface"], groups, wait, arrivals=arrivals, device=device, home=home)


def bound_store(where: str, num_processes: int | None, keeps: bool, wait: timedelta) -> dist.TCPStore:
    """The store at `where` (ADDRESS:PORT); the process that `keeps` it listens at that address alone.

    TCPStore itself would listen at all addresses of the host.

    Raises:
        OSError: if the address or port is not available.
        torch.distributed.DistError: if nothing answers there.
    """
    address, _, port = where.rpartition(":")
    listener = listen(where).detach() if keeps else None
    options = dict(master_listen_fd=listener, wait_for_workers=False)
    return dist.TCPStore(address, int(port), num_processes, keeps, wait, **options)


def perform(state: WorkerState, header: Mapping[str, Any], payload: bytes) -> tuple[Any, dict[str, torch.Tensor]]:
    """Runs a job; returns its result and, separately, its tensors."""
    arguments = dict(header["arguments"])
    if payload:
        arguments["inputs"] = load(payload)
    result = resolve(header["call"], state.home.get("jobs", "detransformer."))(state, **arguments)
    tensors = result.pop("tensors", {}) if isinstance(result, dict) else {}
    return result, tensors


def resolve(name: str, allowed: str = "detransformer.") -> Callable[..., Any]:
    """The function that a job names: "package.module:function", or one of `cluster.jobs`.

    Raises:
        ValueError: if the module's name does not begin with `allowed`.
    """
    module, _, function = name.rpartition(":")
    module = module or "detransformer.cluster.jobs"
    if not module.startswith(allowed) or function.startswith("_"):
        raise ValueError(f"{name} is not a job: name a public function of {allowed}, such as run_plan of cluster.jobs.")
    return getattr(importlib.import_module(module), function)


def blame(error: Exception) -> tuple[str, str]:
    """An error as a sentence, and its cause: a peer (or the link), this device, or the request.

    A failed collective is a peer's; memory and files are the device's. Any other error would recur on every device that
    gets the same request.
    """
    text = " ".join(str(error).split())
    sentence = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:300]}"
    if isinstance(error, RuntimeError) and any(word in text.lower() for word in COLLECTIVE_ERRORS):
        return sentence, PEER
    is_device = isinstance(error, (MemoryError, OSError, SafetensorError)) or any(w in text for w in MEMORY_ERRORS)
    return sentence, DEVICE if is_device else REQUEST


def keep_line(
    job: Mapping[str, Any], line: Line, orders: queue.SimpleQueue, end: End, enough: dict[int, list[int]]
) -> None:
    """The thread that keeps the line to the front while the main thread computes; ends the process with the front.

    `enough` receives, by job number, the rows that the front no longer needs.
    """
    first = f"{job['first']}, the first device,"
    messages: list[Message] | None = line.unread
    while True:
        if messages is None:
            end("lost", f"{first} is lost: its process ended.")
        for message in messages:
            header = message.header
            if "again" in header:
                end()
            elif "end" in header:
                end(header["end"], header["sentence"])
            elif "enough" in header:
                enough.clear()
                enough[header["job"]] = header["enough"]
            elif "say" in header:
                end.say(header["say"])
            else:
                orders.put(message)
        line.beat()
        end.alive()
        if line.silent_for(job["silence_s"]):
            end("lost", f"{first} has been silent for {job['silence_s']:g} s: it is off, or its network is down.")
        messages = line.receive() if select.select([line], [], [], BEAT_S / 2)[0] else []
