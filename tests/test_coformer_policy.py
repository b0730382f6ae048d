"""Policies: each constraint is named where it is broken, random policies break none, costs are the models' own."""

from dataclasses import replace

import numpy as np
import pytest

from coformer_cases import DEIT
from detransformer.coformer.policy import (
    Limits,
    Original,
    Policy,
    SubModelConfig,
    encode,
    flops,
    memory_bytes,
    parameters,
    violations,
)
from detransformer.coformer.sampling import (
    filled,
    mutate_policy,
    sample_policy,
    sample_uniform_policy,
    uniform_policy,
)
from detransformer.models import preset_config
from detransformer.models.sizes import model_flops, model_parameters
from detransformer.planning.cost import activation_bytes

SMALL = Original(num_layers=4, hidden_size=48, num_heads=6, ffn_size=96, seq_len=10, embedding_rows=20)


def sub_model(num_layers=4, hidden_size=16, heads=2, ffn=32):
    return SubModelConfig.alike(num_layers, hidden_size, heads, ffn)


@pytest.mark.parametrize("name", ["bert-base", "gpt2"])
def test_costs_of_the_whole_model_are_those_of_the_cost_model(name):
    config = preset_config(name)
    original = Original.of(config, seq_len=128)
    assert flops(original.whole, original) == model_flops(config, 128)
    assert parameters(original.whole, original) == model_parameters(config)
    bytes_of_activations = memory_bytes(original.whole, original) - 4 * model_parameters(config)
    assert bytes_of_activations == activation_bytes(config, 128, 1)


def test_deit_b_is_what_the_paper_says_of_it():
    assert DEIT.seq_len == 197
    assert flops(DEIT.whole, DEIT) == pytest.approx(35.1e9, rel=0.01)  # 17.6 GMAC (Touvron et al. 2021)
    assert parameters(DEIT.whole, DEIT) == pytest.approx(86e6, rel=0.01)


