"""Images: sources and damaged files, batches as a function of the step, a ViT that learns."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from transformers import AutoModelForImageClassification

from detransformer.training.data import sources as sources_module
from detransformer.training.data.images import (
    GENERATED_ROWS,
    MEAN,
    STD,
    ImageData,
    augmented,
    balanced_order,
    generated_images,
    normalised,
    open_images,
)
from detransformer.training.images import (
    ImageConfig,
    evaluate_images,
    train_best_vit,
    train_vit,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ImageConfig(
    **dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, patch_size=8, num_steps=8),
    **dict(global_batch_size=32, micro_batch_size=16, learning_rate=3e-3, dropout=0.1, mixed_precision="no"),
)


def arrays(num_train=30, num_test=12, num_classes=10, seed=0):
    """As the mirror's file has them, the classes in no order."""
    rng = np.random.default_rng(seed)
    made = {}
    for split, num in (("train", num_train), ("test", num_test)):
        made[f"{split}_images"] = rng.integers(256, size=(num, 32, 32, 3), dtype=np.uint8)
        made[f"{split}_labels"] = rng.permutation(np.arange(num, dtype=np.uint8) % num_classes)
    return made


def write(folder, **changed):
    path = folder / "cifar100" / "cifar100_subset.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in (arrays() | changed).items() if array is not None})
    return path


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    write(folder)
    monkeypatch.setenv("DETRANSFORMER_DATA", str(folder))
    return folder


@pytest.fixture
def no_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("DETRANSFORMER_DATA", str(tmp_path / "nowhere"))


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(sources_module, "hub_problem", lambda offline: "no network in this test")


@pytest.fixture(scope="module")
def generated() -> ImageData:
    return generated_images()


# --- sources --------------------------------------------------------------------------------------------------------


def test_the_mirror_is_first_and_its_rows_are_balanced(mirror, tmp_path):
    data = open_images("auto", tmp_path / "cache")
    assert (data.name, data.num_classes) == ("mirror", 100)
    assert data.note == "mirror; reduced training set, 30 of 50,000 rows; reduced test set, 12 of 10,000 rows"
    assert data.labels["train"][:10].tolist() == list(range(10)) == data.labels["train"][20:].tolist()
    given = arrays()
    for image, label in zip(data.images["train"], data.labels["train"], strict=True):  # images kept their labels
        at = np.flatnonzero((given["train_images"] == image).all((1, 2, 3)))
        assert given["train_labels"][at].tolist() == [label]


def test_a_whole_set_is_preferred_to_a_subset_and_not_called_reduced(mirror):
    shutil.copy(mirror / "cifar100/cifar100_subset.npz", mirror / "cifar100/cifar100.npz")
    np.savez(mirror / "cifar100/cifar100_subset.npz", nothing=0)
    data = dataclasses.replace(open_images("mirror"), full_rows={"train": 30, "test": 12})
    assert data.note == "mirror; full training set, 30 rows; 12 test rows"


@pytest.mark.parametrize("mirror", ["nowhere", "with-other-data"])
def test_auto_without_images_generates_some(mirror, no_hub, monkeypatch, tmp_path):
    (tmp_path / "with-other-data" / "glue").mkdir(parents=True)
    monkeypatch.setenv("DETRANSFORMER_DATA", str(tmp_path / mirror))
    data = open_images("auto", tmp_path / "cache")
    assert data.name == "built-in"
    assert data.note == "built-in generated images, 2,000 training rows; 400 test rows"


