"""Conversion of a trained original BERT to a decoupled one by slicing its weights (DATE 2024, Fig. 4).

Sub-block p takes the columns of Q, K, V and FFN-in that read its input slice, and the rows of both output projections
that write its output slice. Original layers, embeddings, pooler and heads are copied.
"""

import torch
from transformers import BertConfig, BertPreTrainedModel
from transformers.initialization import no_init_weights

from detransformer.models.configuration import DecoupledBertConfig, decoupled_config, layer_kinds
from detransformer.models.decoupled_bert import DECOUPLED_CLASS


def decouple(
    model: BertPreTrainedModel,
    num_original_layers: int = 4,
    num_divisions: int = 4,
    attention_width: str = "full",
) -> BertPreTrainedModel:
    """A decoupled model of the same head as `model`, its weights sliced from `model`'s.

    Args:
        model: a `BertModel`, `BertForMaskedLM`, `BertForSequenceClassification` or `BertForQuestionAnswering`.
        num_original_layers: Nb; `model`'s layers at those places are copied.
        num_divisions: Ndiv; must divide the hidden size.
        attention_width: `"full"` (published) or `"narrow"`.

    Raises:
        ValueError: if `model` is not one of the four BERT classes, or the sizes do not divide.
    """
    decoupled_class = DECOUPLED_CLASS.get(type(model))
    if decoupled_class is None:
        raise ValueError(
            f"{type(model).__name__} cannot be decoupled: it is not an original BERT. "
            f"Load the checkpoint as one of {', '.join(c.__name__ for c in DECOUPLED_CLASS)}."
        )
    config = decoupled_config(model.config, num_original_layers, num_divisions, attention_width)
    config._attn_implementation = model.config._attn_implementation
    kwargs = {"add_pooling_layer": model.pooler is not None} if hasattr(model, "pooler") else {}
    with no_init_weights():  # every weight comes from `model`, and drawing 110 M random ones takes seconds
        decoupled = decoupled_class(config, **kwargs)
    decoupled.tie_weights()  # the MLM head's decoder is the word embeddings; drawing weights would have tied them
    decoupled = decoupled.to(next(model.parameters()).dtype)
    decoupled.load_state_dict(decoupled_state_dict(model.state_dict(), config))
    return decoupled.train(model.training)


def decoupled_state_dict(state: dict[str, torch.Tensor], config: DecoupledBertConfig) -> dict[str, torch.Tensor]:
    """Slices the decoupled layers' entries of a BERT state dict; everything else passes through unchanged."""
    kinds = layer_kinds(config)
    sliced = {}
    for name, value in state.items():
        prefix, found, rest = name.partition("encoder.layer.")
        index, _, parameter = rest.partition(".")
        if found and kinds[int(index)] == "decoupled":
            value = slice_parameter(parameter, value, config)
        sliced[name] = value.clone()
    return sliced


def slice_parameter(parameter: str, value: torch.Tensor, config: BertConfig) -> torch.Tensor:
    """One original layer's parameter [...] as the stacked parameter [P, ...] of its decoupled layer.

    `parameter` is the name inside the layer, e.g. `attention.self.query.weight`.
    """
    blocks = config.num_divisions
    narrow = config.attention_width == "narrow"
    is_qkv = parameter.startswith("attention.self.")
    if is_qkv or parameter.startswith("intermediate."):  # reads a slice: columns; the bias is whole in each sub-block
        if parameter.endswith("weight"):
            value = value.unflatten(1, (blocks, -1)).transpose(0, 1)  # [out, D] -> [P, out, d]
        else:
            value = value.expand(blocks, -1)
        return _narrow_heads(value, config, dim=1) if is_qkv and narrow else value
    value = value.unflatten(0, (blocks, -1))  # writes a slice: rows, bias and LayerNorm entries [P, d, ...]
    if parameter == "attention.output.dense.weight" and narrow:
        value = _narrow_heads(value, config, dim=2)
    return value


def _narrow_heads(stacked: torch.Tensor, config: BertConfig, dim: int) -> torch.Tensor:
    """Sub-block p keeps the p-th part of every head along `dim`: [P, ..D..] -> [P, ..d..]."""
    blocks, heads = config.num_divisions, config.num_attention_heads
    parts = stacked.unflatten(dim, (heads, blocks, -1))  # [P, .., H, P, s/P, ..]
    kept = [parts[p].select(dim, p) for p in range(blocks)]  # the leading axis is gone: P stands at dim
    return torch.stack(kept).flatten(dim, dim + 1)
