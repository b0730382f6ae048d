"""Next-token training: rows start alike, resume bit-equal, are not trained twice, and their weights come back."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from detransformer.training import (
    CausalConfig,
    ModelRow,
    open_data,
    pretrain,
    pretrain_all,
    pretraining_table,
    reduced_data,
)
from detransformer.training.data.packing import NextTokenBatches
from detransformer.training.optim import parameter_groups
from detransformer.training.pretraining import NextTokenLoss, build_model
from stopping import Stop, stop_at

TINY = CausalConfig(
    **dict(num_layers=2, hidden_size=16, num_heads=2, vocab_size=120, num_steps=4, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, learning_rate=1e-2, dropout=0.1, max_train_tokens=4000, max_valid_tokens=320, seed=5),
)
DECOUPLED = ModelRow("gpt2", 1, 2)
ROWS = [ModelRow("gpt2"), DECOUPLED]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data("built-in", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reduced(data):
    return reduced_data(data, TINY.vocab_size, decoder=True)


def test_rows_are_trained_once_and_make_a_table(reduced, tmp_path):
    table = pretraining_table(pretrain_all(ROWS, TINY, reduced, tmp_path))
    assert table["num_original_layers"].isna().tolist() == [True, False] and set(table["model"]) == {"gpt2"}
    assert table["tokens"].tolist() == [4 * 4 * 14] * 2 and table["valid_tokens"].tolist() == [320] * 2
    assert table["perplexity"].tolist() == pytest.approx([math.exp(loss) for loss in table["valid_loss"]])
    assert table["note"][0].startswith("2 layers, hidden 16, 224 tokens pre-training; built-in-120-pieces text")
    again = pretrain(DECOUPLED, TINY, reduced, tmp_path, on_step=stop_at(1))  # would raise if it trained
    assert again.valid_loss == table["valid_loss"][1]
    model, tokenizer = (kind.from_pretrained(again.checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.num_divisions == 2
    prompt = tokenizer("Anna bought", return_tensors="pt", return_token_type_ids=False)
    assert prompt["input_ids"][0, 0] == tokenizer.cls_token_id == model.config.bos_token_id
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 3
    assert again.history["tokens"].tolist() == [56, 112, 168, 224]
    assert again.history["train_loss"][0] == pytest.approx(math.log(TINY.vocab_size), abs=0.7)


def test_interrupted_training_ends_bit_equal(reduced, tmp_path):
    config = dataclasses.replace(TINY, checkpoint_every_s=0)
    whole = pretrain(DECOUPLED, TINY, reduced, tmp_path / "whole")
    with pytest.raises(Stop):
        pretrain(DECOUPLED, config, reduced, tmp_path / "parts", on_step=stop_at(2))
    steps = []
    parts = pretrain(DECOUPLED, config, reduced, tmp_path / "parts", on_step=lambda step, loss: steps.append(step))
    assert steps == [3, 4] and parts.valid_loss == whole.valid_loss  # it went on, it did not start again
    left = sorted(path.name for path in (tmp_path / "parts" / DECOUPLED.key).iterdir())
    assert left == ["history.csv", "model", "result.json"]


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
    torch.testing.assert_close(NextTokenLoss(model)(**batch), model(whole, labels=whole).loss)


def test_no_weight_decay_on_bias_and_layer_norm_even_when_stacked(reduced):
    model = NextTokenLoss(build_model(DECOUPLED, TINY, reduced))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = parameter_groups(model.named_parameters(), 0.01)
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(".c_" in names[id(p)] or ".wte" in names[id(p)] or ".wpe" in names[id(p)] for p in decayed["params"])
    assert "model.transformer.h.0.ln_1.weight" in {names[id(p)] for p in plain["params"]}


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


def test_a_sequence_may_be_as_long_as_gpt2_has_positions():
    with pytest.raises(ValueError, match="seq_len=1025 is outside 8..1024"):
        CausalConfig(seq_len=1025)


@pytest.mark.parametrize("row, words", [([3, 2], "outside 1..2"), ([1, 3], "num_divisions=3")])
def test_rows_that_cannot_be_built_are_named_before_training(reduced, tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        pretrain_all([ModelRow("gpt2"), ModelRow("gpt2", *row)], TINY, reduced, tmp_path)
    assert not any(tmp_path.iterdir())
