"""Sub-models of BERT, GPT-2 and ViT as Hugging Face models: heads and FFN widths by layer (CoFormer 2025, Fig. 14).

Only a layer's projections differ from `transformers`' own: it has `layer_heads[k]` heads of the large model's head size
and `layer_ffn_sizes[k]` FFN columns, and its attention is as wide as its heads, which the embedding need not be. All
else, parameter names too, is the original class's, so a sub-model whose layers are alike and as wide as their heads is
a plain smaller model. `facebook/deit-base-patch16-224`, DeiT-B without distillation token, is a ViT to `transformers`.

Shapes: B batch, S tokens, d embedding width, A = heads x head size, D FFN columns of a layer.
"""

import copy

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder, BertLayer, BertPooler
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer, ViTPooler
from transformers.pytorch_utils import Conv1D

from detransformer.coformer.policy import Original, SubModelConfig
from detransformer.models.configuration import config_fields

# Configurations --------------------------------------------------------------------------------------------------


@strict
class CoformerBertConfig(BertConfig):
    """`BertConfig` of a sub-model; without the four fields it describes a plain BERT.

    Args:
        layer_heads: heads of each layer; `num_attention_heads` is the large model's, h.
        layer_ffn_sizes: FFN columns of each layer; `intermediate_size` is the large model's, D.
        head_dim: size of a head, the large model's.
        source_layers: the large model's layers that this one's were cut from.

    Raises:
        ValueError: for lists that are not one entry a layer, or a size below 1.
    """

    model_type = "coformer_bert"

    layer_heads: list[int] | None = None
    layer_ffn_sizes: list[int] | None = None
    head_dim: int | None = None
    source_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("a sub-model of BERT is an encoder: set is_decoder=False and add_cross_attention=False.")
        _complete(self, self.intermediate_size)


@strict
class CoformerGPT2Config(GPT2Config):
    """`GPT2Config` of a sub-model, as `CoformerBertConfig`; `n_inner` is the large model's D."""

    model_type = "coformer_gpt2"

    layer_heads: list[int] | None = None
    layer_ffn_sizes: list[int] | None = None
    head_dim: int | None = None
    source_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.add_cross_attention:
            raise ValueError("a sub-model of GPT-2 attends to its own tokens only: set add_cross_attention=False.")
        _complete(self, self.n_inner or 4 * self.n_embd)


@strict
class CoformerViTConfig(ViTConfig):
    """`ViTConfig` of a sub-model, as `CoformerBertConfig`."""

    model_type = "coformer_vit"

    layer_heads: list[int] | None = None
    layer_ffn_sizes: list[int] | None = None
    head_dim: int | None = None
    source_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _complete(self, self.intermediate_size)


CoformerConfig = CoformerBertConfig | CoformerGPT2Config | CoformerViTConfig
SUB_MODEL_CONFIG = {"bert": CoformerBertConfig, "gpt2": CoformerGPT2Config, "vit": CoformerViTConfig}


def _complete(config: CoformerConfig, ffn_size: int) -> None:
    """What is not given is the plain model's; ValueError for what cannot be."""
    layers = config.num_hidden_layers
    config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    config.layer_heads = config.layer_heads or [config.num_attention_heads] * layers
    config.layer_ffn_sizes = config.layer_ffn_sizes or [ffn_size] * layers
    config.source_layers = config.source_layers or list(range(layers))
    if len(config.source_layers) != layers:
        raise ValueError(f"source_layers lists {len(config.source_layers)} layers and the model has {layers}.")
    sizes_of(config)


def sizes_of(config: CoformerConfig) -> SubModelConfig:
    """The C_n that a sub-model's configuration describes."""
    return SubModelConfig(config.num_hidden_layers, config.hidden_size, config.layer_heads, config.layer_ffn_sizes)


