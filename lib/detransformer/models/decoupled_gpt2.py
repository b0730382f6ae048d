"""Decoupled GPT-2 as Hugging Face models: the decoder's counterpart of `decoupled_bert` (TPDS 2025).

Only the layers differ from `transformers`' GPT-2: embeddings, original layers, the last LayerNorm, the head and
`generate` are its own. A decoupled layer is a pre-norm layer on each slice of the hidden axis: for slice p,
x + Attention_p(LayerNorm_p(x)), then x + FFN_p(LayerNorm_p(x)), causal. Its cache holds, for each head, the keys (and
the values) of all sub-blocks side by side: [B, H, T, P*s]. Parameter names are GPT-2's, with a leading sub-block axis.

Shapes: B batch, T tokens, D hidden size, P = Ndiv sub-blocks, d = D/P slice, A attention width of a sub-block (D, or d
if narrow), H heads, s = A/H head size, I intermediate size.
"""

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
    GenerationMixin,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, eager_attention_forward

from detransformer.models.configuration import DecoupledGPT2Config, ffn_size, layer_kinds
from detransformer.models.stacked import (
    BatchedConv1D,
    BatchedLayerNorm,
    DecoupledHead,
    DecoupledModel,
    attend_in_slices,
    merge_hidden,
    split_hidden,
)


class DecoupledGPT2Attention(GPT2Attention):
    """Causal self-attention of P sub-blocks: Q, K, V are Linear(d -> A) packed in one, all heads in each sub-block."""

    def __init__(self, config: DecoupledGPT2Config, layer_idx: int):
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        blocks, width = config.num_divisions, config.hidden_size // config.num_divisions
        attention_width = config.hidden_size if config.attention_width == "full" else width
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
        batch_size: int,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
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


class DecoupledGPT2MLP(GPT2MLP):
    """The FFN of P sub-blocks, Linear(d -> I), activation, Linear(I -> d): [P, M, d] -> [P, M, d]."""

    def __init__(self, config: DecoupledGPT2Config):
        nn.Module.__init__(self)
        blocks, width = config.num_divisions, config.hidden_size // config.num_divisions
        self.c_fc = BatchedConv1D(blocks, width, ffn_size(config))
        self.c_proj = BatchedConv1D(blocks, ffn_size(config), width)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)


class DecoupledGPT2Block(GPT2Block):
    """One decoupled layer: P pre-norm sub-blocks, each over its own slice of the hidden axis."""

    def __init__(self, config: DecoupledGPT2Config, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        blocks, width = config.num_divisions, config.hidden_size // config.num_divisions
        self.num_divisions = blocks
        self.ln_1 = BatchedLayerNorm(blocks, width, config.layer_norm_epsilon)
        self.attn = DecoupledGPT2Attention(config, layer_idx)
        self.ln_2 = BatchedLayerNorm(blocks, width, config.layer_norm_epsilon)
        self.mlp = DecoupledGPT2MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; the remaining arguments are GPT2Block's (no cross-attention)."""
        kwargs.pop("encoder_attention_mask", None)
        batch_size = len(hidden_states)
        x = split_hidden(hidden_states, self.num_divisions)  # [P, B*T, d]
        attended, _ = self.attn(self.ln_1(x), batch_size, past_key_values, attention_mask, **kwargs)
        x = x + attended
        x = x + self.mlp(self.ln_2(x))
        return merge_hidden(x, batch_size)


class DecoupledGPT2Model(DecoupledModel, GPT2Model):
    """Decoupled GPT-2 without a head; outputs as `transformers.GPT2Model`."""

    config_class = DecoupledGPT2Config
    block_class = {"decoupled": DecoupledGPT2Block, "original": GPT2Block}
    _no_split_modules = ["GPT2Block", "DecoupledGPT2Block"]

    def __init__(self, config: DecoupledGPT2Config):
        if config.add_cross_attention:
            raise ValueError("decoupled GPT-2 attends to its own tokens only: set add_cross_attention=False.")
        GPT2PreTrainedModel.__init__(self, config)  # GPT2Model's own would make the original layers too
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        kinds = enumerate(layer_kinds(config))
        self.h = nn.ModuleList(self.block_class[kind](config, layer_idx=i) for i, kind in kinds)
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()


class _DecoupledGPT2Head(DecoupledHead):
    config_class = DecoupledGPT2Config
    body_class = DecoupledGPT2Model


class DecoupledGPT2LMHeadModel(_DecoupledGPT2Head, GPT2LMHeadModel, GenerationMixin):
    """Decoupled GPT-2 that writes text; outputs and `generate` as `transformers.GPT2LMHeadModel`."""

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: decoupled GPT-2 has no continuous batching."""
        raise ValueError(
            "continuous batching (generate_batch) keeps the keys of one attention a layer, and a decoupled layer has "
            f"num_divisions={self.config.num_divisions}: call generate on padded prompts, or `detransformer serve`."
        )


class DecoupledGPT2ForSequenceClassification(_DecoupledGPT2Head, GPT2ForSequenceClassification):
    """Decoupled GPT-2 with GPT-2's own classifier of the last token: logits [B, labels]."""


class DecoupledGPT2ForTokenClassification(_DecoupledGPT2Head, GPT2ForTokenClassification):
    """Decoupled GPT-2 with GPT-2's own classifier of tokens: logits [B, T, labels]."""


class DecoupledGPT2ForQuestionAnswering(_DecoupledGPT2Head, GPT2ForQuestionAnswering):
    """Decoupled GPT-2 with GPT-2's own span head: logits [B, T] of an answer's start and of its end."""


CLASSES = (  # the AutoModel class, the original, the decoupled one
    (AutoModel, GPT2Model, DecoupledGPT2Model),
    (AutoModelForPreTraining, GPT2LMHeadModel, DecoupledGPT2LMHeadModel),
    (AutoModelForCausalLM, GPT2LMHeadModel, DecoupledGPT2LMHeadModel),
    (AutoModelForSequenceClassification, GPT2ForSequenceClassification, DecoupledGPT2ForSequenceClassification),
    (AutoModelForTokenClassification, GPT2ForTokenClassification, DecoupledGPT2ForTokenClassification),
    (AutoModelForQuestionAnswering, GPT2ForQuestionAnswering, DecoupledGPT2ForQuestionAnswering),
)
