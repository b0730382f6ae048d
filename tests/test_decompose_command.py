"""`detransformer decompose` and `run` of what it wrote: pictures and text, over real processes, and what is refused."""

import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTConfig

from detransformer.cli import main
from detransformer.coformer.ensemble import load_ensemble, whole_answer
from detransformer.coformer.policy import Limits, Original, violations
from detransformer.coformer.sampling import filled
from detransformer.commands.classifiers import check_labels, learned_task
from detransformer.commands.decompose import PLAN_FILE
from detransformer.files import repository_root
from detransformer.training.data import open_data
from detransformer.training.data.images import open_images
from detransformer.training.images import ImageConfig, train_vit

CLUSTER = str(repository_root() / "examples" / "jetsons.yaml")
SHORT = ["--source", "built-in", "--evaluations", "4", "--steps", "6", "--batch-size", "16"]
VIT = dict(hidden_size=48, num_layers=3, num_heads=6, patch_size=8, num_steps=8)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    data = open_images("built-in").cut(96, 40)
    config = ImageConfig(**VIT, global_batch_size=16, micro_batch_size=16)
    return train_vit(config, data, tmp_path_factory.mktemp("vit")).checkpoint


@pytest.fixture(scope="module")
def ensemble(vit, tmp_path_factory):
    output = tmp_path_factory.mktemp("decomposed") / "ensemble"
    decompose(vit, output, "--budget", "0.5", "--train-rows", "96")
    return output


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "one.png"
    Image.fromarray(open_images("built-in").images["test"][3]).save(path)
    return path


def run_cli(*arguments):
    """Exit status of the command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def decompose(checkpoint, output, *options):
    assert run_cli("decompose", checkpoint, "--cluster", CLUSTER, "--output", output, *SHORT, *options) == 0


def refused(capsys, *arguments):
    assert run_cli(*arguments) == 2
    return capsys.readouterr().err


def test_writes_sub_models_aggregator_and_plan(ensemble, vit):
    made = load_ensemble(ensemble)
    plan = json.loads((ensemble / PLAN_FILE).read_text())
    assert made.num_devices == 3 and plan["devices"] == ["nano", "tx2", "orin"]
    assert plan["policy"] == json.loads(json.dumps(asdict(made.policy)))
    assert plan["central"] == plan["devices"][made.central] == "tx2"  # the fastest
    assert plan["predicted"]["total_s"] > 0 and len(plan["scores"]["without_each"]) == 3
    assert made.aggregator().kind == "coformer"
    original = Original.of(ViTConfig.from_pretrained(vit))
    limits = Limits.share(original, 0.5, 3)
    assert filled(made.policy, original, limits) == made.policy and not violations(made.policy, original, limits)
    assert (ensemble / "preprocessor_config.json").read_text() == (vit / "preprocessor_config.json").read_text()
    assert not ensemble.with_name("ensemble.work").exists()


@pytest.mark.slow
def test_run_answers_a_picture_as_one_process_does(ensemble, picture, tmp_path, capfd):
    record = tmp_path / "record.json"
    asked = ("run", "--cluster", CLUSTER, "--model", ensemble, "--image", picture, "--check", "--repeats", "2")
    assert run_cli(*asked, "--output", record) == 0
    told = json.loads(record.read_text())
    assert told["check"]["agrees"] and told["check"]["max_abs_error"] <= 1e-5
    assert told["present"] == ["nano", "tx2", "orin"] and told["sentence"] == "All 3 sub-models answered."
    batch = next(open_images("built-in").cut(None, 4).ordered_batches("test", 4))
    expected = whole_answer(load_ensemble(ensemble), {"pixel_values": batch["pixel_values"][3:]})
    torch.testing.assert_close(torch.tensor([told["answer"]["logits"]]), expected, rtol=1e-4, atol=1e-4)
    printed = capfd.readouterr().out
    assert "All 3 sub-models answered." in printed and "aggregated on tx2" in printed


@pytest.mark.slow
def test_a_text_classifier_is_decomposed_and_asked(tmp_path, capfd):
    data = open_data("built-in", tmp_path / "data")
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=48, vocab_size=data.vocab_size,
        num_labels=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    BertForSequenceClassification(config).save_pretrained(folder)
    data.save_tokenizer(folder)
    decompose(folder, tmp_path / "made", "--task", "SST-2", "--seq-len", "32", "--train-rows", "48", "--rule", "none")
    assert run_cli("run", "--cluster", CLUSTER, "--model", tmp_path / "made", "--text", "a fine day", "--check") == 0
    assert "agrees with the single process's" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--budget", "0"], "--budget"),
        (["--search", "grid"], "--search grid is unknown"),
        (["--aggregator", "sum"], "--aggregator sum is unknown"),
        (["--task", "SST-2"], "looks at images"),
        (["--memory", "x"], "--memory"),
    ],
)
def test_decompose_refuses(vit, tmp_path, capsys, options, sentence):
    said = refused(capsys, "decompose", vit, "--cluster", CLUSTER, "--output", tmp_path / "made", *SHORT, *options)
    assert sentence in said and not (tmp_path / "made").exists()


def test_decompose_refuses_what_it_cannot_use(vit, ensemble, tmp_path, capsys):
    common = ("--cluster", CLUSTER, "--output")
    assert "exists already" in refused(capsys, "decompose", vit, *common, ensemble, *SHORT)
    assert "is the checkpoint itself" in refused(capsys, "decompose", vit, *common, vit, "--force", *SHORT)
    BertModel(BertConfig(**dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2))).save_pretrained(
        tmp_path / "base"
    )
    assert "is not decomposed" in refused(capsys, "decompose", tmp_path / "base", *common, tmp_path / "made", *SHORT)
    assert "no config.json" in refused(capsys, "decompose", tmp_path, *common, tmp_path / "made", *SHORT)
    with pytest.raises(ValueError, match="looks at images of 64 pixels and CIFAR-100's are 32"):
        learned_task(tmp_path, ViTConfig(image_size=64), None, "built-in", tmp_path / "cache", 16, 4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--text", "hello"], "looks at images"),
        (["--method", "tp"], "--method is for one model"),
        (["--image", __file__], "is no picture"),
        (["--image", "missing.png"], "is not there"),
        (["--image", "a.png", "--text", "b"], "cannot be combined"),
    ],
)
def test_run_refuses(ensemble, capsys, options, sentence):
    assert sentence in refused(capsys, "run", "--cluster", CLUSTER, "--model", ensemble, *options)


def test_run_refuses_other_clusters_and_pictures_for_plain_models(ensemble, vit, capsys):
    examples = repository_root() / "examples"
    four = refused(capsys, "run", "--cluster", examples / "emulated-four-pis.yaml", "--model", ensemble)
    assert "3 sub-models" in four and "4 devices" in four
    assert "lists real hosts" in refused(capsys, "run", "--cluster", examples / "four-pis.yaml", "--model", ensemble)
    plain = refused(capsys, "run", "--cluster", CLUSTER, "--model", vit, "--image", "a.png")
    assert "is for an ensemble" in plain


def test_labels_in_another_order_than_the_tasks_are_named(tmp_path):
    for task, labels in (
        ("MNLI", ("contradiction", "Entailment", "neutral")),
        ("MRPC", ("equivalent", "not_equivalent")),
    ):
        with pytest.raises(
            ValueError, match=f"has its labels in the order {', '.join(labels)}, and {task} in the order"
        ):
            check_labels(tmp_path, labels, task)
    for labels in (("LABEL_0", "LABEL_1"), ("Negative", "POSITIVE")):
        check_labels(tmp_path, labels, "SST-2")
