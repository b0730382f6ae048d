"""The LM head of an encoder, whatever its architecture names the parts."""

import torch
from transformers import PreTrainedModel


def lm_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Applies the masked-LM head of `model`, original or decoupled, to hidden states [..., D]: logits [..., V]."""
    if hasattr(model, "cls"):
        return model.cls.predictions(states)
    if hasattr(model, "lm_head"):
        return model.lm_head(states)
    return model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(states))))
