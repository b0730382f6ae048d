"""The search: prices are the cost model's, and no plan is faster; which devices, memory and formats are taken."""

import itertools
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from transformers import BertConfig, GPT2Config

from detransformer.cluster.devices import preset_profile
from detransformer.models import preset_config
from detransformer.models.configuration import decoupled_config
from detransformer.parallel.plan import layer_plan, strategies_for
from detransformer.planning.cost import predict
from detransformer.planning.memory import least_bytes, memory_bytes
from detransformer.planning.pieces import Pieces
from detransformer.planning.placement import place, place_freely
from detransformer.planning.problem import device_speeds
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.planning.search import fastest

BERT = dict(hidden_size=96, num_attention_heads=6, intermediate_size=384, vocab_size=500)
GPT2 = dict(n_embd=96, n_head=6, vocab_size=500, bos_token_id=0, eos_token_id=0)
MIB = 2**20


def small(num_layers, num_original_layers=None, num_divisions=4, decoder=False):
    original = GPT2Config(n_layer=num_layers, **GPT2) if decoder else BertConfig(num_hidden_layers=num_layers, **BERT)
    return decoupled_config(original, num_original_layers, num_divisions) if num_original_layers else original


def unequal(speeds, mbps=50.0, shares=(), memory_bytes_per_s=4e9, memories=None):
    """Devices of these speeds; shares under some strategies run at another rate than the rest."""
    efficiency = [("block", 0.1, 20, 1, 0.7), ("block", 1.0, 20, 1, 0.9), ("block", 0.1, 50, 1, 0.8)]
    efficiency += [("heads", 0.5, 20, 1, 0.9), ("heads", 0.5, 20, 4, 0.5), ("replicate", 1.0, 20, 4, 0.8)]
    devices = tuple(
        DeviceProfile(f"d{i}", m, 2e9 * s, "test", memory_bytes_per_s, tuple(efficiency))
        for i, (s, m) in enumerate(zip(speeds, memories or [2**30] * len(speeds), strict=True))
    )
    return ClusterProfile(devices, LinkProfile(mbps * 1e6, shares=shares))


def any_plan(config, speeds, num_chunks=1, wire="float32", direct=True):
    return layer_plan("bp+auto", config, strategies_for(config, "replicate"), speeds, wire, direct, num_chunks)


def all_strategies(pieces):
    return list(itertools.product(*[[row.name for row in stage] for stage in pieces.choices()[1:-1]]))


MODELS = {
    "original": small(3),
    "decoupled": small(5, 3, 6),
    "mostly decoupled": small(4, 2),
    "decoder": small(3, decoder=True),
    "decoupled decoder": small(4, 2, decoder=True),
}
REQUESTS = {  # of decoders, `past` counts too
    "37 tokens": dict(seq_len=37),
    "two sequences": dict(seq_len=16, batch_size=2),
    "one token": dict(seq_len=1, past=20),
}
CASES = [
    (model, request, wire, num_chunks)
    for model, request, wire, num_chunks in itertools.product(MODELS, REQUESTS, ["float32", "int8"], [1, 2, 4])
    if "decoder" in model or request != "one token"
]


