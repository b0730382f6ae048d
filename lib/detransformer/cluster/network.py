"""An emulated network of devices on one Linux machine: namespaces on a bridge, links shaped by the kernel.

Each device is a network namespace with one interface; its cable ends at a bridge in a namespace of its own. A token
bucket (tbf) stands at both ends of the cable, so a device sends and receives at most at the link's rate, as on a
full-duplex switch port. Latency and jitter are netem's, where the kernel has it: what a device sends is held back
before it reaches the bucket. Nothing touches the host's own interfaces.

The namespaces belong to a small keeper process (this module run with `-m`), which removes them when its input closes:
also when the process that asked for them was killed. Names start with `dtf<pid of the keeper>`; should a keeper itself
have been killed, its leftovers are removed at the next start.
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from detransformer.typed_json import from_json

Result = TypeVar("Result")
PREFIX = "dtf"
INTERFACE = "eth0"
SUBNET = "10.77.0"
BURST_BYTES = 10_000  # a few MTU: small messages must not pass above the line rate (a 32 kB bucket lets them)
QUEUE_BYTES = 4_000_000  # deep enough that an all_to_all's incast is delayed, not dropped
DELAYED_PACKETS = 10_000  # what netem may hold back: more than fits in QUEUE_BYTES
_CLONE_NEWNET = 0x40000000


def enter_namespace(name: str) -> None:
    """Moves the calling thread (at start-up: the process) into the network namespace `name`."""
    with open(f"/var/run/netns/{name}") as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter network namespace {name}: {os.strerror(error)}")


def inside(namespace: str, action: Callable[[], Result]) -> Result:
    """What `action` returns in the network namespace `namespace`, or raises there; it runs in a thread of its own."""

    def enter() -> Result:
        enter_namespace(namespace)  # of this thread alone
        return action()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter).result()


@functools.cache
def can_emulate() -> tuple[bool, str]:
    """Whether this machine lets us make namespaces and shaped links, by trying, and why not."""
    try:
        with EmulatedNetwork(2, 100e6) as network:
            network.set_rate(200e6)
    except OSError as error:
        return False, f"network namespaces or tbf are not permitted here ({error})"
    return True, "network namespaces, veth, bridge and tbf work"


@functools.cache
def can_delay() -> tuple[bool, str]:
    """Whether this kernel can add latency to links (netem), by trying, and why not."""
    permitted, why = can_emulate()
    if not permitted:
        return False, why
    try:
        with EmulatedNetwork(2, 100e6, delay_s=0.001, jitter_s=0.0001):
            pass
    except OSError as error:
        return False, f"this kernel has no netem queueing discipline ({error})"
    return True, "netem adds latency and jitter"


class EmulatedNetwork:
    """`num_devices` namespaces on one switch, every link `bandwidth_bps` in both directions. A context manager.

    `shares` are the links' parts of that rate, one a device; empty: all have all of it.
    `delay_s` (one way, between any two devices) and `jitter_s` (how far a packet's delay may lie from it,
    which can reorder packets) want netem. `namespaces`, `addresses` and `switch` are known once entered.

    Raises:
        OSError: on entering, where the kernel does not permit it, with the reason.
    """

    def __init__(
        self,
        num_devices: int,
        bandwidth_bps: float,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        shares: Sequence[float] = (),
    ):
        self.num_devices = num_devices
        self.shape = Shape(bandwidth_bps, delay_s, jitter_s, tuple(shares))
        self.addresses = [f"{SUBNET}.{i + 1}" for i in range(num_devices)]
        self.namespaces: list[str] = []
        self.switch = ""
        self._keeper: subprocess.Popen | None = None

    def __enter__(self) -> "EmulatedNetwork":
        command = [sys.executable, "-m", "detransformer.cluster.network", str(self.num_devices), self.shape.to_line()]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # A session of its own: a kernel is killed with its whole process group, and the keeper must outlive it.
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
        answer = json.loads(line) if line else {"error": "the process that keeps the namespaces ended"}
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["names"]

    def set_rate(self, bandwidth_bps: float, delay_s: float = 0.0, jitter_s: float = 0.0) -> None:
        """Changes the rate, of which every link keeps its share, and, on a network made with a delay, its latency.

        Connections stay open.
        """
        self.shape = Shape(bandwidth_bps, delay_s, jitter_s, self.shape.shares)
        self._keeper.stdin.write(f"{self.shape.to_line()}\n")
        self._keeper.stdin.flush()
        self._answer()

    def close(self) -> None:
        """Removes the namespaces; safe to call twice."""
        if self._keeper:
            with contextlib.suppress(BrokenPipeError):
                self._keeper.stdin.close()
            self._keeper.wait(timeout=30)
            self._keeper.stdout.close()
            self._keeper = None


@dataclass(frozen=True)
class Shape:
    """What links are set to; `shares` as in `EmulatedNetwork`."""

    bandwidth_bps: float
    delay_s: float = 0.0
    jitter_s: float = 0.0
    shares: tuple[float, ...] = ()

    def of(self, device: int) -> "Shape":
        """That of one device's link."""
        share = self.shares[device] if self.shares else 1.0
        return Shape(share * self.bandwidth_bps, self.delay_s, self.jitter_s)

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Shape":
        return from_json(cls, json.loads(line))


