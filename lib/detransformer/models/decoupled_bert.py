"""Decoupled BERT as Hugging Face models (DATE 2024, Section III-B, Eq. 2, Fig. 4b).

Only the layers differ from `transformers`' BERT: embeddings, original layers, pooler and heads are its own classes.
Parameter names are BERT's too; a decoupled layer's weights carry a leading sub-block axis.

Shapes: B batch, T tokens, D hidden size, P = Ndiv sub-blocks, d = D/P slice, A attention width of a sub-block (D, or d
if narrow), H heads, I intermediate size.
"""

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertPooler,
    BertSelfAttention,
    eager_attention_forward,
)

from detransformer.models.configuration import DecoupledBertConfig, layer_kinds
from detransformer.models.stacked import (
    BatchedLayerNorm,
    BatchedLinear,
    DecoupledHead,
    DecoupledModel,
    attend_in_slices,
    merge_hidden,
    split_hidden,
)


class DecoupledSelfAttention(BertSelfAttention):
    """Self-attention of P sub-blocks: Q, K, V are Linear(d -> A), all heads in each sub-block."""

    dropout_name = "attention_probs_dropout_prob"  # the configuration's field of its rate

    def __init__(self, config: DecoupledBertConfig, layer_idx: int | None = None):
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        blocks, width = config.num_divisions, config.hidden_size // config.num_divisions
        attention_width = config.hidden_size if config.attention_width == "full" else width
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = attention_width // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.query = BatchedLinear(blocks, width, attention_width)
        self.key = BatchedLinear(blocks, width, attention_width)
        self.value = BatchedLinear(blocks, width, attention_width)
        self.dropout = nn.Dropout(getattr(config, self.dropout_name))
        self.is_decoder, self.is_causal = False, False  # read by the attention functions of transformers

    def forward(self, x: torch.Tensor, batch_size: int, attention_mask: torch.Tensor | None = None, **kwargs):
        """x [P, B*T, d] -> ([P, B*T, A], attention weights [B, H, T, T], the mean over sub-blocks, or None)."""

        def heads(projected: torch.Tensor) -> torch.Tensor:  # [P, B*T, A] -> [P, B, H, T, A/H]
            split = projected.view(len(x), batch_size, -1, self.num_attention_heads, self.attention_head_size)
            return split.transpose(2, 3)

        return attend_in_slices(
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward),
            self,
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )


