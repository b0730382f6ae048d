"""How work is split over devices: pure functions from totals and speeds to sizes, and from sizes to ranges."""

from collections.abc import Sequence


def split(total: int, speeds: Sequence[float]) -> list[int]:
    """Splits `total` indivisible units in proportion to `speeds` (largest remainder; ties go to the first device).

    `split(128, [1, 1, 1])` is `[43, 43, 42]`; `split(12, [1, 1, 2, 4])` is `[2, 1, 3, 6]`.

    Raises:
        ValueError: if there is no device, or a speed is not positive.
    """
    if not speeds or min(speeds) <= 0:
        raise ValueError(f"speeds={list(speeds)}: at least one device is needed, and every speed must be above 0.")
    shares = [total * speed / sum(speeds) for speed in speeds]
    sizes = [int(share) for share in shares]
    by_remainder = sorted(range(len(speeds)), key=lambda i: sizes[i] - shares[i])
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes


def bounds(sizes: Sequence[int], rank: int) -> tuple[int, int]:
    """Start and stop of device `rank`'s part: `bounds([3, 2, 2], 1)` is `(3, 5)`."""
    start = sum(sizes[:rank])
    return start, start + sizes[rank]
