"""What word frequencies alone predict: the loss beside which every held-out loss has to be read.

A model that has learned nothing of the order of words cannot do better than the unigram distribution
p(v) = (n_v + 1) / (N + V), n_v being how often piece v is to be predicted in the training text, N all of these, V the
vocabulary. A loss is in nats a predicted token, as a model's.
"""

import torch

from detransformer.training.data.packing import IGNORED, MaskedBatches


def unigram_loss(train: MaskedBatches, valid: MaskedBatches, batch_size: int) -> float:
    """Mean loss of the training text's word frequencies over the labels that a model of `valid` is scored on.

    Args:
        train: whose tokens are counted.
        valid: of the same kind and vocabulary.
        batch_size: that of the model's evaluation: masks depend on it.
    """
    counts = torch.from_numpy(train.target_counts()).double() + 1  # [V]
    log_probability = (counts / counts.sum()).log()
    total = count = 0.0
    for batch in valid.valid_batches(batch_size):
        labels = batch["labels"][batch["labels"] != IGNORED]
        total -= float(log_probability[labels].sum())
        count += len(labels)
    return total / count
