"""The store at which a process group meets, listening at the cluster's address alone: torch's own takes all."""

from datetime import timedelta

from torch.distributed import TCPStore

from detransformer.cluster.line import listen


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
        found = listen(f"{address}:{port}")
        port, listener = found.getsockname()[1], found.detach()
    return TCPStore(address, port, num_processes, keeps, timeout, master_listen_fd=listener, **options)
