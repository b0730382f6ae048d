"""Stores that processes meet at, listening at the cluster's address alone: torch's own take all addresses of a host."""

import socket
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at `address` alone."""
    return socket.create_server((address, port), backlog=128)


def bound_store(
    address: str, port: int, num_processes: int | None, keeps: bool, timeout: timedelta, **options: bool
) -> TCPStore:
    """A TCPStore whose server, in the process that `keeps` it, listens at `address`; `options` are TCPStore's.

    Port 0: one that is free, which the store then names.

    Raises:
        OSError: where the address or port cannot be had.
        torch.distributed.DistError: where nothing answers there, or not all processes come within `timeout`.
    """
    listener = None
    if keeps:
        found = listen(address, port)
        port, listener = found.getsockname()[1], found.detach()
    return TCPStore(address, port, num_processes, keeps, timeout, master_listen_fd=listener, **options)


class BoundRendezvous(StaticTCPRendezvous):
    """torchrun's static rendezvous; its store listens at the master's address."""

    def next_rendezvous(self) -> RendezvousInfo:
        if not self._store and self.rank == 0:
            where = self.master_addr, self.master_port
            self._store = bound_store(*where, self.world_size, True, self.timeout, multi_tenant=True)
        return super().next_rendezvous()
