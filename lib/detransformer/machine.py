"""The machine: processor, cores, GPUs, the time, and this process's memory as the kernel counts it.

Linux with glibc, as torch's builds need it.
"""

import contextlib
import ctypes
import gc
import os
import platform
import re
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)
_PR_SET_PDEATHSIG = 1  # prctl(2)


def now() -> str:
    """The UTC time to the second, as in manifests."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo has it (x86 `model name`, ARM boards `Model`), else the architecture."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """GPUs as nvidia-smi lists them; empty without one. (Asking torch would cost its import.)"""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):  # not there, or without a driver
        return []


def usable_cores() -> int:
    """The number of cores that this process may use, which a container or `taskset` can limit."""
    return len(os.sched_getaffinity(0))


def hardware() -> dict:
    """Processor, cores, memory in bytes, system and GPUs, without the host's name."""
    import psutil  # late: a worker on a board does not need it

    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "kernel": platform.release(),
        "gpus": gpu_names(),
    }


def free_unused() -> None:
    """Returns unused memory to the kernel, as far as the allocator can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int | None:
    """This process's resident memory; None if the kernel does not report it."""
    return _status_bytes("VmRSS")


def restart_peak() -> None:
    """Restarts the count of `peak_bytes`; no effect if the kernel does not offer it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark (proc(5))


def peak_bytes() -> int | None:
    """Largest resident size since `restart_peak`; None if the kernel does not report it."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """In this block, allocations of 128 KiB or more are mapped separately and return to the kernel when freed.

    By default glibc gradually raises this threshold to 32 MB, and memory freed between live objects remains a hole.
    After the block the threshold is 32 MB: activations are reused rather than mapped anew for each layer.
    """
    set_option = ctypes.CDLL(None).mallopt
    set_option(_M_MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, 2**25)


def keep_freed_memory() -> None:
    """Lets the allocator keep memory that a training step has freed: asking for it again in the next costs time."""
    set_option = ctypes.CDLL(None).mallopt
    set_option(_M_MMAP_THRESHOLD, 2**25)
    set_option(_M_TRIM_THRESHOLD, 2**31 - 1)
    set_option(_M_TOP_PAD, 2**26)


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
