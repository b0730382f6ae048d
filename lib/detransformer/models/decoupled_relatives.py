"""Decoupled RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT as Hugging Face models, by analogy with `decoupled_bert`.

All but DistilBERT have BERT's layer, and so its decoupled layer. One class per head is made from the original's class
(`CLASSES`), which provides embeddings, original layers, pooler and heads.

Shapes as in `decoupled_bert`.
"""

import copy

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from detransformer.models.configuration import FAMILIES, DecoupledDistilBertConfig, Family, layer_kinds
from detransformer.models.decoupled_bert import DecoupledBertLayer, DecoupledSelfAttention, ProjectedSelfAttention
from detransformer.models.stacked import (
    BatchedLayerNorm,
    BatchedLinear,
    DecoupledHead,
    DecoupledModel,
    merge_hidden,
    split_hidden,
)

DISTILBERT_EPS = 1e-12  # of its LayerNorms; its configuration has no field for it
AUTO_CLASS = {
    "base": transformers.AutoModel,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}


class DecoupledDistilBertAttention(ProjectedSelfAttention):
    """Attention of P sub-blocks under DistilBERT's names."""

    maps = ("q_lin", "k_lin", "v_lin", "out_lin")
    dropout_name = "attention_dropout"


class _SliceFFN(nn.Module):
    """Linear(d -> I), activation, Linear(I -> d): [P, M, d] -> [P, M, d]."""

    def __init__(self, config: DecoupledDistilBertConfig):
        super().__init__()
        blocks, width = config.num_divisions, config.dim // config.num_divisions
        self.lin1 = BatchedLinear(blocks, width, config.hidden_dim)
        self.lin2 = BatchedLinear(blocks, config.hidden_dim, width)
        self.activation = ACT2FN[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.lin2(self.activation(self.lin1(x))))


class DecoupledDistilBertLayer(TransformerBlock):
    """One decoupled layer of DistilBERT: P post-norm sub-blocks, each over its own slice of the hidden axis (Eq. 2)."""

    def __init__(self, config: DecoupledDistilBertConfig, layer_idx: int | None = None):
        GradientCheckpointingLayer.__init__(self)
        self.num_divisions = config.num_divisions
        width = config.dim // config.num_divisions
        self.attention = DecoupledDistilBertAttention(config)
        self.sa_layer_norm = BatchedLayerNorm(config.num_divisions, width, DISTILBERT_EPS)
        self.ffn = _SliceFFN(config)
        self.output_layer_norm = BatchedLayerNorm(config.num_divisions, width, DISTILBERT_EPS)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """hidden_states [B, T, D] -> [B, T, D]."""
        batch_size = len(hidden_states)
        x = split_hidden(hidden_states, self.num_divisions)  # [P, B*T, d]
        x = self.sa_layer_norm(self.attention(x, batch_size, attention_mask, **kwargs)[0] + x)
        x = self.output_layer_norm(self.ffn(x) + x)
        return merge_hidden(x, batch_size)


class DecoupledRelative(DecoupledModel):
    """Mixin of the models without a head: the original's parts around a stack of layers given by `layer_kinds`."""

    layer_class: dict[str, type[nn.Module]]  # of an original and of a decoupled layer

    def __init__(self, config: PretrainedConfig, **options):
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise ValueError(
                f"{type(self).__name__} is an encoder: set is_decoder=False and add_cross_attention=False."
            )
        without_layers = copy.deepcopy(config)
        without_layers.num_hidden_layers = 0
        with no_init_weights():
            super().__init__(without_layers, **options)
        config._attn_implementation = self.config._attn_implementation  # chosen by the constructor
        self.config = config
        stack = self.transformer if hasattr(self, "transformer") else self.encoder
        stack.config = config
        stack.layer = nn.ModuleList(self.layer_class[kind](config) for kind in layer_kinds(config))
        self.post_init()


def _make_classes(family: Family) -> tuple[tuple[type, type, type], ...]:
    """For each head: the AutoModel class, the original, and the decoupled class, which this module gets by its name.

    The class without a head is made first, since those with a head refer to it.
    """
    distilbert = family.architecture == "distilbert"
    decoupled_layer = DecoupledDistilBertLayer if distilbert else DecoupledBertLayer
    made: list[tuple[type, type, type]] = []
    for head in family.class_endings:
        original = getattr(transformers, family.class_name(head))
        original_layer = original._can_record_outputs["hidden_states"]
        fields = {
            "__module__": __name__,
            "__doc__": f"Decoupled {family.name}; outputs as `transformers.{original.__name__}`.",
            "config_class": family.decoupled,
            "_no_split_modules": [*(original._no_split_modules or []), decoupled_layer.__name__],
            "_can_record_outputs": {
                "hidden_states": [original_layer, *([] if distilbert else [decoupled_layer])],  # or it is one already
                "attentions": [original._can_record_outputs["attentions"], DecoupledSelfAttention],
            },
            "layer_class": {"original": original_layer, "decoupled": decoupled_layer},
        }
        if made:
            fields["body_class"] = made[0][2]
        mixin = DecoupledHead if made else DecoupledRelative
        decoupled = type(f"Decoupled{original.__name__}", (mixin, original), fields)
        globals()[decoupled.__name__] = decoupled
        made.append((AUTO_CLASS[head], original, decoupled))
    return tuple(made)


CLASSES = {
    FAMILIES[name].decoupled: _make_classes(FAMILIES[name])
    for name in ("roberta", "xlm-roberta", "camembert", "distilbert")
}
