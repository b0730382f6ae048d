"""Booster: what each rule does to the weights, Eq. 14, images and text, resumption, the large model's decisions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, ViTForImageClassification

from detransformer.coformer.booster import BoostConfig, BoostLoss, boost, sample_losses, update_weights
from detransformer.coformer.outputs import collect_outputs, compute_outputs, weights_hash
from detransformer.coformer.tasks import ImageTask, TextTask
from detransformer.training import FinetuneConfig, open_data
from detransformer.training.data.images import generated_images
from detransformer.training.images import ImageConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = BoostConfig(
    **dict(num_steps=6, global_batch_size=16, micro_batch_size=8, learning_rate=3e-3, mixed_precision="no"),
    checkpoint_every_s=0.0,
)


class Stop(Exception):
    pass


class Watched(ImageTask):
    """Notes from which order of samples (of sub-model n: n - 1) each batch was taken; stops before batch `stop_at`."""

    def __init__(self, data, stop_at=None):
        super().__init__(data)
        self.seen, self.stop_at = [], stop_at

    def train_batch(self, seed, step, batch_size):
        if (seed, step) == self.stop_at:
            raise Stop
        self.seen.append((seed, step))
        return super().train_batch(seed, step, batch_size)


def vit(hidden_size=16, seed=0):
    torch.manual_seed(seed)
    sizes = ImageConfig(hidden_size=hidden_size, num_layers=1, num_heads=2, patch_size=8)
    return ViTForImageClassification(sizes.vit_config(20))


def bert(hidden_size, seed):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=2000, num_labels=2))


def same_weights(one, two):
    other = two.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


@pytest.fixture(scope="module")
def task():
    return ImageTask(generated_images().cut(60, 40))


@pytest.fixture(scope="module")
def text():
    config = FinetuneConfig(seq_len=32, max_train_rows=50, max_eval_rows=20)
    return TextTask(open_data("built-in", "unused"), "SST-2", config)


# --- Eq. 13 ---------------------------------------------------------------------------------------------------------


LOSSES = np.array([0.1, 0.5, 1.0, 4.0])


def test_published_is_equation_13_normalised_and_favours_the_easy():
    exact = np.full(4, 1 / 4) * np.exp((1 / 4 - 1) * LOSSES)
    weights = update_weights(np.ones(4), LOSSES, "published", 10)
    np.testing.assert_allclose(weights, exact / exact.mean(), rtol=1e-12)
    assert (np.diff(weights) < 0).all()  # the higher the loss, the less the weight


def test_boosting_favours_the_hard_and_is_bounded():
    weights = update_weights(np.ones(4), LOSSES, "boosting", 10)
    assert (np.diff(weights) > 0).all() and weights.mean() == pytest.approx(1)
    extreme = update_weights(np.ones(1000), np.r_[np.zeros(999), 50.0], "boosting", 10)
    assert extreme[-1] / extreme[0] == pytest.approx(math.exp(0.999))
    at_chance = update_weights(np.ones(4), np.array([0, math.log(10) / 2, math.log(10), 99]), "boosting", 10)
    assert at_chance[3] == at_chance[2] and at_chance[1] / at_chance[0] == pytest.approx(math.exp(0.75 / 2))


def test_none_leaves_the_weights():
    weights = np.array([0.5, 1.5, 1.0, 1.0])
    np.testing.assert_array_equal(update_weights(weights, LOSSES, "none", 10), weights)


def test_weights_multiply_over_the_rounds():
    once = update_weights(np.ones(4), LOSSES, "published", 10)
    twice = update_weights(once, LOSSES, "published", 10)
    np.testing.assert_allclose(twice / twice[0], (once / once[0]) ** 2, rtol=1e-12)


def test_large_losses_do_not_make_the_weights_vanish():
    weights = update_weights(np.ones(3), np.array([2000.0, 2001.0, 2002.0]), "published", 10)
    assert np.isfinite(weights).all() and weights[0] > weights[1] > weights[2] > 0
    assert update_weights(np.ones(1), np.array([3.0]), "published", 10) == [1.0]  # M = 1: the exponent is 0


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="rule='adaboost' is unknown: choose one of boosting, published, none"):
        BoostConfig(rule="adaboost")
    with pytest.raises(ValueError, match="target='x' is unknown"):
        BoostConfig(target="x")
    with pytest.raises(ValueError, match="micro_batch_size=48 does not divide"):
        BoostConfig(micro_batch_size=48)


# --- Eq. 14 ---------------------------------------------------------------------------------------------------------


def test_the_hard_loss_is_half_of_two_cross_entropies():
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    found = sample_losses(logits, labels, teacher)
    logs = logits.log_softmax(-1)
    for i in range(5):
        expected = -(logs[i, labels[i]] + logs[i, teacher[i].argmax()]) / 2
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-5)
    sure = F.one_hot(labels, 4) * 9.0  # a teacher that agrees with the label: plain cross-entropy
    torch.testing.assert_close(sample_losses(logits, labels, sure), F.cross_entropy(logits, labels, reduction="none"))


def test_the_soft_loss_asks_for_the_teachers_probabilities():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    truth = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(sample_losses(logits, labels, logits, "soft"), truth / 2)  # no divergence
    teacher = torch.randn(5, 4)
    p, q = (teacher / 2).softmax(-1), (logits / 2).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(sample_losses(logits, labels, teacher, "soft"), (truth + 4 * divergence) / 2)


def test_weights_multiply_the_losses_of_their_own_samples(task):
    model, weights = vit().eval(), torch.tensor([0.5, 2.0, 1.0])
    labels, taught = torch.tensor([3, 4, 5]), torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    pixels = task.train_batch(3, 1, 3)["pixel_values"]
    each = sample_losses(model(pixel_values=pixels).logits, labels, taught)
    loss = BoostLoss(model, "hard")(labels, taught, weights, pixel_values=pixels)
    assert loss.item() == pytest.approx((weights * each).mean().item(), rel=1e-5)


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_images_come_with_their_numbers(task):
    batch = task.train_batch(0, 2, 16)
    assert set(batch) == {"rows", "labels", "pixel_values"} and batch["pixel_values"].shape == (16, 3, 32, 32)
    assert torch.equal(task.train_batch(0, 2, 16)["rows"], batch["rows"])
    assert batch["labels"].tolist() == task.train_labels[batch["rows"]].tolist()
    rows = torch.cat([batch["rows"] for batch in task.ordered_batches("test", 16)]).tolist()
    assert sorted(rows) == list(range(40)) and task.score(task.test_labels) == 100
    assert ImageTask(task.data.cut(59)).fingerprint != task.fingerprint


def test_text_comes_with_its_numbers(text):
    seen = torch.cat([text.train_batch(0, step, 16)["rows"] for step in range(4)]).tolist()  # 16 + 16 + 16 + 2
    assert sorted(seen) == list(range(50))
    again = torch.cat([text.train_batch(0, step, 16)["rows"] for step in range(4, 8)]).tolist()
    assert sorted(again) == list(range(50)) and seen != again
    for batch in text.ordered_batches("test", 6):
        lengths = batch["attention_mask"].sum(1)
        assert lengths.tolist() == [len(text._features["test"][i].tokens) for i in batch["rows"]]
        assert batch["labels"].tolist() == text.test_labels[batch["rows"]].tolist()
    assert (text.num_classes, text.metric, len(text.test_labels)) == (2, "accuracy", 20)
    assert text.score(1 - text.test_labels) == 0


def test_questions_have_no_classes():
    with pytest.raises(ValueError, match="SQuAD has no classes to boost on"):
        TextTask(open_data("built-in", "unused"), "SQuAD", FinetuneConfig())


def test_predictions_are_by_number_whatever_the_order(text):
    model = bert(16, 0)
    one, many = (compute_outputs(model, text, "test", batch_size=size)["logits"] for size in (1, 7))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)  # other padding
    assert one.shape == (20, 2) and one[:, 0].std() > 0


# --- hashes of models -----------------------------------------------------------------------------------------------


def test_hashes_know_weights_and_configuration_and_not_where_a_model_was(tmp_path):
    model = vit(seed=1)
    before = weights_hash(model)
    assert before == weights_hash(vit(seed=1)) != weights_hash(vit(seed=2))
    model.save_pretrained(tmp_path)
    assert weights_hash(model) == before == weights_hash(ViTForImageClassification.from_pretrained(tmp_path))
    model.config.hidden_dropout_prob = 0.5
    assert weights_hash(model) != before


# --- calibration ----------------------------------------------------------------------------------------------------


def test_sub_models_are_calibrated_and_found_again(task, tmp_path):
    subs, teacher = [vit(16, 1), vit(24, 2)], vit(32, 9)
    copies = [vit(16, 1), vit(24, 2)]
    config = dataclasses.replace(TINY, num_steps=25, checkpoint_every_s=600)
    results = boost(subs, teacher, task, config, tmp_path)
    assert all(map(same_weights, subs, copies)) and subs[0].dtype == torch.float32
    for result, start in zip(results, subs, strict=True):
        loss = result.history.train_loss
        assert len(loss) == 25 and loss.tail(8).mean() < loss.head(8).mean()
        assert type(result.model) is type(start) and not same_weights(result.model, start) and not result.model.training
        assert same_weights(type(start).from_pretrained(result.checkpoint), result.model)
        assert not (result.checkpoint.parent / "checkpoint").exists()
    watched = Watched(task.data)
    again = boost(subs, teacher, watched, config, tmp_path)
    assert [r.identity for r in again] == [r.identity for r in results] and not watched.seen


def test_the_next_sub_model_sees_the_weights_of_the_last(task, tmp_path, monkeypatch):
    seen, forward = [], BoostLoss.forward

    def spy(self, labels, teacher_logits, sample_weights, **inputs):
        seen.append((inputs["pixel_values"], sample_weights))
        return forward(self, labels, teacher_logits, sample_weights, **inputs)

    monkeypatch.setattr(BoostLoss, "forward", spy)
    config = dataclasses.replace(TINY, num_steps=1, micro_batch_size=16)
    teacher = vit(24, 9)
    results = boost([vit(16, 1), vit(16, 2), vit(16, 3)], teacher, task, config, tmp_path)
    expected = np.ones(60)
    for (pixels, weights), result in zip(seen, results, strict=True):
        batch = task.train_batch(result.number - 1, 0, 16)  # its own order
        assert torch.equal(pixels, batch["pixel_values"])
        np.testing.assert_allclose(weights, expected[batch["rows"]], rtol=1e-6)
        student, taught = collect_outputs([result.model, teacher], task, "train", tmp_path).logits
        losses = sample_losses(student, torch.from_numpy(task.train_labels), taught).numpy()
        expected = update_weights(expected, losses, "boosting", 20)


def test_an_interrupted_calibration_goes_on_in_the_middle_of_a_sub_model(task, tmp_path):
    subs, teacher = [vit(16, 1), vit(16, 2)], vit(24, 9)
    whole = boost(subs, teacher, task, TINY, tmp_path / "whole")
    with pytest.raises(Stop):
        boost(subs, teacher, Watched(task.data, stop_at=(1, 8)), TINY, tmp_path / "parts")  # two batches a step
    watched = Watched(task.data)
    parts = boost(subs, teacher, watched, TINY, tmp_path / "parts")
    assert watched.seen == [(1, 8), (1, 9), (1, 10), (1, 11)]
    for one, two in zip(whole, parts, strict=True):
        assert one.history.train_loss.tolist() == two.history.train_loss.tolist()
    assert all(same_weights(one.model, two.model) for one, two in zip(whole, parts, strict=True))


def test_what_a_sub_model_depends_on_is_what_trains_it_again(task, tmp_path):
    teacher = vit(24, 9)

    def run(first, second, **changed):
        watched = Watched(task.data)
        config = dataclasses.replace(TINY, num_steps=1, micro_batch_size=16, **changed)
        boost([first, second], teacher, watched, config, tmp_path)
        return [seed + 1 for seed, _ in watched.seen]

    assert run(vit(16, 1), vit(16, 2)) == [1, 2]
    assert run(vit(16, 1), vit(16, 5)) == [2]
    assert run(vit(16, 4), vit(16, 5)) == [1, 2]  # the weights come from another sub-model 1
    assert run(vit(16, 1), vit(16, 2), rule="none") == [1, 2]
    assert run(vit(16, 4), vit(16, 2), rule="none") == [1]  # independent of each other
    assert run(vit(16, 1), vit(16, 2), target="soft") == [1, 2]
    assert run(vit(16, 1), vit(16, 2), checkpoint_every_s=9.0) == []


def test_text_is_calibrated_in_bfloat16_with_soft_targets(text, tmp_path):
    config = dataclasses.replace(
        TINY, num_steps=8, mixed_precision="bf16-weights", target="soft", rule="published", micro_batch_size=16
    )
    results = boost([bert(16, 1), bert(8, 2)], bert(32, 9), text, config, tmp_path)
    assert all(result.model.dtype == torch.float32 for result in results)
    assert compute_outputs(results[1].model, text, "test")["logits"].shape == (20, 2)
