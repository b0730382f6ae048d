"""Formats of messages: names and sizes, no torch. `parallel.codec` writes and reads them.

Number formats: `float32` sends numbers as computed; `bfloat16` rounds; `int8` has one scale a row, `int4` one for
`GROUP` numbers.

Token formats are for the K and V that `sequence` sends, since a device need not know the others' tokens as well as its
own. All other messages of such a plan are int8. Both are approximations for which their authors train models; here no
model is trained for them.
    means8  the means of `SEGMENT` tokens each, in int8 (Segment Means of Prism, arXiv 2507.12145)
    vq4     a device's mean token in int8, and each token's difference from it, of which every `VECTOR` numbers are
            replaced by one of `CODES` entries of a codebook in the message (vector quantisation as in ASTRA, arXiv
            2505.19342, whose codebooks are trained and fixed)
"""

import math
from collections.abc import Sequence

TOKEN_FORMATS = ("means8", "vq4")
WIRE_FORMATS = ("float32", "bfloat16", "int8", "int4", *TOKEN_FORMATS)  # the most exact first
GROUP = 32
SEGMENT = 8
VECTOR, CODES = 8, 16
_ALIGNMENT = 8  # bytes, so that every message can be viewed as any dtype


def check_wire(wire: str) -> None:
    """Raises ValueError unless `wire` is one of `WIRE_FORMATS`."""
    if wire not in WIRE_FORMATS:
        raise ValueError(f"wire {wire!r} is unknown: choose one of {', '.join(WIRE_FORMATS)}.")


def message_bytes(shape: Sequence[int], wire: str, itemsize: int = 4) -> int:
    """Bytes of a message with a tensor of `shape` [..., n], whose computed numbers have `itemsize` bytes each.

    In a token format the shape is [2, t, B, n], K and V of t tokens.
    """
    numbers, rows = math.prod(shape), math.prod(shape[:-1])
    if not numbers:
        return 0
    match wire:
        case "float32":
            num_bytes = itemsize * numbers
        case "bfloat16":
            num_bytes = 2 * numbers
        case "int8":
            num_bytes = 4 * rows + numbers
        case "int4":
            num_bytes = rows * -(-shape[-1] // GROUP) * (2 + GROUP // 2)
        case "means8":
            num_bytes = message_bytes(means_shape(shape), "int8")
        case "vq4":
            num_bytes = sum(vq_parts(shape))
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def means_shape(shape: Sequence[int], tokens: int = SEGMENT) -> tuple[int, ...]:
    """The shape of the means of K and V [2, t, B, n] over `tokens` tokens each; the last mean may be of fewer."""
    return shape[0], -(-shape[1] // tokens), *shape[2:]


def vq_parts(shape: Sequence[int]) -> tuple[int, int, int]:
    """Bytes of `vq4`'s mean tokens, of its bfloat16 codebooks (one for K, one for V), and of its codes."""
    codes = math.prod(shape[:-1]) * -(-shape[-1] // VECTOR)
    return message_bytes(means_shape(shape, shape[1]), "int8"), shape[0] * CODES * VECTOR * 2, -(-codes // 2)