class _Namespaces:
    """What the keeper makes, shapes and removes."""

    def __init__(self, num_devices: int):
        prefix = f"{PREFIX}{os.getpid()}"
        self.switch = f"{prefix}-sw"
        self.devices = [f"{prefix}-d{i}" for i in range(num_devices)]

    def build(self, shape: Shape) -> None:
        from pyroute2 import NetNS, netns

        netns.create(self.switch)
        for name in self.devices:
            netns.create(name)
        with NetNS(self.switch) as switch:
            switch.link("add", ifname="br0", kind="bridge")
            bridge = _index(switch, "br0")
            switch.link("set", index=bridge, state="up")
            for i, name in enumerate(self.devices):
                switch.link("add", ifname=f"port{i}", kind="veth", peer={"ifname": INTERFACE, "net_ns_fd": name})
                switch.link("set", index=_index(switch, f"port{i}"), master=bridge, state="up")
        for i, name in enumerate(self.devices):
            with NetNS(name) as device:
                interface = _index(device, INTERFACE)
                device.addr("add", index=interface, address=f"{SUBNET}.{i + 1}", prefixlen=24)
                device.link("set", index=interface, state="up")
                device.link("set", index=_index(device, "lo"), state="up")
        self.set("add", shape)

    def set(self, action: str, shape: Shape) -> None:
        """Shapes both ends of every cable, or changes how they are (`add`, `change`).

        A delay stands at the device's end only: then it is that of the way from any device to any other.
        """
        from pyroute2 import NetNS

        delayed = shape.delay_s > 0 or shape.jitter_s > 0
        with NetNS(self.switch) as space:
            for i in range(len(self.devices)):
                self._set(space, action, f"port{i}", shape.of(i), delayed=False)
        for i, name in enumerate(self.devices):
            with NetNS(name) as space:
                self._set(space, action, INTERFACE, shape.of(i), delayed)

    @staticmethod
    def _set(space, action: str, interface: str, shape: Shape, delayed: bool) -> None:
        index = _index(space, interface)
        for discipline in disciplines(shape, delayed):
            space.tc(action, index=index, **discipline)

    def remove(self) -> None:
        from pyroute2 import netns

        for name in [*self.devices, self.switch]:
            if Path("/var/run/netns", name).exists():
                with contextlib.suppress(OSError):
                    netns.remove(name)


def disciplines(shape: Shape, delayed: bool) -> list[dict]:
    """The queueing disciplines of one interface, outermost first, as arguments of pyroute2's `tc`.

    Token bucket alone, or netem with the token bucket in it: packets are held back, then sent at the rate.
    """
    bucket = {
        "kind": "tbf",
        "handle": "2:",
        "rate": int(shape.bandwidth_bps / 8),  # bytes per second
        "burst": BURST_BYTES,
        "limit": QUEUE_BYTES,
    }
    if not delayed:
        return [bucket]
    microseconds = {"delay": round(shape.delay_s * 1e6), "jitter": round(shape.jitter_s * 1e6)}
    return [{"kind": "netem", "handle": "1:", "limit": DELAYED_PACKETS, **microseconds}, bucket | {"parent": "1:1"}]


def _keep(num_devices: int, shape: Shape) -> None:
    """The keeper: builds, then takes a new rate a line until its input closes, then removes everything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes our input
    remove_stale_namespaces()
    made = _Namespaces(num_devices)
    try:
        made.build(shape)
        print(json.dumps({"names": [made.switch, *made.devices]}), flush=True)
        for line in sys.stdin:
            made.set("change", Shape.from_line(line))
            print(json.dumps({"names": []}), flush=True)
    except Exception as error:  # NetlinkError, PermissionError, a missing module: the parent says it in its own words
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    finally:
        made.remove()


def _index(space, name: str) -> int:
    """Index of interface `name` in a namespace; a new one can take a moment to be seen."""
    for _ in range(40):
        found = space.link_lookup(ifname=name)
        if found:
            return found[0]
        time.sleep(0.05)
    raise OSError(f"network interface {name} did not appear: the kernel refused it, or something removed it.")


def remove_stale_namespaces() -> list[str]:
    """Removes namespaces of earlier runs whose process no longer exists; returns their names."""
    from pyroute2 import netns

    removed = []
    for path in Path("/var/run/netns").glob(f"{PREFIX}*"):
        match = re.match(rf"{PREFIX}(\d+)-", path.name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(OSError):
                netns.remove(path.name)
                removed.append(path.name)
    return removed


if __name__ == "__main__":
    _keep(int(sys.argv[1]), Shape.from_line(sys.argv[2]))
