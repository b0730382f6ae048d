"""Aggregators: Eq. 2 and the token that is sent, votes and ties, missing sub-models, training, costs."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTForImageClassification,
)

from detransformer.coformer.aggregator import KINDS, aggregator_flops, features_and_logits, make_aggregator
from detransformer.coformer.calibration import (
    AggregatorConfig,
    ensemble_accuracy,
    missing_table,
    random_presence,
    train_aggregator,
)
from detransformer.coformer.outputs import Outputs, collect_outputs, compute_outputs
from detransformer.coformer.tasks import ImageTask
from detransformer.training.data.images import generated_images
from detransformer.training.images import ImageConfig

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS, CLASSES = (6, 10, 4), 5
LEARNED = ("coformer", "attention", "senet")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind):
    torch.manual_seed(1)
    aggregator = make_aggregator(kind, WIDTHS, CLASSES).double().eval()
    if aggregator.learned:
        aggregator.set_means([random(50, width, seed=90 + width) + 1 for width in WIDTHS])
    return aggregator


def answers(num=7):
    """(features [B, d_n], logits [B, C]) of three sub-models."""
    features = [random(num, width, seed=n) for n, width in enumerate(WIDTHS)]
    return features, [random(num, CLASSES, seed=10 + n) for n in range(3)]


def as_logits(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def learnable(num=400, seed=0, noise=0.6) -> Outputs:
    """Features of three sub-models that each tell two of the three bits of the class; C = 8."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(8, size=num)
    bits = (labels[:, None] >> np.arange(3)) & 1
    features = []
    for n, width in enumerate(WIDTHS):
        seen = bits[:, [n, (n + 1) % 3]] * 2.0 - 1
        mix = np.random.default_rng(100 + n).normal(size=(2, width))  # the same in training and test
        features.append(torch.from_numpy(seen @ mix + rng.normal(0, noise, size=(num, width))).float())
    return Outputs(features, [None] * 3, torch.from_numpy(labels))


# --- Eq. 2 ----------------------------------------------------------------------------------------------------------


def test_coformer_is_equation_2():
    aggregator, (features, _) = made("coformer"), answers()
    weight, bias = aggregator.projection.weight, aggregator.projection.bias  # [d_i, d_agg], [d_i]
    expected = aggregator.head(torch.cat(features, dim=-1) @ weight.T + bias)
    torch.testing.assert_close(aggregator(features), expected, atol=1e-12, rtol=0)
    assert aggregator.hidden_size == 10  # the widest


def test_attention_and_senet_are_what_they_are_called():
    features, _ = answers()
    attention = made("attention")
    x = torch.stack([p(f) for p, f in zip(attention.projections, features, strict=True)], 1)
    q, k, v = attention.query(x), attention.key(x), attention.value(x)
    attended = nn.functional.scaled_dot_product_attention(q, k, v)
    expected = attention.head((x + attention.output(attended)).mean(1))
    torch.testing.assert_close(attention(features), expected)
    senet = made("senet")
    with torch.no_grad():
        senet.excite.weight.zero_()
        senet.excite.bias.fill_(100.0)  # every gate open: what is left is Eq. 2 on pooled features
    coformer = made("coformer")
    coformer.projection.load_state_dict(senet.projection.state_dict())
    coformer.head.load_state_dict(senet.head.state_dict())
    torch.testing.assert_close(senet(features), coformer(features))
    with torch.no_grad():
        senet.excite.bias.fill_(-100.0)  # every gate shut: only biases
    assert torch.allclose(senet(features), senet(features)[:1].expand(7, -1))


# --- votes ----------------------------------------------------------------------------------------------------------


def test_average_is_of_probabilities():
    logits = [as_logits([0.9, 0.1]), as_logits([0.2, 0.8]), as_logits([0.3, 0.7])]
    aggregator = make_aggregator("average", (1, 1, 1), 2)
    np.testing.assert_allclose(aggregator(logits).exp()[0], [1.4 / 3, 1.6 / 3], rtol=1e-6)
    np.testing.assert_allclose(aggregator(logits, [True, True, False]).exp()[0], [0.55, 0.45], rtol=1e-6)
    sure = [torch.tensor([[0.0, 1e4]])] * 3  # a probability of 0 is no -inf
    assert torch.isfinite(aggregator(sure)).all()


