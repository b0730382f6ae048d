"""An emulated network of devices on one Linux machine: namespaces on a bridge, links shaped by the kernel.

Each device is a network namespace with one interface; its cable ends at a bridge in a namespace of its own. A token
bucket (tbf) stands at both ends of the cable, so a device sends and receives at most at the link's rate, as on a
full-duplex switch port. Nothing touches the host's own interfaces. Names start with `dtf<pid>`; leftovers of runs whose
process is gone are removed at the next start.
"""

import contextlib
import ctypes
import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

PREFIX = "dtf"
INTERFACE = "eth0"
SUBNET = "10.77.0"
BURST_BYTES = 10_000  # a few MTU: small messages must not pass above the line rate (a 32 kB bucket lets them)
QUEUE_BYTES = 4_000_000  # deep enough that an all_to_all's incast is delayed, not dropped
_CLONE_NEWNET = 0x40000000
_names_used = 0


def enter_namespace(name: str) -> None:
    """Moves the calling thread (at start-up: the process) into the network namespace `name`."""
    with open(f"/var/run/netns/{name}") as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter network namespace {name}: {os.strerror(error)}")


@functools.cache
def can_emulate() -> tuple[bool, str]:
    """Whether this machine lets us make namespaces and shaped links, tried in a process of its own, and why not."""
    code = (
        "from detransformer.cluster.network import EmulatedNetwork\n"
        "with EmulatedNetwork(2, 100e6) as n: n.set_rate(200e6)\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False, "making a network namespace took more than 60 s"
    if done.returncode == 0:
        return True, "network namespaces, veth, bridge and tbf work"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return False, f"network namespaces or tbf are not permitted here ({lines[-1] if lines else 'no reason given'})"


class EmulatedNetwork:
    """`num_devices` namespaces on one switch, every link `bandwidth_bps` in both directions. A context manager."""

    def __init__(self, num_devices: int, bandwidth_bps: float):
        global _names_used
        _names_used += 1
        self.num_devices = num_devices
        self.bandwidth_bps = bandwidth_bps
        self._owner = os.getpid()
        self.prefix = f"{PREFIX}{os.getpid()}x{_names_used}"
        self.switch = f"{self.prefix}-sw"
        self.namespaces = [f"{self.prefix}-d{i}" for i in range(num_devices)]
        self.addresses = [f"{SUBNET}.{i + 1}" for i in range(num_devices)]

    def __enter__(self) -> "EmulatedNetwork":
        remove_stale_namespaces()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _build(self) -> None:
        from pyroute2 import NetNS, netns

        netns.create(self.switch)
        for name in self.namespaces:
            netns.create(name)
        with NetNS(self.switch) as switch:
            switch.link("add", ifname="br0", kind="bridge")
            bridge = _index(switch, "br0")
            switch.link("set", index=bridge, state="up")
            for i, name in enumerate(self.namespaces):
                switch.link("add", ifname=f"port{i}", kind="veth", peer={"ifname": INTERFACE, "net_ns_fd": name})
                port = _index(switch, f"port{i}")
                switch.link("set", index=port, master=bridge, state="up")
        for name, address in zip(self.namespaces, self.addresses, strict=True):
            with NetNS(name) as device:
                interface = _index(device, INTERFACE)
                device.addr("add", index=interface, address=address, prefixlen=24)
                device.link("set", index=interface, state="up")
                device.link("set", index=_index(device, "lo"), state="up")
        self._shape("add")

    def set_rate(self, bandwidth_bps: float) -> None:
        """Changes every link's rate, while connections stay open."""
        self.bandwidth_bps = bandwidth_bps
        self._shape("change")

    def _shape(self, action: str) -> None:
        from pyroute2 import NetNS

        ends = [(self.switch, f"port{i}") for i in range(self.num_devices)]
        ends += [(name, INTERFACE) for name in self.namespaces]
        for name, interface in ends:
            with NetNS(name) as space:
                space.tc(
                    action,
                    "tbf",
                    index=_index(space, interface),
                    handle="1:",
                    rate=int(self.bandwidth_bps / 8),  # bytes per second
                    burst=BURST_BYTES,
                    limit=QUEUE_BYTES,
                )

    def close(self) -> None:
        from pyroute2 import netns

        if os.getpid() != self._owner:  # a forked child that unwinds
            return
        for name in [*self.namespaces, self.switch]:
            if Path("/var/run/netns", name).exists():
                with contextlib.suppress(OSError):
                    netns.remove(name)


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
        match = re.match(rf"{PREFIX}(\d+)x\d+-", path.name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(OSError):
                netns.remove(path.name)
                removed.append(path.name)
    return removed
