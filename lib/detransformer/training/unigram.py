"""What word frequencies alone predict: the loss beside which every held-out loss has to be read.

A model that has learned nothing of the order of words cannot do better than the unigram distribution
p(v) = (n_v + 1) / (N + V), n_v being how often piece v is to be predicted in the training text, N all of these, V the
vocabulary. A loss is in nats a predicted token, as a model's.
"""

import torch
from transformers import BertForMaskedLM

from detransformer.training.data.packing import IGNORED, MaskedBatches


def log_frequencies(train: MaskedBatches) -> torch.Tensor:
    """log p of each piece of the vocabulary [V], by how often it is to be predicted in `train`."""
    counts = torch.from_numpy(train.target_counts()).double() + 1  # [V]
    return (counts / counts.sum()).log()


@torch.no_grad()
def start_at_frequencies(model: BertForMaskedLM, train: MaskedBatches) -> None:
    """Sets the bias of the vocabulary's projection to `log_frequencies`: what is learned goes on from there.

    From BERT's zero bias a short training spends itself on learning how frequent each piece is.
    """
    model.cls.predictions.bias.copy_(log_frequencies(train))


def unigram_loss(train: MaskedBatches, valid: MaskedBatches, batch_size: int) -> float:
    """Mean loss of the training text's word frequencies over the labels that a model of `valid` is scored on.

    Args:
        train: whose tokens are counted.
        valid: of the same kind and vocabulary.
        batch_size: that of the model's evaluation: masks depend on it.
    """
    log_probability = log_frequencies(train)
    total = count = 0.0
    for batch in valid.valid_batches(batch_size):
        labels = batch["labels"][batch["labels"] != IGNORED]
        total -= float(log_probability[labels].sum())
        count += len(labels)
    return total / count
