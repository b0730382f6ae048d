"""Real hosts: which device of the cluster file this host is, and the agents that start its worker.

Imports without torch: `detransformer run` on a host reads the file, finds itself in it and starts an agent. A service's
emulated devices, each in a network namespace of this machine, are started in the same way.
"""

import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from detransformer.cluster.devices import DeviceError, DeviceLost
from detransformer.cluster.hello import meet
from detransformer.cluster.line import listen
from detransformer.cluster.network import INTERFACE, EmulatedNetwork, enter_namespace, inside
from detransformer.cluster.roster import REFUSED, SERVICE_SILENCE_S, SILENCE_S, join_words
from detransformer.cluster.spec import ClusterSpec
from detransformer.files import last_words

ANSWERING = "detransformer.cluster.answering"  # the module of the workers' jobs
RETURN_S = 1.0  # longest delay until an agent that has ended is restarted
END_S = 1.0  # an interrupted host waits this long for the front to hear of it


# --- This host ---------------------------------------------------------------------------------------------------


def own_rank(spec: ClusterSpec, host: str | None, interfaces: Mapping[str, list[str]]) -> int:
    """This host's device in the file, found by its name `host`, or else by the addresses of its `interfaces`.

    Raises:
        ValueError: if it is none or could be several of them, or the first device's name cannot be resolved here.
    """
    own = {address for addresses in interfaces.values() for address in addresses}
    listed = join_words([f"{member.name} ({member.address})" for member in spec.members])
    here = [rank for rank, member in enumerate(spec.members) if resolve(member.address) in own]
    first = spec.members[0].address
    if resolve(first) is None:
        raise ValueError(
            f"{spec.path}: the host name {first} is not known on this host, and all connect to it: write its IP "
            "address, or add the name to /etc/hosts."
        )
    if host is not None:
        if host not in spec.names:
            raise ValueError(f"--host {host} is not in {spec.path}, which lists {listed}.")
        rank = spec.names.index(host)
        if rank not in here and not spec.interface:
            raise ValueError(
                f"--host {host} has the address {spec.members[rank].address} in {spec.path}, and this host has "
                f"{_but_loopback(own)}: correct the file, or name its interface there."
            )
        return rank
    if not here:
        raise ValueError(
            f"this host's addresses ({_but_loopback(own)}) are not in {spec.path}, which lists {listed}: "
            "correct the file, or say which device this is by --host."
        )
    if len(here) > 1:
        raise ValueError(f"several devices of {spec.path} have this host's address: say which one this is by --host.")
    return here[0]


def own_interfaces() -> dict[str, list[str]]:
    """IPv4 addresses by network interface."""
    found = psutil.net_if_addrs().items()
    return {name: [a.address for a in addresses if a.family == socket.AF_INET] for name, addresses in found}


def interface_of(spec: ClusterSpec, rank: int, interfaces: Mapping[str, list[str]]) -> str:
    """The network interface for the collectives of this host, which is device `rank`.

    Raises:
        ValueError: if this host lacks the interface that the file names.
    """
    if not spec.interface:
        address = resolve(spec.members[rank].address)
        return next(name for name, found in interfaces.items() if address in found)
    if not interfaces.get(spec.interface):
        known = join_words([name for name, found in interfaces.items() if found])
        raise ValueError(
            f"{spec.path}: interface {spec.interface} has no IPv4 address on this host, which has {known}: "
            "correct it, or leave it out."
        )
    return spec.interface


def _but_loopback(addresses) -> str:
    return ", ".join(sorted(a for a in addresses if not a.startswith("127."))) or "none but loopback"


def resolve(address: str) -> str | None:
    """The IPv4 address of a host name; None if it cannot be resolved here."""
    try:
        return socket.gethostbyname(address)
    except (OSError, UnicodeError):  # UnicodeError: the name is too long
        return None


# --- Agents ------------------------------------------------------------------------------------------------------


