"""Training runs side by side, bfloat16 weights with float32 copies, and what is chosen for the hardware."""

import copy
import dataclasses
import time

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from detransformer.training import FinetuneConfig, ModelRow, PretrainConfig, finetune_all, open_data, pretrain_all
from detransformer.training.hardware import autocast_of, resolve_precision
from detransformer.training.jobs import advance, run_jobs
from detransformer.training.optim import MasterWeights, make_optimizer, parameter_groups

TINY = PretrainConfig(
    **dict(hidden_size=16, num_heads=2, intermediate_size=32, num_steps=6, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, optimizer="adamw", learning_rate=1e-2, dropout=0.1, max_train_tokens=4000),
    **dict(max_valid_tokens=320, seed=5),
)
ROWS = [ModelRow(), ModelRow("bert-base", 4, 4)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data("built-in", tmp_path_factory.mktemp("cache"))


# --- bfloat16 weights -----------------------------------------------------------------------------------------------


def small_pair():
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    rounded = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    rounded.load_state_dict(exact.state_dict())
    return exact, rounded.to(torch.bfloat16)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_float32_copies_take_the_steps_of_a_float32_model(name):
    exact, rounded = small_pair()
    plain, master = make_optimizer(exact, name, 1e-4, 0.01), make_optimizer(rounded, name, 1e-4, 0.01)
    assert isinstance(master, MasterWeights)
    master.set_copies(dict(zip(rounded.parameters(), [p.detach() for p in exact.parameters()], strict=True)))
    for step in range(20):  # each step is below what bfloat16 resolves at these weights
        torch.manual_seed(step)
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float()
        plain.step()
        master.step()
        master.zero_grad()
    assert all(q.grad is None for q in rounded.parameters())
    for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(q, p.to(torch.bfloat16))
    master.restore_float32()
    for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p, q)


def test_float32_copies_are_saved_and_loaded():
    _, one = small_pair()
    _, two = small_pair()
    make = lambda model: make_optimizer(model, "adamw", 1e-3, 0.01)  # noqa: E731
    first, second = make(one), make(two)
    for step in range(3):
        for q in one.parameters():
            q.grad = torch.full_like(q, 0.1 * (step + 1))
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file: no shared memory
    for optimizer, model in ((first, one), (second, two)):
        for q in model.parameters():
            q.grad = torch.full_like(q, -0.2)
        optimizer.step()
        optimizer.restore_float32()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rates_and_groups_reach_the_copies():
    _, rounded = small_pair()
    optimizer = MasterWeights(parameter_groups(rounded, 0.01), lambda groups: AdamW(groups, lr=1.0))
    before = [copy.clone() for copy in optimizer.copies]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for q in rounded.parameters():
        q.grad = torch.ones_like(q)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.copies, strict=True))
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.01]


def test_training_in_bfloat16_weights_learns_as_in_float32_and_leaves_float32(data, tmp_path):
    config = dataclasses.replace(TINY, num_steps=60, dropout=0.0, learning_rate=3e-3)
    results = {}
    for precision in ("no", "bf16-weights"):
        chosen = dataclasses.replace(config, mixed_precision=precision)
        (results[precision],) = pretrain_all([ROWS[1]], chosen, data, tmp_path / precision)
        assert results[precision].precision == precision
    exact, rounded = results["no"], results["bf16-weights"]
    fallen = exact.history["train_loss"].iloc[0] - exact.valid_loss
    assert fallen > 0.5
    assert abs(rounded.valid_loss - exact.valid_loss) < 0.05 * fallen  # rounding, not another optimisation
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(rounded.checkpoint / "model.safetensors").values()} == {torch.float32}


def test_auto_is_what_the_machine_has(monkeypatch):
    assert resolve_precision("no") == "no" and resolve_precision("fp16") == "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, wanted in ((True, "bf16-weights"), (False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=supported: found)
        assert resolve_precision("auto") == wanted
    assert autocast_of("bf16-weights") == "no" and autocast_of("bf16") == "bf16"


# --- side by side ---------------------------------------------------------------------------------------------------


def square(number: int) -> int:
    time.sleep(0.2 / (number + 1))
    advance()
    return number * number


def refuse(number: int) -> int:
    if number == 1:
        raise ValueError("number=1 is refused: give another.")
    time.sleep(200)
    return number


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_results_come_in_the_order_of_the_jobs(num_jobs):
    assert run_jobs(square, [(n,) for n in range(5)], num_jobs, "squares", 5, "job") == [0, 1, 4, 9, 16]


def test_a_job_that_fails_stops_the_others_and_says_why():
    start_s = time.monotonic()
    with pytest.raises(ValueError, match="number=1 is refused"):
        run_jobs(refuse, [(0,), (1,), (2,)], 2, "jobs", 3, "job")
    assert time.monotonic() - start_s < 100  # two processes start; the other job alone would take longer


def test_no_jobs_at_a_time_is_refused():
    with pytest.raises(ValueError, match="num_jobs=0 is below 1"):
        run_jobs(square, [(1,)], 0, "squares", 1, "job")


def test_side_by_side_is_what_one_after_the_other_is(data, tmp_path):
    finetuning = {
        "MRPC": FinetuneConfig(num_epochs=1, seq_len=32, max_train_rows=32, max_eval_rows=16, dropout=0.1),
        "CoLA": FinetuneConfig(num_epochs=1, seq_len=32, max_train_rows=32, max_eval_rows=16, dropout=0.1),
    }
    tables = []
    for num_jobs in (1, 2):
        folder = tmp_path / str(num_jobs)
        results = pretrain_all(ROWS, TINY, data, folder, num_jobs=num_jobs)
        assert [r.row for r in results] == ROWS
        runs = finetune_all(results, finetuning, {"MRPC": 2, "CoLA": 1}, data, folder / "runs", num_jobs=num_jobs)
        tables.append((results, runs.drop(columns="seconds")))
    for one, two in zip(tables[0][0], tables[1][0], strict=True):
        assert one.valid_loss == pytest.approx(two.valid_loss, rel=1e-5)  # sums in another order: other threads
        assert list(one.history["train_loss"]) == pytest.approx(list(two.history["train_loss"]), rel=1e-5)
    assert list(tables[0][1]["score"]) == pytest.approx(list(tables[1][1]["score"]), abs=1e-6)
    assert list(tables[0][1]["seed"]) == list(tables[1][1]["seed"]) == [0, 1, 0] * 2
