"""Ways to break one device of a running session: its processes, its link, its disk, its copy of the model.

A new fault is a `Fault` in `FAULTS`: how it begins, how it ends, and whether somebody is to blame. `rounds` plays them.
"""

import contextlib
import fcntl
import functools
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from safetensors.torch import load_file, save_file

from detransformer.cluster import switch
from detransformer.cluster.network import INTERFACE, EmulatedNetwork, inside
from detransformer.service.session import Session

HOLD_S = 6.0  # a device is away
DAMAGE = "damaged frames"
DAMAGED = 0.05  # of the frames that reach a device with damaged links
STEP = "clock step"
STEP_SOURCE = Path(__file__).with_name("clock_step.c")


@dataclass
class Fault:
    """A way to break device `device` of a session: `begin`, then `end` after `hold_s`.

    `names`: whether somebody is to blame that the session has to name (by `kind` of its events); a link that is away
    for an instant need not be noticed. `possible`: whether this machine permits it, and why not. `device`: the one
    that is hit where it is not the field's.
    """

    name: str
    begin: Callable[["Field"], None]
    end: Callable[["Field"], None] = lambda field: None
    hold_s: float = 0.0
    names: bool = True
    kind: str = "lost"
    possible: Callable[[], tuple[bool, str]] = lambda: (True, "")
    device: int | None = None


@dataclass
class Field:
    """Where faults happen: a session, the device that is hit, its own copy of the model and what its clock goes by."""

    session: Session
    device: int
    copy: Path
    clock: Path | None = None
    held: list = field(default_factory=list)

    def of(self, fault: Fault) -> "Field":
        """A new one for one round of `fault`."""
        return replace(self, device=self.device if fault.device is None else fault.device, held=[])

    def processes(self) -> list[psutil.Process]:
        """The agent of the device, its fork server and tracker, and last the worker."""
        agent = psutil.Process(self.session.hosts.agents[self.device].pid)
        return [agent, *sorted(agent.children(recursive=True), key=lambda process: process.create_time())]

    @property
    def worker(self) -> psutil.Process:
        return self.processes()[-1]


def control(request: int, interface: str, argument: bytes) -> bytes:
    """An ioctl of the calling thread's interface; what the kernel made of `argument`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel:
        return fcntl.ioctl(kernel, request, struct.pack("16s", interface.encode()) + argument)


def set_link(namespace: str, up: bool) -> None:
    """Takes the device's interface down, or up, as pulling its cable would."""

    def work() -> None:
        (flags,) = struct.unpack_from("16xh", control(0x8913, INTERFACE, bytes(16)))  # SIOCGIFFLAGS
        flags = flags | 1 if up else flags & ~1  # IFF_UP
        control(0x8914, INTERFACE, struct.pack("h14x", flags))  # SIOCSIFFLAGS

    inside(namespace, work)


def set_checksums(namespace: str, interface: str, on: bool) -> None:
    """Whether frames get their checksum before they leave this end of a cable; between namespaces they have none."""
    inside(namespace, lambda: switch.set_checksums(interface, on))


def damage(namespace: str, interface: str, share: float) -> None:
    """Changes a byte in `share` of the frames that come in; 0: no longer. Wants `nft`.

    Raises:
        OSError: where it is not installed or the kernel refuses.
    """
    rule = f"numgen random mod 1000 < {round(1000 * share)} @th,320,8 set 0xa5" if share else ""
    set_ingress(namespace, interface, rule)


def set_ingress(namespace: str, interface: str, rule: str) -> None:
    """Has `nft` apply `rule` to the frames that come in, in place of an earlier one; "": none any longer.

    Raises:
        OSError: where it is not installed or the kernel refuses.
    """
    rules = "table netdev faults\ndelete table netdev faults\n"  # also where there was none
    if rule:
        hook = f"type filter hook ingress device {interface} priority 0"
        rules += f"table netdev faults {{ chain in {{ {hook}; {rule}; }}; }}\n"

    def work() -> None:
        done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"nft: {done.stderr.strip().splitlines()[0]}")

    inside(namespace, work)


def num_damaged(namespace: str) -> int:
    """TCP segments whose checksum was wrong, so far."""

    def work() -> int:
        lines = Path("/proc/thread-self/net/snmp").read_text(encoding="ascii").splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[names.index("InCsumErrors")])

    return inside(namespace, work)


@functools.cache
def can_damage() -> tuple[bool, str]:
    """Whether frames can be damaged on this machine, by trying, and why not."""
    try:
        with EmulatedNetwork(1, 100e6) as network:
            set_checksums(network.switch, "port0", on=True)
            damage(network.namespaces[0], INTERFACE, DAMAGED)
    except OSError as error:
        return False, f"needs network namespaces and nftables ({error})"
    return True, "nftables changes bytes"


def _damage(place: Field, share: float = DAMAGED) -> None:
    """In both directions: what comes to the device, and at the switch what comes from it."""
    network, port = place.session.hosts.network, f"port{place.device}"
    here = network.namespaces[place.device]
    places = [(here, INTERFACE), (network.switch, port)]
    if share:
        for where in places:
            set_checksums(*where, on=True)
    for where in places:
        damage(*where, share)
    if not share:  # not before: what is damaged without a checksum reaches the program
        for where in places:
            set_checksums(*where, on=False)


def _flap(place: Field) -> None:
    for _ in range(3):
        _link(place, False)
        time.sleep(0.4)
        _link(place, True)
        time.sleep(0.4)


