"""The decoupled layers of BERT and its relatives, DistilBERT and ViT (DATE 2024, Section III-B, Eq. 2, Fig. 4b).

RoBERTa, XLM-RoBERTa and CamemBERT have BERT's layer, and so its decoupled layer; a ViT's is pre-norm. Parameter names
are the original's; a decoupled layer's weights carry a leading sub-block axis. `models.auto` makes the models.

Shapes: B batch, T tokens (of a ViT an image's patches and the class token), D hidden size, P = Ndiv sub-blocks,
d = D/P slice, A attention width of a sub-block (D, or d if narrow), H heads.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertLayer, eager_attention_forward
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.vit.modeling_vit import ViTLayer

from detransformer.models.stacked import BatchedLinear, DecoupledLayer, attend_in_slices


class DecoupledSelfAttention(nn.Module):
    """Self-attention of P sub-blocks, all heads in each: Q, K, V are Linear(d -> A).

    Args:
        config: a decoupled model's.
        qkv: the names of the three maps.
        out: the name of the output projection Linear(A -> d), where it belongs to this module.
        dropout: of the attention weights.
    """

    def __init__(self, config: PretrainedConfig, qkv: Sequence[str], out: str | None, dropout: float):
        super().__init__()
        self.config, self.qkv, self.out = config, qkv, out
        blocks, width, attention_width = config.num_divisions, config.slice_width, config.slice_attention_width
        for name in qkv:
            self.add_module(name, BatchedLinear(blocks, width, attention_width))
        if out:
            self.add_module(out, BatchedLinear(blocks, attention_width, width))
        self.head_size = attention_width // config.num_attention_heads
        self.dropout = nn.Dropout(dropout)
        self.is_causal = False  # read by the attention functions of transformers

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        batch_size: int,
        past_key_values: None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [P, B*T, d] -> ([P, B*T, A or d], attention weights [B, H, T, T], the mean over sub-blocks, or None)."""
        if past_key_values is not None:
            raise ValueError(
                "decoupled BERT takes no past_key_values, which prefix tuning adds: choose another kind of adapter."
            )
        heads = (len(x), batch_size, -1, self.config.num_attention_heads, self.head_size)
        query, key, value = (self.get_submodule(name)(x).view(heads).transpose(2, 3) for name in self.qkv)
        context, weights = attend_in_slices(
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward),
            self,
            query,  # [P, B, H, T, A/H]
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.head_size**-0.5,
            **kwargs,
        )
        return self.get_submodule(self.out)(context) if self.out else context, weights


class DecoupledBertLayer(DecoupledLayer, BertLayer):
    """P post-norm sub-blocks, each an attention and an FFN over its own slice of the hidden axis (Eq. 2)."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        names, dropout = ("query", "key", "value"), config.attention_probs_dropout_prob
        self.attention.self = DecoupledSelfAttention(config, names, None, dropout)
        out = BatchedLinear(config.num_divisions, config.slice_attention_width, config.slice_width)
        self.attention.output.dense = out


class DecoupledDistilBertLayer(DecoupledLayer, TransformerBlock):
    """As BERT's, under DistilBERT's names."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        names, dropout = ("q_lin", "k_lin", "v_lin"), config.attention_dropout
        self.attention = DecoupledSelfAttention(config, names, "out_lin", dropout)


class DecoupledViTLayer(DecoupledLayer, ViTLayer):
    """P pre-norm sub-blocks: for slice p, x + Attention_p(LayerNorm_p(x)), then x + FFN_p(LayerNorm_p(x))."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        names, dropout = ("q_proj", "k_proj", "v_proj"), config.attention_probs_dropout_prob
        self.attention = DecoupledSelfAttention(config, names, "o_proj", dropout)
