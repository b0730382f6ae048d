"""How work is split over devices: pure functions from totals and speeds to sizes, and from sizes to ranges."""

from collections.abc import Sequence
from heapq import heapify, heapreplace


def split(total: int, speeds: Sequence[float]) -> list[int]:
    """Splits `total` indivisible units so that the slowest device takes as little time as possible.

    Sizes are in proportion to `speeds`, rounded down; each remaining unit goes to the device that would finish it
    first (ties: the first device). This is D'Hondt's apportionment, which minimises max(size / speed).
    `split(128, [1, 1, 1])` is `[43, 43, 42]`; `split(12, [1, 1, 2, 4])` is `[1, 1, 3, 7]`.

    Raises:
        ValueError: if there is no device, or a speed is not positive.
    """
    if not speeds or min(speeds) <= 0:
        raise ValueError(f"speeds={list(speeds)}: at least one device is needed, and every speed must be above 0.")
    whole = sum(speeds)
    sizes = [int(total * speed / whole) for speed in speeds]
    waiting = [((size + 1) / speed, i) for i, (size, speed) in enumerate(zip(sizes, speeds, strict=True))]
    heapify(waiting)
    for _ in range(total - sum(sizes)):
        _, i = waiting[0]
        sizes[i] += 1
        heapreplace(waiting, ((sizes[i] + 1) / speeds[i], i))
    return sizes


def bounds(sizes: Sequence[int], rank: int) -> tuple[int, int]:
    """Start and stop of device `rank`'s part: `bounds([3, 2, 2], 1)` is `(3, 5)`."""
    start = sum(sizes[:rank])
    return start, start + sizes[rank]