def sub_model_config(config: PretrainedConfig, sizes: SubModelConfig, source_layers: list[int]) -> CoformerConfig:
    """The configuration of a sub-model of these sizes of a BERT, GPT-2 or ViT of `config`."""
    original = Original.of(config)
    fields = config_fields(config)
    fields[config.attribute_map.get("hidden_size", "hidden_size")] = sizes.hidden_size
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = sizes.num_layers
    if config.model_type == "gpt2":
        fields["n_inner"] = original.ffn_size  # not 4 times the width of the sub-model
    if fields.get("pooler_output_size") == config.hidden_size:
        fields["pooler_output_size"] = sizes.hidden_size
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
    """What `transformers`' layer takes its sizes from: a layer of this width, with its own heads and FFN columns."""
    sizes = copy.copy(config)
    sizes.hidden_size = hidden_size
    sizes.num_attention_heads = config.layer_heads[layer]
    sizes.intermediate_size = config.layer_ffn_sizes[layer]
    return sizes


# BERT ------------------------------------------------------------------------------------------------------------


class CoformerBertLayer(BertLayer):
    """BERT's layer: Q, K, V are Linear(d -> A), the output Linear(A -> d), the FFN Linear(d -> D -> d)."""

    def __init__(self, config: CoformerBertConfig, layer_idx: int):
        width, attention = config.hidden_size, config.layer_heads[layer_idx] * config.head_dim
        super().__init__(_layer_config(config, layer_idx, attention), layer_idx)  # as if it were A wide
        attend = self.attention.self
        attend.config = config  # its attention function is the model's, also after the model's is changed
        attend.query, attend.key, attend.value = (nn.Linear(width, attention) for _ in range(3))
        self.attention.output.dense = nn.Linear(attention, width)
        self.intermediate.dense = nn.Linear(width, config.layer_ffn_sizes[layer_idx])
        self.output.dense = nn.Linear(config.layer_ffn_sizes[layer_idx], width)
        for output in (self.attention.output, self.output):
            output.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)


class CoformerBertEncoder(BertEncoder):
    def __init__(self, config: CoformerBertConfig):
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList([CoformerBertLayer(config, i) for i in range(config.num_hidden_layers)])


class CoformerBertModel(BertModel):
    """A sub-model of BERT (and its pooler); outputs as `transformers.BertModel`."""

    config_class = CoformerBertConfig
    _no_split_modules = ["BertEmbeddings", "CoformerBertLayer"]

    def __init__(self, config: CoformerBertConfig, add_pooling_layer: bool = True):
        PreTrainedModel.__init__(self, config)  # BertModel's own makes layers that are as wide as the embedding
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        self.encoder = CoformerBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()


class CoformerBertForSequenceClassification(BertForSequenceClassification):
    """A sub-model of a BERT with its classification head: input_ids [B, T] to logits [B, C] (CoFormer, Fig. 14)."""

    config_class = CoformerBertConfig
    _no_split_modules = CoformerBertModel._no_split_modules

    def __init__(self, config: CoformerBertConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = CoformerBertModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


# GPT-2 -----------------------------------------------------------------------------------------------------------


class CoformerGPT2Block(GPT2Block):
    """GPT-2's layer: Q, K, V packed in Conv1D(d -> 3 A), the output Conv1D(A -> d), the FFN Conv1D(d -> D -> d)."""

    def __init__(self, config: CoformerGPT2Config, layer_idx: int):
        width, attention = config.hidden_size, config.layer_heads[layer_idx] * config.head_dim
        super().__init__(_layer_config(config, layer_idx, attention), layer_idx)
        self.attn.config = config
        if config.scale_attn_weights and config.scale_attn_by_inverse_layer_idx:
            self.attn.scaling = config.head_dim**-0.5 / (config.source_layers[layer_idx] + 1)
        elif config.scale_attn_by_inverse_layer_idx:
            self.attn.scaling = 1.0 / (config.source_layers[layer_idx] + 1)
        self.attn.c_attn = Conv1D(3 * attention, width)
        self.attn.c_proj = Conv1D(width, attention)
        self.mlp = GPT2MLP(config.layer_ffn_sizes[layer_idx], config)
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=config.layer_norm_epsilon) for _ in range(2))


class _CoformerGPT2Mixin:
    config_class = CoformerGPT2Config
    _no_split_modules = ["CoformerGPT2Block"]

    @classmethod
    def is_custom_code(cls) -> bool:
        # Where it draws the weights of custom code, `transformers` passes over modules that hold none themselves, and
        # so over GPT-2's attention and FFN, for which `_init_weights` draws the narrower c_proj.
        return False


