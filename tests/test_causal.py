"""Next-token training: rows start alike, are not trained twice, and their weights come back."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from detransformer.training import (
    CausalConfig,
    ModelRow,
    pretrain,
    pretrain_all,
    pretraining_table,
    reduced_data,
)
from detransformer.training.data.packing import NextTokenBatches
from detransformer.training.pretraining import build_model, next_token_loss

TINY = CausalConfig(
    **dict(num_layers=2, hidden_size=16, num_heads=2, vocab_size=120, num_steps=4, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, learning_rate=1e-2, dropout=0.1, max_train_tokens=4000, max_valid_tokens=320, seed=5),
)
DECOUPLED = ModelRow("gpt2", 1, 2)
ROWS = [ModelRow("gpt2"), DECOUPLED]


@pytest.fixture(scope="module")
def reduced(data):
    return reduced_data(data, TINY.vocab_size, decoder=True)


def test_rows_are_trained_once_and_make_a_table(reduced, steps, tmp_path):
    table = pretraining_table(pretrain_all(ROWS, TINY, reduced, tmp_path))
    assert table["num_original_layers"].isna().tolist() == [True, False] and set(table["model"]) == {"gpt2"}
    assert table["tokens"].tolist() == [4 * 4 * 14] * 2 and table["valid_tokens"].tolist() == [320] * 2
    assert table["unigram_loss"].between(2, math.log(TINY.vocab_size)).all()
    assert table["perplexity"].tolist() == pytest.approx([math.exp(loss) for loss in table["valid_loss"]])
    assert table["note"][0].startswith("2 layers, hidden 16, 224 tokens pre-training; built-in-120-pieces text")
    steps.clear()
    again = pretrain(DECOUPLED, TINY, reduced, tmp_path)
    assert not steps and again.valid_loss == table["valid_loss"][1]
    model, tokenizer = (kind.from_pretrained(again.checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.num_divisions == 2
    prompt = tokenizer("Anna bought", return_tensors="pt", return_token_type_ids=False)
    assert prompt["input_ids"][0, 0] == tokenizer.cls_token_id == model.config.bos_token_id
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 3
    assert again.history["tokens"].tolist() == [56, 112, 168, 224]
    assert again.history["train_loss"][0] == pytest.approx(math.log(TINY.vocab_size), abs=0.7)


def test_it_learns(reduced, tmp_path):
    config = dataclasses.replace(TINY, num_steps=60, micro_batch_size=4, max_train_tokens=None, dropout=0.0)
    for result in pretrain_all(ROWS, config, reduced, tmp_path):
        losses = result.history["train_loss"].tolist()
        assert losses[-1] < losses[0] - 0.5 and result.valid_loss < losses[0] - 0.5


def test_loss_is_that_of_the_text_alone(reduced):
    """The same as the model's own loss with the labels of the last [SEP] taken out."""
    sequences = reduced.packed("validation", 16, 320)
    batch = NextTokenBatches(sequences, reduced.vocab_size, reduced.special, seed=0).train_batch(0, 3)
    model = build_model(DECOUPLED, TINY, reduced).eval()
    whole = torch.cat([batch["input_ids"], batch["labels"][:, -1:]], dim=1)
    assert (whole[:, 0] == reduced.special.cls).all() and batch["labels"].shape == (3, 14)
    torch.testing.assert_close(next_token_loss(model, **batch), model(whole, labels=whole).loss)


def test_reduced_vocabulary_spells_what_it_lacks(data, reduced):
    assert reduced.vocab_size == 120 < data.vocab_size
    assert reduced.special.all == (0, 2, 3, 4)  # [PAD], [CLS], [SEP], [MASK]
    encoded, whole = reduced.tokenizer.encode("Anna bought a yellow accordion."), data.tokenizer.encode("yellow")
    assert encoded.tokens[0] == "[CLS]" and "[UNK]" not in encoded.tokens and "yellow" in whole.tokens
    assert encoded.tokens[3:10] == ["a", "y", "##e", "##l", "##l", "##o", "##w"]
    assert reduced.tokenizer.decode(encoded.ids) == "anna bought a yellow accordion."
    assert reduced_data(data, None) is data and reduced_data(data, 10**6) is data
    with pytest.raises(ValueError, match="vocab_size=9 has no room for 5 special tokens"):
        reduced_data(data, 9)


@pytest.mark.parametrize("row, words", [([3, 2], "outside 1..2"), ([1, 3], "num_divisions=3")])
def test_rows_that_cannot_be_built_are_named_before_training(reduced, tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        pretrain_all([ModelRow("gpt2"), ModelRow("gpt2", *row)], TINY, reduced, tmp_path)
    assert not any(tmp_path.iterdir())
