"""Decoupled and original BERT, and the conversion between them. Knows no rank, clock, file path or plot."""

from detransformer.models.configuration import DecoupledBertConfig, layer_kinds, preset_config
from detransformer.models.conversion import decouple
from detransformer.models.decoupled_bert import (
    DecoupledBertForMaskedLM,
    DecoupledBertForQuestionAnswering,
    DecoupledBertForSequenceClassification,
    DecoupledBertModel,
)

__all__ = [
    "DecoupledBertConfig",
    "DecoupledBertForMaskedLM",
    "DecoupledBertForQuestionAnswering",
    "DecoupledBertForSequenceClassification",
    "DecoupledBertModel",
    "decouple",
    "layer_kinds",
    "preset_config",
]