def test_majority_counts_votes_and_ties_go_by_probability():
    aggregator = make_aggregator("majority", (1, 1, 1), 3)
    outvoted = [as_logits([0.98, 0.01, 0.01]), as_logits([0.4, 0.6, 0.0]), as_logits([0.4, 0.6, 0.0])]
    assert aggregator(outvoted).argmax() == 1 and make_aggregator("average", (1, 1, 1), 3)(outvoted).argmax() == 0
    tied = [as_logits([0.5, 0.3, 0.2]), as_logits([0.3, 0.6, 0.1]), as_logits([0.1, 0.2, 0.7])]
    assert aggregator(tied).argmax() == 1  # 0.9, 1.1, 1.0
    assert aggregator(tied, [False, True, True]).argmax() == 1  # 0.8 and 0.8 + 0.0 for class 2
    scores = aggregator([as_logits([0.34, 0.33, 0.33])] * 2 + [as_logits([0.0, 0.01, 0.99])])
    assert scores.argmax() == 0, "no probability outweighs a vote"
    assert scores[0, 2] > scores[0, 1]


# --- missing sub-models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED)
def test_a_missing_sub_model_is_its_training_mean(kind):
    aggregator, (features, _) = made(kind), answers()
    mean = aggregator.mean.split(WIDTHS)[1].expand(*features[1].shape)
    expected = aggregator([features[0], mean, features[2]])
    torch.testing.assert_close(aggregator(features, present=[True, False, True]), expected)
    features[1] = torch.full_like(features[1], float("nan"))  # what arrived of it is not looked at
    torch.testing.assert_close(aggregator(features, present=[True, False, True]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_missing_may_differ_by_sample(kind):
    aggregator, (features, logits) = made(kind), answers()
    sent = features if aggregator.learned else logits
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 1, 0]]).bool()
    found = aggregator(sent, present)
    for i in range(7):
        alone = aggregator([x[i : i + 1] for x in sent], present[i])
        torch.testing.assert_close(found[i : i + 1], alone)


@pytest.mark.parametrize("kind", ["average", "majority"])
def test_votes_leave_the_missing_out(kind):
    aggregator, (_, logits) = made(kind), answers(50)
    of_two = make_aggregator(kind, WIDTHS[:2], CLASSES)
    found = aggregator(logits, [True, True, False]).argmax(-1)
    assert torch.equal(found, of_two(logits[:2]).argmax(-1))
    only = aggregator(logits, [False, True, False]).argmax(-1)
    assert torch.equal(only, logits[1].argmax(-1))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind 'stacking' is unknown: choose one of coformer, attention"):
        make_aggregator("stacking", WIDTHS, CLASSES)


def test_random_presence_leaves_one_and_is_seeded():
    present = random_presence(2000, 3, 0.9, [0, 1])
    assert present.any(1).all() and torch.equal(present, random_presence(2000, 3, 0.9, [0, 1]))
    assert present.sum(0).min() > 2000 * 0.9**3 / 3  # the one that stays is any of them
    assert random_presence(2000, 3, 0.25, [0]).double().mean() == pytest.approx(0.75, abs=0.03)
    assert random_presence(5, 3, 0.0, [0]).all()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_aggregator_knows_more_than_each_sub_model(kind):
    outputs = learnable()
    config = AggregatorConfig(num_epochs=15, batch_size=100, learning_rate=2e-2)
    aggregator, losses = train_aggregator(kind, outputs, 8, config)
    assert not aggregator.training and aggregator.num_labels == 8
    assert len(losses) == 60 and losses[-1] < losses[0] / 2
    # A sub-model that sees two bits of three is right half the time at best.
    assert ensemble_accuracy(aggregator, learnable(seed=1)) > 65
    for mean, x in zip(aggregator.mean.split(WIDTHS), outputs.features, strict=True):
        torch.testing.assert_close(mean, x.mean(0))


def test_training_is_seeded():
    outputs, config = learnable(80), AggregatorConfig(num_epochs=2, drop=0.3)
    one, two, other = (train_aggregator("coformer", outputs, 8, config, seed)[1] for seed in (0, 0, 1))
    assert one == two != other


def test_training_with_drops_loses_less_without_a_device():
    outputs, test = learnable(400, noise=1.0), learnable(400, seed=1, noise=1.0)
    config = AggregatorConfig(num_epochs=15, batch_size=100, learning_rate=2e-2)
    plain, _ = train_aggregator("senet", outputs, 8, config)
    kept = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    tuned, _ = train_aggregator("senet", outputs, 8, dataclasses.replace(config, drop=0.3), start=plain)
    assert all(torch.equal(kept[name], tensor) for name, tensor in plain.state_dict().items())
    before, after = (missing_table(aggregator, test) for aggregator in (plain, tuned))
    assert before.missing.tolist() == [0, 1, 2, 3]
    assert (before.accuracy[1:] < before.accuracy[0]).all()
    assert after.accuracy[1:].mean() > before.accuracy[1:].mean()
    assert after.accuracy[0] > before.accuracy[0] - 5


