"""Conversion of a trained original model to a decoupled one by slicing its weights (DATE 2024, Fig. 4).

Sub-block p takes the weights of Q, K, V and FFN-in that read its input slice, and the weights of both output
projections that write its output slice. Original layers, embeddings, last LayerNorm, pooler and heads are copied.
"""

import re

import torch
from transformers import PretrainedConfig, PreTrainedModel

from detransformer.models.auto import DECOUPLED_CLASS
from detransformer.models.configuration import decoupled_config, layer_kinds
from detransformer.models.stacked import made_from

LAYER_NAME = re.compile(r"(?:^|\.)(?:(?:encoder|transformer)\.layer|h|layers)\.(\d+)\.(.+)$")
QKV = ("attention.self.", *(f"attention.{x}_{kind}." for x in "qkv" for kind in ("lin", "proj")))  # name prefixes
FFN_IN = ("intermediate.", "ffn.lin1.", "mlp.fc1.")
ATTENTION_OUT = ("attention.output.dense.weight", "attention.out_lin.weight", "attention.o_proj.weight")


def decouple(
    model: PreTrainedModel,
    num_original_layers: int = 4,
    num_divisions: int = 4,
    attention_width: str = "full",
    original_placement: str = "last",
) -> PreTrainedModel:
    """A decoupled model with `model`'s head, its weights sliced from `model`'s.

    Args:
        model: an instance of an original class that `auto.DECOUPLED_CLASS` lists.
        num_original_layers: Nb; these layers are copied from `model`.
        num_divisions: Ndiv; must divide the hidden size.
        attention_width: `"full"` (published) or `"narrow"`.
        original_placement: where the original layers stand, see `Decoupling`.

    Raises:
        ValueError: if `model` is of another class, or the sizes do not divide.
    """
    decoupled_class = DECOUPLED_CLASS.get(type(model))
    if decoupled_class is None:
        raise ValueError(
            f"{type(model).__name__} cannot be decoupled: load the checkpoint as one of "
            f"{', '.join(c.__name__ for c in DECOUPLED_CLASS)}."
        )
    config = decoupled_config(model.config, num_original_layers, num_divisions, attention_width, original_placement)
    kwargs = {"add_pooling_layer": model.pooler is not None} if hasattr(model, "pooler") else {}
    return made_from(decoupled_class, config, model, decoupled_state_dict(model.state_dict(), config), **kwargs)


def decoupled_state_dict(state: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """An original's state dict with the decoupled layers' entries sliced, mostly as views, and all others unchanged."""
    kinds = layer_kinds(config)
    sliced = {}
    for name, value in state.items():
        found = LAYER_NAME.search(name)
        if found and kinds[int(found[1])] == "decoupled":
            value = slice_parameter(found[2], value, config)
        sliced[name] = value
    return sliced


def slice_parameter(parameter: str, value: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """One original layer's parameter [...] as the stacked parameter [P, ...] of its decoupled layer.

    `parameter` is the name inside the layer, e.g. `attention.self.query.weight` or `attn.c_attn.weight`.
    """
    if config.model_type == "decoupled_gpt2":
        return _slice_gpt2_parameter(parameter, value, config)
    blocks = config.num_divisions
    narrow = config.attention_width == "narrow"
    is_qkv = parameter.startswith(QKV)
    if is_qkv or parameter.startswith(FFN_IN):  # reads a slice: columns; the bias is whole in each sub-block
        if parameter.endswith("weight"):
            value = value.unflatten(1, (blocks, -1)).transpose(0, 1)  # [out, D] -> [P, out, d]
        else:
            value = value.expand(blocks, -1)
        return _narrow_heads(value, config, dim=1) if is_qkv and narrow else value
    value = value.unflatten(0, (blocks, -1))  # writes a slice: rows, bias and LayerNorm entries [P, d, ...]
    if parameter in ATTENTION_OUT and narrow:
        value = _narrow_heads(value, config, dim=2)
    return value


def _slice_gpt2_parameter(parameter: str, value: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """As `slice_parameter`, for GPT-2: weights are input-major, Q, K and V packed in one."""
    blocks = config.num_divisions
    narrow = config.attention_width == "narrow"
    if parameter.startswith(("attn.c_attn.", "mlp.c_fc.")):  # reads a slice: rows; the bias is whole in each sub-block
        if parameter.endswith("weight"):
            value = value.unflatten(0, (blocks, -1))  # [D, out] -> [P, d, out]
        else:
            value = value.expand(blocks, -1)
        is_qkv = parameter.startswith("attn.")
        return _narrow_heads(value, config, value.ndim - 1, num_maps=3) if is_qkv and narrow else value
    if parameter in ("attn.c_proj.weight", "mlp.c_proj.weight"):  # writes a slice: columns
        value = value.unflatten(1, (blocks, -1)).transpose(0, 1)  # [in, D] -> [P, in, d]
        return _narrow_heads(value, config, dim=1) if parameter.startswith("attn.") and narrow else value
    return value.unflatten(0, (blocks, -1))  # bias and LayerNorm entries [P, d]


def _narrow_heads(stacked: torch.Tensor, config: PretrainedConfig, dim: int, num_maps: int = 1) -> torch.Tensor:
    """Sub-block p keeps the p-th part of every head, of each map packed along `dim`: [P, ..D..] -> [P, ..d..]."""
    blocks, heads = config.num_divisions, num_maps * config.num_attention_heads
    parts = stacked.unflatten(dim, (heads, blocks, -1))  # [P, .., H, P, s/P, ..]
    kept = [parts[p].select(dim, p) for p in range(blocks)]  # the leading axis is gone: P stands at dim
    return torch.stack(kept).flatten(dim, dim + 1)