class CoformerGPT2Model(_CoformerGPT2Mixin, GPT2Model):
    """A sub-model of GPT-2 without a head; outputs as `transformers.GPT2Model`."""

    def __init__(self, config: CoformerGPT2Config):
        PreTrainedModel.__init__(self, config)  # as in `CoformerBertModel`
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([CoformerGPT2Block(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._attn_implementation = config._attn_implementation
        self.post_init()


class CoformerGPT2ForSequenceClassification(_CoformerGPT2Mixin, GPT2ForSequenceClassification):
    """A sub-model of a GPT-2 with its classification head: input_ids [B, T] to logits [B, C] (CoFormer, Fig. 14)."""

    def __init__(self, config: CoformerGPT2Config):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = CoformerGPT2Model(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()


class CoformerGPT2LMHeadModel(_CoformerGPT2Mixin, GPT2LMHeadModel):
    """A sub-model of GPT-2 that writes text; outputs and `generate` as `transformers.GPT2LMHeadModel`."""

    def __init__(self, config: CoformerGPT2Config):
        PreTrainedModel.__init__(self, config)
        self.transformer = CoformerGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


# ViT -------------------------------------------------------------------------------------------------------------


class CoformerViTLayer(ViTLayer):
    """ViT's layer, whose sizes `transformers` takes one by one: only its configuration differs."""

    def __init__(self, config: CoformerViTConfig, layer_idx: int):
        super().__init__(_layer_config(config, layer_idx, config.hidden_size))
        self.attention.config = self.mlp.config = config


class CoformerViTModel(ViTModel):
    """A sub-model of ViT; outputs as `transformers.ViTModel`."""

    config_class = CoformerViTConfig
    _no_split_modules = ["ViTEmbeddings", "CoformerViTLayer"]

    def __init__(self, config: CoformerViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        PreTrainedModel.__init__(self, config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([CoformerViTLayer(config, i) for i in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()


class CoformerViTForImageClassification(ViTForImageClassification):
    """A sub-model of a ViT with its head: pixel_values [B, 3, H, W] to logits [B, C] (CoFormer, Fig. 14)."""

    config_class = CoformerViTConfig
    _no_split_modules = CoformerViTModel._no_split_modules

    def __init__(self, config: CoformerViTConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = CoformerViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()


SUB_MODEL_CLASS = {
    BertModel: CoformerBertModel,
    BertForSequenceClassification: CoformerBertForSequenceClassification,
    GPT2Model: CoformerGPT2Model,
    GPT2ForSequenceClassification: CoformerGPT2ForSequenceClassification,
    GPT2LMHeadModel: CoformerGPT2LMHeadModel,
    ViTModel: CoformerViTModel,
    ViTForImageClassification: CoformerViTForImageClassification,
}


def features(sub_model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """X_n of Eq. 2, the backbone's last hidden states, [B, S, d_n]; `labels` among the inputs are left out.

    Of GPT-2 and ViT they are those after the last LayerNorm.
    """
    backbone = sub_model.base_model
    return backbone(**{name: value for name, value in inputs.items() if name != "labels"}).last_hidden_state


def register() -> None:
    """Makes `AutoConfig`, the AutoModel classes and `AutoTokenizer` know the sub-models."""
    for config in SUB_MODEL_CONFIG.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, config, model in (
        (AutoModel, CoformerBertConfig, CoformerBertModel),
        (AutoModelForSequenceClassification, CoformerBertConfig, CoformerBertForSequenceClassification),
        (AutoModel, CoformerGPT2Config, CoformerGPT2Model),
        (AutoModelForSequenceClassification, CoformerGPT2Config, CoformerGPT2ForSequenceClassification),
        (AutoModelForCausalLM, CoformerGPT2Config, CoformerGPT2LMHeadModel),
        (AutoModel, CoformerViTConfig, CoformerViTModel),
        (AutoModelForImageClassification, CoformerViTConfig, CoformerViTForImageClassification),
    ):
        auto.register(config, model, exist_ok=True)
    AutoTokenizer.register(CoformerBertConfig, BertTokenizer, exist_ok=True)
    AutoTokenizer.register(CoformerGPT2Config, GPT2Tokenizer, exist_ok=True)


register()
