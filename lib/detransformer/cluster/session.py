"""A cluster of worker processes that stays up for many jobs, emulated on this machine.

Transport `namespaces`: every worker in its own network namespace, links shaped by the kernel, real TCP between them.
Transport `loopback`: the same workers over 127.0.0.1, links modelled in the process: where namespaces are not
permitted. Compute is paced by the device profile in both. A worker that dies or falls silent ends the session with an
error that names it.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from detransformer.cluster.devices import (
    DeviceError,
    DeviceLost,
    DeviceSpec,
    cluster_profile,
    describe_devices,
    device_specs,
    link_shares,
)
from detransformer.cluster.network import INTERFACE, EmulatedNetwork, can_delay, can_emulate
from detransformer.cluster.pacing import Arrivals
from detransformer.planning.profile import ClusterProfile, LinkProfile

TRANSPORTS = ("auto", "namespaces", "loopback")
MAX_DEVICES = 64
START_TIMEOUT_S = 120
LATE_S = 1.0  # for the others to reply, after the one that has the result
ENDING_S = 5.0  # for the launcher to tell how a process ended
SILENCE_LIMIT_S = 10  # a worker sends a heartbeat every second, whatever it is doing
_MASTER_PORT = 29500


class EmulatedCluster:
    """`num_devices` devices on a switch; a context manager.

    Args:
        device: a preset of `cluster.devices` or a `DeviceSpec`, for all devices alike or a list of one each.
        bandwidth_bps: of every link, times the device's `link_share`; change it with `set_link`.
        transport: `auto` takes namespaces where they are permitted.
        threads: of each worker's compute.
        delay_s, jitter_s: of a packet between two devices, one way; on shaped links where the kernel has netem.

    Raises:
        ValueError: for bad arguments, or what is not permitted or not available here.
    """

    def __init__(
        self,
        num_devices: int,
        device: str | DeviceSpec | Sequence[str | DeviceSpec] = "rpi4b",
        bandwidth_bps: float = 125e6,
        transport: str = "auto",
        threads: int = 1,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
    ):
        if not 1 <= num_devices <= MAX_DEVICES:
            raise ValueError(
                f"num_devices={num_devices} is outside 1..{MAX_DEVICES}: choose how many devices to emulate."
            )
        if not bandwidth_bps > 0:
            raise ValueError(f"bandwidth_bps={bandwidth_bps} must be above 0.")
        if transport not in TRANSPORTS:
            raise ValueError(f"transport={transport!r} is unknown: choose one of {', '.join(TRANSPORTS)}.")
        devices = device_specs(num_devices, device)
        if not (delay_s >= 0 and jitter_s >= 0):
            raise ValueError(f"delay_s={delay_s} and jitter_s={jitter_s} must be 0 or above.")
        if transport != "loopback":
            permitted, why = can_emulate()
            if not permitted and transport == "namespaces":
                raise ValueError(f"{why}: run as root on Linux, or use transport='loopback'.")
            transport = "namespaces" if permitted else "loopback"
        if delay_s or jitter_s:
            if transport == "loopback":
                raise ValueError(
                    "delay and jitter are set on shaped links, and these are modelled: leave them out, "
                    "or use shaped links where network namespaces are permitted."
                )
            delays, why = can_delay()
            if not delays:
                raise ValueError(f"{why}: leave delay and jitter out, or run on a kernel with sch_netem.")
        self.num_devices = num_devices
        self.devices = devices
        self.bandwidth_bps = bandwidth_bps
        self.time_scale = 1.0
        self.transport = transport
        self.threads = threads
        self.delay_s, self.jitter_s = delay_s, jitter_s
        self.folder: Path | None = None  # for files that live as long as the session
        self.lost: dict[int, str] = {}  # who was left out of jobs that can do without, and why
        self._network: EmulatedNetwork | None = None
        self._workers: list[_Worker] = []
        self._launcher: _Launcher | None = None

    @property
    def device(self) -> str:
        """The preset of the first device, which is that of all where they are alike."""
        return self.devices[0].preset

    @property
    def profile_name(self) -> str:
        """What table rows call these devices: `Raspberry Pi 4B (emulated)`, or a list where they differ."""
        return f"{describe_devices(self.devices)} (emulated)"

    @property
    def link_shares(self) -> tuple[float, ...]:
        """Each device's part of `bandwidth_bps`; empty where all have all of it."""
        return link_shares(self.devices)

    @property
    def link(self) -> str:
        """What table rows call this link: `line-rate`, shaped by the kernel, or `modelled` in the process."""
        return "line-rate" if self.transport == "namespaces" else "modelled"

    def profile(self, model: str, config: PretrainedConfig, link: LinkProfile | None = None) -> ClusterProfile:
        """The devices of this cluster on `model` (a preset's name or a folder) of `config`, and its link at its rate.

        `link` gives the figures measured on one.
        """
        return cluster_profile(self.devices, model, config, self.bandwidth_bps, self.delay_s, link)

    def __enter__(self) -> "EmulatedCluster":
        self.folder = Path(tempfile.mkdtemp(prefix="detransformer-"))
        try:
            if self.transport == "namespaces":
                network = EmulatedNetwork(
                    self.num_devices, self.bandwidth_bps, self.delay_s, self.jitter_s, self.link_shares
                )
                self._network = network.__enter__()
            Arrivals.create(self.folder / "arrivals", self.num_devices)
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _start(self) -> None:
        network = self._network
        master = f"{network.addresses[0]}:{_MASTER_PORT}" if network else f"127.0.0.1:{_free_port()}"
        common = {
            "num_ranks": self.num_devices,
            "master": master,
            "interface": INTERFACE if network else "lo",
            "threads": self.threads,
            "arrivals": str(self.folder / "arrivals"),
        }
        self._workers = [_Worker(rank, self.folder / f"worker{rank}.log") for rank in range(self.num_devices)]
        namespaces = network.namespaces if network else [""] * self.num_devices
        told = [
            worker.ends_for_launcher | {"arguments": common | {"rank": worker.rank, "namespace": namespace}}
            for worker, namespace in zip(self._workers, namespaces, strict=True)
        ]
        self._launcher = _Launcher(told, self.folder / "launcher.log", self.threads)
        for worker, pid in zip(self._workers, self._launcher.pids(START_TIMEOUT_S), strict=True):
            worker.pid = pid
        self._collect("starting", START_TIMEOUT_S)

    def set_link(self, bandwidth_bps: float, time_scale: float = 1.0) -> None:
        """Sets the rate that links have their share of, in the devices' own seconds.

        With `time_scale` k all runs k times slower.
        """
        self.bandwidth_bps = bandwidth_bps
        self.time_scale = time_scale
        if self._network:
            self._network.set_rate(bandwidth_bps / time_scale, self.delay_s * time_scale, self.jitter_s * time_scale)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def run(
        self, op: str, per_rank: list[dict] | None = None, timeout_s: float = 600, needed: int | None = None, **job
    ) -> list:
        """Gives every worker one job (`per_rank` adds what differs) and returns their results in rank order.

        Args:
            needed: the one rank without which there is no result; another that is lost, or still at work a second after
                that one's reply, is left out from then on (`lost` says why) and has None in the list.

        Raises:
            DeviceLost: if a worker died, or was silent for 10 s.
            DeviceError: if a worker reports an error.
        """
        for worker in self._workers:
            if worker.rank not in self.lost:
                extra = per_rank[worker.rank] if per_rank else {}
                worker.send({"op": op, **job, **extra})
        return self._collect(op, timeout_s, needed)

    def _leave_out(self, rank: int, why: str) -> None:
        self.lost[rank] = f"device {rank} ({self.devices[rank].title}) {why}"
        self._workers[rank].stop()

    def _collect(self, doing: str, timeout_s: float, needed: int | None = None) -> list:
        """Waits for one reply of every worker; watches for deaths and silence meanwhile."""
        waiting = {worker.rank for worker in self._workers} - set(self.lost)
        answered_at = None
        results: list = [None] * len(self._workers)
        errors: dict[int, str] = {}
        error_since = None
        deadline = time.monotonic() + timeout_s
        now = time.monotonic()
        for worker in self._workers:
            worker.heard_at = now
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if worker.rank not in self.lost:
                    selector.register(worker.replies, selectors.EVENT_READ, worker)
            selector.register(self._launcher.output, selectors.EVENT_READ, self._launcher)
            while waiting:
                for key, _ in selector.select(timeout=0.2):
                    worker = key.data
                    if worker is self._launcher:
                        self._note_ends(selector)
                        continue
                    messages = worker.receive()
                    if messages is None:
                        worker.ended = True
                        selector.unregister(key.fileobj)
                    for message in messages or ():
                        if "result" in message or "ready" in message:
                            results[worker.rank] = message.get("result")
                            waiting.discard(worker.rank)
                        elif "error" in message:
                            errors[worker.rank] = message["error"]
                            waiting.discard(worker.rank)
                now = time.monotonic()
                if needed is not None:
                    for rank, how in self._gone(now).items():
                        if rank != needed:
                            waiting.discard(rank)
                            errors.pop(rank, None)
                            self._unregister(selector, rank)
                            self._leave_out(rank, how)
                    if needed not in waiting:
                        answered_at = answered_at or now
                        ending = any(self._workers[rank].ended for rank in waiting)  # the launcher tells how, soon
                        if now - answered_at > (ENDING_S if ending else LATE_S):
                            for rank in sorted(waiting):
                                ended = self._workers[rank].ended
                                self._unregister(selector, rank)
                                self._leave_out(rank, "has ended" if ended else "did not answer in time")
                            break
                self._raise_if_lost(doing, now)
                if errors:  # often a peer's death seen from here: the dead one, if any, is named instead
                    error_since = error_since or now
                    if now - error_since > 1.0:
                        break
                if now > deadline:
                    rank = min(waiting)
                    self.close()
                    title = self.devices[rank].title
                    raise DeviceLost(
                        rank, f"device {rank} ({title}) had no result after {timeout_s:.0f} s while {doing}."
                    )
        if errors:
            time.sleep(0.3)
            self._raise_if_lost(doing, time.monotonic())
            rank = min(errors)
            self.close()
            raise DeviceError(rank, f"device {rank} failed while {doing}: {errors[rank]}")
        return results

    def _note_ends(self, selector) -> None:
        """Takes in which workers the launcher has seen ending; all of them, if it is gone itself."""
        codes = self._launcher.codes()
        if codes is None:
            selector.unregister(self._launcher.output)
            codes = {worker.rank: -signal.SIGKILL for worker in self._workers if worker.code is None}
        for rank, code in codes.items():
            self._workers[rank].code = code

    def _gone(self, now: float) -> dict[int, str]:
        """The workers that have died or fallen silent, and how; those left out before are not among them."""
        gone = {}
        for worker in self._workers:
            if worker.rank in self.lost:
                continue
            code = worker.code
            if code is not None:
                gone[worker.rank] = (
                    f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
                )
            elif now - worker.heard_at > SILENCE_LIMIT_S:
                gone[worker.rank] = f"has been silent for {SILENCE_LIMIT_S} s"
        return gone

    def _raise_if_lost(self, doing: str, now: float) -> None:
        for rank, how in self._gone(now).items():
            worker, num_left = self._workers[rank], len(self._workers) - 1
            why = worker.last_words() if (worker.code or 0) > 0 else ""
            self.close()
            raise DeviceLost(
                rank,
                f"device {rank} of {num_left + 1} ({self.devices[rank].title}) {how} while {doing}{why}; "
                f"the other {num_left} were stopped.",
            )

    def _unregister(self, selector, rank: int) -> None:
        with contextlib.suppress(KeyError, ValueError):  # its end was seen before
            selector.unregister(self._workers[rank].replies)

    def close(self) -> None:
        """Ends all workers and removes the network; safe to call twice."""
        for worker in self._workers:
            worker.stop()
        if self._launcher:
            self._launcher.close()
            self._launcher = None
        self._workers = []
        if self._network:
            self._network.close()
            self._network = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


