"""Calibration: what the losses are, that it learns, resumes and is found again, and leaves its teacher alone."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from detransformer import cli
from detransformer.models import decouple, layer_kinds
from detransformer.training import (
    CalibrationConfig,
    FinetuneConfig,
    ModelRow,
    PretrainConfig,
    calibrate,
    calibration_table,
    finetune,
    open_data,
    pretrain,
)
from detransformer.training.data.packing import SpecialTokens, mask_tokens
from detransformer.training.data.text import text_data
from detransformer.training.distillation import DistillationLoss
from detransformer.training.objective import MaskedLmLoss
from stopping import Stop, stop_at
from test_cli import assert_one_sentence, call

TINY = PretrainConfig(
    **dict(hidden_size=32, num_heads=2, intermediate_size=64, num_steps=12, seq_len=16, global_batch_size=16),
    **dict(micro_batch_size=8, optimizer="adamw", learning_rate=2e-3, warmup=0.1, dropout=0.1),
    initializer_range=0.15,  # at width 32, so that layers do something before they have learned it
    **dict(max_train_tokens=20000, max_valid_tokens=640, seed=5),
)
ROW = ModelRow("bert-base", 4, 4)
SIZES = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=60)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small only wait for each other on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data("built-in", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    config = dataclasses.replace(TINY, num_steps=60, learning_rate=5e-3)
    return pretrain(ModelRow("bert-base"), config, data, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def models():
    """(teacher, its slices D O D O in eval mode, a batch) with random weights."""
    torch.manual_seed(0)
    original = BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = mask_tokens(torch.randint(5, 60, (3, 20)), 60, SpecialTokens(0, 1, 2, 3), 4, torch.Generator())
    batch["labels"][0, 0] = -100
    return original.eval(), decouple(original, 2, 4), batch


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- losses ---------------------------------------------------------------------------------------------------------


def test_losses_by_hand(models):
    original, student, batch = models
    config = CalibrationConfig(TINY, ce_weight=0.5, kl_weight=2.0, hidden_weight=3.0, temperature=1.5)
    objective = DistillationLoss(student, original, config).train()
    parts = objective.parts(**batch, names=("ce", "kl", "hidden"))
    outputs = [m(batch["input_ids"], output_hidden_states=True) for m in (student, original)]
    held = batch["labels"] != -100
    index = batch["positions"].unsqueeze(-1).expand(-1, -1, 60)
    ours, theirs = (output.logits.gather(1, index)[held] for output in outputs)  # [labels, V]
    p, q = (theirs / 1.5).softmax(-1), (ours / 1.5).softmax(-1)
    expected = {
        "ce": F.cross_entropy(ours, batch["labels"][held]),
        "kl": 1.5**2 * (p * (p / q).log()).sum(-1).mean(),
        "hidden": torch.stack(
            [
                ((a - b).norm(dim=-1) / b.norm(dim=-1)).square().mean()
                for i, (a, b) in enumerate(zip(*(output.hidden_states[1:] for output in outputs), strict=True))
                if layer_kinds(student.config)[i] == "original"
            ]
        ).mean(),
    }
    assert layer_kinds(student.config) == ("decoupled", "original") * 2
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)
    total = 0.5 * expected["ce"] + 2 * expected["kl"] + 3 * expected["hidden"]
    torch.testing.assert_close(objective(**batch), total, rtol=1e-4, atol=1e-5)
    assert torch.equal(objective.eval()(**batch), MaskedLmLoss(student)(**batch))  # evaluated as any model


def test_one_division_starts_where_the_teacher_is(models):
    original, _, batch = models
    parts = DistillationLoss(decouple(original, 2, 1), original, CalibrationConfig(TINY)).parts(
        **batch, names=("ce", "kl", "hidden")
    )
    assert parts["kl"].abs() < 1e-6 and parts["hidden"] < 1e-10 and parts["ce"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_student_is_trained_and_saved(models, dtype):
    original, student, batch = models
    objective = DistillationLoss(student.to(dtype), original.to(dtype), CalibrationConfig(TINY)).train()
    loss = objective(**batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert len(objective.state_dict()) == len(student.state_dict())
    assert not original.training and all(p.grad is None for p in original.parameters())
    assert all(p.grad is not None for p in objective.parameters())


def test_plain_calibration_asks_no_teacher(models):
    original, student, batch = models
    config = CalibrationConfig(TINY, kl_weight=0, hidden_weight=0)
    original.forward = original.bert.forward = None  # would fail
    assert config.method == "plain"
    torch.testing.assert_close(
        DistillationLoss(student, original, config).train()(**batch), MaskedLmLoss(student)(**batch)
    )


# --- calibration ----------------------------------------------------------------------------------------------------


def test_it_learns_and_leaves_the_teacher_alone(data, teacher, tmp_path):
    before = files(teacher.checkpoint)
    config = CalibrationConfig(dataclasses.replace(TINY, num_steps=40, dropout=0.0), ce_weight=0)
    distilled = calibrate(teacher, ROW, config, data, tmp_path)
    assert files(teacher.checkpoint) == before
    losses = distilled.history["train_loss"]
    assert losses.tail(5).mean() < 0.1 * losses.head(2).mean()  # it comes to say what its teacher says
    assert distilled.teacher_valid_loss == pytest.approx(teacher.valid_loss, rel=1e-5)
    errors = [abs(x - distilled.teacher_valid_loss) for x in (distilled.valid_loss, distilled.sliced_valid_loss)]
    assert errors[0] < errors[1]
    assert (distilled.method, distilled.tokens) == ("distilled", 40 * 16 * 16)
    model = AutoModelForMaskedLM.from_pretrained(distilled.checkpoint)
    assert model.config.num_divisions == 4 and (distilled.checkpoint / "tokenizer.json").is_file()
    again = calibrate(teacher, ROW, config, data, tmp_path, on_step=stop_at(1))  # would raise if it trained
    assert again.valid_loss == distilled.valid_loss and again.identity == distilled.identity
    finetuned = finetune(
        distilled, "SST-2", FinetuneConfig(max_train_rows=32, max_eval_rows=32, num_epochs=1), data, 0, tmp_path / "t"
    )
    assert math.isfinite(finetuned["score"])


@pytest.mark.parametrize("precision", ["no", "bf16-weights"])
def test_interrupted_calibration_ends_bit_equal(data, teacher, tmp_path, precision):
    recipe = dataclasses.replace(TINY, num_steps=4, mixed_precision=precision)
    row = ModelRow("bert-base", 4, 4, "full", "middle")
    whole = calibrate(teacher, row, CalibrationConfig(recipe), data, tmp_path / "whole")
    config = CalibrationConfig(dataclasses.replace(recipe, checkpoint_every_s=0))
    with pytest.raises(Stop):
        calibrate(teacher, row, config, data, tmp_path / "parts", on_step=stop_at(2))
    steps = []
    parts = calibrate(teacher, row, config, data, tmp_path / "parts", on_step=lambda step, loss: steps.append(step))
    assert steps == [3, 4] and parts.identity == whole.identity
    assert parts.history["train_loss"].tolist() == whole.history["train_loss"].tolist()
    assert parts.valid_loss == whole.valid_loss
    states = [AutoModelForMaskedLM.from_pretrained(r.checkpoint).state_dict() for r in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["bert.encoder.layer.0.attention.self.query.weight"].dtype == torch.float32
    assert not list((tmp_path / "parts").glob("*/checkpoint"))


def test_one_division_and_no_training_is_the_teacher(data, teacher, tmp_path):
    recipe = dataclasses.replace(TINY, num_steps=1, learning_rate=1e-12, dropout=0.0)
    result = calibrate(teacher, ModelRow("bert-base", 4, 1), CalibrationConfig(recipe, ce_weight=0), data, tmp_path)
    assert result.sliced_valid_loss == pytest.approx(result.teacher_valid_loss, abs=1e-5)
    assert result.history["train_loss"][0] < 1e-6
    assert result.valid_loss == pytest.approx(result.teacher_valid_loss, abs=1e-4)


def test_table(data, teacher, tmp_path):
    results = [
        calibrate(teacher, ROW, CalibrationConfig(recipe, kl_weight=weight, hidden_weight=weight), data, tmp_path)
        for recipe in (dataclasses.replace(TINY, num_steps=steps) for steps in (4, 2))
        for weight in (1.0, 0.0)
    ]
    scratch = dataclasses.replace(teacher, row=ROW)
    table = calibration_table(results, [scratch, teacher])
    assert table["method"].tolist() == ["none", "plain", "plain", "distilled", "distilled", "from scratch"]
    assert table["start"].tolist() == ["slices"] * 5 + ["scratch"]
    assert table["tokens"].tolist() == [0, 512, 1024, 512, 1024, 60 * 256]
    assert table["tokens_share"].tolist() == pytest.approx([0, 2 / 60, 4 / 60, 2 / 60, 4 / 60, 1])
    assert table["teacher_valid_loss"].nunique() == 1 and (table["row"] == ROW.label).all()
    assert table["valid_loss"][0] == results[0].sliced_valid_loss
    assert table["perplexity"].tolist() == pytest.approx([math.exp(x) for x in table["valid_loss"]])
    assert calibration_table([]).empty


def test_what_cannot_be_calibrated_is_one_sentence(data, teacher, tmp_path):
    config = CalibrationConfig(TINY)
    for bad, words in (
        (dict(kl_weight=-1.0), "kl_weight=-1.0"),
        (dict(ce_weight=0, kl_weight=0, hidden_weight=0), "all 0"),
        (dict(temperature=0.0), "temperature=0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            CalibrationConfig(TINY, **bad)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "headless")
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "small")
    decouple(BertForMaskedLM(BertConfig(**SIZES)), 2, 4).save_pretrained(tmp_path / "decoupled")
    shutil.copytree(teacher.checkpoint, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for who, row, words in (
        (teacher, ModelRow("bert-base"), "is not decoupled"),
        (teacher, ModelRow("bert-large", 6, 4), "cannot teach bert-large"),
        (teacher, ModelRow("bert-base", 4, 5), "num_divisions=5 does not divide"),
        (tmp_path, ROW, "has no model.safetensors"),
        (tmp_path / "headless", ROW, "masked-LM head"),
        (tmp_path / "small", ROW, "another vocabulary"),
        (tmp_path / "other", ROW, "another vocabulary"),
        (tmp_path / "decoupled", ROW, "decoupled already"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(who, row, config, data, tmp_path / "out")


# --- from the command line ------------------------------------------------------------------------------------------

SHORT = ["--steps", 3, "--batch-size", 4, "--seq-len", 16, "--learning-rate", "1e-3", "--precision", "no"]


def test_a_checkpoint_and_a_text_file_make_a_calibrated_model(data, teacher, tmp_path, capsys):
    articles = [article for article, _ in zip(data.source.articles("train"), range(60), strict=False)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(articles[:30]))
    (tmp_path / "b.txt").write_text("\n".join(articles[30:]))
    texts = ["--text", tmp_path / "texts", "--text", tmp_path / "b.txt"]
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in ("calibrate", teacher.checkpoint, tmp_path / "ours", *texts, *SHORT)])
    assert end.value.code == 0
    assert "calibrated (distilled, 192 tokens" in capsys.readouterr().out
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert layer_kinds(model.config).count("original") == 4
    assert json.loads((tmp_path / "ours" / "calibration.json").read_text())["method"] == "distilled"
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab() == data.tokenizer.get_vocab()
    assert not (tmp_path / "ours.work").exists()
    code, stderr = call(capsys, "calibrate", teacher.checkpoint, tmp_path / "ours", *texts, *SHORT)
    assert_one_sentence(code, stderr, "exists already", "--force")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "many"], ["--steps many", "whole number"]),
        (["--num-divisions", 5], ["num_divisions=5", "hidden_size=32"]),
        (["--kl-weight", -1], ["kl_weight=-1"]),
        (["--original-placement", "outer"], ["--original-placement outer"]),
        (["--text", "/nowhere.txt"], ["/nowhere.txt", "text file"]),
        (["--precision", "int4"], ["--precision int4"]),
    ],
)
def test_bad_words_are_one_sentence(teacher, tmp_path, capsys, arguments, words):
    code, stderr = call(capsys, "calibrate", teacher.checkpoint, tmp_path / "ours", *arguments)
    assert_one_sentence(code, stderr, *words)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "bare")
    code, stderr = call(capsys, "calibrate", tmp_path / "bare", tmp_path / "ours", "--source", "built-in")
    assert_one_sentence(code, stderr, "tokenizer")


def test_text_files_hold_out_every_twentieth_line(data, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(45)) + "\n\n")
    text = text_data([tmp_path], data.tokenizer, tmp_path / "cache").source
    assert list(text.articles("validation")) == ["line 19", "line 39"]
    assert len(list(text.articles("train"))) == 43
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    assert list(text.articles("train")) == ["one", "two"] and list(text.articles("validation")) == ["three"]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(text.articles("train"))
