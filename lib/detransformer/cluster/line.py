"""The one message framing between processes of a cluster: a JSON header and raw bytes, over a connected socket.

Tensors travel in the bytes as safetensors, so nothing is unpickled. An empty header is a heartbeat. Imports no torch.
"""

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

HEAD = struct.Struct("!IQ")  # bytes of the header and of the payload
STRANGER_BYTES, MEMBER_BYTES = 2**16, 2**30  # limit of a message, before and after its sender is known
BEAT_S = 0.5  # between two heartbeats
SEND_S = 60.0  # limit for sending one message
PEER, DEVICE, REQUEST = "peer", "device", "request"  # who caused an error that a worker reports


class Message(NamedTuple):
    """One received message."""

    header: dict
    payload: bytes


class Line:
    """One end of a connected socket. Any thread may send; one thread receives, when a selector says so."""

    def __init__(self, connection: socket.socket, limit_bytes: int = STRANGER_BYTES):
        connection.settimeout(SEND_S)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.limit_bytes = connection, limit_bytes
        self.heard_at = self._looked_at = time.monotonic()
        self._silent_s = self._sent_at = 0.0
        self._sending = threading.Lock()
        self._pending = bytearray()
        self.unread: list[Message] = []  # messages that arrived together with an awaited one

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, header: Mapping, payload: bytes = b"") -> None:
        """Sends one message.

        Raises:
            OSError: if the other end is closed, or accepted no bytes for a minute.
        """
        with self._sending:
            self._write(header, payload)

    def tell(self, header: Mapping) -> bool:
        """Sends a short message if it need not wait; returns whether it was sent."""
        if not self._sending.acquire(blocking=False):
            return False
        try:
            if not select.select([], [self.socket], [], 0)[1]:
                return False
            self._write(header)
            return True
        except (OSError, ValueError):  # `receive` notices a closed line
            return False
        finally:
            self._sending.release()

    def _write(self, header: Mapping, payload: bytes = b"") -> None:
        words = json.dumps(header).encode()
        self.socket.sendall(HEAD.pack(len(words), len(payload)) + words)
        if payload:
            self.socket.sendall(payload)
        self._sent_at = time.monotonic()

    def beat(self) -> None:
        """Sends a heartbeat, unless another message was sent less than `BEAT_S` ago."""
        if time.monotonic() - self._sent_at >= BEAT_S:
            self.tell({})

    def silent_for(self, limit_s: float) -> bool:
        """Whether the other end has been silent for `limit_s`; to be asked several times a second.

        Between two questions at most `BEAT_S` counts: a process that was itself held up may have missed heartbeats.
        """
        now = time.monotonic()
        self._silent_s += min(now - self._looked_at, BEAT_S)
        self._looked_at = now
        return self._silent_s > limit_s

    def receive(self) -> list[Message] | None:
        """The complete messages without heartbeats; None if the line is closed or the bytes are not messages."""
        try:
            data = self.socket.recv(2**20)
        except OSError:
            return None
        if not data:
            return None
        self.heard_at, self._silent_s = time.monotonic(), 0.0
        self._pending += data
        found = []
        while len(self._pending) >= HEAD.size:
            length, size = HEAD.unpack_from(self._pending)
            if length + size > self.limit_bytes:
                return None
            end = HEAD.size + length
            if len(self._pending) < end + size:
                break
            try:
                header = json.loads(self._pending[HEAD.size : end])
            except ValueError:
                return None
            if not isinstance(header, dict):
                return None
            if header:
                found.append(Message(header, bytes(self._pending[end : end + size])))
            del self._pending[: end + size]
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def connect(address: str, timeout_s: float) -> Line:
    """A line to the front, which listens at `address`: ADDRESS:PORT, or the path of a Unix socket.

    Raises:
        OSError: if nothing listens there.
    """
    if address.startswith("/"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        connection.connect(address)
        return Line(connection, MEMBER_BYTES)
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout_s)
    if connection.getsockname() == connection.getpeername():  # TCP can connect to itself if nobody listens
        connection.close()
        raise ConnectionRefusedError("connection refused")
    return Line(connection, MEMBER_BYTES)


def listen(address: str) -> socket.socket:
    """A socket that listens at `address`, as in `connect`, and nowhere else."""
    if address.startswith("/"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(128)
        return listener
    host, _, port = address.rpartition(":")
    return socket.create_server((host, int(port)), backlog=128)
