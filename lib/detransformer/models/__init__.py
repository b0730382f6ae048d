"""Decoupled and original models, and the conversion between them. Knows no rank, clock, file path or plot."""

from detransformer.models.auto import (
    DecoupledBertForMaskedLM,
    DecoupledBertForMultipleChoice,
    DecoupledBertForNextSentencePrediction,
    DecoupledBertForPreTraining,
    DecoupledBertForQuestionAnswering,
    DecoupledBertForSequenceClassification,
    DecoupledBertForTokenClassification,
    DecoupledBertModel,
    DecoupledGPT2ForQuestionAnswering,
    DecoupledGPT2ForSequenceClassification,
    DecoupledGPT2ForTokenClassification,
    DecoupledGPT2LMHeadModel,
    DecoupledGPT2Model,
)
from detransformer.models.configuration import (
    DecoupledBertConfig,
    DecoupledGPT2Config,
    architecture,
    ffn_size,
    layer_kinds,
    preset_config,
)
from detransformer.models.conversion import decouple

__all__ = [
    "DecoupledBertConfig",
    "DecoupledBertForMaskedLM",
    "DecoupledBertForMultipleChoice",
    "DecoupledBertForNextSentencePrediction",
    "DecoupledBertForPreTraining",
    "DecoupledBertForQuestionAnswering",
    "DecoupledBertForSequenceClassification",
    "DecoupledBertForTokenClassification",
    "DecoupledBertModel",
    "DecoupledGPT2Config",
    "DecoupledGPT2ForQuestionAnswering",
    "DecoupledGPT2ForSequenceClassification",
    "DecoupledGPT2ForTokenClassification",
    "DecoupledGPT2LMHeadModel",
    "DecoupledGPT2Model",
    "architecture",
    "decouple",
    "ffn_size",
    "layer_kinds",
    "preset_config",
]
