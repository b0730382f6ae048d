"""The decoupled layer of GPT-2: the decoder's counterpart of `decoupled_encoders` (TPDS 2025).

A decoupled layer is a pre-norm layer on each slice of the hidden axis: for slice p, x + Attention_p(LayerNorm_p(x)),
then x + FFN_p(LayerNorm_p(x)), causal. Its cache holds, for each head, the keys (and the values) of all sub-blocks side
by side: [B, H, T, P*s]. Parameter names are GPT-2's, with a leading sub-block axis.

Shapes: B batch, T tokens, D hidden size, P = Ndiv sub-blocks, d = D/P slice, A attention width of a sub-block (D, or d
if narrow), H heads, s = A/H head size, I intermediate size.
"""

import torch
from torch import nn
from transformers import Cache, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, eager_attention_forward

from detransformer.models.stacked import BatchedConv1D, DecoupledLayer, DecoupledModel, attend_in_slices


class DecoupledGPT2Attention(GPT2Attention):
    """Causal self-attention of P sub-blocks: Q, K, V are Linear(d -> A) packed in one, all heads in each sub-block."""

    def __init__(self, config: PretrainedConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        blocks, width, attention_width = config.num_divisions, config.slice_width, config.slice_attention_width
        self.num_heads = config.num_attention_heads
        self.head_dim = attention_width // self.num_heads
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.reorder_and_upcast_attn = config.reorder_and_upcast_attn
        self.c_attn = BatchedConv1D(blocks, width, 3 * attention_width)
        self.c_proj = BatchedConv1D(blocks, attention_width, width)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.is_causal = True  # read by the attention functions of transformers

    def forward(
        self,
        x: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        batch_size: int,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [P, B*T, d] -> ([P, B*T, d], attention weights [B, H, T, T_all], the mean over sub-blocks, or None)."""
        blocks = len(x)
        packed = self.c_attn(x).view(blocks, batch_size, -1, 3, self.num_heads, self.head_dim)
        query = packed[:, :, :, 0].transpose(2, 3)  # [P, B, H, T, s]
        # `generate` reorders, cuts and repeats caches of the configuration's heads, so sub-blocks widen each head.
        key, value = packed[:, :, :, 1:].permute(3, 1, 4, 2, 0, 5).flatten(-2)  # [B, H, T, P*s] each
        if past_key_values is not None:
            _check_width(past_key_values, self.layer_idx, key.shape[-1])
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        if name == "eager" and self.reorder_and_upcast_attn:
            attend = _upcast_attention
        context, weights = attend_in_slices(
            attend,
            self,
            query,
            key.unflatten(-1, (blocks, -1)).movedim(-2, 0),  # [P, B, H, T_all, s]
            value.unflatten(-1, (blocks, -1)).movedim(-2, 0),
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.resid_dropout(self.c_proj(context)), weights


def _check_width(cache: Cache, layer_idx: int, width: int) -> None:
    """Raises ValueError if `cache` came with keys [B, H, T, s] of another width, as those of prefix tuning."""
    held = cache.layers[layer_idx].keys if layer_idx < len(cache.layers) else None
    if held is not None and held.ndim == 4 and held.shape[-1] != width:
        raise ValueError(
            f"past_key_values holds keys of width {held.shape[-1]} a head for layer {layer_idx}, and a decoupled layer "
            f"keeps {width}, those of all sub-blocks: prefix tuning needs attention_width='narrow'."
        )


def _upcast_attention(module: GPT2Attention, query, key, value, attention_mask, **kwargs):
    """GPT-2's attention in float32 (`reorder_and_upcast_attn`), with the arguments of the other attention functions."""
    return module._upcast_and_reordered_attn(query, key, value, attention_mask)


class DecoupledGPT2Block(DecoupledLayer, GPT2Block):
    """One decoupled layer: P pre-norm sub-blocks, each over its own slice of the hidden axis."""

    def __init__(self, config: PretrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attn = DecoupledGPT2Attention(config, layer_idx)


class DecoupledGPT2(DecoupledModel):
    """Mixin of decoupled GPT-2s, in place of `DecoupledModel`."""

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: decoupled GPT-2 has no continuous batching."""
        raise ValueError(
            "continuous batching (generate_batch) keeps the keys of one attention a layer, and a decoupled layer has "
            f"num_divisions={self.config.num_divisions}: call generate on padded prompts, or `detransformer serve`."
        )
