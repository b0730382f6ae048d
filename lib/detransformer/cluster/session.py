"""An emulated cluster: worker processes on this machine that stay up for many jobs.

Transport `namespaces`: every worker runs in its own network namespace; the kernel shapes the links, over real TCP.
Transport `loopback`, if namespaces are not permitted: the same workers over 127.0.0.1, with links modelled in the
process. The device profile paces compute in both. A worker that dies or falls silent ends the session with an error
that names it (`fleet`).
"""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from detransformer.cluster.devices import (
    DeviceError,
    DeviceSpec,
    cluster_profile,
    describe_devices,
    device_specs,
    link_shares,
)
from detransformer.cluster.fleet import Fleet
from detransformer.cluster.line import listen
from detransformer.cluster.network import INTERFACE, EmulatedNetwork, can_emulate
from detransformer.cluster.pacing import Arrivals
from detransformer.planning.profile import ClusterProfile, LinkProfile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TRANSPORTS = ("auto", "namespaces", "loopback")
START_TIMEOUT_S = 120
MESSAGE_S = 120.0  # limit of a message between two devices
_STORE_PORT = 29500


@dataclass(eq=False)
class EmulatedCluster:
    """`num_devices` devices on a switch; a context manager.

    Args:
        device: a preset of `cluster.devices` or a `DeviceSpec`, for all devices, or a list of one for each.
        bandwidth_bps: of every link, times the device's `link_share`; change it with `set_link`.
        transport: `auto` takes namespaces if they are permitted.
        threads: per worker, for compute.
        delay_s, jitter_s: of a packet between two devices, one way; on shaped links alone.
        shared: the links are one medium, such as Wi-Fi: all traffic together has the rate.
        pins: each device, with the threads that send its messages, is pinned to one core, in turn.
        home: settings that jobs find in `WorkerState.home`, such as the model's folder and the cluster file.

    Raises:
        ValueError: for bad arguments, or for a transport or delay that is not possible here.
    """

    num_devices: int
    device: str | DeviceSpec | Sequence[str | DeviceSpec] = "rpi4b"
    bandwidth_bps: float = 125e6
    transport: str = "auto"
    threads: int = 1
    delay_s: float = 0.0
    jitter_s: float = 0.0
    shared: bool = False
    pins: bool = False
    home: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport={self.transport!r} is unknown: choose one of {', '.join(TRANSPORTS)}.")
        self.devices = device_specs(self.num_devices, self.device)
        self.link_shares = link_shares(self.devices)
        if self.transport != "loopback":
            permitted, why = can_emulate()
            if not permitted and self.transport == "namespaces":
                raise ValueError(f"{why}: run as root on Linux, or use transport='loopback'.")
            self.transport = "namespaces" if permitted else "loopback"
        if (self.delay_s or self.jitter_s) and self.transport == "loopback":
            raise ValueError(
                "delay and jitter are set on shaped links, and these are modelled: leave them out, "
                "or use shaped links where network namespaces are permitted."
            )
        self.time_scale = 1.0
        self.folder: Path | None = None  # for files that live as long as the session
        self.fleet: Fleet | None = None
        self._network: EmulatedNetwork | None = None
        self._launcher: psutil.Popen | None = None

    @property
    def profile_name(self) -> str:
        """The devices' name in table rows: `Raspberry Pi 4B (emulated)`, or a list if they differ."""
        return f"{describe_devices(self.devices)} (emulated)"

    @property
    def link(self) -> str:
        """The links' name in table rows: `line-rate` (shaped by the kernel) or `modelled`; `shared` if one medium."""
        return ("shared " if self.shared else "") + ("line-rate" if self.transport == "namespaces" else "modelled")

    def profile(self, config: "PretrainedConfig", link: LinkProfile | None = None) -> ClusterProfile:
        """The devices of this cluster and its link (measured, or else assumed) at its present rate."""
        where = self.bandwidth_bps, self.delay_s, link
        return cluster_profile(self.devices, config, *where, shared=self.shared)

    def __enter__(self) -> "EmulatedCluster":
        self.folder = Path(tempfile.mkdtemp(prefix="detransformer-"))
        try:
            if self.transport == "namespaces":
                latency = dict(delay_s=self.delay_s, jitter_s=self.jitter_s)
                links = dict(shares=self.link_shares, shared=self.shared, **latency)
                self._network = EmulatedNetwork(self.num_devices, self.bandwidth_bps, **links).__enter__()
            Arrivals(self.folder / "arrivals", self.num_devices, create=True)
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _start(self) -> None:
        network, folder = self._network, self.folder
        listener = listen(str(folder / "front"))  # a Unix socket: only jobs use the emulated links
        store = f"{network.addresses[0]}:{_STORE_PORT}" if network else f"127.0.0.1:{_free_port()}"
        names = [f"device {i} of {self.num_devices} ({device.title})" for i, device in enumerate(self.devices)]
        self.fleet = Fleet(names, listener, store)
        cores = sorted(os.sched_getaffinity(0)) if self.pins else []
        places = [
            {
                "namespace": network.namespaces[rank] if network else "",
                "core": cores[rank % len(cores)] if cores else None,
                "log": str(folder / f"worker{rank}.log"),
            }
            for rank in range(self.num_devices)
        ]
        job = {
            "front": str(folder / "front"),
            "first": names[0],
            "secret": "",
            "interface": INTERFACE if network else "lo",
            "threads": self.threads,
            "arrivals": str(folder / "arrivals"),
            "message_s": MESSAGE_S,
            "wait_s": START_TIMEOUT_S,
            "silence_s": float("inf"),  # the kernel ends the workers with this process
            "places": places,
        }
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # no thread may exist when it forks
        command = [sys.executable, "-m", "detransformer.cluster.launcher", json.dumps(job | dict(self.home))]
        with open(folder / "launcher.log", "wb") as log:
            self._launcher = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.fleet.wait(START_TIMEOUT_S)

    def set_link(self, bandwidth_bps: float, time_scale: float = 1.0) -> None:
        """Sets the links' rate (times each device's share), in the devices' seconds, and the time scale.

        With time scale k, links and compute are k times slower on the host's clock.
        """
        self.bandwidth_bps, self.time_scale = bandwidth_bps, time_scale
        if self._network:
            latency = dict(delay_s=self.delay_s * time_scale, jitter_s=self.jitter_s * time_scale)
            self._network.set_rate(bandwidth_bps / time_scale, **latency)

    def packet_s(self) -> float:
        """Seconds of a packet from the first device to the last, in the devices' time; NaN if links are modelled."""
        return self._network.packet_s() / self.time_scale if self._network else math.nan

    @property
    def lost(self) -> dict[int, str]:
        """Devices that jobs have done without (`needed` of `run`), and why."""
        return self.fleet.left_out if self.fleet else {}

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, by device."""
        return [member.hello["pid"] for member in self.fleet.group.members.values()]

    def run(
        self, op: str, per_rank: list[dict] | None = None, timeout_s: float = 600, needed: int | None = None, **job
    ) -> list:
        """Gives every worker one job (`per_rank` adds arguments that differ) and returns their results in rank order.

        Args:
            op: a function of `cluster.jobs`, or "package.module:function".
            needed: the rank whose result is required. Any other that is lost, or has not answered a second after it, is
                left out from then on (`lost` says why) and yields None.

        Raises:
            DeviceLost: if a worker died or was silent for 10 s.
            DeviceError: if a worker reports an error.
        """
        pids, before = self.pids if needed is not None else [], set(self.lost)
        try:
            answers = self.fleet.run(op, job, per_device=per_rank, timeout_s=timeout_s, needed=needed)
        except DeviceError:
            self.close()
            raise
        for rank in self.lost.keys() - before:
            _kill(pids[rank])
        return [answers[rank][0] if rank in answers else None for rank in range(self.num_devices)]

    def close(self) -> None:
        """Ends all workers and removes the network; safe to call twice."""
        if self._launcher:
            with contextlib.suppress(psutil.NoSuchProcess):
                for worker in self._launcher.children():
                    _kill(worker.pid)
            try:
                self._launcher.wait(timeout=10)  # it ends after all of them
            except psutil.TimeoutExpired:
                self._launcher.kill()
                self._launcher.wait()
            self._launcher = None
        if self.fleet:
            self.fleet.close(wait_s=0)
        if self._network:
            self._network.close()
            self._network = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # ends a stopped process, too; workers have nothing to save


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
