"""Decoupled RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT as Hugging Face models, by analogy with `decoupled_bert`.

All but DistilBERT have BERT's layer, and so its decoupled one. The classes, one for each head, are made from the
original's (`DECOUPLED_CLASS`): embeddings, original layers, pooler and heads are its own.

Shapes as in `decoupled_bert`.
"""

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from detransformer.models.configuration import FAMILIES, DecoupledDistilBertConfig, layer_kinds
from detransformer.models.decoupled_bert import (
    BatchedLayerNorm,
    BatchedLinear,
    DecoupledBertLayer,
    DecoupledBertMixin,
    DecoupledSelfAttention,
    merge_hidden,
    split_hidden,
)

DISTILBERT_EPS = 1e-12  # of its LayerNorms; no configuration says otherwise
AUTO_CLASS = {
    "base": AutoModel,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}


class DecoupledDistilBertAttention(DecoupledSelfAttention):
    """`DecoupledSelfAttention` under DistilBERT's names, with the output projection Linear(A -> d)."""

    def __init__(self, config: DecoupledDistilBertConfig):
        nn.Module.__init__(self)
        self.config = config
        blocks, width = config.num_divisions, config.dim // config.num_divisions
        attention_width = config.dim if config.attention_width == "full" else width
        self.num_attention_heads = config.n_heads
        self.attention_head_size = attention_width // config.n_heads
        self.scaling = self.attention_head_size**-0.5
        for name in ("q_lin", "k_lin", "v_lin"):
            setattr(self, name, BatchedLinear(blocks, width, attention_width))
        self.out_lin = BatchedLinear(blocks, attention_width, width)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.is_decoder, self.is_causal = False, False  # read by the attention functions of transformers

    query = property(lambda self: self.q_lin)
    key = property(lambda self: self.k_lin)
    value = property(lambda self: self.v_lin)

    def forward(self, x: torch.Tensor, batch_size: int, attention_mask: torch.Tensor | None = None, **kwargs):
        """x [P, B*T, d] -> ([P, B*T, d], attention weights or None)."""
        context, weights = super().forward(x, batch_size, attention_mask, **kwargs)
        return self.out_lin(context), weights


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


class DecoupledRelative(DecoupledBertMixin):
    """What the classes below share: once the original's parts are there, decoupled layers take the others' places."""

    decoupled_layer: type[nn.Module]
    decoupled_body: type[PreTrainedModel]  # of the same family, without a head

    def post_init(self) -> None:
        if getattr(self.config, "is_decoder", False) or getattr(self.config, "add_cross_attention", False):
            raise ValueError(
                f"decoupled {self.base_model_prefix} is an encoder: set is_decoder=False and add_cross_attention=False."
            )
        body = self.base_model
        if body is self:
            layers = self.transformer.layer if hasattr(self, "transformer") else self.encoder.layer
            for i, kind in enumerate(layer_kinds(self.config)):
                if kind == "decoupled":
                    layers[i] = self.decoupled_layer(self.config, layer_idx=i)
        else:
            options = {"add_pooling_layer": body.pooler is not None} if hasattr(body, "pooler") else {}
            setattr(self, self.base_model_prefix, self.decoupled_body(self.config, **options))
        super().post_init()


DECOUPLED_CLASS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def _make_classes(model_type: str) -> None:
    """The decoupled class of each head of a family, known to this module and to the Auto classes by their names."""
    family = FAMILIES[model_type]
    distilbert = family.architecture == "distilbert"
    body = None
    for head in family.class_endings:
        original = getattr(transformers, family.class_name(head))
        recorded = original._can_record_outputs
        layer = DecoupledDistilBertLayer if distilbert else DecoupledBertLayer
        fields = {
            "__module__": __name__,
            "__doc__": f"Decoupled {family.name}; outputs as `transformers.{original.__name__}`.",
            "config_class": family.decoupled,
            "_no_split_modules": [*(original._no_split_modules or []), layer.__name__],
            "_can_record_outputs": {
                "hidden_states": [recorded["hidden_states"], *([] if distilbert else [layer])],  # or it is one already
                "attentions": [recorded["attentions"], DecoupledSelfAttention],
            },
            "decoupled_layer": layer,
            "decoupled_body": body,
        }
        made = type(f"Decoupled{original.__name__}", (DecoupledRelative, original), fields)
        body = body or made
        globals()[made.__name__] = DECOUPLED_CLASS[original] = made
        AUTO_CLASS[head].register(family.decoupled, made, exist_ok=True)
    AutoConfig.register(family.decoupled.model_type, family.decoupled, exist_ok=True)


for _model_type in ("roberta", "xlm-roberta", "camembert", "distilbert"):
    _make_classes(_model_type)
