"""Cost model and placement: the paper's counts, memory, choice; profiles to JSON and back."""

from dataclasses import replace

import pytest

from detransformer.cluster.devices import PACES, cluster_profile, device_specs, preset_profile
from detransformer.models import preset_config
from detransformer.models.sizes import model_flops, model_parameters
from detransformer.parallel.methods import BLOCK_METHODS, PAPER_METHODS
from detransformer.parallel.plan import layer_plan, published_plan, strategies_for
from detransformer.planning.cost import launched_seconds, predict
from detransformer.planning.memory import held_bytes
from detransformer.planning.pieces import Pieces
from detransformer.planning.placement import bottleneck, limits, method_plan, place, place_freely
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.planning.recorder import device_steps
from detransformer.planning.tape import Compute, Wait

FOUR = [1.0] * 4


def cluster(config, mbps=125.0, count=4):
    return ClusterProfile((preset_profile("rpi4b", config),) * count, LinkProfile(mbps * 1e6))


@pytest.mark.parametrize(
    "method, nb, counts",
    [
        ("tp", None, {"all_reduce": 24}),  # Section IV-C-1
        ("bp+tp", 4, {"all_gather": 4, "all_reduce": 8}),  # Section IV-C-1
        ("bp+sp", 4, {"all_gather": 12}),  # two around and one, of K and V together, in each of four layers
        ("bp+allgather", 4, {"all_gather": 4}),
        ("sp", None, {"all_gather": 13}),  # one a layer, and the last gathers the output
        ("ulysses", None, {"all_to_all": 24, "all_gather": 1}),
        ("galaxy", None, {"all_gather": 25, "reduce_scatter": 24}),
        ("bp+heads", 4, {"all_gather": 5, "all_to_all": 7}),
        ("bp+ulysses", 4, {"all_to_all": 15, "all_gather": 1}),
        ("single", None, {}),
        ("dp", None, {}),
        ("pp", None, {"send": 3}),
    ],
)
def test_collectives_of_bert_base(method, nb, counts):
    config = preset_config("bert-base", nb)
    assert predict(config, published_plan(method, config, FOUR), cluster(config)).counts == counts


