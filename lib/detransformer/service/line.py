"""Messages between the front and the leading worker: a JSON header and tensors as safetensors, over a Unix socket."""

import contextlib
import json
import selectors
import socket
import struct
from collections.abc import Mapping

import torch
from safetensors.torch import load, save

HEAD = struct.Struct("!IQ")  # lengths of header and tensors
MAX_HEADER_BYTES, MAX_TENSOR_BYTES = 2**20, 2**30


class Line:
    """One end of a connected socket."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def send(self, header: Mapping, tensors: Mapping[str, torch.Tensor] | bytes = b"") -> None:
        """
        Raises:
            OSError: when the other end has gone.
        """
        words = json.dumps(header).encode()
        payload = tensors if isinstance(tensors, bytes) else save(dict(tensors))
        self.socket.sendall(HEAD.pack(len(words), len(payload)) + words + payload)

    def waits(self, timeout_s: float) -> bool:
        """Whether something has come, or the other end has closed, within `timeout_s`."""
        return bool(self._selector.select(timeout_s))

    def receive(self) -> tuple[dict, bytes]:
        """The next header and, unread, its tensors (`tensors_of`).

        Raises:
            ConnectionError: when the other end has closed, or what came is no message.
        """
        length, size = HEAD.unpack(self._exactly(HEAD.size))
        if length > MAX_HEADER_BYTES or size > MAX_TENSOR_BYTES:
            raise ConnectionError(f"a message of {length} and {size} bytes is too long")
        return json.loads(self._exactly(length)), self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.socket.recv(min(size - len(data), 2**20))
            if not part:
                raise ConnectionError("the other end has closed")
            data += part
        return bytes(data)

    def close(self) -> None:
        self._selector.close()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def tensors_of(payload: bytes) -> dict[str, torch.Tensor]:
    return load(payload) if payload else {}
