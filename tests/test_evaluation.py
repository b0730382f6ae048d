"""Saved models evaluated again: as they were trained, rounded as on a wire, and as small copies to share."""

import math

import pytest
from transformers import AutoModelForMaskedLM, BertConfig, BertForSequenceClassification

from detransformer import cli
from detransformer.training import (
    ModelRow,
    PretrainConfig,
    export,
    held_out_loss,
    load_masked_lm,
    open_data,
    pretrain,
)
from test_cli import call

TINY = PretrainConfig(
    **dict(hidden_size=16, num_heads=4, intermediate_size=32, num_steps=4, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, optimizer="adamw", learning_rate=1e-2, dropout=0.0, max_train_tokens=4000),
    **dict(max_valid_tokens=320, seed=0),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = open_data("built-in", tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("runs")
    return data, [pretrain(row, TINY, data, folder) for row in (ModelRow(), ModelRow("bert-base", 4, 4))]


def test_a_saved_model_has_the_loss_it_was_trained_to(trained):
    data, results = trained
    for result in results:
        found = held_out_loss(load_masked_lm(result.checkpoint), data, seq_len=16, max_tokens=320)
        assert found["tokens"] == result.valid_tokens
        # other micro-batches draw other masks of the same 20 sequences
        assert found["loss"] == pytest.approx(result.valid_loss, rel=0.05)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_rounded_messages_change_the_loss_little_but_do(trained):
    data, results = trained
    model = load_masked_lm(results[1].checkpoint)
    exact, plain, rounded = (held_out_loss(model, data, 16, 320, wire)["loss"] for wire in ("", "float32", "int8"))
    assert plain == pytest.approx(exact, abs=1e-5)
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


def test_a_shared_copy_is_half_as_large_and_loads_anywhere(trained, tmp_path):
    data, results = trained
    folder = export(results[1], tmp_path / "copy", "# a card\n")
    size = (folder / "model.safetensors").stat().st_size
    assert size < 0.6 * (results[1].checkpoint / "model.safetensors").stat().st_size
    assert (folder / "README.md").read_text() == "# a card\n" and (folder / "tokenizer.json").is_file()
    assert type(AutoModelForMaskedLM.from_pretrained(folder)).__name__ == "DecoupledBertForMaskedLM"
    exact, copied = (held_out_loss(load_masked_lm(f), data, 16, 320)["loss"] for f in (results[1].checkpoint, folder))
    assert copied == pytest.approx(exact, rel=0.01)


def test_evaluate_prints_loss_and_perplexity(trained, capsys):
    _, results = trained
    cli.app(
        ["evaluate", str(results[1].checkpoint), "--source", "built-in", "--seq-len", "16", "--wire", "int8"],
        standalone_mode=False,
    )
    shown = capsys.readouterr().out
    assert "exact: " in shown and "int8 messages between four devices: " in shown


@pytest.mark.parametrize("kind, words", [("empty", "no config.json"), ("classifier", "masked-LM head")])
def test_what_is_no_masked_language_model_is_refused(kind, words, tmp_path, capsys):
    if kind == "classifier":
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=60)
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path)
    code, stderr = call(capsys, "evaluate", tmp_path)
    assert code == 2 and words in stderr
