"""A switch in user space: for links whose packets are delayed, and for a medium that all devices share.

The kernel's bridge can do neither without netem. This switch takes each frame from the port where it arrived, holds it,
and writes it to the port of its destination, where the kernel's token bucket shapes it as on a bridge. A shared medium
(a hub, Wi-Fi) sends one frame at a time from all senders: all traffic together has the rate. Each frame costs processor
time here, so fast links need a larger time scale, which the self-check finds.
"""

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

MAX_FRAME_BYTES = 2**16
FRAMES_AT_ONCE = 64  # from one port, before others have their turn
BUFFER_BYTES = 16_000_000  # of a port in each direction
# Linux constants that Python's `socket` lacks
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_IGNORE_OUTGOING = 32, 33, 263, 23
_ETH_P_ALL, _SIOCETHTOOL, _ETHTOOL_STXCSUM = 3, 0x8946, 0x17


@dataclass(frozen=True)
class Shape:
    """The rate and delay of an emulated network's links.

    Args:
        bandwidth_bps: of each link, in each direction.
        delay_s: one way, between any two devices.
        jitter_s: largest deviation of a packet's delay, which can reorder packets.
        shares: each link's fraction of the rate, one per device; empty: each has all of it.
        shared: one medium, on which the devices take turns: all their traffic together has the rate.
    """

    bandwidth_bps: float
    delay_s: float = 0.0
    jitter_s: float = 0.0
    shares: Sequence[float] = ()
    shared: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the kernel's bridge suffices."""
        return not (self.delay_s or self.jitter_s or self.shared)


class Switch:
    """Connects network interfaces of the calling thread's namespace until they are removed (`run`).

    Args:
        interfaces: their names; none is on a bridge.
        medium: read anew for each frame; replace the attribute to change it.
        queue_bytes: limit of the queue for a shared medium; more is dropped.
    """

    def __init__(self, interfaces: Sequence[str], medium: Shape, queue_bytes: int):
        self.medium, self.queue_bytes = medium, queue_bytes
        self.ports = [_open(name) for name in interfaces]
        self._port_of: dict[bytes, socket.socket] = {}  # by Ethernet address, learned from senders
        self._held: list[tuple[float, int, socket.socket, bytes]] = []  # (when to send, number, port, frame)
        self._numbers = itertools.count()
        self._free_at = 0.0  # when a shared medium has sent its queue

    def run(self) -> None:
        with contextlib.suppress(OSError):  # on a busy host other processes would delay packets
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # of this thread
        while True:
            now = time.perf_counter()
            while self._held and self._held[0][0] <= now:
                _, _, port, frame = heapq.heappop(self._held)
                with contextlib.suppress(OSError):  # a full queue drops it, as in any switch
                    port.send(frame)
            wait_s = max(0.0, self._held[0][0] - time.perf_counter()) if self._held else None
            for port in select.select(self.ports, [], [], wait_s)[0]:
                try:
                    for _ in range(FRAMES_AT_ONCE):
                        self._take(port.recv(MAX_FRAME_BYTES), port)
                except BlockingIOError:
                    pass
                except OSError:  # the network is down
                    return

    def _take(self, frame: bytes, source: socket.socket) -> None:
        """Holds a frame that has arrived; one to an unknown address goes to all other ports."""
        medium, now = self.medium, time.perf_counter()
        when = now + medium.delay_s + (random.uniform(-1, 1) * medium.jitter_s if medium.jitter_s else 0.0)
        if medium.shared:
            wait_s = max(0.0, self._free_at - now)
            if wait_s * medium.bandwidth_bps > 8 * self.queue_bytes:
                return
            wait_s += 8 * len(frame) / medium.bandwidth_bps
            self._free_at, when = now + wait_s, when + wait_s
        self._port_of[frame[6:12]] = source
        known = self._port_of.get(frame[:6])
        for port in [known] if known else self.ports:
            if port is not source:
                heapq.heappush(self._held, (when, next(self._numbers), port, frame))


def _open(interface: str) -> socket.socket:
    """A socket that reads and writes an interface's frames."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        port.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.bind((interface, _ETH_P_ALL))
    port.setblocking(False)
    return port


def set_checksums(interface: str, on: bool) -> None:
    """Whether the kernel finishes each packet before it leaves `interface`, for a switch that forwards it unchanged.

    Otherwise it marks a packet as needing no checksum and no segmentation by the far end of a cable.
    """
    order = ctypes.create_string_buffer(struct.pack("II", _ETHTOOL_STXCSUM, int(not on)), 8)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, struct.pack("16sP", interface.encode(), ctypes.addressof(order)))
