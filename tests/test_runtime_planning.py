"""Planning in two phases: plans that are held together, the rate that links show, and what each request takes."""

import time
from functools import cache

import numpy as np
import pytest

from detransformer.models import preset_config
from detransformer.parallel.plan import Plan
from detransformer.planning.cost import predict
from detransformer.planning.memory import activation_bytes, held_bytes
from detransformer.planning.pieces import Pieces
from detransformer.planning.placement import place_freely
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.planning.runtime import (
    MIN_BYTES,
    PROBE_BYTES,
    BandwidthEstimator,
    RuntimePlanner,
    static_plans,
)

MIB = 2**20
CONFIG = preset_config("bert-base", 4)
LENGTHS, RATES = (32, 128, 512), (1e9, 2.5e8, 1.25e8)


def cluster(gflops=(284.0,) * 4, memory=4096 * MIB):
    """By default as fast as Jetson TX2: there the best plan depends on rate and length."""
    devices = tuple(DeviceProfile(f"d{i}", memory, 1e9 * rate, "test") for i, rate in enumerate(gflops))
    return ClusterProfile(devices, LinkProfile(1e9))


@pytest.fixture(scope="module")
def plans():
    return static_plans(CONFIG, cluster(), LENGTHS, RATES)


@pytest.fixture
def planner(plans):
    return RuntimePlanner(CONFIG, plans, cluster(), LENGTHS, RATES)


def latency_s(plan, seq_len, bandwidth_bps, profile=None):
    return predict(CONFIG, plan, (profile or cluster()).at(bandwidth_bps), seq_len).latency_s


# Static ------------------------------------------------------------------------------------------------------------


def test_plans_held_together_share_one_split_and_each_adds_something(plans):
    assert 2 <= len(plans) <= 4
    splits = {(p.device_ids, p.heads, p.ffn_columns, p.sub_blocks) for p in plans if p.num_devices > 1}
    assert len(splits) == 1
    cells = [(length, rate) for length in LENGTHS for rate in RATES]
    table = np.array([[latency_s(plan, *cell) for cell in cells] for plan in plans])
    sums = [table[: i + 1].min(0).sum() for i in range(len(plans))]
    assert sums == sorted(sums, reverse=True) and sums[-1] < 0.95 * sums[0]
    assert sums[0] == min(table.sum(1))  # the first one is the best alone


def test_the_held_plans_come_near_to_planning_each_request_freely(plans):
    """They share one split, so that two devices cannot join where four are held."""
    free, held = [], []
    for length in LENGTHS:
        for rate in RATES:
            free.append(place_freely(CONFIG, cluster().at(rate), length).chosen.latency_s)
            held.append(min(latency_s(plan, length, rate) for plan in plans))
    assert sum(held) <= 1.03 * sum(free)
    assert max(np.divide(held, free)) < 1.15


def test_all_held_weights_and_a_request_fit_the_budget_and_less_memory_is_slower():
    totals = []
    for budget_mib in (290, 330, 1000):
        profile = cluster((100.0, 100.0, 200.0, 200.0), budget_mib * MIB)
        plans = static_plans(CONFIG, profile, LENGTHS, RATES)
        for device in range(4):
            held = held_bytes(CONFIG, plans, device)
            assert not held or held + activation_bytes(CONFIG, 512, 1) <= budget_mib * MIB
        totals.append(sum(min(latency_s(p, t, r, profile) for p in plans) for t in LENGTHS for r in RATES))
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_static_planning_says_what_is_missing():
    with pytest.raises(ValueError, match="no plan fits: even the smallest"):
        static_plans(CONFIG, cluster(memory=100 * MIB), LENGTHS, RATES)


# The rate that links show --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all", "reduce_scatter"])
def test_a_collective_tells_the_rate_it_was_sent_at(kind):
    link = LinkProfile(1e9, {"*": 3e-4, "all_gather": 1e-4}, {"*": 0.9, "all_reduce": 0.5})
    seconds = link.at(2e8).collective_s(kind, 100_000, 4)
    assert BandwidthEstimator(link).rate(kind, 100_000, seconds, 4) == pytest.approx(2e8)
    assert BandwidthEstimator(link).rate(kind, MIN_BYTES - 1, seconds, 4) is None
    assert BandwidthEstimator(link).rate(kind, 100_000, 1e-4, 4) is None  # no time for its latency


def feed(estimator, rate_bps, spread=0.0, count=20, late=0.0, seed=0):
    """One request's messages at a rate, of which a share `late` waited for other devices."""
    chance = np.random.default_rng(seed)
    for _ in range(count):
        seconds = estimator.link.at(rate_bps).collective_s("all_gather", 300_000, 4)
        waited = 5 * seconds if chance.uniform() < late else 0.0
        estimator.observe("all_gather", 300_000, seconds * (1 + spread * chance.uniform(-1, 1)) + waited, 4)
    return estimator.end_request()


def test_a_fall_is_followed_at_once_and_a_rise_smoothly():
    estimator = BandwidthEstimator(LinkProfile(1e9))
    assert not estimator.end_request()
    assert feed(estimator, 1e8)
    assert estimator.bandwidth_bps == pytest.approx(1e8)
    feed(estimator, 1e9)
    assert 3e8 < estimator.bandwidth_bps < 7e8
    for _ in range(6):
        feed(estimator, 1e9)
    assert estimator.bandwidth_bps > 8e8


def test_noise_hardly_moves_the_estimate_and_waiting_does_not_lower_it():
    estimator = BandwidthEstimator(LinkProfile(1e9))
    seen = []
    for seed in range(100):
        feed(estimator, 1e9, spread=0.1, late=0.6, seed=seed)
        seen.append(estimator.bandwidth_bps)
    assert 0.9e9 < min(seen) and max(seen) < 1.15e9
    assert max(abs(np.diff(seen))) < 0.03e9


