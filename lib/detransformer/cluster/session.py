"""A cluster of worker processes that stays up for many jobs, emulated on this machine.

Transport `namespaces`: every worker in its own network namespace, links shaped by the kernel, real TCP between them.
Transport `loopback`: the same workers over 127.0.0.1, links modelled in the process; where namespaces are not
permitted. Compute is paced by the device profile in both. A worker that dies or falls silent ends the session with an
error that names it.
"""

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
from pathlib import Path

from transformers import BertConfig

from detransformer.cluster.devices import DEVICES, preset_profile
from detransformer.cluster.network import INTERFACE, EmulatedNetwork, can_emulate
from detransformer.planning.profile import ClusterProfile, LinkProfile

TRANSPORTS = ("auto", "namespaces", "loopback")
MAX_DEVICES = 64
START_TIMEOUT_S = 120
SILENCE_LIMIT_S = 10  # a worker sends a heartbeat every second, whatever it is doing
_MASTER_PORT = 29500


class DeviceError(RuntimeError):
    """A device could not do its part; `rank` says which."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class DeviceLost(DeviceError):
    """A device died, or stopped answering."""


class EmulatedCluster:
    """`num_devices` preset devices on a switch; a context manager.

    Args:
        device: a preset of `cluster.devices`.
        bandwidth_bps: of every link; change it with `set_link`.
        transport: `auto` takes namespaces where they are permitted.
        threads: of each worker's compute.

    Raises:
        ValueError: for bad arguments, or `namespaces` where they are not permitted.
    """

    def __init__(
        self,
        num_devices: int,
        device: str = "rpi4b",
        bandwidth_bps: float = 125e6,
        transport: str = "auto",
        threads: int = 1,
    ):
        if not 1 <= num_devices <= MAX_DEVICES:
            raise ValueError(
                f"num_devices={num_devices} is outside 1..{MAX_DEVICES}: choose how many devices to emulate."
            )
        if not bandwidth_bps > 0:
            raise ValueError(f"bandwidth_bps={bandwidth_bps} must be above 0.")
        if transport not in TRANSPORTS:
            raise ValueError(f"transport={transport!r} is unknown: choose one of {', '.join(TRANSPORTS)}.")
        if device not in DEVICES:
            raise ValueError(f"device {device!r} is unknown: choose one of {', '.join(DEVICES)}.")
        if transport != "loopback":
            permitted, why = can_emulate()
            if not permitted and transport == "namespaces":
                raise ValueError(f"{why}: run as root on Linux, or use transport='loopback'.")
            transport = "namespaces" if permitted else "loopback"
        self.num_devices = num_devices
        self.device = device
        self.bandwidth_bps = bandwidth_bps
        self.time_scale = 1.0
        self.transport = transport
        self.threads = threads
        self.folder: Path | None = None  # for files that live as long as the session
        self._network: EmulatedNetwork | None = None
        self._workers: list[_Worker] = []

    @property
    def profile_name(self) -> str:
        """What table rows call these devices."""
        return f"{DEVICES[self.device].name} (emulated)"

    @property
    def link(self) -> str:
        """What table rows call this link."""
        return "line-rate" if self.transport == "namespaces" else "modelled"

    def profile(self, config: BertConfig, link: LinkProfile | None = None) -> ClusterProfile:
        """The devices of this cluster on a model of `config`, with its link's rate and, if given, `link`'s figures."""
        devices = (preset_profile(self.device, config),) * self.num_devices
        return ClusterProfile(devices, (link or LinkProfile(self.bandwidth_bps)).at(self.bandwidth_bps))

    def __enter__(self) -> "EmulatedCluster":
        self.folder = Path(tempfile.mkdtemp(prefix="detransformer-"))
        try:
            if self.transport == "namespaces":
                self._network = EmulatedNetwork(self.num_devices, self.bandwidth_bps).__enter__()
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
        for rank in range(self.num_devices):
            command = [sys.executable, "-m", "detransformer.cluster.worker"]
            command += ["--rank", str(rank), "--num-ranks", str(self.num_devices), "--master", master]
            command += ["--interface", INTERFACE if network else "lo", "--threads", str(self.threads)]
            command += ["--namespace", network.namespaces[rank]] if network else []
            self._workers.append(_Worker(rank, command, self.folder / f"worker{rank}.log", self.threads))
        self._collect("starting", START_TIMEOUT_S)

    def set_link(self, bandwidth_bps: float, time_scale: float = 1.0) -> None:
        """Sets every link's rate, in the devices' own seconds; with `time_scale` k all runs k times slower."""
        self.bandwidth_bps = bandwidth_bps
        self.time_scale = time_scale
        if self._network:
            self._network.set_rate(bandwidth_bps / time_scale)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def run(self, op: str, per_rank: list[dict] | None = None, timeout_s: float = 600, **job) -> list:
        """Gives every worker one job (`per_rank` adds what differs) and returns their results in rank order.

        Raises:
            DeviceLost: if a worker died, or was silent for 10 s.
            DeviceError: if a worker reports an error.
        """
        for worker in self._workers:
            extra = per_rank[worker.rank] if per_rank else {}
            worker.send({"op": op, **job, **extra})
        return self._collect(op, timeout_s)

    def _collect(self, doing: str, timeout_s: float) -> list:
        """Waits for one reply of every worker; watches for deaths and silence meanwhile."""
        waiting = {worker.rank for worker in self._workers}
        results: list = [None] * len(self._workers)
        errors: dict[int, str] = {}
        error_since = None
        deadline = time.monotonic() + timeout_s
        now = time.monotonic()
        for worker in self._workers:
            worker.heard_at = now
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            while waiting:
                for key, _ in selector.select(timeout=0.2):
                    worker = key.data
                    messages = worker.receive()
                    if messages is None:
                        selector.unregister(key.fileobj)
                    for message in messages or ():
                        if "result" in message or "ready" in message:
                            results[worker.rank] = message.get("result")
                            waiting.discard(worker.rank)
                        elif "error" in message:
                            errors[worker.rank] = message["error"]
                            waiting.discard(worker.rank)
                now = time.monotonic()
                self._raise_if_lost(doing, now)
                if errors:  # often a peer's death seen from here: the dead one, if any, is named instead
                    error_since = error_since or now
                    if now - error_since > 1.0:
                        break
                if now > deadline:
                    rank = min(waiting)
                    self.close()
                    raise DeviceLost(rank, f"device {rank} had no result after {timeout_s:.0f} s while {doing}.")
        if errors:
            time.sleep(0.3)
            self._raise_if_lost(doing, time.monotonic())
            rank = min(errors)
            self.close()
            raise DeviceError(rank, f"device {rank} failed while {doing}: {errors[rank]}")
        return results

    def _raise_if_lost(self, doing: str, now: float) -> None:
        for worker in self._workers:
            code = worker.process.poll()
            if code is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
                why = worker.last_words() if code > 0 else ""
            elif now - worker.heard_at > SILENCE_LIMIT_S:
                how, why = f"has been silent for {SILENCE_LIMIT_S} s", ""
            else:
                continue
            rank, num_left = worker.rank, len(self._workers) - 1
            self.close()
            raise DeviceLost(
                rank,
                f"device {rank} of {num_left + 1} ({DEVICES[self.device].name}) {how} while {doing}{why}; "
                f"the other {num_left} were stopped.",
            )

    def close(self) -> None:
        """Ends all workers and removes the network; safe to call twice."""
        for worker in self._workers:
            worker.stop()
        self._workers = []
        if self._network:
            self._network.close()
            self._network = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


class _Worker:
    """One worker process and its pipes."""

    def __init__(self, rank: int, command: list[str], log: Path, threads: int):
        self.rank = rank
        self.heard_at = time.monotonic()
        self._log = log
        self._pending = b""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment
            )
        os.set_blocking(self.process.stdout.fileno(), False)

    def send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the collecting loop says so

    def receive(self) -> list[dict] | None:
        """Messages that have come in; None once the worker has closed its end."""
        data = self.process.stdout.read()
        if data == b"":
            return None
        self.heard_at = time.monotonic()
        *lines, self._pending = (self._pending + (data or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return f" ({lines[-1].strip()})" if lines else ""

    def stop(self) -> None:
        self.process.kill()  # SIGKILL also ends a stopped process; workers hold nothing that needs saving
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
