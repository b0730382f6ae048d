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
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from detransformer.models import DecoupledBertConfig, DecoupledBertForMaskedLM
from detransformer.tables.accuracy import table_iii
from detransformer.training import (
    CalibrationConfig,
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    finetune,
    finetune_all,
    make_config,
    model_rows,
    open_data,
    pretrain,
    pretrain_all,
    pretraining_table,
    row_config,
)
from detransformer.training.config import Recipe
from detransformer.training.data import TASKS
from detransformer.training.data.packing import SpecialTokens, mask_tokens
from detransformer.training.features import LengthGrouped, best_spans, question_features
from detransformer.training.loop import Run, fit
from detransformer.training.metrics import classification_scores, majority_score, squad_scores
from detransformer.training.optim import Lamb, learning_rate, parameter_groups
from detransformer.training.pretraining import MaskedLmLoss
from stopping import Stop, stop_at

TINY = PretrainConfig(
    **dict(hidden_size=16, num_heads=2, intermediate_size=32, num_steps=4, seq_len=16, global_batch_size=4),
    **dict(micro_batch_size=2, optimizer="lamb", learning_rate=1e-2, dropout=0.1, max_train_tokens=4000),
    **dict(max_valid_tokens=320, seed=5),
)
DECOUPLED = ModelRow("bert-base", 4, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data("built-in", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, data):
    """A two-layer checkpoint folder, small enough to learn in a second."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    folder = tmp_path_factory.mktemp("small")
    BertForMaskedLM(BertConfig(**sizes, vocab_size=data.vocab_size, initializer_range=0.07)).save_pretrained(folder)
    return folder


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


def test_no_weight_decay_on_bias_and_layer_norm_even_when_stacked():
    config = DecoupledBertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50,
        num_original_layers=1, num_divisions=2,
    )  # fmt: skip
    model = DecoupledBertForMaskedLM(config)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = parameter_groups(model.named_parameters(), 0.01)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and "LayerNorm" not in names[id(p)] for p in decayed["params"])
    assert any(p.ndim == 2 and names[id(p)].endswith("bias") for p in plain["params"])


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[50] == pytest.approx(0.5**0.5) and all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(0, 10, 2.0, 0.0) == 2.0


@pytest.mark.parametrize("kind", ["original", "decoupled"])
def test_masked_only_projection_equals_the_full_loss(kind):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60)
    torch.manual_seed(0)
    model = (
        BertForMaskedLM(BertConfig(**sizes))
        if kind == "original"
        else DecoupledBertForMaskedLM(DecoupledBertConfig(**sizes, num_original_layers=1, num_divisions=4))
    )
    model = model.double().eval()
    tokens = torch.randint(5, 60, (3, 20))
    batch = mask_tokens(tokens, 60, SpecialTokens(0, 1, 2, 3), 4, torch.Generator().manual_seed(0))
    batch["labels"][0, 0] = -100
    full_labels = torch.full_like(tokens, -100).scatter(1, batch["positions"], batch["labels"])
    full = F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), full_labels.flatten(), ignore_index=-100)
    ours = MaskedLmLoss(model)(**batch)
    # The loss is computed in float32 whatever the model's type.
    torch.testing.assert_close(ours.double(), full, rtol=1e-5, atol=1e-6)
    ours.backward()
    ours_grad = model.bert.embeddings.word_embeddings.weight.grad.clone()
    model.zero_grad()
    full.backward()
    torch.testing.assert_close(ours_grad, model.bert.embeddings.word_embeddings.weight.grad, rtol=1e-4, atol=1e-6)


# --- pre-training ---------------------------------------------------------------------------------------------------


def test_interrupted_pretraining_ends_bit_equal(data, tmp_path):
    config = dataclasses.replace(TINY, checkpoint_every_s=0)
    whole = pretrain(DECOUPLED, TINY, data, tmp_path / "whole")
    with pytest.raises(Stop):
        pretrain(DECOUPLED, config, data, tmp_path / "parts", on_step=stop_at(2))
    assert (tmp_path / "parts" / DECOUPLED.key / "checkpoint").is_dir()
    steps = []
    parts = pretrain(DECOUPLED, config, data, tmp_path / "parts", on_step=lambda step, loss: steps.append(step))
    assert steps == [3, 4]  # it went on, it did not start again
    assert parts.history["train_loss"].tolist() == whole.history["train_loss"].tolist()
    assert parts.valid_loss == whole.valid_loss
    models = [AutoModelForMaskedLM.from_pretrained(r.checkpoint).state_dict() for r in (whole, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not (tmp_path / "parts" / DECOUPLED.key / "checkpoint").exists()


def test_finished_rows_are_read_back_and_changed_ones_trained(data, tmp_path):
    rows = model_rows([["bert-base"], ["bert-base", 4, 4]])
    config = dataclasses.replace(TINY, num_steps=2)
    first = pretrain_all(rows, config, data, tmp_path)
    again = pretrain(rows[1], config, data, tmp_path, on_step=stop_at(1))  # would raise if it trained
    assert again.valid_loss == first[1].valid_loss
    with pytest.raises(Stop):
        pretrain(rows[1], dataclasses.replace(config, learning_rate=2e-2), data, tmp_path, on_step=stop_at(1))
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


def test_gradient_accumulation_is_the_same_step(data, small_model, tmp_path):
    losses = {8: [], None: []}
    for size, seen in losses.items():
        config = FinetuneConfig(
            **dict(seq_len=48, max_train_rows=64, max_eval_rows=10, num_epochs=1, batch_size=16, dropout=0.0),
            micro_batch_size=size,
        )
        note = lambda step, loss, seen=seen: seen.append(loss)  # noqa: E731
        finetune(small_model, "MRPC", config, data, 0, tmp_path / str(size), on_step=note)
    # float32 sums in another order, through four Adam steps
    assert losses[8] == pytest.approx(losses[None], abs=1e-4) and len(losses[8]) == 4


def test_damaged_checkpoint_and_result_name_the_remedy(data, tmp_path):
    config = dataclasses.replace(TINY, checkpoint_every_s=0)
    with pytest.raises(Stop):
        pretrain(ModelRow(), config, data, tmp_path, on_step=stop_at(1))
    folder = tmp_path / ModelRow().key
    (weights,) = (folder / "checkpoint").rglob("pytorch_model*")
    weights.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read.*delete that folder"):
        pretrain(ModelRow(), config, data, tmp_path)
    (folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json, line 1: damaged"):
        pretrain(ModelRow(), config, data, tmp_path)


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def test_finetuning_learns_the_built_in_task(data, small_model, tmp_path):
    config = FinetuneConfig(learning_rate=1e-3, num_epochs=2, seq_len=32, max_train_rows=1000, dropout=0.0)
    result = finetune(small_model, "SST-2", config, data, seed=0, output_dir=tmp_path)
    assert result["score"] > result["majority_score"] + 25
    assert result["train_rows"] == 1000 and result["eval_rows"] == 400 and result["source"] == "built-in"


@pytest.mark.parametrize("task", ["MRPC", "SQuAD"])
def test_interrupted_finetuning_ends_equal(task, data, small_model, tmp_path):
    config = FinetuneConfig(
        **dict(seq_len=48, doc_stride=8, max_train_rows=64, max_eval_rows=40, num_epochs=2, batch_size=16),
        **dict(micro_batch_size=8, checkpoint_every_s=0),
    )
    whole = finetune(small_model, task, config, data, 1, tmp_path / "whole")
    with pytest.raises(Stop):
        finetune(small_model, task, config, data, 1, tmp_path / "parts", on_step=stop_at(5))
    steps = []
    parts = finetune(
        small_model, task, config, data, 1, tmp_path / "parts", on_step=lambda step, loss: steps.append(step)
    )
    assert steps[0] == 6
    assert {k: v for k, v in parts.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    finetune(small_model, task, config, data, 1, tmp_path / "parts", on_step=stop_at(1))  # would raise if it trained


def test_what_is_no_checkpoint_is_refused(data, tmp_path):
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
        (lambda: FinetuneConfig(num_seeds=0), "num_seeds=0 is not above 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_task_is_named(data, small_model, tmp_path):
    with pytest.raises(ValueError, match="task 'QQP' is unknown: choose one of CoLA"):
        finetune(small_model, "QQP", FinetuneConfig(), data, 0, tmp_path)


@pytest.mark.parametrize("profile", ["quick", "laptop", "paper"])
def test_profiles_hold_runnable_settings(profile):
    from importlib.resources import files

    import yaml

    sections = yaml.safe_load((files("detransformer") / "profiles" / f"{profile}.yaml").read_text())
    accuracy, pretraining = sections["03_accuracy"], sections["02_pretraining"]
    config = make_config(PretrainConfig, pretraining["pretraining"])
    for row in model_rows(pretraining["rows"]):
        config.check_row(row)
    configs = {task: make_config(FinetuneConfig, recipe) for task, recipe in pretraining["finetuning"].items()}
    assert profile == "quick" or (len(configs) == 5 and min(configs[task].num_seeds for task in ("CoLA", "MRPC")) >= 2)
    make_config(CalibrationConfig, accuracy["calibration"])
    for row in model_rows({"model": "minilm"} | row["structure"] for row in accuracy["rows"]):
        row_config(BertConfig(hidden_size=384, num_hidden_layers=6), row)
    assert len(pretraining["rows"]) == {"quick": 2, "laptop": 7, "paper": 11}[profile]


def test_table_iii_has_every_published_cell_and_the_measured_ones(data, tmp_path):
    published = pd.DataFrame(
        {
            "model": ["bert-base"] * 3,
            "num_original_layers_nb": ["original", "4", "1"],
            "num_divisions_ndiv": ["original", "4", "4"],
            **{name: [50.0, 52.0, 40.0] for name in ("cola_mcc", "sst2_acc", "mrpc_acc", "mnli_acc", "squad_acc")},
        }
    )
    pretrained = pretrain_all(
        model_rows([["bert-base"], ["bert-base", 4, 4]]), dataclasses.replace(TINY, num_steps=1), data, tmp_path
    )
    config = FinetuneConfig(num_epochs=1, seq_len=16, max_train_rows=32, max_eval_rows=30, num_seeds=2)
    runs = finetune_all({r.row.label: r for r in pretrained}, {"CoLA": config}, data, tmp_path / "runs")
    assert len(runs) == 4 and runs["seed"].tolist() == [0, 1, 0, 1]
    table = table_iii(runs, published, "quick")
    assert len(table) == 15 and (table["status"] == "measured").sum() == 2
    assert set(table["status"]) == {"measured", "not run (profile quick)"}
    cola = table[(table["task"] == "CoLA") & (table["num_original_layers"] == 4)].iloc[0]
    assert cola["published"] == 52 and cola["num_seeds"] == 2 and cola["train_rows"] == 32
    assert cola["obtained_mean"] == pytest.approx(runs["score"][2:].mean())
    assert runs["note"].str.contains("built-in generated set, 32 training rows").all()


class Line(nn.Module):
    """A loss that is a multiple of one weight."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        return self.model.weight.sum() * times.sum()


def test_a_loss_that_is_not_finite_ends_the_run():
    batches = lambda step: [(1.0, {"times": torch.tensor([math.inf if step == 1 else 1.0])})]  # noqa: E731
    with pytest.raises(ValueError, match="mine: the loss is .* at step 2; lower learning_rate=0.01"):
        fit(Line(), batches, Recipe(learning_rate=0.01), 3, Run("mine"))


def test_one_of_several_processes_does_not_wait_for_the_others(monkeypatch):
    """Variables that an earlier job left, or a launcher of several processes: accelerate would wait for 30 minutes."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
        with pytest.raises(ValueError, match=f"{name}=8 is set, and a training run is one process: unset it"):
            fit(Line(), lambda step: [], Recipe(), 1, Run("mine"))
        monkeypatch.setenv(name, "1")