def arbitrary(case):
    """(config, plan, profile, request) of a case, with devices and links by chance; the same ones each time."""
    model, request, wire, num_chunks = case
    chance = random.Random(str(case))
    count = chance.choice([2, 3, 4])
    speeds = [chance.choice([1.0, chance.uniform(0.2, 2.0)]) for _ in range(count)]
    shares = chance.choice([(), tuple(chance.uniform(0.3, 1.0) for _ in range(count))])
    profile = unequal(speeds, chance.choice([5, 50, 500]), shares, chance.choice([None, 4e9]))
    plan = any_plan(MODELS[model], speeds, num_chunks, wire, direct=chance.random() < 0.8)
    return MODELS[model], plan, profile, REQUESTS[request]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_plan_is_faster_than_the_one_found(case):
    """Of all there are; and under four budgets that differ by device, of those that fit."""
    config, plan, profile, request = arbitrary(case)
    pieces = Pieces(config, plan, profile, **request)
    prices = {strategies: pieces.price(strategies)[0] for strategies in all_strategies(pieces)}
    sizes = {names: np.array(memory_bytes(config, replace(plan, strategies=names), **request)) for names in prices}
    least = least_bytes(config, request["seq_len"], request.get("batch_size", 1))
    found = fastest(pieces, np.full(len(pieces.ranks), np.inf))
    assert prices[found] == pytest.approx(min(prices.values()), rel=1e-9)
    chance, largest = random.Random(1), sorted(max(own) for own in sizes.values())
    for share in (0.0, 0.1, 0.3, 0.6):
        size = largest[int(share * (len(largest) - 1))]
        budgets = np.array([int(size * chance.choice([1, 1, 1.2])) for _ in pieces.ranks])
        fitting = [names for names in prices if (sizes[names][pieces.first_of_group] <= budgets).all()]
        found = fastest(pieces, budgets - float(least))
        assert bool(found) == bool(fitting)
        if found:
            assert found in fitting
            assert prices[found] == pytest.approx(min(prices[names] for names in fitting), rel=1e-9)


def test_nothing_is_found_below_what_there_is():
    config = small(4)
    pieces = Pieces(config, any_plan(config, [1.0, 1.5]), unequal([1.0, 1.5]), 37)
    room = np.full(2, np.inf)
    best = pieces.price(fastest(pieces, room))[0]
    assert fastest(pieces, room, best * (1 - 1e-6)) is None
    assert fastest(pieces, room, best * (1 + 1e-6))


# Placement: which devices, in which split and format


def test_speeds_are_relative_to_the_fastest():
    assert device_speeds(unequal([1.0, 4.0, 2.0])) == [0.25, 1.0, 0.5]
    config = preset_config("bert-base", 4)
    assert device_speeds(ClusterProfile((preset_profile("rpi4b", config),) * 3, LinkProfile(1e9))) == [1.0] * 3


def test_a_device_that_makes_things_slower_is_left_out():
    config = preset_config("bert-base")
    placement = place_freely(config, unequal([1.0, 0.02, 1.0, 1.0], 200))
    assert placement.plan.device_ids == (0, 2, 3) and placement.plan.devices == (0, 2, 3)
    (sentence,) = placement.left_out
    with_it = next(a for a in placement.alternatives if a.plan.num_devices == 4)
    assert sentence == (
        f"device 1 (d1) is left out: with it {with_it.latency_s:.3g} s instead of {placement.chosen.latency_s:.3g} s"
    )
    assert with_it.latency_s > placement.chosen.latency_s


def test_on_a_hopeless_link_one_device_runs_alone():
    placement = place_freely(preset_config("bert-base"), unequal([1.0, 1.0, 1.5], 0.5))
    assert placement.plan.device_ids == (2,) and placement.plan.method == "single"
    (sentence,) = placement.left_out
    assert sentence.startswith("devices 0 (d0) and 1 (d1) are left out: with them ")


def test_a_fast_device_on_a_narrow_link_is_left_out():
    """Fastest first, all numbers of devices would include it."""
    config = preset_config("bert-base")
    placement = place_freely(config, unequal([1.0, 1.0, 1.0, 1.1], 200, shares=(1.0, 1.0, 1.0, 0.01)))
    assert placement.plan.device_ids == (0, 1, 2)


def test_all_alternatives_are_listed_and_none_that_fits_is_faster():
    config = preset_config("bert-large", 4)
    placement = place_freely(config, unequal([1.0, 2.0, 2.0, 4.0], 125))
    methods = {a.plan.method for a in placement.alternatives}
    assert methods == {"bp+auto", "single", "bp+tp", "bp+sp", "bp+allgather"}
    assert {a.plan.num_devices for a in placement.alternatives} == {1, 2, 3, 4}
    assert placement.chosen is placement.alternatives[0]
    plans = [replace(a.plan, method="") for a in placement.alternatives]
    assert len(set(plans)) == len(plans)