class ProjectedSelfAttention(DecoupledSelfAttention):
    """`DecoupledSelfAttention` under another architecture's names, with the output projection Linear(A -> d)."""

    maps: tuple[str, str, str, str]  # the names of Q, K, V and the output projection

    def __init__(self, config: DecoupledBertConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        for name, other in zip(("query", "key", "value"), self.maps, strict=False):
            self.add_module(other, self._modules.pop(name))
        blocks, attention_width, width = self.query.weight.shape  # [P, A, d]
        self.add_module(self.maps[3], BatchedLinear(blocks, attention_width, width))

    query = property(lambda self: getattr(self, self.maps[0]))
    key = property(lambda self: getattr(self, self.maps[1]))
    value = property(lambda self: getattr(self, self.maps[2]))

    def forward(self, x: torch.Tensor, batch_size: int, attention_mask: torch.Tensor | None = None, **kwargs):
        """x [P, B*T, d] -> ([P, B*T, d], attention weights [B, H, T, T], the mean over sub-blocks, or None)."""
        context, weights = super().forward(x, batch_size, attention_mask, **kwargs)
        return getattr(self, self.maps[3])(context), weights


class DecoupledAttention(nn.Module):
    """Attention, output projection Linear(A -> d), residual and LayerNorm, all inside the slice."""

    def __init__(self, config: DecoupledBertConfig, layer_idx: int | None = None):
        super().__init__()
        self.self = DecoupledSelfAttention(config, layer_idx)
        self.output = _SliceOutput(config, in_features=self.self.query.weight.shape[1])

    def forward(self, x: torch.Tensor, batch_size: int, attention_mask: torch.Tensor | None = None, **kwargs):
        context, weights = self.self(x, batch_size, attention_mask, **kwargs)
        return self.output(context, x), weights


class _SliceOutput(nn.Module):
    """Linear(in -> d), dropout, residual, LayerNorm of width d."""

    def __init__(self, config: DecoupledBertConfig, in_features: int):
        super().__init__()
        width = config.hidden_size // config.num_divisions
        self.dense = BatchedLinear(config.num_divisions, in_features, width)
        self.LayerNorm = BatchedLayerNorm(config.num_divisions, width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class _SliceIntermediate(nn.Module):
    def __init__(self, config: DecoupledBertConfig):
        super().__init__()
        width = config.hidden_size // config.num_divisions
        self.dense = BatchedLinear(config.num_divisions, width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(x))


class DecoupledBertLayer(BertLayer):
    """One decoupled layer: P sub-blocks, each an attention and an FFN over its own slice of the hidden axis (Eq. 2)."""

    def __init__(self, config: DecoupledBertConfig, layer_idx: int | None = None):
        GradientCheckpointingLayer.__init__(self)
        self.num_divisions = config.num_divisions
        self.attention = DecoupledAttention(config, layer_idx)
        self.intermediate = _SliceIntermediate(config)
        self.output = _SliceOutput(config, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args, **kwargs):
        """hidden_states [B, T, D] -> [B, T, D]; the remaining arguments are BertLayer's and unused (no decoder)."""
        kwargs.pop("encoder_attention_mask", None)
        if kwargs.pop("past_key_values", None) is not None:
            raise ValueError(
                "decoupled BERT takes no past_key_values, which prefix tuning adds: choose another kind of adapter."
            )
        batch_size, num_tokens, _ = hidden_states.shape
        x = split_hidden(hidden_states, self.num_divisions)  # [P, B*T, d]
        x, _ = self.attention(x, batch_size, attention_mask, **kwargs)
        x = self.output(self.intermediate(x), x)
        return merge_hidden(x, batch_size)


class _DecoupledBertEncoder(BertEncoder):
    """BERT's stack of layers, decoupled and original ones by `layer_kinds`."""

    def __init__(self, config: DecoupledBertConfig):
        nn.Module.__init__(self)
        self.config = config
        layer_class = {"decoupled": DecoupledBertLayer, "original": BertLayer}
        self.layer = nn.ModuleList(layer_class[kind](config, layer_idx=i) for i, kind in enumerate(layer_kinds(config)))


class DecoupledBertModel(DecoupledModel, BertModel):
    """Decoupled BERT encoder (and pooler); outputs as `transformers.BertModel`."""

    config_class = DecoupledBertConfig
    _no_split_modules = ["BertEmbeddings", "BertLayer", "DecoupledBertLayer"]

    def __init__(self, config: DecoupledBertConfig, add_pooling_layer: bool = True):
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("decoupled BERT is an encoder: set is_decoder=False and add_cross_attention=False.")
        BertPreTrainedModel.__init__(self, config)  # BertModel's own would make the original layers too
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        self.encoder = _DecoupledBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()


class _DecoupledBertHead(DecoupledHead):
    config_class = DecoupledBertConfig
    body_class = DecoupledBertModel


class DecoupledBertForPreTraining(_DecoupledBertHead, BertForPreTraining):
    """Decoupled BERT with BERT's two heads of pre-training: logits [B, T, vocabulary] and [B, 2]."""


class DecoupledBertForMaskedLM(_DecoupledBertHead, BertForMaskedLM):
    """Decoupled BERT with BERT's own masked-language-model head: logits [B, T, vocabulary]."""


class DecoupledBertForNextSentencePrediction(_DecoupledBertHead, BertForNextSentencePrediction):
    """Decoupled BERT with BERT's own next-sentence head: logits [B, 2]."""


class DecoupledBertForSequenceClassification(_DecoupledBertHead, BertForSequenceClassification):
    """Decoupled BERT with BERT's own classifier of the pooled [CLS]: logits [B, labels]."""


class DecoupledBertForMultipleChoice(_DecoupledBertHead, BertForMultipleChoice):
    """Decoupled BERT with BERT's own head that rates each of C choices: input_ids [B, C, T], logits [B, C]."""


class DecoupledBertForTokenClassification(_DecoupledBertHead, BertForTokenClassification):
    """Decoupled BERT with BERT's own classifier of tokens: logits [B, T, labels]."""


class DecoupledBertForQuestionAnswering(_DecoupledBertHead, BertForQuestionAnswering):
    """Decoupled BERT with BERT's own span head: logits [B, T] of an answer's start and of its end."""


CLASSES = (  # the AutoModel class, the original, the decoupled one
    (AutoModel, BertModel, DecoupledBertModel),
    (AutoModelForPreTraining, BertForPreTraining, DecoupledBertForPreTraining),
    (AutoModelForMaskedLM, BertForMaskedLM, DecoupledBertForMaskedLM),
    (AutoModelForNextSentencePrediction, BertForNextSentencePrediction, DecoupledBertForNextSentencePrediction),
    (AutoModelForSequenceClassification, BertForSequenceClassification, DecoupledBertForSequenceClassification),
    (AutoModelForMultipleChoice, BertForMultipleChoice, DecoupledBertForMultipleChoice),
    (AutoModelForTokenClassification, BertForTokenClassification, DecoupledBertForTokenClassification),
    (AutoModelForQuestionAnswering, BertForQuestionAnswering, DecoupledBertForQuestionAnswering),
)
