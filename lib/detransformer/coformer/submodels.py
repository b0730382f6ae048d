"""Sub-models of BERT, GPT-2 and ViT classifiers: heads and FFN widths by layer (CoFormer 2025, Fig. 14).

Only a layer's projections differ from `transformers`' own: it has `layer_heads[k]` heads of the large model's head size
and `layer_ffn_sizes[k]` FFN columns, and its attention is as wide as its heads, which may differ from the embedding's
width. All else, including parameter names, is the original class's, so a sub-model whose layers are alike and as wide
as their heads is a plain smaller model. `facebook/deit-base-patch16-224`, DeiT-B without distillation token, is a ViT
to `transformers`.

Shapes: B batch, S tokens, d embedding width, A = heads x head size, D FFN columns of a layer.
"""

import copy
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PretrainedConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.pytorch_utils import Conv1D

from detransformer.coformer.policy import Original, SubModelConfig
from detransformer.models.configuration import config_fields

# Configurations --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, repr=False, eq=False)
class SubModelSizes:
    """The fields that a sub-model's configuration adds to the original class's; without them it is a plain model's.

    Args:
        layer_heads: heads of each layer; `num_attention_heads` is the large model's, h.
        layer_ffn_sizes: FFN columns of each layer; `intermediate_size` (GPT-2's `n_inner`) is the large model's, D.
        head_dim: size of a head, the large model's.
        source_layers: the large model's layers from which this one's were cut.

    Raises:
        ValueError: for lists without one entry a layer, a size below 1, or decoder settings for an encoder.
    """

    layer_heads: list[int] | None = None
    layer_ffn_sizes: list[int] | None = None
    head_dim: int | None = None
    source_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.model_type == "coformer_bert" and (self.is_decoder or self.add_cross_attention):
            raise ValueError("a sub-model of BERT is an encoder: set is_decoder=False and add_cross_attention=False.")
        if self.model_type == "coformer_gpt2" and self.add_cross_attention:
            raise ValueError("a sub-model of GPT-2 attends to its own tokens only: set add_cross_attention=False.")
        layers = self.num_hidden_layers
        ffn_size = self.n_inner or 4 * self.n_embd if self.model_type == "coformer_gpt2" else self.intermediate_size
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.layer_heads = self.layer_heads or [self.num_attention_heads] * layers
        self.layer_ffn_sizes = self.layer_ffn_sizes or [ffn_size] * layers
        self.source_layers = self.source_layers or list(range(layers))
        if len(self.source_layers) != layers:
            raise ValueError(f"source_layers lists {len(self.source_layers)} layers and the model has {layers}.")
        sizes_of(self)


@strict
class CoformerBertConfig(SubModelSizes, BertConfig):
    """`BertConfig` of a sub-model."""

    model_type = "coformer_bert"


@strict
class CoformerGPT2Config(SubModelSizes, GPT2Config):
    """`GPT2Config` of a sub-model."""

    model_type = "coformer_gpt2"


@strict
class CoformerViTConfig(SubModelSizes, ViTConfig):
    """`ViTConfig` of a sub-model."""

    model_type = "coformer_vit"


CoformerConfig = CoformerBertConfig | CoformerGPT2Config | CoformerViTConfig
SUB_MODEL_CONFIG = {"bert": CoformerBertConfig, "gpt2": CoformerGPT2Config, "vit": CoformerViTConfig}


def sizes_of(config: CoformerConfig) -> SubModelConfig:
    """The C_n that a sub-model's configuration describes."""
    return SubModelConfig(config.num_hidden_layers, config.hidden_size, config.layer_heads, config.layer_ffn_sizes)


def sub_model_config(config: PretrainedConfig, sizes: SubModelConfig, source_layers: list[int]) -> CoformerConfig:
    """The configuration of a sub-model with these sizes, cut from a BERT, GPT-2 or ViT of `config`."""
    original = Original.of(config)
    fields = config_fields(config)
    fields[config.attribute_map.get("hidden_size", "hidden_size")] = sizes.hidden_size
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = sizes.num_layers
    if config.model_type == "gpt2":
        fields["n_inner"] = original.ffn_size  # not 4 times the width of the sub-model
    made = SUB_MODEL_CONFIG[config.model_type](
        **fields,
        layer_heads=list(sizes.num_heads),
        layer_ffn_sizes=list(sizes.ffn_sizes),
        head_dim=original.head_size,
        source_layers=list(source_layers),
    )
    made._attn_implementation = config._attn_implementation
    return made


def _layer_config(config: CoformerConfig, layer: int, hidden_size: int) -> CoformerConfig:
    """The configuration for `transformers`' layer: a layer of this width, with its own heads and FFN columns."""
    sizes = copy.copy(config)
    sizes.hidden_size = hidden_size
    sizes.num_attention_heads = config.layer_heads[layer]
    sizes.intermediate_size = config.layer_ffn_sizes[layer]
    return sizes