class _Launcher:
    """The process that forks the workers, and tells when one has ended."""

    def __init__(self, workers: list[dict], log: Path, threads: int):
        self._log = log
        self._pending = b""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # no thread may exist when it forks
        ends = [worker[name] for worker in workers for name in ("stdin", "stdout")]
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "detransformer.cluster.launcher", json.dumps(workers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=ends,
                env=environment,
            )
        for end in ends:
            os.close(end)
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)

    def pids(self, timeout_s: float) -> list[int]:
        """Process ids of the workers, in rank order, once they exist."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                selector.select(timeout=0.2)
                messages = self._receive()
                if messages is None:
                    raise DeviceLost(0, f"the devices did not start{_last_words(self._log)}.")
                if messages:
                    return messages[0]["pids"]
        raise DeviceLost(0, f"the devices did not start within {timeout_s:.0f} s.")

    def codes(self) -> dict[int, int] | None:
        """Exit codes by rank of the workers that have ended since the last call; None if the launcher has ended."""
        messages = self._receive()
        return None if messages is None else {message["rank"]: message["code"] for message in messages}

    def _receive(self) -> list[dict] | None:
        data = self.output.read()
        if data == b"":
            return None
        *lines, self._pending = (self._pending + (data or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Waits until it has seen all workers ending, which were killed before."""
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()