def test_a_mirror_that_is_not_there_is_an_error(no_mirror, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*cifar100_subset.npz is missing: copy it there"):
        open_images("mirror", tmp_path)


def test_the_hub_is_decoded_once_and_kept(no_mirror, monkeypatch, tmp_path):
    made, asked = arrays(12, 6), []

    def load_dataset(name, split):
        asked.append((name, split))
        rows = {"img": list(made[f"{split}_images"]), "fine_label": made[f"{split}_labels"].tolist()}
        rows["coarse_label"] = [0] * len(rows["img"])
        kinds = {"img": Image(), "fine_label": Value("int64"), "coarse_label": Value("int64")}
        return Dataset.from_dict(rows, features=Features(kinds))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(sources_module, "hub_problem", lambda offline: None)
    data = open_images("hub", tmp_path)
    assert asked == [("uoft-cs/cifar100", "train"), ("uoft-cs/cifar100", "test")]
    order = balanced_order(made["train_labels"])
    assert (data.images["train"] == made["train_images"][order]).all() and data.name == "hub"
    monkeypatch.setattr(sources_module, "hub_problem", lambda offline: "gone")
    assert open_images("hub", tmp_path).fingerprint == data.fingerprint and len(asked) == 2
    (tmp_path / "cifar100-hub.npz").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ValueError, match=r"cifar100-hub.npz is damaged.*delete it and it is made again"):
        open_images("hub", tmp_path)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"test_images": None}, "has no array"),
        ({"train_images": arrays()["train_images"].astype(np.float32)}, r"float32 \[30, 32, 32, 3\]"),
        ({"train_images": arrays()["train_images"][:, :28]}, r"uint8 \[30, 28, 32, 3\]"),
        ({"test_images": arrays()["test_images"][:0], "test_labels": np.array([], int)}, r"\[0, 32, 32, 3\]"),
        ({"train_labels": arrays()["train_labels"][:29]}, "where 30 integers are expected"),
        ({"train_labels": np.full(30, 100)}, r"has 100, outside 0\.\.99"),
        ({"test_labels": np.full(12, -1)}, r"has -1, outside 0\.\.99"),
        ({"test_labels": np.full(12, 1.0)}, "test_labels is float64"),
        ({"test_labels": np.array([{}] * 12, dtype=object)}, "is damaged"),
    ],
)
def test_wrong_arrays_name_the_file_and_the_remedy(mirror, changed, said):
    write(mirror, **changed)
    with pytest.raises(ValueError, match=rf"cifar100_subset\.npz.*{said}.*copy it again from the original"):
        open_images("mirror")


def test_a_damaged_file_is_named(mirror):
    path = mirror / "cifar100" / "cifar100_subset.npz"
    content = path.read_bytes()
    changed = content[:5000] + bytes([content[5000] ^ 255]) + content[5001:]
    for damaged in (b"", content[:10], content[:2000], content[:-30], changed):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cifar100_subset\.npz is damaged.*copy it again"):
            open_images("mirror")


def test_generated_images_are_the_same_every_time_and_balanced(generated):
    generated_images.cache_clear()
    assert generated.fingerprint == generated_images().fingerprint
    assert len(generated.images["train"]) == GENERATED_ROWS["train"]
    assert set(np.bincount(generated.labels["test"])) == {20} and generated.num_classes == 20


# --- cutting and batches --------------------------------------------------------------------------------------------


def test_any_prefix_of_the_balanced_order_is_balanced():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 9))
    ordered = labels[balanced_order(labels)]
    for end in range(1, len(labels) + 1):
        counts = np.bincount(ordered[:end], minlength=7)
        assert counts.max() - counts.min() <= 1
    rare = np.array([2, 2, 2, 0, 1, 1])
    assert rare[balanced_order(rare)].tolist() == [0, 1, 2, 1, 2, 2]  # no class is there twice before each is once
    assert sorted(balanced_order(rare)) == list(range(6))


def test_a_cut_set_is_a_prefix_and_another_identity(generated):
    small = generated.cut(100, 40)
    assert (small.images["train"] == generated.images["train"][:100]).all() and len(small.labels["test"]) == 40
    assert small.fingerprint not in (generated.fingerprint, generated.cut(101, 40).fingerprint)
    assert generated.cut().fingerprint == generated.fingerprint
    assert len(generated.cut(10**6).images["train"]) == 2000
    with pytest.raises(ValueError, match="max_train_rows=0 is below 1"):
        generated.cut(0)


def test_held_out_rows_are_the_last_ones_and_in_no_batch(generated):
    cut = generated.cut(100, 20)
    data = cut.hold_out(0.1)
    assert np.array_equal(data.labels["train"], cut.labels["train"][:90])
    assert np.array_equal(data.labels["held"], cut.labels["train"][90:]) and len(data.images["held"]) == 10
    assert data.fingerprint != cut.fingerprint and "90 training rows and 10 held out" in data.note
    seen = np.concatenate([data.train_batch(0, step, 30)["rows"] for step in range(6)])
    assert set(seen) == set(range(90))
    (batch,) = data.ordered_batches("held", 100)
    assert batch["labels"].tolist() == cut.labels["train"][90:].tolist()
    for wrong in (0.0, 1.0, 0.001):
        with pytest.raises(ValueError, match="cannot be held out: give a share between 0 and 1"):
            cut.hold_out(wrong)
    with pytest.raises(ValueError, match="once"):
        data.hold_out(0.1)


def test_batches_are_a_function_of_seed_and_step(generated):
    data = generated.cut(100)
    first, again = data.train_batch(3, 5, 16), data.train_batch(3, 5, 16)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rows"], data.train_batch(4, 5, 16)["rows"])
    assert first["pixel_values"].shape == (16, 3, 32, 32) and first["labels"].dtype == torch.int64
    assert (data.labels["train"][first["rows"].numpy()] == first["labels"].numpy()).all()


