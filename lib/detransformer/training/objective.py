"""The masked-language-model loss, with the vocabulary projection on masked positions only.

Shapes: B batch, T tokens, K masked positions a sequence, D hidden, V vocabulary. With K = 0.15 T the projection, the
widest product of a small BERT, costs 0.15 of the full one; loss and gradients are the same.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertForMaskedLM

from detransformer.training.data.packing import IGNORED


class MaskedLmLoss(nn.Module):
    """`model` and its loss as one module."""

    def __init__(self, model: BertForMaskedLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T], positions [B, K], labels [B, K] -> mean loss in nats over the labels that count."""
        hidden = self.model.bert(input_ids).last_hidden_state  # [B, T, D]
        picked = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # [B, K, D]
        logits = self.model.cls(picked)  # [B, K, V]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
