"""Cost model and placement: the paper's counts, memory, choice; profiles to JSON and back."""

from dataclasses import replace

import pytest

from detransformer.cluster.devices import preset_profile
from detransformer.models import preset_config
from detransformer.models.sizes import model_flops, model_parameters
from detransformer.parallel.plan import published_plan
from detransformer.planning.cost import Compute, device_parameters, device_steps, predict, segments
from detransformer.planning.placement import auto_plan, place
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile

FOUR = [1.0] * 4


def cluster(config, mbps=125.0, count=4):
    return ClusterProfile((preset_profile("rpi4b", config),) * count, LinkProfile(mbps * 1e6))


@pytest.mark.parametrize(
    "method, nb, counts",
    [
        ("tp", None, {"all_reduce": 24}),  # Section IV-C-1
        ("bp+tp", 4, {"all_gather": 4, "all_reduce": 8}),  # Section IV-C-1
        ("bp+sp", 4, {"all_gather": 16}),  # two around and two in each of four layers
        ("bp+allgather", 4, {"all_gather": 4}),
        ("sp", None, {"all_gather": 25}),  # two a layer, and the last gathers the output
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


@pytest.mark.parametrize("model, seconds", [("bert-base", 1.57), ("bert-large", 4.48)])
def test_preset_reproduces_published_single_device_latency(model, seconds):
    config = preset_config(model)
    prediction = predict(config, published_plan("single", config), cluster(config, count=1))
    assert prediction.latency_s == pytest.approx(seconds, rel=1e-9)
    assert prediction.comm_s == 0


@pytest.mark.parametrize("method", ["single", "tp", "sp"])
def test_shares_add_up_to_the_whole_model(method):
    config = preset_config("bert-base")
    plan = published_plan(method, config, FOUR)
    flops = sum(
        step.flops
        for rank in range(plan.num_devices)
        for step in device_steps(config, plan, rank, 128)
        if isinstance(step, Compute)
    )
    pooler_again = (plan.num_devices - 1) * 2 * config.hidden_size**2  # every device runs it
    assert flops - pooler_again == model_flops(config, 128)


def test_blocks_add_up_to_the_whole_model():
    config = preset_config("bert-base", 4)
    plan = published_plan("single", config)
    flops = sum(s.flops for s in device_steps(config, plan, 0, 128) if isinstance(s, Compute))
    assert flops == model_flops(config, 128)
    assert device_parameters(config, plan, 0) == model_parameters(config)


def test_segments_lie_between_collectives():
    config = preset_config("bert-base", 4)
    plan = published_plan("bp+sp", config, FOUR)
    computes, collectives = segments(device_steps(config, plan, 1, 128))
    assert len(computes) == len(collectives) + 1


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


def test_auto_plan_is_the_chosen_one_renamed():
    config = preset_config("bert-base", 4)
    profile = cluster(config, 10)
    assert auto_plan(config, profile) == replace(place(config, profile).plan, method="bp+auto")


def test_an_impossible_budget_says_how_much_is_missing():
    config = preset_config("bert-base", 4)
    with pytest.raises(ValueError, match=r"no plan fits: even the smallest, bp\+tp, needs \d+ MiB .* MiB more than"):
        place(config, cluster(config), memory_budget_bytes=50 * 2**20)


def test_slower_device_sets_the_pace():
    config = preset_config("bert-base", 4)
    fast = preset_profile("rpi4b", config)
    slow = DeviceProfile("slow", fast.memory_bytes, {"*": fast.flops_per_s["*"] / 2}, "test")
    plan = published_plan("bp+tp", config, FOUR)
    mixed = predict(config, plan, ClusterProfile((fast, fast, slow, fast), LinkProfile(125e6)))
    even = predict(config, plan, cluster(config))
    assert mixed.compute_s == pytest.approx(2 * even.compute_s)


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
