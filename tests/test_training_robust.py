"""Training that is killed (SIGKILL, at any moment) or interrupted goes on to the same result."""

import dataclasses
import multiprocessing
import os
import random
import re
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from detransformer.training import (
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    finetune,
    finetune_all,
    open_data,
    pretrain,
    pretrain_all,
)
from stopping import Stop, stop_at

pytestmark = pytest.mark.slow
SIZES = dict(hidden_size=16, num_heads=2, intermediate_size=32, seq_len=16, micro_batch_size=2, optimizer="adamw")
TINY = PretrainConfig(
    **SIZES, **dict(num_steps=70, global_batch_size=4, learning_rate=1e-2, dropout=0.1, seed=5),
    **dict(max_train_tokens=4000, max_valid_tokens=320),
)  # fmt: skip
FINETUNING = FinetuneConfig(
    **dict(seq_len=32, max_train_rows=640, max_eval_rows=40, num_epochs=2, batch_size=16, micro_batch_size=8),
)
ROW = ModelRow("bert-base", 4, 4)
ROWS = [ModelRow(), ROW]
START_S = 250  # a process that imports everything, on a machine busy with other work
WORKERS_END_S = 30  # the process that they are forked from takes its interpreter down first


@pytest.fixture(scope="module")
def context():
    """Processes that find the library imported: each is forked from one that has imported it and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detransformer.training"])
    return context


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the killed processes, so that sums have the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache):
    return open_data("built-in", cache)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, data):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    folder = tmp_path_factory.mktemp("small")
    BertForMaskedLM(BertConfig(**sizes, vocab_size=data.vocab_size, initializer_range=0.07)).save_pretrained(folder)
    return folder


# --- what the killed processes do -----------------------------------------------------------------------------------


def pretrain_one(config: PretrainConfig, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    pretrain(ROW, config, open_data("built-in", cache), folder)


def finetune_one(model: Path, config: FinetuneConfig, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    finetune(model, "MRPC", config, open_data("built-in", cache), 1, folder)


def pretrain_side_by_side(config: PretrainConfig, cache: Path, folder: Path) -> None:
    pretrain_all(ROWS, config, open_data("built-in", cache), folder, num_jobs=2)


def finetune_side_by_side(pretrained: list, config: FinetuneConfig, cache: Path, folder: Path) -> None:
    finetune_all(
        {r.row.label: r for r in pretrained},
        {"MRPC": config},
        open_data("built-in", cache),
        folder,
        num_jobs=2,
    )


# --- helpers --------------------------------------------------------------------------------------------------------


def saved_at(checkpoint: Path) -> int:
    """The step that the checkpoint in place was saved at, 0 without one."""
    steps = (path.name.rpartition("-")[2] for path in checkpoint.glob("*-*"))
    return max(map(int, steps), default=0)


def wait_until(condition, process=None, limit_s: float = START_S) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert process is None or process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < end_s, f"nothing for {limit_s} s"
        time.sleep(0.01)


@contextmanager
def killed_in_the_end(*processes):
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def kill_at_random(context, function, arguments: tuple, checkpoint: Path, times: int) -> None:
    """Starts `function` and kills it `times` times, in the tenth of a second after its first new checkpoint.

    With a checkpoint after every step, most of that time one is being written.
    """
    moments = random.Random(0)
    for _ in range(times):
        before = saved_at(checkpoint)
        process = context.Process(target=function, args=arguments)
        with killed_in_the_end(process):
            wait_until(lambda before=before: saved_at(checkpoint) > before, process)
            time.sleep(moments.uniform(0, 0.1))
        assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"


def weights_of(result) -> dict[str, torch.Tensor]:
    return load_file(result.checkpoint / "model.safetensors")


def assert_same_pretraining(one, two) -> None:
    assert one.history["train_loss"].tolist() == two.history["train_loss"].tolist()
    assert one.valid_loss == two.valid_loss
    first, second = weights_of(one), weights_of(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


def without_seconds(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "seconds"}


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16-weights"])
def test_pretraining_killed_at_any_moment_ends_bit_equal(precision, context, data, cache, tmp_path):
    config = dataclasses.replace(TINY, mixed_precision=precision)
    whole = pretrain(ROW, config, data, tmp_path / "whole")
    often = dataclasses.replace(config, checkpoint_every_s=0)
    checkpoint = tmp_path / "parts" / ROW.key / "checkpoint"
    kill_at_random(context, pretrain_one, (often, cache, tmp_path / "parts"), checkpoint, times=4)
    steps = []
    parts = pretrain(ROW, config, data, tmp_path / "parts", on_step=lambda step, loss: steps.append(step))
    assert 4 < steps[0] <= config.num_steps  # it went on: each time at least a step had been saved
    assert_same_pretraining(whole, parts)
    assert sorted(p.name for p in (tmp_path / "parts" / ROW.key).iterdir()) == ["history.csv", "model", "result.json"]


@pytest.mark.parametrize("precision", ["no", "bf16-weights"])
def test_finetuning_killed_at_any_moment_ends_equal(precision, context, data, cache, small_model, tmp_path):
    config = dataclasses.replace(FINETUNING, mixed_precision=precision)
    whole = finetune(small_model, "MRPC", config, data, 1, tmp_path / "whole")
    often = dataclasses.replace(config, checkpoint_every_s=0)
    arguments = (small_model, often, cache, tmp_path / "parts")
    kill_at_random(context, finetune_one, arguments, tmp_path / "parts" / "checkpoint", times=3)
    steps = []
    parts = finetune(small_model, "MRPC", config, data, 1, tmp_path / "parts", lambda step, loss: steps.append(step))
    assert 3 < steps[0] <= whole["num_steps"]
    assert without_seconds(parts) == without_seconds(whole)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["history.csv", "result.json"]


def kill_parent(context, function, arguments: tuple, folders: list[Path]) -> None:
    """Kills the process that runs `function` when its workers have saved something in `folders`; they must end too."""
    parent = context.Process(target=function, args=arguments)
    with killed_in_the_end(parent):
        wait_until(lambda: all(is_finished(path) or saved_at(path / "checkpoint") for path in folders), parent)
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
    _, left = psutil.wait_procs(workers, timeout=WORKERS_END_S)
    assert not left, f"still running: {left}"
    assert not all(is_finished(path) for path in folders)


def is_finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


@pytest.mark.timeout(900)
def test_runs_side_by_side_end_with_their_killed_parent_and_go_on(context, data, cache, tmp_path):
    """Pre-training, then fine-tuning of what it made."""
    config = dataclasses.replace(TINY, num_steps=60, checkpoint_every_s=0.1)
    whole = pretrain_all(ROWS, config, data, tmp_path / "whole")
    folders = [tmp_path / "parts" / row.key for row in ROWS]
    kill_parent(context, pretrain_side_by_side, (config, cache, tmp_path / "parts"), folders)
    parts = pretrain_all(ROWS, config, data, tmp_path / "parts")  # one after the other: the same, without two imports
    for one, two in zip(whole, parts, strict=True):
        assert_same_pretraining(one, two)

    tuning = dataclasses.replace(FINETUNING, checkpoint_every_s=0.1, max_train_rows=320)
    table = finetune_all({r.row.label: r for r in whole}, {"MRPC": tuning}, data, tmp_path / "whole-runs")
    folders = [tmp_path / "runs" / re.sub(r"[^\w.-]+", "-", row.label) / "MRPC" / "seed0" for row in ROWS]
    kill_parent(context, finetune_side_by_side, (parts, tuning, cache, tmp_path / "runs"), folders)
    again = finetune_all({r.row.label: r for r in parts}, {"MRPC": tuning}, data, tmp_path / "runs")
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), again.drop(columns="seconds"))


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_effect_after_a_checkpoint(number, context, data, cache, tmp_path):
    config = dataclasses.replace(TINY, num_steps=400, checkpoint_every_s=3600)
    folder = tmp_path / ROW.key
    process = context.Process(target=pretrain_and_say, args=(config, cache, tmp_path, tmp_path / "started"))
    with killed_in_the_end(process):
        wait_until((tmp_path / "started").exists, process)
        os.kill(process.pid, number)
        process.join(START_S)
    assert process.exitcode == (1 if number == signal.SIGINT else -number)  # KeyboardInterrupt, or ended by it
    (saved,) = (folder / "checkpoint").iterdir()
    steps = []
    with pytest.raises(Stop):
        pretrain(
            ROW, config, data, tmp_path, on_step=lambda step, loss: steps.append(step) or stop_at(step)(step, loss)
        )
    assert steps == [int(saved.name.rpartition("-")[2]) + 1] and steps[0] > 4


def pretrain_and_say(config: PretrainConfig, cache: Path, folder: Path, started: Path) -> None:
    torch.set_num_threads(1)
    pretrain(ROW, config, open_data("built-in", cache), folder, lambda step, loss: step == 4 and started.touch())
