"""Decoupled and original models, and the conversion between them. Knows no rank, clock, file path or plot.

The classes that `models.auto` makes are here by their names too, such as `DecoupledBertForMaskedLM`.
"""

from detransformer.models.auto import BY_NAME
from detransformer.models.configuration import architecture, ffn_size, layer_kinds, preset_config
from detransformer.models.conversion import decouple

globals().update(BY_NAME)

__all__ = ["architecture", "decouple", "ffn_size", "layer_kinds", "preset_config"]
