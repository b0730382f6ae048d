"""Predictor and evaluator: phases of the latency are their equations', the network meets profiles, losses are means."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from coformer_cases import DEIT
from detransformer.cluster.devices import DeviceSpec, jetson_share
from detransformer.cluster.spec import ClusterSpec
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.policy import Original, Policy, SubModelConfig, flops
from detransformer.coformer.predictor import latency, roofline_s
from detransformer.coformer.sampling import uniform_policy
from detransformer.coformer.search import Evaluator, validation_loss
from detransformer.files import repository_root
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile

pytestmark = pytest.mark.usefixtures("one_thread")
JETSONS = tuple(DeviceSpec(name) for name in ("jetson-nano", "jetson-tx2", "jetson-orin-nano"))
LINK = LinkProfile(100e6, {"*": 0.0}, {"*": 1.0}, "test", shares=(1.0, 0.5, 1.0))


def device(rate, memory=2**30):
    return DeviceProfile("test", memory, rate, "test")


CLUSTER = ClusterProfile((device(1e9), device(2e9), device(4e9)), LINK)


def test_latency_is_eqs_3_to_6():
    policy = Policy(
        tuple(SubModelConfig(2, width, (heads,) * 2, (64,) * 2) for width, heads in ((128, 2), (256, 3), (320, 4)))
    )
    times = latency(policy, DEIT, CLUSTER, sent_tokens=None)
    assert times.backbone_s == pytest.approx(
        [flops(c, DEIT) / rate for c, rate in zip(policy.sub_models, (1e9, 2e9, 4e9), strict=True)]
    )
    assert times.central == 2  # the fastest
    # |X_n| / r_n of 197 tokens in float32; the second device has half a link, the central one sends nothing.
    assert times.send_s == pytest.approx([8 * 4 * 197 * 128 / 100e6, 8 * 4 * 197 * 256 / 50e6, 0.0])
    assert times.aggregate_s == pytest.approx(2 * 197 * 320 * (128 + 256 + 320) / 4e9)
    assert times.total_s == pytest.approx(
        max(a + b for a, b in zip(times.backbone_s, times.send_s, strict=True)) + times.aggregate_s
    )
    assert min(times.idle_s) == 0 and max(times.idle_s) > 0
    pooled = latency(policy, DEIT, CLUSTER)
    assert pooled.send_s == pytest.approx([s / 197 for s in times.send_s])
    assert pooled.aggregate_s == pytest.approx(times.aggregate_s / 197)
    predicted = latency(policy, DEIT, CLUSTER, [lambda c: 1.0, lambda c: 2.0, lambda c: 0.5], central=0)
    assert predicted.backbone_s == (1.0, 2.0, 0.5) and predicted.send_s[0] == 0 and predicted.central == 0


def test_the_roofline_is_bound_by_memory_where_tokens_are_few():
    few = replace(DEIT, seq_len=2)
    slow_memory = replace(device(1e12), memory_bytes_per_s=1e9)
    config = SubModelConfig(1, 64, (1,), (64,))
    weights = 4 * (768 * 64 + 4 * 64 * 64 + 2 * 64 * 64)
    assert roofline_s(config, few, slow_memory) == pytest.approx(weights / 1e9, rel=0.01)


def test_deit_b_on_a_tx2_is_the_published_latency():
    known = JETSONS[1].on(DEIT.whole)
    # Table V, one device; the preset is calibrated on it, with BERT's pooler counted.
    assert roofline_s(DEIT.whole, DEIT, known) == pytest.approx(0.12348, rel=0.01)
    assert 0.3 < jetson_share() < 0.6


def test_the_clusters_file_of_coformers_testbed_is_three_jetsons():
    spec = ClusterSpec.load(repository_root() / "examples" / "jetsons.yaml")
    assert [s.preset for s in spec.device_specs] == [s.preset for s in JETSONS]
    cluster = spec.profile(BertConfig())
    times = latency(uniform_policy(DEIT, 3), DEIT, cluster)
    assert times.total_s < 0.12348  # faster than DeiT-B on the TX2
    assert np.argmax(times.idle_s) in (1, 2) and times.idle_s[0] == 0  # the Jetson Nano is waited for


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=50)
    return BertForSequenceClassification(config)


BATCHES = [
    {"input_ids": torch.arange(1, 1 + 5 * size).view(size, 5), "labels": torch.arange(size) % 2} for size in (3, 1)
]


def test_validation_loss_is_the_mean_over_samples(bert):
    loss = validation_loss(bert.train(), BATCHES)
    assert not bert.training
    with torch.no_grad():
        samples = [
            float(bert(input_ids=ids[None], labels=label[None]).loss)
            for batch in BATCHES
            for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
    assert loss == pytest.approx(np.mean(samples), rel=1e-5)  # float32


def test_the_objective_is_loss_and_weighted_latency(bert):
    original = Original.of(bert.config, seq_len=5)
    policy = uniform_policy(original, 2)
    cluster = ClusterProfile((device(1e6), device(2e6)), replace(LINK, shares=()))
    evaluator = Evaluator(bert, BATCHES, lambda policy: latency(policy, original, cluster), delta=3.0)
    found = evaluator(policy)
    losses = [validation_loss(sub_model, BATCHES) for sub_model in decompose(bert, policy)]
    assert found.loss == pytest.approx(sum(losses) / 2)
    assert found.latency_s == latency(policy, original, cluster).total_s
    assert found.objective == pytest.approx(found.loss + 3 * found.latency_s)
