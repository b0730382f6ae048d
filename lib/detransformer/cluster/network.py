"""An emulated network of devices on one Linux machine: namespaces on a bridge, links shaped by the kernel.

Each device is a network namespace with one interface; its veth cable ends at a bridge in a separate namespace. A token
bucket (tbf) shapes both ends of the cable, so a device sends and receives at most at the link's rate, as on a
full-duplex switch port. If packets are delayed, or devices share one medium, a switch in user space replaces the bridge
(`cluster.switch`). Nothing touches the host's own interfaces.

The namespaces belong to a small keeper process (this module run with `-m`), which removes them when its input closes,
even if its parent was killed. Names start with `dtf<pid of the keeper>`; the leftovers of a killed keeper are removed
at the next start.
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from detransformer.cluster.switch import Shape, Switch, set_checksums

Result = TypeVar("Result")
PREFIX = "dtf"
INTERFACE = "eth0"
SUBNET = "10.77.0"
BURST_BYTES = 10_000  # a few MTU: with a 32 kB bucket small messages exceed the line rate
QUEUE_BYTES = 4_000_000  # deep enough that an all_to_all's incast is delayed, not dropped
TIMED_PACKETS = 21  # the measured delay is their median
_CLONE_NEWNET = 0x40000000


def enter_namespace(name: str) -> None:
    """Moves the calling thread (at start-up: the process) into the network namespace `name`."""
    with open(f"/var/run/netns/{name}") as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter network namespace {name}: {os.strerror(error)}")


def inside(namespace: str, action: Callable[[], Result]) -> Result:
    """Runs `action` in a thread in the network namespace `namespace`; returns its result, or raises its error."""

    def enter() -> Result:
        enter_namespace(namespace)  # of this thread alone
        return action()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter).result()


@functools.cache
def can_emulate() -> tuple[bool, str]:
    """Tries whether this machine permits namespaces and shaped links; also returns the reason."""
    try:
        with EmulatedNetwork(2, 100e6) as network:
            network.set_rate(200e6)
    except OSError as error:
        return False, f"network namespaces or tbf are not permitted here ({error})"
    return True, "network namespaces, veth, bridge and tbf work"


class EmulatedNetwork:
    """`num_devices` namespaces on one switch; a context manager. Further arguments are those of `Shape`.

    `namespaces` and `switch` (the bridge's namespace) are known once entered; `addresses` before.

    Raises:
        OSError: on entering, with the reason, if the kernel does not permit it.
    """

    def __init__(self, num_devices: int, bandwidth_bps: float, **latency: Any):
        self.num_devices = num_devices
        self.shape = Shape(bandwidth_bps, **latency)
        self.addresses = [f"{SUBNET}.{i + 1}" for i in range(num_devices)]
        self.namespaces: list[str] = []
        self.switch = ""
        self._keeper: subprocess.Popen | None = None

    def __enter__(self) -> "EmulatedNetwork":
        module = [sys.executable, "-m", "detransformer.cluster.network"]
        command = [*module, str(self.num_devices), json.dumps(asdict(self.shape))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # A new process group: Jupyter kills a kernel with its whole group, and the keeper must outlive it.
        self._keeper = subprocess.Popen(command, start_new_session=True, **pipes)
        try:
            names = self._answer()
        except BaseException:
            self.close()
            raise
        self.switch, *self.namespaces = names
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _answer(self) -> list[str]:
        line = self._keeper.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process that keeps the namespaces has ended"}
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["names"]

    def set_rate(self, bandwidth_bps: float, **latency: float) -> None:
        """Changes the rate, and the latency if the network was made with any. Connections stay open."""
        self.shape = replace(self.shape, bandwidth_bps=bandwidth_bps, **latency)
        self._keeper.stdin.write(f"{json.dumps(asdict(self.shape))}\n")
        self._keeper.stdin.flush()
        self._answer()

    def packet_s(self) -> float:
        """Seconds that an empty packet takes from the first device to the last: the median of `TIMED_PACKETS`."""

        def endpoint() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.bind(("", 0))
            made.settimeout(10 + 2 * self.shape.delay_s)
            return made

        seconds = []
        with inside(self.namespaces[0], endpoint) as here, inside(self.namespaces[-1], endpoint) as there:
            target = self.addresses[-1], there.getsockname()[1]
            for _ in range(TIMED_PACKETS + 1):  # the first one also resolves addresses
                start = time.perf_counter()
                here.sendto(b"", target)
                there.recv(1)
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def close(self) -> None:
        """Removes the namespaces; safe to call twice."""
        if self._keeper:
            with contextlib.suppress(BrokenPipeError):
                self._keeper.stdin.close()
            self._keeper.wait(timeout=30)
            self._keeper.stdout.close()
            self._keeper = None


def _build(switch: str, devices: Sequence[str], shape: Shape) -> Switch | None:
    """Makes the namespaces: a bridge in `switch`, and one interface in each of `devices`, joined by a cable.

    Returns the switch that has to run instead of the bridge, or None.
    """
    from pyroute2 import NetNS, netns

    for name in (switch, *devices):
        netns.create(name)
    ports = [f"port{i}" for i in range(len(devices))]
    with NetNS(switch) as space:
        for port, name in zip(ports, devices, strict=True):
            space.link("add", ifname=port, kind="veth", peer={"ifname": INTERFACE, "net_ns_fd": name})
            space.link("set", index=_index(space, port), state="up")
        if shape.is_plain:
            space.link("add", ifname="br0", kind="bridge")
            bridge = _index(space, "br0")
            space.link("set", index=bridge, state="up")
            for port in ports:
                space.link("set", index=_index(space, port), master=bridge)
    for i, name in enumerate(devices):
        with NetNS(name) as space:
            interface = _index(space, INTERFACE)
            space.addr("add", index=interface, address=f"{SUBNET}.{i + 1}", prefixlen=24)
            space.link("set", index=interface, state="up")
            space.link("set", index=_index(space, "lo"), state="up")
    _set_shape(switch, devices, shape)
    if shape.is_plain:
        return None
    for name in devices:
        inside(name, lambda: set_checksums(INTERFACE, on=True))
    return inside(switch, lambda: Switch(ports, shape, QUEUE_BYTES))


def _set_shape(switch: str, devices: Sequence[str], shape: Shape) -> None:
    """Shapes both ends of every cable."""
    from pyroute2 import NetNS

    ends = {switch: [(f"port{i}", i) for i in range(len(devices))]}
    ends |= {name: [(INTERFACE, i)] for i, name in enumerate(devices)}
    for namespace, interfaces in ends.items():
        with NetNS(namespace) as space:
            for interface, i in interfaces:
                share = shape.shares[i] if shape.shares else 1.0
                bucket = {"rate": int(share * shape.bandwidth_bps / 8), "burst": BURST_BYTES, "limit": QUEUE_BYTES}
                space.tc("replace", kind="tbf", index=_index(space, interface), handle="2:", **bucket)


def _keep(num_devices: int, shape: Shape) -> None:
    """The keeper: builds, reads a new shape from each line until its input closes, then removes everything."""
    from pyroute2 import netns

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes our input
    remove_stale_namespaces()
    prefix = f"{PREFIX}{os.getpid()}"
    switch, devices = f"{prefix}-sw", [f"{prefix}-d{i}" for i in range(num_devices)]
    try:
        in_user_space = _build(switch, devices, shape)
        if in_user_space:
            threading.Thread(target=in_user_space.run, daemon=True).start()
        print(json.dumps({"names": [switch, *devices]}), flush=True)
        for line in sys.stdin:
            shape = Shape(**json.loads(line))
            _set_shape(switch, devices, shape)
            if in_user_space:
                in_user_space.medium = shape
            print(json.dumps({"names": []}), flush=True)
    except Exception as error:  # NetlinkError, PermissionError, a missing module: the parent reports it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    finally:
        for name in (*devices, switch):
            if Path("/var/run/netns", name).exists():
                with contextlib.suppress(OSError):
                    netns.remove(name)


def _index(space, name: str) -> int:
    """Index of interface `name` in a namespace; a new interface can take a moment to appear."""
    for _ in range(40):
        found = space.link_lookup(ifname=name)
        if found:
            return found[0]
        time.sleep(0.05)
    raise OSError(f"network interface {name} did not appear: the kernel refused it, or something removed it.")


def remove_stale_namespaces() -> None:
    """Removes namespaces of earlier runs whose process no longer exists."""
    from pyroute2 import netns

    for path in Path("/var/run/netns").glob(f"{PREFIX}*"):
        match = re.match(rf"{PREFIX}(\d+)-", path.name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(OSError):
                netns.remove(path.name)


if __name__ == "__main__":
    _keep(int(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
