"""Training that is killed (SIGKILL, at any moment) or interrupted goes on to the same result."""

import dataclasses
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from detransformer.training import (
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    TrainingData,
    finetune_all,
    loop,
    pretrain,
    pretrain_all,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # as the killed processes
SIZES = dict(hidden_size=16, num_heads=2, intermediate_size=32, seq_len=16, micro_batch_size=2, optimizer="adamw")
TINY = PretrainConfig(
    **SIZES, **dict(num_steps=70, global_batch_size=4, learning_rate=1e-2, dropout=0.1, seed=5),
    **dict(max_train_tokens=4000, max_valid_tokens=320),
)  # fmt: skip
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


# --- what the killed processes do -----------------------------------------------------------------------------------


def in_one_thread(train: Callable, *arguments) -> None:
    torch.set_num_threads(1)
    train(*arguments)


def pretrain_and_say(config: PretrainConfig, data: TrainingData, folder: Path, started: Path) -> None:
    """Makes the file `started` when step 5 begins."""
    rate = loop.learning_rate

    def watched(step: int, *recipe) -> float:
        if step == 4:
            started.touch()
        return rate(step, *recipe)

    loop.learning_rate = watched
    pretrain(ROW, config, data, folder)


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
        process = context.Process(target=in_one_thread, args=(function, *arguments))
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


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16-weights"])
def test_pretraining_killed_at_any_moment_ends_bit_equal(precision, context, data, steps, tmp_path):
    config = dataclasses.replace(TINY, mixed_precision=precision)
    whole = pretrain(ROW, config, data, tmp_path / "whole")
    often = dataclasses.replace(config, checkpoint_every_s=0)
    checkpoint = tmp_path / "parts" / ROW.key / "checkpoint"
    kill_at_random(context, pretrain, (ROW, often, data, tmp_path / "parts"), checkpoint, times=4)
    steps.clear()
    parts = pretrain(ROW, config, data, tmp_path / "parts")
    assert 4 < steps[0] <= config.num_steps  # it went on: each time at least a step had been saved
    assert_same_pretraining(whole, parts)
    assert sorted(p.name for p in (tmp_path / "parts" / ROW.key).iterdir()) == ["history.csv", "model", "result.json"]


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
def test_runs_side_by_side_end_with_their_killed_parent_and_go_on(context, data, tmp_path):
    """Pre-training, then fine-tuning of what it made."""
    config = dataclasses.replace(TINY, num_steps=60, checkpoint_every_s=0.1)
    whole = pretrain_all(ROWS, config, data, tmp_path / "whole")
    folders = [tmp_path / "parts" / row.key for row in ROWS]
    kill_parent(context, pretrain_all, (ROWS, config, data, tmp_path / "parts", 2), folders)
    parts = pretrain_all(ROWS, config, data, tmp_path / "parts")  # one after the other: the same, without two imports
    for one, two in zip(whole, parts, strict=True):
        assert_same_pretraining(one, two)

    sizes = dict(seq_len=32, max_train_rows=320, max_eval_rows=40, num_epochs=2, batch_size=16, micro_batch_size=8)
    tuning = FinetuneConfig(**sizes, checkpoint_every_s=0.1)
    table = finetune_all({r.row.label: r for r in whole}, {"MRPC": tuning}, data, tmp_path / "whole-runs")
    pretrained = {r.row.label: r for r in parts}
    folders = [tmp_path / "runs" / re.sub(r"[^\w.-]+", "-", row.label) / "MRPC" / "seed0" for row in ROWS]
    kill_parent(context, finetune_all, (pretrained, {"MRPC": tuning}, data, tmp_path / "runs", 2), folders)
    again = finetune_all(pretrained, {"MRPC": tuning}, data, tmp_path / "runs")
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), again.drop(columns="seconds"))


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_effect_after_a_checkpoint(number, context, data, steps, tmp_path):
    config = dataclasses.replace(TINY, num_steps=400, checkpoint_every_s=3600)
    folder = tmp_path / ROW.key
    arguments = (pretrain_and_say, config, data, tmp_path, tmp_path / "started")
    process = context.Process(target=in_one_thread, args=arguments)
    with killed_in_the_end(process):
        wait_until((tmp_path / "started").exists, process)
        os.kill(process.pid, number)
        process.join(START_S)
    assert process.exitcode == (1 if number == signal.SIGINT else -number)  # KeyboardInterrupt, or ended by it
    (saved,) = (folder / "checkpoint").iterdir()
    done = int(saved.name.rpartition("-")[2])
    assert done > 4
    steps.last = done + 1
    with pytest.raises(InterruptedError):
        pretrain(ROW, config, data, tmp_path)
    assert steps == [done + 1]
