"""What the hardware at hand trains fastest with: number format, attention kernel, kept memory.

Measured on one x86 core with AVX-512 BF16 (AMD Zen 4 or later), 12 layers of width 128, 32 sequences of 128 tokens:
bfloat16 matrix products run 2.5 times as fast as float32 ones, PyTorch's fused attention takes half of a bfloat16
training step in its backward pass, and giving freed memory back to the system costs a tenth of a step.
"""

import ctypes
import sys

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from detransformer.settings import launched_processes

AUTOCAST = ("no", "bf16", "fp16")  # what accelerate knows
_KEPT_BYTES = 2**31 - 1
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD = -3, -1, -2  # malloc.h


def resolve_precision(precision: str) -> str:
    """`precision`, or for `"auto"` the fastest that trains safely here.

    On a GPU with bfloat16: `"bf16"`. On a CPU whose instructions multiply bfloat16 (AVX-512 BF16 or AMX):
    `"bf16-weights"`. Else `"no"`, float32.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-weights" if fast else "no"


def autocast_of(precision: str) -> str:
    """The setting of accelerate for a resolved `precision`; bfloat16 weights need no casts."""
    return precision if precision in AUTOCAST else "no"


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate for a resolved `precision`; on a CPU one run over all processes that torchrun or accelerate started.

    Without being told, accelerate would take each of several CPU processes for a run of its own.
    """
    together = launched_processes() > 1 and not torch.cuda.is_available()
    return Accelerator(mixed_precision=autocast_of(precision), cpu=together)


def choose_attention(model: PreTrainedModel, precision: str) -> None:
    """Plain products and softmax where bfloat16 is trained on a CPU, PyTorch's fused attention elsewhere."""
    plain = precision == "bf16-weights" and not torch.cuda.is_available()
    model.set_attn_implementation("eager" if plain else "sdpa")


def keep_freed_memory() -> None:
    """Lets glibc keep what a training step frees for the next one; elsewhere nothing."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc's largest
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, 64 << 20)