class Hosts:
    """Keeps agents running until `close`, each with the worker of one device; a context manager.

    Args:
        own: this host's device in the file; None: all devices are emulated here, each in a namespace.
        interface: network interface of this host's collectives.
        secret: shared by all real hosts; emulated devices get a new one.
        stays: restart workers and agents that have ended, for a service.
        time_scale: factor by which emulated links and devices are slower.
        paced: emulated devices compute no faster than their presets; else as fast as this machine.
        threads: per device, for compute; 0: all cores.
        wait_s: how long a worker waits for the first device; 0: no limit.
        models: device -> folder, for devices with another copy of the model.
        variables: device -> further environment variables of its processes.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        model: str,
        own: int | None = None,
        interface: str = "",
        secret: str = "",
        stays: bool = True,
        time_scale: float = 1.0,
        paced: bool = True,
        threads: int = 1,
        wait_s: float = 0.0,
        models: Mapping[int, str] | None = None,
        variables: Mapping[int, Mapping[str, str]] | None = None,
    ):
        self.spec, self.own, self.stays = spec, own, stays
        self.variables, self._models = variables or {}, models or {}
        self.agents: dict[int, subprocess.Popen] = {}
        self.kept = set(range(len(spec.members))) if own is None else {own}  # devices whose agents are to run
        self.network: EmulatedNetwork | None = None
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="detransformer-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        first = spec.members[0]
        self.job = {
            "cluster": str(spec.path.resolve()),
            "model": str(Path(model).resolve()),
            "listed": ", ".join(f"{member.name} {member.address}" for member in spec.members),
            "first": f"{first.name} ({first.address})" if first.address else first.name,
            "secret": secrets.token_hex(32) if own is None else secret,
            "interface": interface or INTERFACE,
            "threads": threads,
            "time_scale": time_scale,
            "paced": paced and own is None,
            "stays": stays,
            "jobs": ANSWERING,  # a false front can ask for no other jobs
            "wait_s": wait_s,
            "silence_s": SERVICE_SILENCE_S if stays and not own else SILENCE_S,  # another host's front may be busy
            "message_s": 60.0 if stays else 120.0,
            "alive": str(self.folder / "alive"),
            "end": None if stays else str(self.folder / "end.json"),
        }

    @property
    def address(self) -> str:
        """The first device's IPv4 address."""
        return self.network.addresses[0] if self.network else resolve(self.spec.members[0].address)

    def listen(self) -> socket.socket:
        """A socket at the first device's address for workers to connect to. Makes the emulated network.

        Raises:
            ValueError: if the address or port is not available.
            OSError: if this machine does not permit network namespaces.
        """
        if self.own is None:
            rate_bps = self.spec.bandwidth_bps / self.job["time_scale"]
            self.network = EmulatedNetwork(len(self.spec.members), rate_bps).__enter__()
            return inside(self.network.namespaces[0], lambda: listen(f"{self.address}:{self.spec.port}"))
        port = self.spec.port + 1
        try:
            listen(f"0.0.0.0:{port}").close()  # the first device's worker keeps the store there
            port = self.spec.port
            return listen(f"{self.address}:{port}")
        except OSError as error:
            why = "is in use, perhaps by another run" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
            raise ValueError(
                f"port {port} of {self.address} {why}: end that, or choose another rendezvous.port on all hosts, which "
                "take that port and the next one."
            ) from None

    @property
    def store(self) -> str:
        """ADDRESS:PORT of the process group's store, which the first device's worker keeps at the next port."""
        return f"{self.address}:{self.spec.port + 1}"

    def start(self) -> None:
        """Starts the agents; the first device must `listen` before."""
        self.job["front"] = f"{self.address}:{self.spec.port}"
        path = self.folder / "job.json"
        path.touch(0o600)
        path.write_text(json.dumps(self.job), encoding="utf-8")
        for device in sorted(self.kept):
            self._start_agent(device)
        if self.stays:
            self._keeper = threading.Thread(target=self._keep, daemon=True)
            self._keeper.start()

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.own and isinstance(error, KeyboardInterrupt) and not self.stays:
            with contextlib.suppress(OSError, LookupError):  # the front tells the other hosts
                line = meet(self.job | {"wait_s": END_S})
                line.send({"ended": self.own, "code": 130, "words": "it was interrupted"})
        self.close()

    def close(self) -> None:
        """Ends agents and workers, and removes the namespaces; safe to call twice."""
        self._stop.set()
        if self._keeper:
            self._keeper.join(10)
        for agent in self.agents.values():
            kill(agent)
        if self.network:
            self.network.close()
        self._folder.cleanup()

    def wait(self) -> None:
        """Waits, on a host that is not the first, until its part has ended.

        Raises:
            ValueError, DeviceError: with the reason, in the front's or the worker's sentence.
        """
        (agent,) = self.agents.values()
        agent.wait()
        try:
            end = json.loads((self.folder / "end.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DeviceLost(0, f"the worker of this host ended ({last_words(self._log(self.own))}).") from None
        if end["end"] == REFUSED:
            raise ValueError(end["sentence"])
        if end["sentence"]:
            raise DeviceError(0, end["sentence"])

    def _log(self, device: int) -> Path:
        return self.folder / f"agent{device}.log"

    def _start_agent(self, device: int) -> None:
        model = str(Path(self._models.get(device, self.job["model"])).resolve())
        command = [sys.executable, "-m", "detransformer.cluster.agent", self.folder / "job.json", str(device), model]
        namespace = self.network.namespaces[device] if self.network else None
        temporary = {"TMPDIR": str(self.folder)}  # an agent is killed, and cannot remove its files
        with open(self._log(device), "ab") as log:
            self.agents[device] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if self.stays else sys.stderr,  # the worker's sentences are for the user of `run`
                stderr=log,
                start_new_session=True,
                env=os.environ | temporary | self.variables.get(device, {}),
                preexec_fn=namespace and (lambda: enter_namespace(namespace)),
            )

    def _keep(self) -> None:
        """Restarts agents that have ended, as a host's service manager would."""
        while not self._stop.wait(RETURN_S):
            for device in sorted(self.kept):
                if self.agents[device].poll() is not None:
                    kill(self.agents[device])  # with its remaining processes
                    self._start_agent(device)

    def last_words(self) -> str:
        """The last line of each agent's log."""
        return "; ".join(filter(None, (last_words(path) for path in sorted(self.folder.glob("agent*.log")))))


def kill(agent: subprocess.Popen) -> None:
    """Kills an agent and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