# What each request takes ---------------------------------------------------------------------------------------------


def test_predictions_are_the_cost_models_at_the_grid_and_near_it_between(planner, plans):
    for rate in RATES:
        expected = [latency_s(plan, 128, rate) for plan in plans]
        assert planner.predict(128, rate) == pytest.approx(expected)
    for length, rate in ((80, 1e9), (300, 1.8e8)):
        expected = [latency_s(plan, length, rate) for plan in plans]
        assert planner.predict(length, rate) == pytest.approx(expected, rel=0.15)
    assert planner.predict(128, 1.0) == pytest.approx(planner.predict(128, min(RATES)))  # no slower than known


def test_a_choice_takes_well_under_a_millisecond(planner):
    planner.choose(100)
    start = time.process_time()
    for _ in range(200):
        planner.choose(100)
    assert (time.process_time() - start) / 200 < 1e-3


def test_other_lengths_take_other_plans_at_once(planner):
    """At 250 Mbps short requests run on one device, long ones on all; going from one to the other is no switch."""
    planner.estimator.bandwidth_bps = 2.5e8
    planner.choose(32)
    chosen = [planner.choose(length) for length in (32, 512, 32, 512)]
    assert len({choice.index for choice in chosen}) == 2
    assert not any(choice.switched for choice in chosen)
    for choice, length in zip(chosen, (32, 512, 32, 512), strict=True):
        assert choice.predicted_s == pytest.approx(planner.predict(length, 2.5e8)[choice.index])


def run(planner, choice, length, rate_bps):
    """Runs a request: its plan's collectives at that rate."""
    plan = planner.plans[choice.index]
    for message in Pieces(CONFIG, plan, cluster().at(rate_bps), length).run(plan.strategies).messages:
        planner.observe(message.kind, message.num_bytes, message.seconds)


def test_a_changed_rate_changes_the_plan_and_noise_does_not(planner):
    before = planner.choose(512)
    run(planner, before, 512, 1.25e8)
    after = planner.choose(512)
    assert after.switched and after.index != before.index
    assert planner.bandwidth_bps == pytest.approx(1.25e8)
    for rate in np.random.default_rng(0).uniform(0.9, 1.1, 50) * 1.25e8:
        choice = planner.choose(512)
        assert choice.index == after.index and not choice.switched
        run(planner, choice, 512, rate)


def test_a_probe_is_due_when_silence_may_cost_more_and_is_believed(planner, plans):
    assert not planner.needs_probe()
    planner.observe_probe(PROBE_BYTES, cluster().link.at(1.25e8).collective_s("all_gather", PROBE_BYTES, 4))
    assert planner.bandwidth_bps == pytest.approx(1.25e8)
    count = 0
    while not planner.needs_probe():
        choice = planner.choose(512)
        assert plans[choice.index].num_devices == 1  # sends nothing
        count += 1
    assert 1 <= count <= 20
    planner.observe_probe(PROBE_BYTES, cluster().link.at(1e9).collective_s("all_gather", PROBE_BYTES, 4))
    assert not planner.needs_probe()
    assert plans[planner.choose(512).index].num_devices == 4


def replay(planner: RuntimePlanner, profile: ClusterProfile, lengths, bandwidths_bps, noise: float):
    """What `planner` chooses for requests of these lengths, each at its own bandwidth; a simulation.

    Every collective lasts as the cost model says at the true rate, up to `noise` (relative) more or less. A tuple a
    request: the seconds that it took, probes included, those under the fastest plan, and whether plans were switched.
    """
    chance = np.random.default_rng(0)

    @cache
    def priced(plan: Plan, seq_len: int, bandwidth_bps: float):
        return Pieces(CONFIG, plan, profile.at(bandwidth_bps), seq_len).run(plan.strategies)

    def lasts(seconds: float) -> float:
        return seconds * (1 + noise * chance.uniform(-1, 1))

    for seq_len, bandwidth_bps in zip(lengths, bandwidths_bps, strict=True):
        probe_s = 0.0
        if planner.needs_probe():
            link, count = profile.link.at(bandwidth_bps), len(profile.devices)
            probe_s = lasts(link.collective_s("all_gather", PROBE_BYTES, count))
            planner.observe_probe(PROBE_BYTES, probe_s)
        choice = planner.choose(seq_len)
        runs = [priced(plan, seq_len, bandwidth_bps) for plan in planner.plans]
        for message in runs[choice.index].messages:
            planner.observe(message.kind, message.num_bytes, lasts(message.seconds))
        latencies = [run.now.max() for run in runs]
        yield latencies[choice.index] + probe_s, min(latencies), choice.switched


@pytest.mark.parametrize(
    "gflops, noise",
    [((284.0,) * 4, 0.0), ((284.0,) * 4, 0.1), ((14.2,) * 4, 0.1), ((14.2, 100.0, 284.0, 284.0), 0.1)],
    ids=str,
)
def test_a_drop_and_a_rise_of_the_rate_cost_little_over_an_oracle(gflops, noise):
    """200 requests of mixed lengths at 1000, 125 and again 1000 Mbps."""
    profile = cluster(gflops)
    planner = RuntimePlanner(CONFIG, static_plans(CONFIG, profile, LENGTHS, RATES), profile, LENGTHS, RATES)
    lengths = np.random.default_rng(1).choice(LENGTHS, 200).tolist()
    rates = [1e9] * 67 + [1.25e8] * 66 + [1e9] * 67
    taken, fastest, switched = map(np.array, zip(*replay(planner, profile, lengths, rates, noise), strict=True))
    assert taken.sum() <= 1.03 * fastest.sum() and (taken >= fastest).all()
    assert switched.sum() <= 6
