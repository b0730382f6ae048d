"""Sets of runs: calibration beside training from scratch, and rows that vary the published structure."""

import dataclasses

import pytest

from detransformer.training import ModelRow, PretrainConfig, calibration_study, open_data, pretrain, structures

TINY = PretrainConfig(
    **dict(hidden_size=16, num_heads=2, intermediate_size=32, num_steps=4, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, optimizer="adamw", learning_rate=1e-2, dropout=0.0, max_train_tokens=4000),
    **dict(max_valid_tokens=320, seed=5),
)
ROW = ModelRow("bert-base", 4, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    data = open_data("built-in", tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("runs")
    return data, pretrain(ModelRow(), TINY, data, folder), pretrain(ROW, TINY, data, folder)


def test_a_share_of_the_tokens_is_trained_three_ways(runs, tmp_path):
    data, teacher, scratch = runs
    table = calibration_study(teacher, scratch, TINY, [0.5], data, tmp_path)
    assert list(table["method"]) == ["none", "plain", "distilled", "from scratch", "from scratch"]
    assert list(table["tokens"]) == [0, 128, 128, 128, 256]
    assert list(table["tokens_share"]) == [0.0, 0.5, 0.5, 0.5, 1.0]
    assert set(table["row"]) == {ROW.label}
    assert table["valid_loss"].iloc[-1] == scratch.valid_loss
    assert (table["teacher_valid_loss"] - teacher.valid_loss).abs().max() < 1e-5
    again = calibration_study(teacher, scratch, TINY, [0.5], data, tmp_path)  # read back, not trained
    assert list(again["seconds"]) == list(table["seconds"])


@pytest.mark.parametrize(
    "shares, message", [([], "shares is empty"), ([0.1], "share 0.1 of 4 steps"), ([1.5], "share 1.5 of 4 steps")]
)
def test_shares_that_train_nothing_are_refused(runs, shares, message, tmp_path):
    data, teacher, scratch = runs
    with pytest.raises(ValueError, match=message):
        calibration_study(teacher, scratch, TINY, shares, data, tmp_path)


def test_each_published_structure_stands_before_its_variants_once():
    narrow = dataclasses.replace(ROW, attention_width="narrow")
    top = dataclasses.replace(ROW, original_placement="top")
    other = ModelRow("bert-base", 2, 4, "full", "first")
    assert structures([narrow, top, other]) == [ROW, narrow, top, ModelRow("bert-base", 2, 4), other]
    assert len({row.key for row in structures([narrow, top, other])}) == 5
