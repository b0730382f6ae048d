"""Number formats of messages: words and sizes, no torch.

`float32` means as computed; `bfloat16` rounds; `int8` has one scale a row. `parallel.comm` writes and reads them.
"""

import math
from collections.abc import Sequence

WIRE_FORMATS = ("float32", "bfloat16", "int8")
_ALIGNMENT = 8  # bytes, so that every message can be viewed as any dtype


def check_wire(wire: str) -> None:
    """Raises ValueError unless `wire` is one of `WIRE_FORMATS`."""
    if wire not in WIRE_FORMATS:
        raise ValueError(f"wire {wire!r} is unknown: choose one of {', '.join(WIRE_FORMATS)}.")


def message_bytes(shape: Sequence[int], wire: str, itemsize: int = 4) -> int:
    """Bytes of a message that carries a tensor of `shape` [..., n] whose computed numbers have `itemsize` bytes."""
    numbers, rows = math.prod(shape), math.prod(shape[:-1])
    num_bytes = {"float32": itemsize * numbers, "bfloat16": 2 * numbers, "int8": 4 * rows + numbers}[wire]
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
