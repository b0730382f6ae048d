"""Conversion of a trained original model to a decoupled one by slicing its weights (DATE 2024, Fig. 4).

Sub-block p takes the weights of Q, K, V and FFN-in that read its input slice, and the weights of both output
projections that write its output slice. Original layers, embeddings, last LayerNorm, pooler and heads are copied.
"""

import re

import torch
from transformers import PretrainedConfig, PreTrainedModel

from detransformer.models.auto import DECOUPLED_CLASS
from detransformer.models.configuration import decoupled_config, layer_kinds
from detransformer.models.naming import naming_of
from detransformer.models.stacked import made_from

LAYER_NAME = re.compile(r"(?:^|\.)(?:(?:encoder|transformer)\.layer|h|layers)\.(\d+)\.(.+)$")


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
    naming, (part, kind) = naming_of(config), parameter.rsplit(".", 1)
    reads_slice = part in (*naming.qkv, naming.ffn_in)
    if reads_slice and kind == "bias":  # whole in each sub-block
        value = value.expand(config.num_divisions, -1)
    else:  # its inputs, or its outputs, which are rows of an output-major weight, and all of a bias or LayerNorm
        axis = int(reads_slice != naming.input_major) if value.ndim == 2 else 0
        value = value.unflatten(axis, (config.num_divisions, -1)).movedim(axis, 0)
    if config.attention_width == "narrow":
        if part in naming.qkv:
            axis = 2 if naming.input_major and kind == "weight" else 1
            value = _narrow_heads(value, config, axis, num_maps=3 // len(naming.qkv))
        elif part == naming.out and kind == "weight":
            value = _narrow_heads(value, config, 1 if naming.input_major else 2)
    return value


def _narrow_heads(stacked: torch.Tensor, config: PretrainedConfig, dim: int, num_maps: int = 1) -> torch.Tensor:
    """Sub-block p keeps the p-th part of every head, of each map packed along `dim`: [P, ..D..] -> [P, ..d..]."""
    blocks, heads = config.num_divisions, num_maps * config.num_attention_heads
    parts = stacked.unflatten(dim, (heads, blocks, -1))  # [P, .., H, P, s/P, ..]
    return parts.diagonal(dim1=0, dim2=dim + 1).movedim(-1, 0).flatten(dim, dim + 1)
