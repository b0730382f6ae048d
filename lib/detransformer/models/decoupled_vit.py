"""Decoupled ViT as a Hugging Face model: the pre-norm encoder of images, by analogy with `decoupled_bert` (Eq. 2).

Only the layers differ from `transformers`' ViT: patches, original layers, the last LayerNorm and the classifier are its
own. A decoupled layer is a pre-norm layer on each slice of the hidden axis: for slice p,
x + Attention_p(LayerNorm_p(x)), then x + FFN_p(LayerNorm_p(x)). Parameter names are ViT's, with a leading sub-block
axis. It can be trained, distilled and run under plans; commands and the cost model take text models only.

Shapes as in `decoupled_bert`; T counts an image's patches and the class token.
"""

import copy

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, ViTForImageClassification, ViTModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP

from detransformer.models.configuration import DecoupledViTConfig, layer_kinds
from detransformer.models.decoupled_bert import ProjectedSelfAttention
from detransformer.models.stacked import (
    BatchedLayerNorm,
    BatchedLinear,
    DecoupledHead,
    DecoupledModel,
    merge_hidden,
    split_hidden,
)


class DecoupledViTAttention(ProjectedSelfAttention):
    """Attention of P sub-blocks under ViT's names."""

    maps = ("q_proj", "k_proj", "v_proj", "o_proj")


class DecoupledViTMLP(ViTMLP):
    """The FFN of P sub-blocks, Linear(d -> I), activation, Linear(I -> d): [P, M, d] -> [P, M, d]."""

    def __init__(self, config: DecoupledViTConfig):
        nn.Module.__init__(self)
        blocks, width = config.num_divisions, config.hidden_size // config.num_divisions
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = BatchedLinear(blocks, width, config.intermediate_size)
        self.fc2 = BatchedLinear(blocks, config.intermediate_size, width)


class DecoupledViTLayer(ViTLayer):
    """One decoupled layer: P pre-norm sub-blocks, each over its own slice of the hidden axis."""

    def __init__(self, config: DecoupledViTConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        blocks, width = config.num_divisions, config.hidden_size // config.num_divisions
        self.num_divisions = blocks
        self.attention = DecoupledViTAttention(config, layer_idx)
        self.layernorm_before = BatchedLayerNorm(blocks, width, config.layer_norm_eps)
        self.layernorm_after = BatchedLayerNorm(blocks, width, config.layer_norm_eps)
        self.mlp = DecoupledViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """hidden_states [B, T, D] -> [B, T, D]."""
        batch_size = len(hidden_states)
        x = split_hidden(hidden_states, self.num_divisions)  # [P, B*T, d]
        attended, _ = self.attention(self.layernorm_before(x), batch_size, attention_mask, **kwargs)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.mlp(self.layernorm_after(x)))
        return merge_hidden(x, batch_size)


_RECORDED = {"hidden_states": ViTLayer, "attentions": [ViTAttention, DecoupledViTAttention]}


class DecoupledViTModel(DecoupledModel, ViTModel):
    """Decoupled ViT without a head; outputs as `transformers.ViTModel`."""

    config_class = DecoupledViTConfig
    _no_split_modules = ["ViTEmbeddings", "ViTLayer", "DecoupledViTLayer"]
    _can_record_outputs = _RECORDED

    def __init__(self, config: DecoupledViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        without_layers = copy.deepcopy(config)
        without_layers.num_hidden_layers = 0
        without_layers.gradient_checkpointing = False  # there is no layer to set it on
        with no_init_weights():
            super().__init__(without_layers, add_pooling_layer, use_mask_token)
        config._attn_implementation = self.config._attn_implementation  # chosen by the constructor
        self.config = config
        for i, kind in enumerate(layer_kinds(config)):
            self.layers.append(DecoupledViTLayer(config, i) if kind == "decoupled" else ViTLayer(config))
        self.post_init()


class DecoupledViTForImageClassification(DecoupledHead, ViTForImageClassification):
    """Decoupled ViT with ViT's own classifier of [CLS]: pixel_values [B, 3, H, W] to logits [B, labels]."""

    config_class, body_class = DecoupledViTConfig, DecoupledViTModel
    _no_split_modules = DecoupledViTModel._no_split_modules
    _can_record_outputs = _RECORDED


CLASSES = (  # the AutoModel class, the original, the decoupled one
    (AutoModel, ViTModel, DecoupledViTModel),
    (AutoModelForImageClassification, ViTForImageClassification, DecoupledViTForImageClassification),
)