def test_bytes_are_the_rings():
    config = preset_config("bert-base")
    one_x = 128 * 768 * 4
    sent = predict(config, published_plan("tp", config, FOUR), cluster(config)).bytes
    assert sent == {"all_reduce": 24 * 2 * 3 * one_x // 4}


def test_bytes_of_one_x():
    """Of X [128, 768] float32 on four devices a rank sends 290 KiB in an all_gather and 73 KiB in an all_to_all."""
    config = preset_config("bert-base", 4)
    sent = predict(config, published_plan("bp+ulysses", config, FOUR), cluster(config)).bytes
    assert sent["all_gather"] == 3 * 128 * 192 * 4
    assert sent["all_to_all"] == (4 * (1 + 3 + 1) + 3) * 3 * 32 * 192 * 4  # in, q k v, context; three times out
    int8 = predict(config, published_plan("bp+ulysses", config, FOUR, wire="int8"), cluster(config)).bytes
    assert int8["all_gather"] == 3 * 32 * (768 + 4)  # of [32, 768] tokens, each with its scale


@pytest.mark.parametrize("model, seconds", [("bert-base", 1.57), ("bert-large", 4.48)])
def test_preset_reproduces_published_single_device_latency(model, seconds):
    config = preset_config(model)
    prediction = predict(config, published_plan("single", config), cluster(config, count=1))
    assert prediction.latency_s == pytest.approx(seconds, rel=1e-9)
    assert prediction.comm_s == 0


@pytest.mark.parametrize(
    "nb, method", [(4, "single"), *((None, m) for m in ("single", "tp", "sp", "ulysses", "galaxy"))]
)
def test_shares_add_up_to_the_whole_model(nb, method):
    config = preset_config("bert-base", nb)
    plan = published_plan(method, config, FOUR)
    steps = [step for rank in range(plan.num_devices) for step in device_steps(config, plan, rank, 128)]
    flops = sum(step.flops for step in steps if isinstance(step, Compute))
    pooler_again = (plan.num_devices - 1) * 2 * config.hidden_size**2  # every device runs it
    assert flops - pooler_again == model_flops(config, 128)
    if method == "single":
        assert held_bytes(config, [plan], 0) == 4 * model_parameters(config)


def test_few_tokens_take_as_long_as_reading_the_weights():
    """One token against 20 MiB of projection and FFN: 4.4 ms at 4.8 GB/s, though its operations take 0.7 ms."""
    config = preset_config("bert-base")
    device = preset_profile("rpi4b", config)
    weight_bytes = 4 * (768 * 768 + 2 * 768 * 3072)
    assert device.compute_s(2 * weight_bytes / 4, "heads", weight_bytes) == pytest.approx(weight_bytes / 4.8e9)
    assert device.compute_s(64 * weight_bytes / 4, "heads", weight_bytes) == pytest.approx(
        16 * weight_bytes / 14.2e9, rel=1e-2
    )
    host = DeviceProfile("host", 2**30, 1e9, "test")  # not known: operations alone
    assert host.compute_s(1e9, "heads", 1e12) == 1


def test_small_shares_are_as_much_slower_as_was_measured():
    """Between what was measured by the logarithms of share and tokens; of chunks the next larger number counts."""
    measured = [("heads", 0.25, 128, 1, 0.8), ("heads", 1.0, 128, 1, 1.0), ("heads", 0.25, 128, 4, 0.4)]
    measured += [("heads", 0.25, 32, 1, 0.6), ("heads", 1.0, 32, 1, 0.9), ("block", 1.0, 128, 1, 1.3)]
    device = DeviceProfile("host", 2**30, 1e9, "test", efficiency=measured)
    cases = {  # (share, tokens, chunks) -> efficiency
        (0.25, 128, 1): 0.8,
        (0.5, 128, 1): 0.9,
        (0.01, 128, 1): 0.8,
        (0.25, 64, 1): 0.7,
        (0.25, 128, 2): 0.4,
        (0.25, 128, 9): 0.4,
        (0.0, 128, 1): 1.0,
    }
    for how, expected in cases.items():
        assert device.efficiency_of("heads", *how) == pytest.approx(expected), how
        assert device.compute_s(1e9, "heads", 0, *how) == pytest.approx(1 / expected)
    assert device.efficiency_of("block", 1.0, 128, 1) == 1  # no share is faster than the whole layer
    assert device.efficiency_of("tensor", 0.25, 128, 1) == 1  # not measured: by operations


def test_the_measured_pace_is_slower_for_small_shares_alone():
    """One device takes the published time under both paces; shares in chunks take longer than operations say."""
    config, specs = preset_config("bert-base"), device_specs(4, "rpi4b")
    paced = {pace: cluster_profile(specs, config, 125e6, pace=pace) for pace in PACES}
    seconds = {}
    for name, plan in {
        "single": published_plan("single", config),
        "heads": layer_plan("auto", config, ["heads"] * 12, FOUR),
        "heads, 4 chunks": layer_plan("auto", config, ["heads"] * 12, FOUR, num_chunks=4),
    }.items():
        seconds[name] = [predict(config, plan, paced[pace]).compute_s for pace in ("measured", "roofline")]
    assert seconds["single"][0] == pytest.approx(seconds["single"][1]) == pytest.approx(1.57, rel=0.01)
    whole, chunked = (seconds[name][0] / seconds[name][1] for name in ("heads", "heads, 4 chunks"))
    assert 1.05 < whole < 1.2 * whole < chunked
    with pytest.raises(ValueError, match="pace='fast' is unknown: choose one of measured, roofline"):
        cluster_profile(specs, config, 125e6, pace="fast")


def test_chunks_hide_communication_behind_compute():
    """The same work and bytes; what travels while something is computed is not waited for."""
    config = preset_config("bert-base", 4)
    strategies = strategies_for(config, "heads")
    plans = [layer_plan("bp+auto", config, strategies, FOUR, num_chunks=n) for n in (1, 4)]
    whole, chunks = (predict(config, plan, cluster(config)) for plan in plans)
    assert chunks.compute_s == pytest.approx(whole.compute_s)
    assert sum(chunks.bytes.values()) == sum(whole.bytes.values())
    assert chunks.comm_s < whole.comm_s / 5


def test_a_collective_waits_for_the_last_rank_and_for_the_link():
    """Two equal devices and a slow one under TP, step by step, against a plain simulation of the recorded steps."""
    config = preset_config("bert-base")
    fast = preset_profile("rpi4b", config)
    slow = replace(fast, name="slow", flops_per_s=fast.flops_per_s / 3)
    profile = ClusterProfile((fast, slow, fast), LinkProfile(50e6, shares=(1.0, 1.0, 0.5)))
    for strategy in ("tensor", "galaxy", "sequence"):
        plan = layer_plan("test", config, (strategy,) * 12, [1.0] * 3, num_chunks=4)
        steps = [device_steps(config, plan, rank, 128) for rank in range(3)]
        link_s = launched_seconds(config, plan, 0, profile.link, 128)
        expected = simulated(steps, profile, link_s)
        assert predict(config, plan, profile).latency_s == pytest.approx(expected, rel=1e-12)


def simulated(steps, profile, link_s) -> float:
    """When the last device is done; a collective begins when all have started it and the one before is through."""
    now, at, done, begun = [0.0] * len(steps), [0] * len(steps), [], 0
    while any(place < len(own) for place, own in zip(at, steps, strict=True)):
        for rank, own in enumerate(steps):
            while at[rank] < len(own) and isinstance(own[at[rank]], Compute):
                step = own[at[rank]]
                now[rank] += profile.devices[rank].compute_s(step.flops, step.strategy, step.weight_bytes, step.share)
                at[rank] += 1
        if all(place == len(own) for place, own in zip(at, steps, strict=True)):
            break
        events = [own[place] for place, own in zip(at, steps, strict=True)]
        if isinstance(events[0], Wait):
            assert len(set(events)) == 1
            now = [max(t, done[events[0].number]) for t in now]
        else:
            done.append(max(*now, *done[-1:]) + link_s[begun])
            begun += 1
        at = [place + 1 for place in at]
    return max(now)


def test_faster_link_is_never_slower():
    config = preset_config("bert-large", 4)
    latencies = [place(config, cluster(config, mbps)).chosen.prediction.latency_s for mbps in (125, 250, 500, 1000)]
    assert latencies == sorted(latencies, reverse=True)


def test_placement_takes_the_fastest_that_fits():
    config = preset_config("bert-large", 4)
    free = place(config, cluster(config, 50))
    assert free.chosen.prediction.latency_s == min(a.prediction.latency_s for a in free.alternatives)
    # Plans 2 and 3 keep whole original layers on every device; a tight budget leaves only Plan 1.
    smallest = min(free.alternatives, key=lambda a: max(a.prediction.memory_bytes))
    budget = max(smallest.prediction.memory_bytes)
    tight = place(config, cluster(config, 50), memory_budget_bytes=budget)
    assert tight.plan.method == "bp+tp"
    rejected = [a for a in tight.alternatives if not a.fits]
    assert {a.plan.method for a in rejected} == {"bp+sp", "bp+allgather"}
    assert all("MiB more than its budget" in a.reason for a in rejected)


def test_slow_links_favour_fewer_collectives():
    config = preset_config("bert-base", 4)
    assert place(config, cluster(config, 10)).plan.method == "bp+allgather"
    assert place(config, cluster(config, 1000)).plan.method in ("bp+tp", "bp+sp")


@pytest.mark.parametrize("mbps", [10, 125, 1000])
def test_auto_is_predicted_no_slower_than_any_named_plan(mbps):
    config = preset_config("bert-base", 4)
    profile = cluster(config, mbps)
    auto = predict(config, method_plan("bp+auto", config, profile), profile).latency_s
    for method in BLOCK_METHODS:
        named = published_plan(method, config, FOUR)
        assert auto <= predict(config, named, profile).latency_s
    assert method_plan("bp+auto", config, profile).method == "bp+auto"
    paper = place(config, profile).plan
    assert paper.method in PAPER_METHODS and not paper.direct and paper.num_chunks == 1


def test_an_impossible_budget_says_how_much_is_missing():
    config = preset_config("bert-base", 4)
    words = r"bp\+tp, needs \d+ MiB on device \d \(Raspberry Pi 4B\), \d+ MiB more than its budget of 50 MiB"
    with pytest.raises(ValueError, match=f"no plan fits: even the smallest, {words}"):
        place(config, cluster(config), memory_budget_bytes=50 * 2**20)


def test_profile_round_trip(tmp_path):
    config = preset_config("bert-base")
    link = LinkProfile(125e6, {"all_reduce": 1e-4, "*": 2e-4}, {"*": 0.9}, "measured")
    profile = ClusterProfile((preset_profile("rpi4b", config),) * 2, link)
    path = tmp_path / "profile.json"
    profile.save(path, {"date": "today"})
    assert ClusterProfile.load(path) == profile


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}', '{"version": 1, "devices": [1], "link": {}}'])
def test_a_damaged_profile_is_one_sentence(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="profile.json is not a profile"):
        ClusterProfile.load(path)
    with pytest.raises(ValueError, match="does not exist"):
        ClusterProfile.load(tmp_path / "none.json")