class _Worker:
    """One worker process and its pipes; `pid` is known once the launcher has forked it, `code` once it has ended."""

    def __init__(self, rank: int, log: Path):
        self.rank = rank
        self.pid: int | None = None
        self.code: int | None = None
        self.heard_at = time.monotonic()
        self.ended = False  # its end of the pipe is closed
        self._log = log
        self._pending = b""
        stdin, jobs = os.pipe()
        replies, stdout = os.pipe()
        self._jobs, self.replies = os.fdopen(jobs, "wb"), os.fdopen(replies, "rb")
        self.ends_for_launcher = {"stdin": stdin, "stdout": stdout, "log": str(log)}
        os.set_blocking(replies, False)

    def send(self, message: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died; the collecting loop says so
            self._jobs.write(json.dumps(message).encode() + b"\n")
            self._jobs.flush()

    def receive(self) -> list[dict] | None:
        """Messages that have come in; None once the worker has closed its end."""
        data = self.replies.read()
        if data == b"":
            return None
        self.heard_at = time.monotonic()
        *lines, self._pending = (self._pending + (data or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        return _last_words(self._log)

    def stop(self) -> None:
        if self.pid is not None and self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # also ends a stopped process; workers hold nothing to be saved
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        self.replies.close()


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return f" ({lines[-1].strip()})" if lines else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
