"""Peak memory of this process, by the kernel (Linux): what a device would need beside its interpreter."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # mallopt(3)


def free_unused() -> None:
    """Gives memory that nothing refers to back to the kernel, as far as the allocator can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int | None:
    """This process's resident memory; None where the system does not tell."""
    return _status_bytes("VmRSS")


def restart_peak() -> None:
    """Lets the peak count from now on; no effect where the kernel does not offer it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark (proc(5))


def peak_bytes() -> int | None:
    """Largest resident size since `restart_peak`; None where the kernel does not tell."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


@contextlib.contextmanager
def large_blocks_apart(num_bytes: int = 2**17) -> Iterator[None]:
    """Within, what is allocated from `num_bytes` on lies by itself, and goes back to the kernel once it is freed.

    Left alone, glibc raises that limit to 32 MB by and by, and what is freed between things that stay remains a hole.
    Outside, the limit is 32 MB at once: activations are used again rather than mapped anew for each layer.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        yield
        return
    set_option(_M_MMAP_THRESHOLD, num_bytes)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, 2**25)
