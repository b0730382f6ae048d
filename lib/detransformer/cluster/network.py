"""An emulated network of devices on one Linux machine: namespaces on a bridge, links shaped by the kernel.

Each device is a network namespace with one interface; its cable ends at a bridge in a separate namespace. A token
bucket (tbf) shapes both ends of the cable, so a device sends and receives at most at the link's rate, as on a
full-duplex switch port. Latency and jitter are netem's, where the kernel has it: it delays a device's packets before
they reach the bucket. Nothing touches the host's own interfaces.

The namespaces belong to a small keeper process (this module run with `-m`), which removes them when its input closes,
also when the process that asked for them was killed. Names start with `dtf<pid of the keeper>`; the leftovers of a
killed keeper are removed at the next start.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
PREFIX = "dtf"
INTERFACE = "eth0"
SUBNET = "10.77.0"
BURST_BYTES = 10_000  # a few MTU: with a 32 kB bucket small messages exceed the line rate
QUEUE_BYTES = 4_000_000  # deep enough that an all_to_all's incast is delayed, not dropped
DELAYED_PACKETS = 10_000  # netem's queue, longer than fits in QUEUE_BYTES
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
    """Whether this machine permits namespaces and shaped links, by trying, and the reason."""
    try:
        with EmulatedNetwork(2, 100e6) as network:
            network.set_rate(200e6)
    except OSError as error:
        return False, f"network namespaces or tbf are not permitted here ({error})"
    return True, "network namespaces, veth, bridge and tbf work"


@functools.cache
def can_delay() -> tuple[bool, str]:
    """Whether this kernel can add latency to links (netem), by trying, and the reason."""
    permitted, why = can_emulate()
    if not permitted:
        return False, why
    try:
        with EmulatedNetwork(2, 100e6, delay_s=0.001, jitter_s=0.0001):
            return True, "netem adds latency and jitter"
    except OSError as error:
        return False, f"this kernel has no netem queueing discipline ({error})"


class EmulatedNetwork:
    """`num_devices` namespaces on one switch, every link `bandwidth_bps` in both directions. A context manager.

    `namespaces` and `switch`, the bridge's, are known once entered; `addresses` before.

    Args:
        delay_s: one way, between any two devices; needs netem.
        jitter_s: largest deviation of a packet's delay, which can reorder packets; needs netem.
        shares: each link's part of the rate, one a device; empty: all have the whole of it.

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
        self.shape = Shape(bandwidth_bps, delay_s, jitter_s, shares)
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
        answer = json.loads(line) if line else {"error": "the process that keeps the namespaces ended"}
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["names"]

    def set_rate(self, bandwidth_bps: float, delay_s: float = 0.0, jitter_s: float = 0.0) -> None:
        """Changes the rate, and the latency of a network that was made with a delay. Connections stay open."""
        self.shape = replace(self.shape, bandwidth_bps=bandwidth_bps, delay_s=delay_s, jitter_s=jitter_s)
        self._keeper.stdin.write(f"{json.dumps(asdict(self.shape))}\n")
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
    """The links' rate and latency; `shares` as in `EmulatedNetwork`."""

    bandwidth_bps: float
    delay_s: float = 0.0
    jitter_s: float = 0.0
    shares: Sequence[float] = ()

    def of(self, device: int) -> "Shape":
        """The shape of one device's link."""
        share = self.shares[device] if self.shares else 1.0
        return replace(self, bandwidth_bps=share * self.bandwidth_bps, shares=())


def _build(switch: str, devices: Sequence[str], shape: Shape) -> None:
    """Makes the namespaces: a bridge in `switch`, and one interface in each of `devices`, joined by a cable."""
    from pyroute2 import NetNS, netns

    for name in (switch, *devices):
        netns.create(name)
    with NetNS(switch) as space:
        space.link("add", ifname="br0", kind="bridge")
        bridge = _index(space, "br0")
        space.link("set", index=bridge, state="up")
        for i, name in enumerate(devices):
            space.link("add", ifname=f"port{i}", kind="veth", peer={"ifname": INTERFACE, "net_ns_fd": name})
            space.link("set", index=_index(space, f"port{i}"), master=bridge, state="up")
    for i, name in enumerate(devices):
        with NetNS(name) as space:
            interface = _index(space, INTERFACE)
            space.addr("add", index=interface, address=f"{SUBNET}.{i + 1}", prefixlen=24)
            space.link("set", index=interface, state="up")
            space.link("set", index=_index(space, "lo"), state="up")
    _set_shape("add", switch, devices, shape)


def _set_shape(action: str, switch: str, devices: Sequence[str], shape: Shape) -> None:
    """Shapes both ends of every cable (`action` add or change).

    Only the device's end delays, so that the delay counts once on the way from any device to any other.
    """
    from pyroute2 import NetNS

    delayed = shape.delay_s > 0 or shape.jitter_s > 0
    ends = {switch: [(f"port{i}", i, False) for i in range(len(devices))]}
    ends |= {name: [(INTERFACE, i, delayed)] for i, name in enumerate(devices)}
    for namespace, interfaces in ends.items():
        with NetNS(namespace) as space:
            for interface, i, delays in interfaces:
                index = _index(space, interface)
                for discipline in disciplines(shape.of(i), delays):
                    space.tc(action, index=index, **discipline)


def disciplines(shape: Shape, delayed: bool) -> list[dict]:
    """The queueing disciplines of one interface, outermost first, as arguments of pyroute2's `tc`.

    A token bucket alone, or netem with the token bucket in it: packets are delayed, then sent at the rate.
    """
    rate = int(shape.bandwidth_bps / 8)  # bytes per second
    bucket = {"kind": "tbf", "handle": "2:", "rate": rate, "burst": BURST_BYTES, "limit": QUEUE_BYTES}
    if not delayed:
        return [bucket]
    microseconds = {"delay": round(shape.delay_s * 1e6), "jitter": round(shape.jitter_s * 1e6)}
    return [{"kind": "netem", "handle": "1:", "limit": DELAYED_PACKETS, **microseconds}, bucket | {"parent": "1:1"}]


def _keep(num_devices: int, shape: Shape) -> None:
    """The keeper: builds, then reads a new shape a line until its input closes, then removes everything."""
    from pyroute2 import netns

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes our input
    remove_stale_namespaces()
    prefix = f"{PREFIX}{os.getpid()}"
    switch, devices = f"{prefix}-sw", [f"{prefix}-d{i}" for i in range(num_devices)]
    try:
        _build(switch, devices, shape)
        print(json.dumps({"names": [switch, *devices]}), flush=True)
        for line in sys.stdin:
            _set_shape("change", switch, devices, Shape(**json.loads(line)))
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
    _keep(int(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
