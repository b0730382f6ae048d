"""Training runs side by side, bfloat16 weights with float32 copies, and what is chosen for the hardware."""

import dataclasses
import time

import pytest
import torch
from torch import nn

from detransformer.training import FinetuneConfig, ModelRow, PretrainConfig, finetune_all, pretrain_all
from detransformer.training.config import Recipe
from detransformer.training.hardware import resolve_precision
from detransformer.training.jobs import run_jobs
from detransformer.training.optim import MasterWeights, make_optimizer

TINY = PretrainConfig(
    **dict(hidden_size=16, num_heads=2, intermediate_size=32, num_steps=6, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, optimizer="adamw", learning_rate=1e-2, dropout=0.1, max_train_tokens=4000),
    **dict(max_valid_tokens=320, seed=5),
)
ROWS = [ModelRow(), ModelRow("bert-base", 4, 4)]


# --- bfloat16 weights -----------------------------------------------------------------------------------------------


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def in_bfloat16(recipe: Recipe):
    """A model in bfloat16, its float32 copies, and the optimizer that holds these."""
    model = small_model()
    copies = MasterWeights(model)
    names = (name for name, _ in model.named_parameters())
    optimizer = make_optimizer(zip(names, copies.copies, strict=True), recipe)
    copies.attach(optimizer)
    return model, copies, optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_float32_copies_take_the_steps_of_a_float32_model(name):
    recipe = Recipe(optimizer=name, learning_rate=1e-4)
    exact, (rounded, copies, master) = small_model(), in_bfloat16(recipe)
    plain = make_optimizer(exact.named_parameters(), recipe)
    for step in range(20):  # each step is below what bfloat16 resolves at these weights
        torch.manual_seed(step)
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float()
        plain.step()
        master.step()
        rounded.zero_grad()
    for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(q, p.to(torch.bfloat16))
    copies.restore_float32()
    for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p, q)


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
    assert resolve_precision("no") == "no" and resolve_precision("bf16") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, wanted in ((True, "bf16-weights"), (False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=supported: found)
        assert resolve_precision("auto") == wanted


# --- side by side ---------------------------------------------------------------------------------------------------


def square(number: int) -> int:
    time.sleep(0.2 / (number + 1))
    return number * number


def refuse(number: int) -> int:
    if number == 1:
        raise ValueError("number=1 is refused: give another.")
    time.sleep(200)
    return number


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_results_come_in_the_order_of_the_jobs(num_jobs):
    assert run_jobs(square, [(n,) for n in range(5)], num_jobs, "squares") == [0, 1, 4, 9, 16]


def test_a_job_that_fails_stops_the_others_and_says_why():
    start_s = time.monotonic()
    with pytest.raises(ValueError, match="number=1 is refused"):
        run_jobs(refuse, [(0,), (1,), (2,)], 2, "jobs")
    assert time.monotonic() - start_s < 100  # two processes start; the other job alone would take longer


def test_no_jobs_at_a_time_is_refused():
    with pytest.raises(ValueError, match="num_jobs=0 is below 1"):
        run_jobs(square, [(1,)], 0, "squares")


@pytest.mark.slow
def test_side_by_side_is_what_one_after_the_other_is(data, tmp_path):
    finetuning = {
        "MRPC": FinetuneConfig(num_epochs=1, seq_len=32, max_train_rows=32, max_eval_rows=16, num_seeds=2),
        "CoLA": FinetuneConfig(num_epochs=1, seq_len=32, max_train_rows=32, max_eval_rows=16, dropout=0.1),
    }
    tables = []
    for num_jobs in (1, 2):
        folder = tmp_path / str(num_jobs)
        results = pretrain_all(ROWS, TINY, data, folder, num_jobs=num_jobs)
        assert [r.row for r in results] == ROWS
        runs = finetune_all(
            {r.row.label: r for r in results},
            finetuning,
            data,
            folder / "runs",
            num_jobs=num_jobs,
        )
        tables.append((results, runs.drop(columns="seconds")))
    for one, two in zip(tables[0][0], tables[1][0], strict=True):
        assert one.valid_loss == pytest.approx(two.valid_loss, rel=1e-5)  # sums in another order: other threads
        assert list(one.history["train_loss"]) == pytest.approx(list(two.history["train_loss"]), rel=1e-5)
    assert list(tables[0][1]["score"]) == pytest.approx(list(tables[1][1]["score"]), abs=1e-6)
    assert list(tables[0][1]["seed"]) == list(tables[1][1]["seed"]) == [0, 1, 0] * 2