def test_an_augmented_image_is_the_image_moved_with_black_beyond_its_edge_half_of_them_flipped():
    images = np.random.default_rng(0).integers(1, 256, size=(64, 32, 32, 3), dtype=np.uint8)
    places, num_turned = set(), 0
    for image, result in zip(images, augmented(images, np.random.default_rng(1)), strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        views = {False: padded, True: padded[:, ::-1]}
        every = [(y, x, turned) for y in range(9) for x in range(9) for turned in views]
        found = [(y, x, turned) for y, x, turned in every if (views[turned][y : y + 32, x : x + 32] == result).all()]
        assert len(found) == 1
        places.add(found[0][:2])
        num_turned += found[0][2]
    assert len(places) > 30 and 16 < num_turned < 48  # of 81, and of 64


def test_normalisation_is_by_channel():
    images = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    images[1] = 255
    pixels = normalised(images)
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == torch.float32
    for channel in range(3):
        assert pixels[0, channel, 0, 0] == pytest.approx(-MEAN[channel] / STD[channel], rel=1e-5)
        assert pixels[1, channel, 7, 9] == pytest.approx((1 - MEAN[channel]) / STD[channel], rel=1e-5)


def test_ordered_batches_have_every_row_once_as_it_is(generated):
    data = generated.cut(50, 30)
    batches = list(data.ordered_batches("test", 16))
    assert [len(batch["rows"]) for batch in batches] == [16, 14]
    assert torch.equal(torch.cat([batch["rows"] for batch in batches]), torch.arange(30))
    assert torch.equal(batches[1]["pixel_values"], normalised(data.images["test"][16:]))
    assert torch.cat([batch["labels"] for batch in data.ordered_batches("train", 16)]).tolist() == list(
        data.labels["train"]
    )


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16-weights"])
def test_a_vit_learns_the_generated_images_and_is_found_again(generated, steps, tmp_path, precision):
    data = generated.cut(400, 100)
    config = dataclasses.replace(TINY, num_steps=45, micro_batch_size=32, dropout=0.0, mixed_precision=precision)
    result = train_vit(config, data, tmp_path)
    assert result.accuracy > 15  # guessing gets 5
    assert result.history.train_loss.tail(10).mean() < result.history.train_loss.head(5).mean() - 0.4
    assert result.history.images.iloc[-1] == 45 * 32
    assert result.note.startswith("2 layers, hidden 32, 17 tokens, 3.6 epochs; built-in generated images")
    model = AutoModelForImageClassification.from_pretrained(result.checkpoint)
    assert model.dtype == torch.float32
    assert evaluate_images(model, data) == pytest.approx(result.accuracy, abs=3)  # bfloat16 decides some otherwise
    assert not (result.checkpoint.parent / "checkpoint").exists()

    steps.clear()
    again = train_vit(config, data, tmp_path)
    assert not steps and again.accuracy == result.accuracy and again.identity == result.identity
    steps.interrupt(0, train_vit, dataclasses.replace(config, seed=1), data, tmp_path)
    steps.interrupt(0, train_vit, config, data.cut(399), tmp_path)


def test_the_recipe_is_chosen_on_images_held_out(generated, tmp_path):
    data = generated.cut(400, 100).hold_out(0.25)
    recipes = [dataclasses.replace(TINY, num_steps=steps, dropout=0.0) for steps in (2, 45)]
    best = train_best_vit(recipes, data, tmp_path)
    made = [train_vit(recipe, data, tmp_path) for recipe in recipes]  # found again
    assert best.num_steps == 45 and best.held_out_accuracy == made[1].held_out_accuracy > made[0].held_out_accuracy
    model = AutoModelForImageClassification.from_pretrained(best.checkpoint)
    assert evaluate_images(model, data, split="held") == best.held_out_accuracy
    with pytest.raises(ValueError, match="no images are held out to choose a recipe by"):
        train_best_vit(recipes, generated, tmp_path)


def test_evaluation_counts_right_answers(generated):
    class Tells(torch.nn.Module):
        """Tells the classes that are given, image by image."""

        def __init__(self, classes):
            super().__init__()
            self.rest, self.weight = torch.from_numpy(classes), torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values):
            assert not self.training
            part, self.rest = self.rest[: len(pixel_values)], self.rest[len(pixel_values) :]
            return SimpleNamespace(logits=torch.nn.functional.one_hot(part, 20).float())

    data = generated.cut(300, 30)
    right = data.labels["train"]
    wrong = np.concatenate([(right[:60] + 1) % 20, right[60:]])
    assert evaluate_images(Tells(right), data, split="train") == 100
    assert evaluate_images(Tells(wrong), data, split="train") == 80
