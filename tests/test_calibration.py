"""Calibration: the closed form, the losses; that it learns, is found again, leaves its teacher alone."""

import dataclasses
import gzip
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from accuracy_studies import calibration_curve, calibration_table
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
)

from detransformer.models import decouple, layer_kinds
from detransformer.models.configuration import FAMILIES
from detransformer.models.naming import layers_of
from detransformer.opening import load_model, open_checkpoint
from detransformer.training import (
    CalibrationConfig,
    FinetuneConfig,
    ModelRow,
    calibrate,
    finetune,
)
from detransformer.training.calibration import LayerErrors, distance
from detransformer.training.data.packing import CutBatches, SpecialTokens, mask_tokens
from detransformer.training.data.text import LONGEST, TextFiles
from detransformer.training.loop import Objective
from detransformer.training.refit import refit
from test_cli import assert_one_sentence, call

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = CalibrationConfig(
    **dict(num_steps=6, global_batch_size=16, micro_batch_size=8, seq_len=16, learning_rate=2e-3, seed=5),
    **dict(fit_sequences=300, max_train_tokens=20000, max_valid_tokens=640),
)
ROW = ModelRow("bert-base", 2, 4)
SIZES = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=60)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """Folder of a random BERT of four layers with its masked-LM head."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher")
    sizes = SIZES | dict(hidden_size=32, intermediate_size=64, vocab_size=data.vocab_size)
    BertForMaskedLM(BertConfig(**sizes, initializer_range=0.1)).save_pretrained(folder)
    data.save_tokenizer(folder)
    return folder


def small(family: str, ending: str, **sizes) -> PreTrainedModel:
    """A random model of four layers, of a family and with a head, without dropout."""
    stem = FAMILIES[family].stem
    options = SIZES | dict(pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) | sizes
    if family == "distilbert":
        options |= dict(hidden_dim=options["intermediate_size"], dropout=0.0, attention_dropout=0.0)
    return getattr(transformers, stem + ending)(getattr(transformers, f"{stem}Config")(**options))


@pytest.fixture(params=["bert", "roberta", "distilbert"])
def models(request):
    """(teacher, its slices D O D O, both in eval mode, masked tokens) with random weights."""
    torch.manual_seed(0)
    original = small(request.param, "ForMaskedLM")
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = mask_tokens(torch.randint(5, 60, (3, 20)), 60, SpecialTokens(0, 1, 2, 3), 4, torch.Generator())
    return original.eval(), decouple(original, 2, 4).eval(), batch


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- closed form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["full", "narrow"])
def test_the_closed_form_comes_closer_on_text_it_has_not_read(models, width):
    original = models[0]
    student = decouple(original, 2, 4, width).eval()
    seen, unseen = torch.randint(5, 60, (300, 20)), torch.randint(5, 60, (64, 20))
    depths = range(1, 5)
    before = distance(student, original, unseen, depths)
    refit(student.base_model, original.base_model, seen)
    after = distance(student, original, unseen, depths)
    assert after[0][0] < 0.5 * before[0][0]  # of a random model later layers amplify whatever is left


def test_the_closed_form_of_one_division_stays_the_teacher(models):
    original = models[0]
    student = decouple(original, 2, 1).eval()
    ids = torch.randint(5, 60, (300, 20))
    refit(student.base_model, original.base_model, ids)
    errors, cosine = distance(student, original, ids[:32], range(1, 5))
    assert max(errors) < 1e-3 and cosine > 0.999


# --- losses ---------------------------------------------------------------------------------------------------------


def test_losses_by_hand(models):
    original, student, batch = models
    loss = partial(LayerErrors(original, range(1, 5), [0, 2]), student)
    outputs = [m(batch["input_ids"], output_hidden_states=True) for m in (student, original)]
    index = batch["positions"].unsqueeze(-1).expand(-1, -1, 60)
    ours, theirs = ((output.logits.gather(1, index) / 2).softmax(-1) for output in outputs)  # [B, K, V]
    divergence = 2**2 * (theirs * (theirs / ours).log()).sum(-1).mean()

    def error(x, y):
        return ((x - y).norm() / y.norm()) ** 2

    hidden, targets = (output.hidden_states for output in outputs)
    together = sum(error(x, y) for x, y in zip(hidden[1:], targets[1:], strict=True)) / 4
    torch.testing.assert_close(loss(**batch, alone=torch.tensor(False)), together + divergence, rtol=1e-4, atol=1e-5)
    layers = layers_of(student.base_model)
    alone = sum(error(layers[i](targets[i]), targets[i + 1]) for i in (0, 2)) / 2
    torch.testing.assert_close(loss(**batch, alone=torch.tensor(True)), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_student_is_trained_and_saved(models, dtype):
    original, student, batch = models
    objective = Objective(student.to(dtype), LayerErrors(original.to(dtype), range(1, 5), [0, 2])).train()
    loss = objective(**batch, alone=torch.tensor(False))
    loss.backward()
    assert loss.dtype == torch.float32
    assert len(objective.state_dict()) == len(student.state_dict())
    assert not original.training and all(p.grad is None for p in original.parameters())
    assert all(p.grad is not None for p in layers_of(student.base_model).parameters())


def test_batches_have_every_token_in_pieces_of_several_lengths():
    text = np.arange(5, 5 + 8 * 12, dtype=np.uint16).reshape(8, 12).repeat(1, axis=0)
    sequences = np.concatenate([np.full((8, 1), 1), text, np.full((8, 1), 2)], axis=1).astype(np.uint16)
    batches = CutBatches(sequences, 101, SpecialTokens(0, 1, 2, 3), seed=4)
    seen, shapes = [], []
    for index in range(3):
        ids = batches.train_batch(index, 2)["input_ids"]
        assert (ids[:, 0] == 1).all() and (ids[:, -1] == 2).all()
        shapes.append(tuple(ids.shape))
        seen += ids[:, 1:-1].flatten().tolist()
    assert shapes == [(2, 14), (4, 8), (12, 4)] and len(set(seen)) == len(seen) == 6 * 12


# --- calibration ----------------------------------------------------------------------------------------------------


def test_it_learns_and_leaves_the_teacher_alone(data, teacher, steps, tmp_path):
    before = files(teacher)
    config = dataclasses.replace(TINY, num_steps=30)
    curve = calibration_curve(teacher, ROW, [30 * 256], config, data, tmp_path)
    assert files(teacher) == before
    assert [r.stage for r in curve] == ["sliced", "closed form", "trained"]
    errors = [np.mean(r.errors) for r in curve]
    assert errors[0] > errors[1] > errors[2], errors
    sliced, fitted, trained = curve
    assert (trained.tokens, trained.fit_tokens, sliced.fit_tokens) == (30 * 256, 300 * 16, 0)
    model = AutoModelForMaskedLM.from_pretrained(trained.checkpoint)
    assert model.config.num_divisions == 4 and (trained.checkpoint / "tokenizer.json").is_file()
    original = AutoModelForMaskedLM.from_pretrained(teacher)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    steps.clear()
    again = calibrate(teacher, ROW, config, data, tmp_path, fitted)
    assert not steps and again.errors == trained.errors and again.identity == trained.identity
    tuning = FinetuneConfig(max_train_rows=32, max_eval_rows=32, num_epochs=1)
    assert math.isfinite(finetune(trained, "SST-2", tuning, data, 0, tmp_path / "t")["score"])
    table = calibration_table(curve)
    assert table["tokens"].tolist() == [0, 300 * 16, 30 * 256] and (table["row"] == ROW.label).all()
    assert table["error"].tolist() == [r.errors[-1] for r in curve]


@pytest.mark.parametrize("ending", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_every_encoder_is_calibrated(data, tmp_path, family, ending):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, vocab_size=data.vocab_size, num_labels=3)
    small(family, ending, **sizes, initializer_range=0.1).save_pretrained(tmp_path / "teacher")
    data.save_tokenizer(tmp_path / "teacher")
    slices, fitted, trained = calibration_curve(
        tmp_path / "teacher", ROW, [2 * 256], dataclasses.replace(TINY, num_steps=2), data, tmp_path
    )
    assert np.mean(fitted.errors) < np.mean(slices.errors) and np.isfinite(trained.errors).all()
    whole = dataclasses.replace(TINY, num_steps=1, learning_rate=1e-12, fit_sequences=0)
    same = calibrate(tmp_path / "teacher", ModelRow("bert-base", 2, 1), whole, data, tmp_path)
    assert same.history["train_loss"][0] < 1e-5 and max(same.errors) < 1e-5
    fewer = calibrate(tmp_path / "teacher", ModelRow("bert-base", num_layers=2), whole, data, tmp_path)
    assert len(fewer.errors) == 2
    before, after = (load_model(open_checkpoint(r.checkpoint)) for r in (slices, trained))
    assert type(after).__name__ == f"Decoupled{FAMILIES[family].stem}{ending}"
    moved = {
        name.partition("layer.")[0]
        for name, weights in after.state_dict().items()
        if not torch.equal(weights, before.state_dict()[name])
    }
    assert len(moved) == 1, moved  # the layers alone


def test_fewer_layers_keep_every_nth_one(data, teacher, tmp_path):
    row = ModelRow("bert-base", num_layers=2)
    cut, trained = calibration_curve(teacher, row, [30 * 256], dataclasses.replace(TINY, num_steps=30), data, tmp_path)
    ours, theirs = (AutoModel.from_pretrained(folder) for folder in (cut.checkpoint, teacher))
    for i, depth in enumerate((2, 4)):
        pairs = zip(ours.encoder.layer[i].parameters(), theirs.encoder.layer[depth - 1].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert (cut.stage, trained.stage, row.label) == ("cut", "trained", "bert-base, 2 layers")
    assert trained.errors[-1] < cut.errors[-1] and len(trained.errors) == 2


def test_what_cannot_be_calibrated_is_one_sentence(data, teacher, tmp_path):
    with pytest.raises(ValueError, match="not above"):
        calibration_curve(teacher, ROW, [512, 512], TINY, data, tmp_path)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "small")
    decouple(BertForMaskedLM(BertConfig(**SIZES)), 2, 4).save_pretrained(tmp_path / "decoupled")
    shutil.copytree(teacher, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for who, row, words in (
        (teacher, ModelRow("bert-base"), "is the teacher itself"),
        (teacher, ModelRow("bert-base", num_layers=4), "num_layers=4 is outside 1..3"),
        (teacher, ModelRow("bert-base", 2, 5), "num_divisions=5 does not divide"),
        (tmp_path, ROW, "has no model.safetensors"),
        (tmp_path / "small", ROW, "another vocabulary"),
        (tmp_path / "other", ROW, "another vocabulary"),
        (tmp_path / "decoupled", ROW, "decoupled already"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(who, row, TINY, data, tmp_path / "out")


# --- from the command line ------------------------------------------------------------------------------------------

SHORT = "--num-original-layers 2 --steps 3 --batch-size 4 --seq-len 16 --fit-sequences 40 --precision no".split()


def test_a_checkpoint_and_a_text_file_make_a_calibrated_model(data, teacher, tmp_path, capsys):
    articles = [article for article, _ in zip(data.source.articles("train"), range(60), strict=False)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(articles[:30]))
    (tmp_path / "b.txt").write_text("\n".join(articles[30:]))
    texts = ["--text", tmp_path / "texts", "--text", tmp_path / "b.txt"]
    assert call(capsys, "calibrate", teacher, tmp_path / "ours", *texts, *SHORT)[0] == 0
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert layer_kinds(model.config).count("original") == 2
    facts = json.loads((tmp_path / "ours" / "calibration.json").read_text())
    assert (facts["stage"], facts["tokens"]) == ("trained", 192)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab() == data.tokenizer.get_vocab()
    assert not (tmp_path / "ours.work").exists()
    code, stderr = call(capsys, "calibrate", teacher, tmp_path / "ours", *texts, *SHORT)
    assert_one_sentence(code, stderr, "exists already", "--force")


def test_an_encoder_without_a_head_is_calibrated(data, teacher, tmp_path, capsys):
    AutoModel.from_pretrained(teacher).save_pretrained(tmp_path / "headless")
    data.save_tokenizer(tmp_path / "headless")
    arguments = ("calibrate", tmp_path / "headless", tmp_path / "ours", "--source", "built-in", *SHORT)
    assert call(capsys, *arguments)[0] == 0
    assert type(AutoModel.from_pretrained(tmp_path / "ours")).__name__ == "DecoupledBertModel"


def test_a_byte_level_tokenizer_names_its_special_tokens_otherwise(tmp_path, capsys):
    words = Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    words.train_from_iterator(["a line of text that is read"] * 20, trainer)
    assert SpecialTokens.of(words) == SpecialTokens(pad=1, cls=0, sep=2, mask=4)
    with pytest.raises(ValueError, match=r"neither \[PAD\] nor <pad>"):
        SpecialTokens.of(Tokenizer(tokenizers.models.BPE()))
    sizes = dict(hidden_size=32, intermediate_size=64, vocab_size=words.get_vocab_size())
    small("roberta", "ForMaskedLM", **sizes | dict(pad_token_id=1)).save_pretrained(tmp_path / "roberta")
    words.save(str(tmp_path / "roberta" / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} of a text that is read here" for i in range(200)))
    arguments = ("calibrate", tmp_path / "roberta", tmp_path / "ours", "--text", tmp_path / "a.txt", *SHORT)
    assert call(capsys, *arguments)[0] == 0
    assert type(AutoModel.from_pretrained(tmp_path / "ours")).__name__ == "DecoupledRobertaModel"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "many"], ["--steps many", "number"]),
        (["--num-divisions", 5], ["num_divisions=5", "hidden_size=32"]),
        (["--alone-share", 2], ["--alone-share 2"]),
        (["--original-placement", "outer"], ["--original-placement outer"]),
        (["--text", "/nowhere.txt"], ["/nowhere.txt", "text file"]),
        (["--precision", "int4"], ["--precision int4"]),
    ],
)
def test_bad_words_are_one_sentence(teacher, tmp_path, capsys, arguments, words):
    code, stderr = call(capsys, "calibrate", teacher, tmp_path / "ours", *arguments)
    assert_one_sentence(code, stderr, *words)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bare")
    code, stderr = call(capsys, "calibrate", tmp_path / "bare", tmp_path / "ours", "--source", "built-in")
    assert_one_sentence(code, stderr, "tokenizer")


def test_text_files_hold_out_every_twentieth_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(45)) + "\n\n")
    text = TextFiles([tmp_path])
    assert list(text.articles("validation")) == ["line 19", "line 39"]
    assert len(list(text.articles("train"))) == 43
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    assert list(text.articles("train")) == ["one", "two"] and list(text.articles("validation")) == ["three"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")  # as Windows writes it
    assert list(text.articles("train")) == ["one"] and list(text.articles("validation")) == ["two"]


def test_a_corpus_in_one_line_is_cut_at_spaces(tmp_path):
    words = [f"word{i}" for i in range(30_000)]
    (tmp_path / "text8").write_text(" ".join(words))
    text = TextFiles([tmp_path / "text8"])
    train, valid = list(text.articles("train")), list(text.articles("validation"))
    assert len(valid) == (len(train) + len(valid)) // 20 >= 1 and max(map(len, train)) < 2 * LONGEST
    assert sorted(" ".join(train + valid).split()) == sorted(words)
    (tmp_path / "text8").write_text("中" * 50_000)  # a script without spaces
    assert sum(map(len, (*text.articles("train"), *text.articles("validation")))) == 50_000


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no line of text"),
        (b"\n \r\n", "no line of text"),
        (b"a chapter in a line", "1 line of text.*an article a line"),
        (b"\xff\xfe", "not UTF-8"),
        (gzip.compress(b"one\ntwo\n"), "not UTF-8.*unpack"),
        (b'{"text": "one"}\n{"text": "two"}\n', "JSON in its lines"),
    ],
    ids=["empty", "blank", "one-line", "utf-16", "gzip", "jsonl"],
)
def test_text_that_cannot_be_read_is_refused(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    text = TextFiles([tmp_path / "a.txt"])
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=f"a.txt.*{words}"):
            list(text.articles(split))