BROKEN = {
    "C1: sub-model 1 has 5 layers, the original 4": (sub_model(), sub_model(num_layers=5)),
    "C2: the sub-models' embeddings are 64 wide together": (sub_model(hidden_size=32), sub_model(hidden_size=32)),
    "C3: layer 2 has 7 heads over the sub-models, the original 6": (
        sub_model(num_layers=2),
        SubModelConfig(4, 16, (3, 3, 4, 6), (32,) * 4),
        SubModelConfig(3, 16, (1, 1, 3), (32,) * 3),
    ),
    "C4: layer 0 has 100 FFN columns over the sub-models, the original 96": (sub_model(ffn=50), sub_model(ffn=50)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_constraint_is_named(message):
    (first, *others) = violations(Policy(BROKEN[message]), SMALL)
    assert first.startswith(message)
    assert all(other.startswith(message[:2]) for other in others)


def test_device_limits_are_named():
    policy = Policy((sub_model(), sub_model()))
    slow, small = flops(sub_model(), SMALL) - 1, memory_bytes(sub_model(), SMALL) - 1
    enough = float("inf")
    assert violations(policy, SMALL, Limits((enough, enough), (enough, enough))) == []
    assert violations(policy, SMALL, Limits((enough, slow), (enough, enough)))[0].startswith("C5: sub-model 1")
    assert violations(policy, SMALL, Limits((enough, enough), (small, enough)))[0].startswith("C6: sub-model 0")


def test_sizes_must_be_of_each_layer_and_above_0():
    with pytest.raises(ValueError, match="num_heads lists 1 layers"):
        SubModelConfig(2, 8, (1,), (4, 4))
    with pytest.raises(ValueError, match="below 1"):
        SubModelConfig(1, 8, (0,), (4,))


@pytest.mark.parametrize("num_devices", [1, 2, 3, 6])
@pytest.mark.parametrize("share", [None, 0.3, 0.02])
def test_random_policies_are_valid(num_devices, share):
    rng = np.random.default_rng(1)
    for original in (SMALL, DEIT):
        limits = Limits.share(original, share, num_devices) if share else None
        if limits:
            memory = 0.4 * memory_bytes(original.whole, original)
            limits = replace(limits, memory_bytes=(memory,) * num_devices)
        for _ in range(8):
            policy = sample_policy(rng, original, limits, num_devices)
            for _ in range(3):
                assert violations(policy, original, limits) == []
                policy = mutate_policy(rng, policy, original, limits)
            alike = sample_uniform_policy(rng, original, limits, num_devices)
            assert len(set(alike.sub_models)) == 1 and violations(alike, original, limits) == []


def test_neighbours_of_a_policy_differ_from_it_also_where_all_is_given():
    whole = uniform_policy(SMALL, 2)  # all of the width, heads and FFN columns
    rng = np.random.default_rng(5)
    neighbours = [mutate_policy(rng, whole, SMALL, None) for _ in range(60)]
    assert len({*neighbours} - {whole}) > 40
    assert {c.num_layers for policy in neighbours for c in policy.sub_models} >= {2, 3, 4}


def test_random_policies_differ_reach_far_and_are_in_steps():
    rng = np.random.default_rng(2)
    policies = [sample_policy(rng, SMALL, None, 3) for _ in range(200)]
    assert len(set(policies)) > 190
    assert all(size % SMALL.ffn_step == 0 for p in policies for c in p.sub_models for size in c.ffn_sizes)
    assert {c.num_layers for p in policies for c in p.sub_models} == {1, 2, 3, 4}
    widths = [c.hidden_size for p in policies for c in p.sub_models]
    assert min(widths) <= 4 and max(widths) >= 36 and all(width % SMALL.hidden_step == 0 for width in widths)
    assert any(len(set(c.num_heads)) > 1 for c in policies[0].sub_models + policies[1].sub_models)


def test_what_no_policy_can_satisfy_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="C3: 7 sub-models"):
        sample_policy(rng, SMALL, None, 7)
    with pytest.raises(ValueError, match="C6: .*device 1"):
        sample_policy(rng, SMALL, Limits((1e12, 1e12), (1e12, 100.0)), 2)
    with pytest.raises(ValueError, match="C5"):
        uniform_policy(SMALL, 2, Limits((1.0, 1.0), (1e12, 1e12)))


def test_uniform_policies_share_out_evenly_and_lose_layers_under_limits():
    (config, *others) = uniform_policy(DEIT, 3).sub_models
    assert config == SubModelConfig.alike(12, 256, 4, 1024) and others == [config, config]
    limits = Limits.share(DEIT, 0.06, 3)
    fewer = uniform_policy(DEIT, 3, limits).sub_models[0]
    assert 1 <= fewer.num_layers < 12
    one_more = SubModelConfig.alike(fewer.num_layers + 1, 256, 4, 1024)
    assert flops(one_more, DEIT) > limits.flops[0] >= flops(fewer, DEIT)


def test_encoding_is_normalised_and_tells_policies_apart():
    whole = encode(Policy((SMALL.whole,)), SMALL)
    assert whole.shape == (10,)
    np.testing.assert_allclose(whole, [1, 1, *[0.5] * 8])  # 1/sqrt(4 layers)
    rng = np.random.default_rng(3)
    policies = {sample_policy(rng, SMALL, None, 2) for _ in range(50)}
    vectors = {tuple(encode(policy, SMALL)) for policy in policies}
    assert len(vectors) == len(policies) and {len(v) for v in vectors} == {20}


@pytest.mark.parametrize("total", [0.1, 0.25])
def test_a_filled_policy_is_valid_and_near_its_limits(total):
    original = Original(6, 192, 6, 768, seq_len=17, embedding_rows=213, patch_values=192)
    limits = Limits.share(original, total / 3, 3)
    policy = filled(Policy((SubModelConfig(2, 16, (1, 1), (32, 32)),) * 3), original, limits)
    assert not violations(policy, original, limits) and filled(policy, original, limits) == policy
    share = sum(flops(config, original) for config in policy.sub_models) / flops(original.whole, original)
    assert 0.8 * total < share <= total


def test_a_further_layer_takes_no_more_than_others_leave():
    policy = Policy((SubModelConfig(1, 24, (5,), (88,)), SubModelConfig(2, 24, (1, 5), (4, 88))))
    grown = filled(policy, SMALL, Limits.share(SMALL, 1.0, 2))
    assert grown.sub_models[0].num_layers == 4 and not violations(grown, SMALL)
    assert grown.sub_models[0].num_heads[1] == 1, "the other one keeps five of six"
