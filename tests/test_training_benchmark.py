"""The training bench: Hugging Face's Trainer's losses on the same batches, model FLOPs, one sentence for errors."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from detransformer import cli
from detransformer.training import ModelRow, PretrainConfig, open_data
from detransformer.training.benchmark import (
    FASTEST,
    FLOAT32,
    LINES,
    TRAINER,
    Job,
    _loss_turn,
    bench_training,
    loss_differences,
    model_flops,
    parse_rows,
)
from detransformer.training.objective import MaskedLmLoss
from detransformer.training.pretraining import build_model

TINY = PretrainConfig(
    **dict(hidden_size=32, num_heads=2, intermediate_size=64, num_steps=8, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=4, optimizer="adamw", learning_rate=3e-3, warmup=0.25, decay_power=1.0, dropout=0.1),
    **dict(max_train_tokens=4000, mixed_precision="bf16-weights"),
)
DECOUPLED = ModelRow("bert-base", 4, 4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products by two threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data("built-in", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("row", [ModelRow(), DECOUPLED], ids=["original", "decoupled"])
def test_losses_are_trainers_step_by_step(row, data, tmp_path):
    losses = {name: _loss_turn(Job(name, row, TINY, data, str(tmp_path)), 8) for name in (TRAINER, FLOAT32, FASTEST)}
    assert len(losses[TRAINER]) == 8 and losses[TRAINER][-1] < losses[TRAINER][0]
    assert losses[FLOAT32] == pytest.approx(losses[TRAINER], rel=1e-4)  # the same sums, in another order
    assert losses[FASTEST] == pytest.approx(losses[TRAINER], rel=1e-2)  # 8 bits of mantissa through 12 layers


@pytest.mark.parametrize("row", [ModelRow(), DECOUPLED], ids=["original", "decoupled"])
def test_model_flops_are_the_counted_ones(row):
    model = build_model(row, dataclasses.replace(TINY, dropout=0.0), vocab_size=100)
    model.set_attn_implementation("eager")  # whose products are seen one by one
    tokens = torch.randint(5, 100, (3, 16))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    assert model_flops(model, 48, 48, 16) == counter.get_total_flops()
    positions = torch.tensor([[1, 4]] * 3)
    with FlopCounterMode(display=False) as counter:
        MaskedLmLoss(model)(tokens, positions, tokens.gather(1, positions)).backward()
    assert model_flops(model, 48, 6, 16) == counter.get_total_flops()


@pytest.mark.timeout(900)  # two processes import everything
def test_implementations_take_turns(data):
    """Float32 is asked for, so the fastest is what float32 is: one row for both."""
    config = dataclasses.replace(TINY, mixed_precision="no")
    names = (LINES, FLOAT32, FASTEST)
    throughput, losses = bench_training([DECOUPLED], config, data, 2, 2, 1, names, num_threads=1, peak_tflops=0.1)
    assert throughput["implementation"].tolist() == [LINES, FLOAT32]
    assert (throughput["tokens_per_s"] > 0).all() and throughput["speedup"].isna().all()  # Trainer's default is not in
    assert throughput["mfu"].tolist() == pytest.approx((throughput["model_gflops_per_s"] / 100).tolist())
    assert set(throughput["precision"]) == {"float32"} and set(throughput["num_threads"]) == {1}
    assert {"hardware", "versions", "commit", "date", "source"} <= set(throughput.columns)
    assert losses["step"].tolist() == [1, 2] and loss_differences(losses).empty
    assert losses["loss"][0] == pytest.approx(math.log(data.vocab_size), abs=0.7)


def test_rows_in_words():
    assert parse_rows("original 4,4 original") == [ModelRow(), DECOUPLED]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", "original 4x4"], ["--rows has 4x4", "Nb,Ndiv"]),
        (["--rows", ""], ["--rows is empty"]),
        (["--rows", "4,7"], ["num_divisions=7"]),
        (["--hidden-size", "100"], ["--hidden-size 100", "multiple of 32"]),
        (["--seq-len", "4"], ["--seq-len 4", "8 to 512"]),
        (["--steps", "0"], ["--steps 0", "1 or more"]),
        (["--precision", "int8"], ["--precision int8", "bf16-weights"]),
        (["--peak-tflops", "0"], ["--peak-tflops 0"]),
        (["--source", "net"], ["--source net", "built-in"]),
        (["--fast"], ["--fast", "bench-training --help"]),
    ],
)
def test_wrong_words_are_one_sentence(options, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench-training", "--source", "built-in", "--output", str(tmp_path / "out"), *options])
    shown = capsys.readouterr().err
    (line,) = [line for line in shown.splitlines() if line.startswith("detransformer: ")]
    assert end.value.code == 2 and all(word in line for word in words), shown
    assert not (tmp_path / "out" / "tables").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lamb"}, "'lamb' is not one of Trainer's: compare with adamw"),
        ({"micro_batch_size": 2}, "micro_batch_size=2 is not global_batch_size=4"),
    ],
)
def test_what_trainer_has_no_equal_of_is_refused(changes, message, data):
    with pytest.raises(ValueError, match=message):
        bench_training([DECOUPLED], dataclasses.replace(TINY, **changes), data, 1, 1, 1)


def test_counts_and_names_are_checked(data):
    with pytest.raises(ValueError, match="warmup_steps=0 is below 1"):
        bench_training([DECOUPLED], TINY, data, 1, 1, 0)
    with pytest.raises(ValueError, match="'theirs' is unknown: choose among Trainer, default"):
        bench_training([DECOUPLED], TINY, data, 1, 1, 1, ["theirs"])
