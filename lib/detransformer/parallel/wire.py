"""Number formats of messages, and which collective of a plan takes which: words and sizes, no torch.

`float32` means as computed; `bfloat16` rounds; `int8` has one scale a row. `parallel.codec` writes and reads them.
"""

import math
from collections.abc import Sequence
from functools import cache

WIRE_FORMATS = ("float32", "bfloat16", "int8")
# What a collective carries: X out of shard(hidden) and out of shard(seq); K and V; Q, K and V; the attention's output;
# partial sums; a pipeline's X. The few numbers that travel for [CLS] alone stay as computed.
ROLES = ("hidden", "tokens", "kv", "qkv", "context", "sum", "stage")
_ALIGNMENT = 8  # bytes, so that every message can be viewed as any dtype


@cache
def _parse(spec: str) -> dict[str, str]:
    """`"int8,qkv=bfloat16,3.sum=float32"` -> {"": "int8", "qkv": "bfloat16", "3.sum": "float32"}."""
    default, *overrides = spec.split(",")
    formats = {"": default}
    for override in overrides:
        place, _, number_format = override.partition("=")
        layer, dot, role = place.rpartition(".")
        if role not in ROLES or (dot and not layer.isdecimal()):
            raise ValueError(
                f"wire {spec!r}: {place!r} is no collective; give one of {', '.join(ROLES)}, or LAYER.NAME."
            )
        formats[place] = number_format
    for number_format in formats.values():
        if number_format not in WIRE_FORMATS:
            raise ValueError(f"wire {spec!r}: {number_format!r} is unknown; choose one of {', '.join(WIRE_FORMATS)}.")
    return formats


def check_spec(spec: str) -> None:
    """Raises ValueError unless `spec` is a format, or a format and exceptions (`float32,qkv=int8,11.sum=int8`)."""
    _parse(spec)


def format_of(spec: str, layer: int, role: str) -> str:
    """The format that `spec` gives the collective `role` of `layer`: the most particular entry counts."""
    formats = _parse(spec)
    return formats.get(f"{layer}.{role}") or formats.get(role) or formats[""]


def message_bytes(shape: Sequence[int], number_format: str, itemsize: int = 4) -> int:
    """Bytes of a message that carries a tensor of `shape` [..., n] whose computed numbers have `itemsize` bytes."""
    numbers, rows = math.prod(shape), math.prod(shape[:-1])
    num_bytes = {"float32": itemsize * numbers, "bfloat16": 2 * numbers, "int8": 4 * rows + numbers}[number_format]
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