# Explanations --------------------------------------------------------------------------------------------------------


def test_the_bottleneck_is_the_largest_share():
    config = preset_config("bert-base", 4)
    plan = place_freely(config, cluster(config)).plan
    assert bottleneck(plan, config, cluster(config)).startswith("Bottleneck: compute ")
    slow = bottleneck(published_plan("bp+sp", config, FOUR), config, cluster(config, 10))
    assert slow.startswith("Bottleneck: bytes on the links ") and slow.endswith("%.")


def test_what_limits_adds_up_and_follows_link_and_devices():
    config = preset_config("bert-base", 4)
    plan = published_plan("bp+sp", config, FOUR)
    shares = [limits(plan, config, cluster(config, mbps)) for mbps in (10, 1000)]
    for share in shares:
        assert sum(share.values()) == pytest.approx(1) and min(share.values()) > -1e-9
    assert shares[0]["bytes on the links"] > 0.8 > 0.3 > shares[1]["bytes on the links"]
    slow = DeviceProfile("slow", 2**32, 1e9, "test")
    mixed = ClusterProfile((*cluster(config).devices[:2], slow, cluster(config).devices[3]), LinkProfile(1e9))
    assert limits(plan, config, mixed)["compute"] > 0.9


@pytest.mark.parametrize("shares", [(), (1.0, 0.5, 1.0, 0.25)])
def test_a_modelled_link_is_paced_by_what_is_priced(shares):
    """Also with unequal parts, of which some ranks send more than others: a collective ends for all ranks at once."""
    config, link = preset_config("bert-base", 4), LinkProfile(1e8, shares=shares)
    plan = layer_plan("bp+auto", config, strategies_for(config, "heads"), [1.0, 1.0, 2.0, 4.0], num_chunks=2)
    plan = replace(plan, sub_blocks=(1, 1, 1, 1))
    seconds = [launched_seconds(config, plan, rank, link, 128) for rank in range(4)]
    devices = (preset_profile("rpi4b", config),) * 4
    priced = Pieces(config, plan, ClusterProfile(devices, link)).run(plan.strategies).messages
    assert seconds[0] and seconds == [[message.seconds for message in priced]] * 4
    stages = published_plan("pp", preset_config("bert-base"), FOUR)
    sent = [launched_seconds(preset_config("bert-base"), stages, rank, link, 128) for rank in range(4)]
    assert [len(own) for own in sent] == [1, 2, 2, 1] and sent[0][0] == sent[1][0]  # a message, as both ends see it


@pytest.mark.parametrize("method", ["tp", "sp", "single"])
def test_one_device_is_planned_for_too(method):
    """What is left of a cluster may be one device: every method then runs layers whole."""
    config = preset_config("bert-base")
    profile = cluster_profile(device_specs(1, "rpi4b"), config, 125e6)
    freely, named = place_freely(config, profile).plan, place(config, profile, methods=[method]).plan
    assert freely.num_devices == named.num_devices == 1
    assert set(freely.strategies) == set(named.strategies) == {"replicate"}
    assert named.method == method


@pytest.mark.parametrize(
    "kind, steps",
    [("all_reduce", 6), ("all_gather", 3), ("all_to_all", 1), ("reduce_scatter", 1), ("send", 1), ("receive", 1)],
)
def test_collectives_wait_for_their_steps_and_their_bytes(kind, steps):
    link = LinkProfile(100e6, {"*": 1e-3}, {kind: 0.5, "*": 1.0})
    assert link.collective_s(kind, 0, 4) == pytest.approx(steps * 1e-3)
    assert link.collective_s(kind, 1e6, 4) == pytest.approx(steps * 1e-3 + 0.16)
