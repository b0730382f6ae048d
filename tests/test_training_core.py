"""Training: LAMB by hand, the masked-only loss, schedules, exact resume, metrics, SQuAD spans, errors, Table III."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pretraining_studies import loss_table
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from detransformer.models import decouple
from detransformer.profiles import load_settings
from detransformer.record.published import published
from detransformer.tables.accuracy import table_iii
from detransformer.training import (
    CalibrationConfig,
    CausalConfig,
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    finetune,
    finetune_all,
    make_config,
    model_rows,
    pretrain,
    pretrain_all,
    pretraining_table,
    row_config,
)
from detransformer.training.config import Recipe
from detransformer.training.data import TASKS
from detransformer.training.data.packing import SpecialTokens, mask_tokens
from detransformer.training.features import LengthGrouped, best_spans, question_features
from detransformer.training.images import ImageConfig
from detransformer.training.loop import Objective, Run, fit
from detransformer.training.metrics import classification_scores, majority_score, squad_scores
from detransformer.training.optim import Lamb, learning_rate, parameter_groups
from detransformer.training.pretraining import masked_lm_loss

TINY = PretrainConfig(
    **dict(hidden_size=16, num_heads=2, intermediate_size=32, num_steps=4, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, optimizer="lamb", learning_rate=1e-2, dropout=0.1, max_train_tokens=4000),
    **dict(max_valid_tokens=320, seed=5),
)
DECOUPLED = ModelRow("bert-base", 4, 4)


# --- optimisation ---------------------------------------------------------------------------------------------------


def test_lamb_steps_match_a_hand_computation():
    weights = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = Lamb([weights], lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1)
    weights.grad = torch.tensor([2.0, -1.0], dtype=torch.float64)
    optimizer.step()
    # First step: mean_hat / sqrt(square_hat) = sign(grad); plus 0.1 * w = (1.3, -0.6); ratio |w| / |that|.
    ratio = 5 / math.hypot(1.3, 0.6)
    first = np.array([3 - 0.1 * ratio * 1.3, 4 + 0.1 * ratio * 0.6])
    np.testing.assert_allclose(weights.detach().numpy(), first, rtol=1e-12)
    weights.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    optimizer.step()
    mean = (0.9 * 0.1 * np.array([2, -1]) + 0.1) / (1 - 0.9**2)
    square = (0.99 * 0.01 * np.array([4, 1]) + 0.01) / (1 - 0.99**2)
    update = mean / np.sqrt(square) + 0.1 * first
    second = first - 0.1 * np.linalg.norm(first) / np.linalg.norm(update) * update
    np.testing.assert_allclose(weights.detach().numpy(), second, rtol=1e-12)


def test_lamb_without_weight_decay_is_adam():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    lamb = Lamb([{"params": [ours], "weight_decay": 0.0}], lr=0.01, eps=1e-8)
    adam = torch.optim.Adam([theirs], lr=0.01, eps=1e-8)
    for _ in range(5):
        ours.grad = torch.randn(3)
        theirs.grad = ours.grad.clone()
        lamb.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_no_weight_decay_on_bias_and_layer_norm_even_when_stacked(family):
    if family == "bert":
        model = decouple(BertForMaskedLM(BertConfig(**SMALL)), 1, 2)
    else:
        model = decouple(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60)), 1, 2)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = parameter_groups(model.named_parameters(), 0.01)
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in (decayed, plain))
    assert all(name.endswith("weight") and "LayerNorm" not in name and ".ln_" not in name for name in decayed)
    assert any(p.ndim == 2 and name in plain for name, p in model.named_parameters())


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[50] == pytest.approx(0.5**0.5) and all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(0, 10, 2.0, 0.0) == 2.0


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_loss_at_masked_positions_is_the_whole_sequences_loss(decoupled):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL))
    model = (decouple(model, 1, 4) if decoupled else model).double().eval()
    tokens = torch.randint(5, 60, (3, 20))
    batch = mask_tokens(tokens, 60, SpecialTokens(0, 1, 2, 3), 4, torch.Generator().manual_seed(0))
    batch["labels"][0, 0] = -100
    full_labels = torch.full_like(tokens, -100).scatter(1, batch["positions"], batch["labels"])
    full = F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), full_labels.flatten(), ignore_index=-100)
    ours = masked_lm_loss(model, **batch)
    # The loss is computed in float32 whatever the model's type.
    torch.testing.assert_close(ours.double(), full, rtol=1e-5, atol=1e-6)
    words = model.bert.embeddings.word_embeddings.weight
    (ours_grad,), (full_grad,) = torch.autograd.grad(ours, words), torch.autograd.grad(full, words)
    torch.testing.assert_close(ours_grad, full_grad, rtol=1e-4, atol=1e-6)


# --- pre-training ---------------------------------------------------------------------------------------------------


def test_finished_rows_are_read_back_and_changed_ones_trained(data, steps, tmp_path):
    rows = model_rows([["bert-base"], ["bert-base", 4, 4]])
    config = dataclasses.replace(TINY, num_steps=2)
    first = pretrain_all(rows, config, data, tmp_path)
    steps.clear()
    again = pretrain(rows[1], config, data, tmp_path)
    assert not steps and again.valid_loss == first[1].valid_loss
    steps.interrupt(0, pretrain, rows[1], dataclasses.replace(config, learning_rate=2e-2), data, tmp_path)
    losses, summary = loss_table(first), pretraining_table(first)
    assert losses["row"].unique().tolist() == ["bert-base original", "bert-base Nb=4, Ndiv=4"]
    assert losses["tokens"].tolist() == [64, 128, 64, 128]
    assert summary["num_original_layers"].isna().tolist() == [True, False]
    assert "reduced width: 12 layers, hidden 16, 128 tokens" in summary["note"][0] and "built-in" in summary["note"][0]
    # Same first batch, and the decoupled weights are slices of the same first weights: both near log(vocabulary).
    assert losses["train_loss"][0] == pytest.approx(math.log(data.vocab_size), abs=0.7)


def test_losses_of_a_long_run_are_means_of_as_many_steps():
    steps = np.arange(1, 451)
    history = pd.DataFrame({"step": steps, "tokens": 64 * steps, "train_loss": steps.astype(float)})
    table = loss_table([SimpleNamespace(history=history, row=ModelRow("bert-base", 4, 4))])
    assert len(table) == 150 and table["step"].tolist()[:2] == [3, 6] and table["tokens"].iloc[-1] == 64 * 450
    assert table["train_loss"].tolist()[:2] == [2.0, 5.0]


def test_gradient_accumulation_is_the_same_step(data, small_bert, tmp_path):
    losses = {}
    config = FinetuneConfig(seq_len=48, max_train_rows=64, max_eval_rows=10, num_epochs=1, batch_size=16, dropout=0.0)
    for size in (8, None):
        config = dataclasses.replace(config, micro_batch_size=size)
        finetune(small_bert, "MRPC", config, data, 0, tmp_path / str(size))
        losses[size] = pd.read_csv(tmp_path / str(size) / "history.csv")["train_loss"].tolist()
    # float32 sums in another order, through four Adam steps
    assert losses[8] == pytest.approx(losses[None], abs=1e-4) and len(losses[8]) == 4


def test_damaged_checkpoint_and_result_name_the_remedy(data, steps, tmp_path):
    config = dataclasses.replace(TINY, checkpoint_every_s=0)
    steps.interrupt(1, pretrain, ModelRow(), config, data, tmp_path)
    folder = tmp_path / ModelRow().key
    (weights,) = (folder / "checkpoint").rglob("pytorch_model*")
    weights.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read.*delete that folder"):
        pretrain(ModelRow(), config, data, tmp_path)
    (folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json, line 1: damaged"):
        pretrain(ModelRow(), config, data, tmp_path)


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def test_finetuning_learns_the_built_in_task(data, small_bert, tmp_path):
    config = FinetuneConfig(learning_rate=1e-3, num_epochs=2, seq_len=32, max_train_rows=1000, dropout=0.0)
    result = finetune(small_bert, "SST-2", config, data, seed=0, output_dir=tmp_path)
    assert result["score"] > result["majority_score"] + 25
    assert result["train_rows"] == 1000 and result["eval_rows"] == 400 and result["source"] == "built-in"


def test_what_is_no_task_or_no_checkpoint_is_refused(data, small_bert, tmp_path):
    with pytest.raises(ValueError, match="task 'QQP' is unknown: choose one of CoLA"):
        finetune(small_bert, "QQP", FinetuneConfig(), data, 0, tmp_path)
    with pytest.raises(ValueError, match="has no model.safetensors: pre-train first"):
        finetune(tmp_path, "CoLA", FinetuneConfig(), data, 0, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ValueError, match="is no checkpoint of BERT"):
        finetune(tmp_path, "CoLA", FinetuneConfig(), data, 0, tmp_path / "out")


def test_squad_windows_keep_the_answer_and_map_back_to_the_text(data):
    rows = data.task("SQuAD", None, 200).validation
    features = question_features(rows, data.tokenizer, seq_len=32, doc_stride=8)
    assert len(features) > len(rows)  # the contexts do not fit one window
    held = set()
    for feature in features:
        row = rows[feature.row]
        answer, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        first, last = feature.label
        if (first, last) != (0, 0):
            held.add(feature.row)
            span = feature.offsets[first, 0], feature.offsets[last, 1]
            assert row["context"][span[0] : span[1]] == answer and span[0] == start
    assert held == set(range(len(rows)))


def test_best_span_is_the_best_of_all_allowed():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(3, 12, generator=generator), torch.randn(3, 12, generator=generator)
    in_context = torch.ones(3, 12, dtype=torch.bool)
    in_context[:, :4] = False
    for b, (s, e, score) in enumerate(zip(*best_spans(start, end, in_context, 3), strict=True)):
        expected = max((start[b, i] + end[b, j]).item() for i in range(4, 12) for j in range(i, min(i + 3, 12)))
        assert 4 <= s <= e < s + 3 and score.item() == pytest.approx(expected)


def test_metrics_against_known_values():
    scores = classification_scores(TASKS["CoLA"], [1, 1, 0, 0], [1, 0, 0, 0])
    assert scores["accuracy"] == 75 and scores["mcc"] == pytest.approx(100 / 3**0.5)
    assert (
        majority_score(TASKS["SST-2"], {"label": [1, 1, 0]}) == pytest.approx(200 / 3)
        and majority_score(TASKS["CoLA"], {"label": [1]}) == 0
    )
    rows = [
        {"id": "a", "answers": {"text": ["the Oslo fjord", "Oslo"], "answer_start": [0, 4]}},
        {"id": "b", "answers": {"text": ["red kite"], "answer_start": [0]}},
    ]
    assert squad_scores({"a": "Oslo!", "b": "kite"}, rows) == pytest.approx(
        {"exact_match": 50, "f1": 100 * (1 + 2 / 3) / 2}
    )


def test_epoch_batches_cover_all_rows_once():
    lengths = [i % 17 for i in range(100)]
    order, again = LengthGrouped(lengths, 8, seed=1), LengthGrouped(lengths, 8, seed=1)
    first, second = ([order.rows(step).tolist() for step in range(start, start + 13)] for start in (0, 13))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(100)) and first != second
    assert again.rows(20).tolist() == second[7] and again.rows(3).tolist() == first[3]


# --- configuration and tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelRow("bert-huge"), "'bert-huge' is unknown: choose one of bert-base, bert-large"),
        (lambda: ModelRow("bert-base", 4), "half decoupled"),
        (lambda: PretrainConfig(optimizer="sgd"), "optimizer='sgd' is unknown: choose one of lamb, adamw"),
        (lambda: PretrainConfig(micro_batch_size=100), "does not divide global_batch_size=65536"),
        (lambda: PretrainConfig(seq_len=1024), "seq_len=1024 is outside 8..512"),
        (lambda: PretrainConfig(warmup=2.0), "warmup=2.0 is outside 0..1"),
        (lambda: PretrainConfig(hidden_size=100, num_heads=3).check_row(ModelRow()), "num_heads=3 does not"),
        (lambda: PretrainConfig(hidden_size=36, num_heads=4).check_row(ModelRow("bert-base", 4, 8)), "num_divisions=8"),
        (lambda: FinetuneConfig(seq_len=64, doc_stride=40), "doc_stride=40 is outside 0..31"),
        (lambda: FinetuneConfig(max_train_rows=0), "max_train_rows=0 is not above 0"),
        (lambda: make_config(FinetuneConfig, {"lr": 1}), "has no setting 'lr': choose among optimizer, learning_rate"),
        (lambda: CausalConfig(num_heads=3), "num_heads=3 does not divide hidden_size=128"),
        (lambda: CausalConfig(seq_len=4), "seq_len=4 is outside 8..1024"),
        (lambda: ImageConfig(patch_size=5), "patch_size=5 does not divide image_size=32"),
        (lambda: ImageConfig(num_heads=5), "num_heads=5 does not divide hidden_size=192"),
        (lambda: ImageConfig(mixed_precision="int8"), "mixed_precision='int8' is unknown"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("profile", ["quick", "laptop", "paper"])
def test_profiles_hold_runnable_settings(profile):
    pretraining, accuracy = (load_settings(profile, name) for name in ("02_pretraining", "03_accuracy"))
    config = make_config(PretrainConfig, pretraining["pretraining"])
    for row in model_rows(pretraining["rows"]):
        config.check_row(row)
    configs = {task: make_config(FinetuneConfig, recipe) for task, recipe in pretraining["finetuning"].items()}
    assert profile == "quick" or (len(configs) == 5 and min(configs[task].num_seeds for task in ("CoLA", "MRPC")) >= 2)
    make_config(CalibrationConfig, accuracy["calibration"])
    for row in model_rows({"model": "minilm"} | row["structure"] for row in accuracy["rows"]):
        row_config(BertConfig(hidden_size=384, num_hidden_layers=6), row)
    assert len(pretraining["rows"]) == {"quick": 2, "laptop": 7, "paper": 11}[profile]


def test_every_model_is_fine_tuned_on_every_task_with_every_seed(data, steps, tmp_path):
    rows, short = model_rows([["bert-base"], ["bert-base", 4, 4]]), dataclasses.replace(TINY, num_steps=1)
    pretrained = {r.row.label: r for r in pretrain_all(rows, short, data, tmp_path)}
    config = FinetuneConfig(num_epochs=1, seq_len=16, max_train_rows=32, max_eval_rows=30, num_seeds=2)
    runs = finetune_all(pretrained, {"CoLA": config}, data, tmp_path / "runs")
    assert runs["seed"].tolist() == [0, 1, 0, 1] and runs["num_divisions"].tolist()[2:] == [4, 4]
    assert runs["note"].str.contains("built-in generated set, 32 training rows").all()
    steps.clear()
    again = finetune_all(pretrained, {"CoLA": config}, data, tmp_path / "runs")
    assert not steps and again["score"].tolist() == runs["score"].tolist()
    table = table_iii(runs, published("table_iii"), "quick")
    measured = table[table["status"] == "measured"]
    assert measured["task"].tolist() == ["CoLA"] * 2 and set(measured["num_seeds"]) == {2}
    assert set(measured["obtained_mean"]) == set(runs.groupby("row")["score"].mean())


LINE = Objective(nn.Linear(1, 1, bias=False), lambda model, times: model.weight.sum() * times.sum())


def test_a_loss_that_is_not_finite_ends_the_run():
    batches = lambda step: [(1.0, {"times": torch.tensor([math.inf if step == 1 else 1.0])})]  # noqa: E731
    with pytest.raises(ValueError, match="mine: the loss is .* at step 2; lower learning_rate=0.01"):
        fit(LINE, batches, Recipe(learning_rate=0.01), 3, Run("mine"))


def test_one_of_several_processes_does_not_wait_for_the_others(monkeypatch):
    """Variables that an earlier job left, or a launcher of several processes: accelerate would wait for 30 minutes."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
        with pytest.raises(ValueError, match=f"{name}=8 is set, and a training run is one process: unset it"):
            fit(LINE, lambda step: [], Recipe(), 1, Run("mine"))
        monkeypatch.setenv(name, "1")
