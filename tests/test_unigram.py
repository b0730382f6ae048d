"""The loss of word frequencies alone, against a count by hand, beside every held-out loss."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from detransformer.training import ModelRow, PretrainConfig, pretrain
from detransformer.training.data.packing import IGNORED, MaskedBatches, NextTokenBatches, SpecialTokens, unigram_loss

SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, mask=3)
TRAIN = np.array([[1, 4, 4, 4, 5, 2], [1, 4, 5, 2, 6, 2]], dtype=np.uint16)  # 4: 4 times, 5: 2 times, 6: once
VALID = np.array([[1, 4, 5, 6, 7, 2]], dtype=np.uint16)


def by_hand(counts: dict[int, int], targets: list[int], vocab_size: int) -> float:
    total = sum(counts.values()) + vocab_size
    return -sum(math.log((counts.get(token, 0) + 1) / total) for token in targets) / len(targets)


def test_masked_tokens_are_scored_by_frequency():
    train, valid = (MaskedBatches(text, 8, SPECIAL, seed=0) for text in (TRAIN, VALID))
    labels = next(valid.valid_batches(1))["labels"].flatten().tolist()
    assert unigram_loss(train, valid, 1) == pytest.approx(by_hand({4: 4, 5: 2, 6: 1}, labels, 8))


def test_next_tokens_are_scored_by_frequency_article_ends_too():
    train, valid = (NextTokenBatches(text, 8, SPECIAL, seed=0) for text in (TRAIN, VALID))
    assert unigram_loss(train, valid, 1) == pytest.approx(by_hand({4: 4, 5: 2, 6: 1, 2: 1}, [4, 5, 6, 7], 8))


def test_counts_of_many_sequences():
    sequences = np.random.default_rng(0).integers(0, 9, size=(20_000, 8), dtype=np.uint16)
    counts = np.bincount(sequences[:, 1:-1].ravel(), minlength=12) + 1.0
    found = NextTokenBatches(sequences, 12, SPECIAL, seed=0).log_frequencies()
    np.testing.assert_allclose(found, np.log(counts / counts.sum()))


def test_training_saves_it_for_the_very_tokens_that_the_model_is_scored_on(data, tmp_path):
    sizes = dict(seq_len=16, global_batch_size=4, micro_batch_size=4, max_train_tokens=4000, max_valid_tokens=320)
    config = PretrainConfig(
        **sizes, hidden_size=16, num_heads=2, intermediate_size=32, num_steps=1, optimizer="adamw", seed=3
    )
    result = pretrain(ModelRow(), config, data, tmp_path)
    text = data.packed("train", 16, 4000)
    counts = {t: int((text == t).sum()) for t in np.unique(text) if t not in data.special.all}
    valid = MaskedBatches(data.packed("validation", 16, 320), data.vocab_size, data.special, seed=3)
    labels = torch.cat([batch["labels"].flatten() for batch in valid.valid_batches(4)])
    targets = labels[labels != IGNORED].tolist()
    assert result.unigram_loss == pytest.approx(by_hand(counts, targets, data.vocab_size))
    assert pretrain(ModelRow(), config, data, tmp_path).unigram_loss == result.unigram_loss  # read back


@pytest.mark.parametrize("row", [ModelRow(), ModelRow("bert-base", 4, 4)], ids=lambda row: row.key)
@pytest.mark.parametrize("mixed_precision", ["no", "bf16-weights"])
def test_training_can_start_at_word_frequencies(data, tmp_path, row, mixed_precision):
    config = PretrainConfig(
        **dict(hidden_size=16, num_heads=4, intermediate_size=32, num_steps=1, seq_len=16, global_batch_size=4),
        **dict(micro_batch_size=4, max_train_tokens=4000, max_valid_tokens=3200, optimizer="adamw"),
        **dict(learning_rate=1e-9, mixed_precision=mixed_precision),
    )
    plain, started = (
        pretrain(row, dataclasses.replace(config, frequency_bias=bias), data, tmp_path / str(bias))
        for bias in (False, True)
    )
    assert plain.valid_loss == pytest.approx(math.log(data.vocab_size), rel=0.02)
    assert started.valid_loss == pytest.approx(started.unigram_loss, rel=0.01)
    assert started.unigram_loss < 0.85 * plain.valid_loss and started.identity != plain.identity