class SubModel:
    """Mixin of all sub-models: the original class without layers, then layers of their own sizes."""

    layer_class: type[nn.Module]
    layers_at: str  # path of the original's layers in the backbone

    def __init__(self, config: CoformerConfig):
        count, config.num_hidden_layers = config.num_hidden_layers, 0
        super().__init__(config)
        config.num_hidden_layers = count
        layers = [self.layer_class(config, number) for number in range(count)]
        self.base_model.get_submodule(self.layers_at).extend(layers)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        # When it initialises custom code, `transformers` skips modules without parameters of their own, and so GPT-2's
        # attention and FFN, whose narrower c_proj `_init_weights` draws.
        return False


# BERT ------------------------------------------------------------------------------------------------------------


class CoformerBertLayer(BertLayer):
    """BERT's layer: Q, K, V are Linear(d -> A), the output Linear(A -> d), the FFN Linear(d -> D -> d)."""

    def __init__(self, config: CoformerBertConfig, layer_idx: int):
        width, attention = config.hidden_size, config.layer_heads[layer_idx] * config.head_dim
        super().__init__(_layer_config(config, layer_idx, attention), layer_idx)  # as if it were A wide
        attend = self.attention.self
        attend.config = config  # it follows later changes of the model's attention function
        attend.query, attend.key, attend.value = (nn.Linear(width, attention) for _ in range(3))
        self.attention.output.dense = nn.Linear(attention, width)
        self.intermediate.dense = nn.Linear(width, config.layer_ffn_sizes[layer_idx])
        self.output.dense = nn.Linear(config.layer_ffn_sizes[layer_idx], width)
        for output in (self.attention.output, self.output):
            output.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)


class CoformerBertForSequenceClassification(SubModel, BertForSequenceClassification):
    """A sub-model of a BERT with its classification head: input_ids [B, T] to logits [B, C] (CoFormer, Fig. 14)."""

    config_class, layer_class, layers_at = CoformerBertConfig, CoformerBertLayer, "encoder.layer"


# GPT-2 -----------------------------------------------------------------------------------------------------------


class CoformerGPT2Block(GPT2Block):
    """GPT-2's layer: Q, K, V packed in Conv1D(d -> 3 A), the output Conv1D(A -> d), the FFN Conv1D(d -> D -> d)."""

    def __init__(self, config: CoformerGPT2Config, layer_idx: int):
        width, attention = config.hidden_size, config.layer_heads[layer_idx] * config.head_dim
        super().__init__(_layer_config(config, layer_idx, attention), layer_idx)
        self.attn.config = config
        if config.scale_attn_by_inverse_layer_idx:
            scaling = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
            self.attn.scaling = scaling / (config.source_layers[layer_idx] + 1)
        self.attn.c_attn = Conv1D(3 * attention, width)
        self.attn.c_proj = Conv1D(width, attention)
        self.mlp = GPT2MLP(config.layer_ffn_sizes[layer_idx], config)
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=config.layer_norm_epsilon) for _ in range(2))


class CoformerGPT2ForSequenceClassification(SubModel, GPT2ForSequenceClassification):
    """A sub-model of a GPT-2 with its classification head: input_ids [B, T] to logits [B, C] (CoFormer, Fig. 14)."""

    config_class, layer_class, layers_at = CoformerGPT2Config, CoformerGPT2Block, "h"


# ViT -------------------------------------------------------------------------------------------------------------


class CoformerViTLayer(ViTLayer):
    """ViT's layer, whose sizes `transformers` takes one by one: only its configuration differs."""

    def __init__(self, config: CoformerViTConfig, layer_idx: int):
        super().__init__(_layer_config(config, layer_idx, config.hidden_size))
        self.attention.config = self.mlp.config = config


class CoformerViTForImageClassification(SubModel, ViTForImageClassification):
    """A sub-model of a ViT with its head: pixel_values [B, 3, H, W] to logits [B, C] (CoFormer, Fig. 14)."""

    config_class, layer_class, layers_at = CoformerViTConfig, CoformerViTLayer, "layers"


SUB_MODEL_CLASS = {
    BertForSequenceClassification: CoformerBertForSequenceClassification,
    GPT2ForSequenceClassification: CoformerGPT2ForSequenceClassification,
    ViTForImageClassification: CoformerViTForImageClassification,
}


for made in SUB_MODEL_CLASS.values():  # so that the Auto classes know the sub-models
    AutoConfig.register(made.config_class.model_type, made.config_class, exist_ok=True)
    images = made is CoformerViTForImageClassification
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    auto.register(made.config_class, made, exist_ok=True)