def _link(place: Field, up: bool) -> None:
    set_link(place.session.hosts.network.namespaces[place.device], up)


def _freeze(place: Field) -> None:
    """Agent, fork server and worker stand still."""
    place.held = place.processes()
    for process in place.held:
        process.suspend()


def _thaw(place: Field) -> None:
    for process in place.held:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _switch_off(place: Field) -> None:
    place.session.hosts.kept.discard(place.device)
    _restart(place)


def _restart(place: Field) -> None:
    """The device's processes are gone at once; `Hosts` starts its agent again."""
    os.killpg(place.session.hosts.agents[place.device].pid, signal.SIGKILL)


def _other_weights(place: Field) -> None:
    """The copy of the model on the device is damaged, and the device starts anew."""
    path = place.copy / "model.safetensors"
    place.held = [path.read_bytes()]
    tensors = load_file(path)
    save_file({name: tensor + 0.05 for name, tensor in tensors.items()}, path, {"format": "pt"})
    place.worker.kill()


def _own_weights(place: Field) -> None:
    (place.copy / "model.safetensors").write_bytes(place.held[0])
    with contextlib.suppress(psutil.NoSuchProcess):  # its agent starts anew in any case
        place.worker.kill()


def _no_memory(place: Field) -> None:
    """The worker dies, and no new one gets the memory to start, until its fork server is started anew."""
    server = place.worker.parent()
    resource.prlimit(server.pid, resource.RLIMIT_AS, (server.memory_info().vms + 2**22,) * 2)
    place.worker.kill()


def _fill_disk(place: Field) -> None:
    """Not a byte is free where the session keeps its files; then a worker dies, and has to start anew there."""
    with contextlib.suppress(OSError), open(place.session.hosts.folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 65536)
    place.worker.kill()


def _free_disk(place: Field) -> None:
    (place.session.hosts.folder / "filler").unlink()


def _slow(place: Field) -> None:
    """The worker gets a tenth of its time."""
    stop = threading.Event()

    def hinder() -> None:
        worker = place.worker
        with contextlib.suppress(psutil.NoSuchProcess):
            while not stop.is_set():
                worker.suspend()
                time.sleep(0.09)
                worker.resume()
                time.sleep(0.01)
            worker.resume()

    thread = threading.Thread(target=hinder, daemon=True)
    thread.start()
    place.held = [stop, thread]


def _unhinder(place: Field) -> None:
    place.held[0].set()
    place.held[1].join()


def _stranger(place: Field) -> None:
    """From the device's namespace, bytes to every port that listens there and at the first device."""
    network, agents = place.session.hosts.network, place.session.hosts.agents
    listening = {
        (c.laddr.ip, c.laddr.port)
        for number in (0, place.device)
        for process in psutil.Process(agents[number].pid).children(recursive=True)
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    } | {(network.addresses[0], place.session.hosts.spec.port)}

    def work() -> None:
        for address, port in listening:
            for words in (b"GET / HTTP/1.0\r\n\r\n", b"\0" * 4096, os.urandom(4096)):
                with contextlib.suppress(OSError), socket.create_connection((address, port), 1) as connection:
                    connection.settimeout(0.3)
                    connection.sendall(words)
                    place.held.append(connection.recv(4096))

    inside(network.namespaces[place.device], work)


def can_step_clock() -> tuple[bool, str]:
    """Whether one device's clock can be set, and why not."""
    found = bool(shutil.which("cc"))
    return found, "a library shows it another time" if found else "needs a C compiler, cc"


def clock_variables(clock: Path) -> dict[str, str]:
    """Environment variables of processes whose time of day is ahead by the seconds that the file `clock` has.

    Raises:
        OSError: where the library that does it cannot be compiled.
    """
    library = clock.with_suffix(".so")
    done = subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, STEP_SOURCE, "-ldl"], capture_output=True)
    if done.returncode:
        raise OSError(f"cc: {done.stderr.decode(errors='replace').strip()}")
    clock.write_text("0")
    return {"LD_PRELOAD": str(library), "CLOCK_STEP_FILE": str(clock)}


def _step_clock(place: Field) -> None:
    """The device's time of day, and nobody else's, is an hour late, as a board's without a battery after a power cut;
    then its worker dies, and all have to meet anew."""
    place.clock.write_text("-3600")
    place.worker.kill()


def _set_clock_back(place: Field) -> None:
    place.clock.write_text("0")


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("killed", lambda place: place.worker.kill()),
        Fault("frozen", lambda place: place.worker.suspend()),
        Fault("host frozen", _freeze, _thaw, HOLD_S),
        Fault("switched off", _switch_off, lambda place: place.session.hosts.kept.add(place.device), HOLD_S),
        Fault("link down", lambda place: _link(place, False), lambda place: _link(place, True), HOLD_S),
        Fault("link flaps", _flap, names=False),
        Fault(DAMAGE, _damage, lambda place: _damage(place, 0.0), HOLD_S, names=False, possible=can_damage),
        Fault("slow", _slow, _unhinder, HOLD_S, kind="slow"),
        Fault("other weights", _other_weights, _own_weights, 2 * HOLD_S, kind="differing"),
        Fault("out of memory", _no_memory),
        Fault("disk full", _fill_disk, _free_disk, HOLD_S),
        Fault("stranger", _stranger, names=False),
        Fault("first killed", lambda place: place.worker.kill(), device=0),
        Fault("first restarts", _restart, device=0),
        Fault(STEP, _step_clock, _set_clock_back, 2 * HOLD_S, possible=can_step_clock),
    )
}