@pytest.mark.parametrize("model, nb", [("bert-base", 4), ("bert-base", None)])
@pytest.mark.parametrize("mbps", [20, 200, 2000])
def test_unequal_devices_are_used_by_their_speed(model, nb, mbps):
    """Never slower than any published plan on all devices, split by speed or evenly, nor than the fastest alone."""
    config = preset_config(model, nb)
    profile = unequal([1.0, 1.0, 2.0, 4.0], mbps)
    best = place_freely(config, profile).chosen.latency_s
    assert best <= place(config, profile).chosen.latency_s
    even = any_plan(config, [1.0] * 4)
    assert best <= predict(config, even, profile).latency_s


def test_a_device_of_little_memory_takes_less_weight_but_its_tokens():
    config = preset_config("bert-large", 4, num_divisions=8)
    memories = [400 * MIB, 4096 * MIB, 4096 * MIB, 4096 * MIB]
    roomy, tight = (place_freely(config, unequal([1.0] * 4, 1000, memories=m)) for m in (memories[1:2] * 4, memories))
    assert roomy.plan.sub_blocks == (2, 2, 2, 2)
    rank = tight.plan.device_ids.index(0)
    assert tight.chosen.prediction.memory_bytes[rank] <= memories[0]
    assert tight.plan.sub_blocks[rank] < 2 or tight.plan.heads[rank] < 4
    assert tight.plan.tokens_share == (1.0,) * 4
    speeds = any_plan(config, [1.0] * 4)
    assert memory_bytes(config, replace(speeds, strategies=tight.plan.strategies), 128)[0] > memories[0]


def test_a_device_that_cannot_hold_the_embeddings_is_left_out():
    config = preset_config("bert-base")
    placement = place_freely(config, unequal([1.0, 1.0, 9.0], 1000, memories=[2**30, 2**30, 80 * MIB]))
    assert placement.plan.device_ids == (0, 1)
    assert placement.left_out == (
        "device 2 (d2) is left out: 98 MiB for embeddings and activations are above its budget of 80 MiB",
    )


def test_where_nothing_fits_the_message_says_what_would_help():
    config = preset_config("bert-large")
    with pytest.raises(ValueError, match=r"or shorten requests \(288 MiB of it are activations\)\."):
        place_freely(config, unequal([1.0] * 2), seq_len=512, batch_size=8, memory_budget_bytes=800 * MIB)


def test_the_most_exact_format_within_two_percent_is_taken():
    config = preset_config("bert-base")
    wires = ("int8", "float32", "bfloat16")
    latencies = {w: place_freely(config, unequal([10.0] * 4, 40), wires=(w,)).chosen.latency_s for w in wires}
    assert latencies["int8"] < 0.98 * latencies["bfloat16"] < latencies["float32"]
    slow = place_freely(config, unequal([10.0] * 4, 40), wires=wires)
    assert slow.plan.wire == "int8" and slow.chosen.latency_s == latencies["int8"]
    assert {a.plan.wire for a in slow.alternatives} == set(wires)
    assert place_freely(config, unequal([1.0] * 4, 100_000), wires=wires).plan.wire == "float32"


GPT2_XL_SIZES = dict(
    hidden_size=1600, num_hidden_layers=48, num_attention_heads=25, intermediate_size=6400, max_position_embeddings=1024
)


@pytest.mark.parametrize("speeds", [[1.0, 2.0, 4.0, 8.0] * 16, [1 + i / 64 for i in range(64)]], ids=["4 kinds", "64"])
@pytest.mark.parametrize("num_original_layers", [None, 12])
@pytest.mark.slow
def test_64_devices_are_planned_in_seconds(speeds, num_original_layers):
    """Processor time where nothing is recorded yet, and afterwards."""
    config = BertConfig(**GPT2_XL_SIZES)
    config = decoupled_config(config, num_original_layers, 64) if num_original_layers else config
    profile = unequal(speeds, 1000, memories=[8 * 2**30] * 64)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        placement = place_freely(config, profile, seq_len=512)
        seconds.append(time.process_time() - start)
    assert seconds[0] < 20 and seconds[1] < 2
    assert placement.chosen.latency_s <= placement.alternatives[-1].latency_s
    assert 1 < placement.plan.num_devices <= 64
