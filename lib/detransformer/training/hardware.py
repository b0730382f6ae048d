"""The fastest settings for training on this hardware: number format, attention kernel.

On an x86 core with AVX-512 BF16 (AMD Zen 4 or later), bfloat16 matrix products run faster than float32 ones, but
PyTorch's fused attention takes half of a bfloat16 training step in its backward pass.
"""

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from detransformer.settings import group_sizes


def resolve_precision(precision: str) -> str:
    """`precision`, or for `"auto"` the fastest format that trains safely here.

    On a GPU with bfloat16: `"bf16"`. On a CPU whose instructions multiply bfloat16 (AVX-512 BF16 or AMX):
    `"bf16-weights"`. Else `"no"`, float32.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-weights" if fast else "no"


def place(model: nn.Module, precision: str) -> None:
    """Moves `model` to this process's device, with the attention that is fastest there.

    That is plain products and softmax for bfloat16 training on a CPU, and PyTorch's fused attention elsewhere.

    Raises:
        ValueError: if environment variables make it one of several processes, which accelerate would wait for.
    """
    if sizes := group_sizes():
        raise ValueError(
            f"{sizes} is set, and a training run is one process: unset it, and start one without a launcher."
        )
    device = PartialState().device
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager" if precision == "bf16-weights" and device.type == "cpu" else "sdpa")
    model.to(device)