def test_what_has_nothing_to_learn_comes_back_at_once():
    aggregator, losses = train_aggregator("average", learnable(20), 8, AggregatorConfig())
    assert aggregator.kind == "average" and not losses and not list(aggregator.state_dict())


def test_wrong_training_data_says_what_is_wrong():
    outputs = learnable(20)
    first, labels = outputs.features[0], outputs.labels
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train_aggregator("coformer", Outputs([first * float("nan")], [], labels), 8, AggregatorConfig())
    for fields, said in (({"drop": 1.0}, "drop=1.0 is outside"), ({"num_epochs": 0}, "num_epochs=0 is not above 0")):
        with pytest.raises(ValueError, match=said):
            AggregatorConfig(**fields)


def test_accuracy_counts_the_samples_that_are_right():
    aggregator, (features, logits) = made("majority"), answers(50)
    labels = aggregator(logits).argmax(-1)
    labels[:10] = (labels[:10] + 1) % CLASSES
    outputs = Outputs(features, logits, labels)
    assert ensemble_accuracy(aggregator, outputs) == 80
    one = ensemble_accuracy(aggregator, outputs, [False, True, False])
    assert one == pytest.approx(100 * (logits[1].argmax(-1) == labels).double().mean().item())


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED)
def test_operations_are_those_of_the_matrix_products(kind):
    aggregator, (features, _) = made(kind), answers(1)
    with FlopCounterMode(display=False) as counter:
        aggregator(features)
    assert counter.get_total_flops() == aggregator_flops(kind, WIDTHS, CLASSES)


# --- models and files -----------------------------------------------------------------------------------------------


def test_features_are_of_the_token_that_the_head_reads_and_logits_of_the_same_pass():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    bert = BertForSequenceClassification(BertConfig(**sizes, vocab_size=50, num_labels=3)).eval()
    sizes = dict(n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    gpt2 = GPT2ForSequenceClassification(GPT2Config(**sizes, vocab_size=50, num_labels=3)).eval()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs = {"input_ids": torch.arange(1, 15).reshape(2, 7) * mask, "attention_mask": mask}
    with torch.no_grad():
        features, logits = features_and_logits(bert, inputs)
        assert torch.equal(features, bert.bert(**inputs).last_hidden_state[:, 0])
        assert torch.equal(logits, bert(**inputs).logits) and not bert.bert._forward_hooks
        features, logits = features_and_logits(gpt2, inputs)
        assert torch.equal(features, gpt2.transformer(**inputs).last_hidden_state[[0, 1], [6, 3]])
        torch.testing.assert_close(gpt2.score(features), logits)
        assert torch.equal(
            features_and_logits(gpt2, {"input_ids": inputs["input_ids"][:1]})[0],
            gpt2.transformer(inputs["input_ids"][:1]).last_hidden_state[:, -1],
        )


def test_outputs_are_collected_once(tmp_path):
    task = ImageTask(generated_images().cut(30, 20))
    models = []
    for seed, width in enumerate((16, 24)):
        torch.manual_seed(seed)
        sizes = ImageConfig(hidden_size=width, num_layers=1, num_heads=2, patch_size=8)
        models.append(ViTForImageClassification(sizes.vit_config(20)).train())
    found = collect_outputs(models, task, "test", tmp_path)
    assert found.widths == (16, 24) and [x.shape for x in found.logits] == [(20, 20)] * 2
    torch.testing.assert_close(found.logits[1], compute_outputs(models[1], task, "test", batch_size=7)["logits"])
    pixels = next(iter(task.ordered_batches("test", 20)))["pixel_values"]
    with torch.no_grad():
        expected = models[0].eval().vit(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(found.features[0], expected)
    assert torch.equal(found.labels, torch.from_numpy(task.test_labels))
    train = collect_outputs(models, task, "train", tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 and len(train.labels) == 30
    task.ordered_batches = None  # what is kept is not computed again
    again = collect_outputs(models, task, "test", tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(found.features, again.features, strict=True))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"outputs-test-.*damaged.*delete it"):
        collect_outputs(models, task, "test", tmp_path)
