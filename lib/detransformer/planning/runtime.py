"""Two phases of planning (TPDS 2025): which plans to load, and which of them each request takes.

Static: `static_plans` chooses, before any request, a few plans that share one loading of weights. Runtime: for each
request, `RuntimePlanner` takes the fastest plan at the rate that the links have shown so far.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig

from detransformer.parallel.plan import Plan, strategies_for
from detransformer.planning.memory import activation_bytes, cache_bytes, held_bytes
from detransformer.planning.pieces import Pieces, strategies_of
from detransformer.planning.placement import chunk_counts, first_counts, place_freely
from detransformer.planning.problem import Problem, splits
from detransformer.planning.profile import ClusterProfile, LinkProfile

WORTH = 0.005  # a further plan must save this fraction of the summed latency
SWITCH_GAIN = 0.05  # after a change of rate, another plan must be predicted to save more
MIN_BYTES = 16 * 1024  # smaller messages measure the latency, not the rate
QUANTILE = 0.95  # most durations include waiting for late devices, so the fastest messages show the rate
SAME_RATE = 0.15  # changes below this may be noise
RISE = 0.5  # how far the estimate follows a higher rate; it follows a lower one at once
NOISE_WEIGHT = 0.2  # how far it follows changes that may be noise
PROBE_BYTES = 64 * 1024
PROBE_WORTH = 20  # a probe is due once requests may have lost this many times its own time


# Static: which plans to load -----------------------------------------------------------------------------------------


def static_plans(
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_lens: Sequence[int],
    bandwidths_bps: Sequence[float],
    max_plans: int = 4,
) -> list[Plan]:
    """At most `max_plans` plans to load at once: the best single one, then those that add most.

    They share one split of one set of devices, and so the weights; a plan on a single device may join them. Of all such
    sets whose weights fit, it returns the one of least summed latency over requests of all `seq_lens`, equally frequent
    at all `bandwidths_bps`. The devices' memory limits weights and the longest request.

    Raises:
        ValueError: if no plan fits.
    """
    cells = _Cells(config, profile, seq_lens, bandwidths_bps)
    largest, sets = cells.largest, []
    place_freely(config, profile, largest.seq_len)  # or says why
    for order in largest.orders:
        singles = [plan for i in order for plan in splits(largest, [i]) if not largest.lacks(plan)][:1]
        sets.append(cells.hold(singles, max_plans))
        for count in first_counts(len(order))[1:]:
            for split in splits(largest, sorted(order[:count])):
                sets.append(cells.hold([*cells.contenders(split), *singles], max_plans))
    return min(sets, key=lambda pair: pair[0])[1]


class _Cells:
    """Requests of each length at each bandwidth, and what plans cost there."""

    def __init__(self, config, profile, seq_lens, bandwidths_bps):
        cells = itertools.product(seq_lens, bandwidths_bps)
        self.problems = [Problem(config, profile.at(rate_bps), seq_len, 1) for seq_len, rate_bps in cells]
        self.largest = Problem(config, profile, max(seq_lens), 1)
        self._pieces: dict[tuple[int, Plan], Pieces] = {}

    def pieces(self, cell: int, plan: Plan) -> Pieces:
        """Prices of all plans of this split in a cell."""
        key = cell, replace(plan, method="", strategies=())
        if key not in self._pieces:
            self._pieces[key] = self.problems[cell].pieces(plan)
        return self._pieces[key]

    def contenders(self, split: Plan) -> list[Plan]:
        """For each number of chunks: plans of one strategy for all original layers, and each cell's fastest plan."""
        plans = []
        for num_chunks in chunk_counts(self.largest.seq_len, split.num_devices):
            split = replace(split, num_chunks=num_chunks)
            for name in strategies_of(self.largest.config, "original", split.num_devices):
                plans.append(replace(split, strategies=strategies_for(self.largest.config, name)))
            found = [problem.fastest(self.pieces(cell, split)) for cell, problem in enumerate(self.problems)]
            plans += [replace(split, strategies=strategies) for strategies in found if strategies]
        return list(dict.fromkeys(plans))

    def hold(self, plans: Sequence[Plan], max_plans: int) -> tuple[float, list[Plan]]:
        """(summed latency, plans): plans that fit together, added one by one by what they save."""
        cells = range(len(self.problems))
        latency_s = np.array([[self.pieces(c, plan).price(plan.strategies)[0] for c in cells] for plan in plans])
        held: list[int] = []
        now = np.full(len(self.problems), np.inf)
        while len(held) < max_plans:
            sums = {i: np.minimum(now, latency_s[i]).sum() for i in range(len(plans)) if i not in held}
            better = sorted((i for i in sums if sums[i] < (1 - WORTH) * now.sum()), key=sums.get)
            best = next((i for i in better if self._fit([plans[k] for k in (*held, i)])), None)
            if best is None:
                break
            held.append(best)
            now = np.minimum(now, latency_s[best])
        return float(now.sum()), [plans[i] for i in held]

    def _fit(self, plans: Sequence[Plan]) -> bool:
        """Whether the weights of all plans, and one largest request, fit each device."""
        largest, config = self.largest, self.largest.config
        activations = activation_bytes(config, largest.seq_len, 1)
        for device in {device for plan in plans for device in plan.device_ids}:
            own = [(plan, plan.device_ids.index(device)) for plan in plans if device in plan.device_ids]
            cached = max(cache_bytes(config, plan, rank, largest.seq_len) for plan, rank in own)
            if held_bytes(config, plans, device) + activations + cached > largest.budgets[device]:
                return False
        return True


# Runtime: which of them each request takes ---------------------------------------------------------------------------


class BandwidthEstimator:
    """The links' rate, from durations of collectives: falls at once, rises smoothly, and noise moves it little.

    Args:
        link: its step latency and efficiency are subtracted; its rate is the first estimate.
    """

    def __init__(self, link: LinkProfile):
        self.link = link
        self.bandwidth_bps = link.bandwidth_bps
        self._rates: list[float] = []

    def rate(self, kind: str, num_bytes: float, seconds: float, num_devices: int) -> float | None:
        """The rate by one collective, seen by the device that sends most of it; None if it is too small to tell."""
        latency_s = self.link.collective_s(kind, 0, num_devices)
        if num_bytes < MIN_BYTES or seconds <= latency_s:
            return None
        full_s = self.link.collective_s(kind, num_bytes, num_devices) - latency_s
        return self.link.bandwidth_bps * full_s / (seconds - latency_s)

    def observe(self, kind: str, num_bytes: float, seconds: float, num_devices: int) -> None:
        """One collective of a request."""
        if (rate := self.rate(kind, num_bytes, seconds, num_devices)) is not None:
            self._rates.append(rate)

    def end_request(self) -> bool:
        """Updates the estimate by the observations since the last call; False if there were none."""
        if not self._rates:
            return False
        change = float(np.quantile(self._rates, QUANTILE, method="higher")) - self.bandwidth_bps
        self._rates.clear()
        outside = abs(change) > SAME_RATE * self.bandwidth_bps
        self.bandwidth_bps += change * (NOISE_WEIGHT if not outside else RISE if change > 0 else 1.0)
        return True


@dataclass(frozen=True)
class Choice:
    """The plan of a request: its index in the planner's, its predicted seconds, and whether the rate has changed it."""

    index: int
    predicted_s: float
    switched: bool


class RuntimePlanner:
    """Chooses for each request the fastest of `plans` at the rate that the links have shown (TPDS 2025).

    Latency is predicted beforehand, by plan, length and bandwidth, and interpolated: linearly in length and in
    1 / bandwidth. Small changes of the rate do not change plans: the choice is that for the rate of the last change,
    until another plan saves 5% at the present rate. Requests of another length take another plan at once.

    One device chooses for all; it may observe its own collectives, or preferably those of all devices.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plans: Sequence[Plan],
        profile: ClusterProfile,
        seq_lens: Sequence[int],
        bandwidths_bps: Sequence[float],
    ):
        self.plans, self.seq_lens = list(plans), np.unique(seq_lens)
        self.slowness = np.unique(1 / np.asarray(bandwidths_bps, float))
        axes = self.plans, self.seq_lens.tolist(), (1 / self.slowness).tolist()
        latency_s = [
            Pieces(config, plan, profile.at(bandwidth_bps), seq_len).price(plan.strategies)[0]
            for plan, seq_len, bandwidth_bps in itertools.product(*axes)
        ]
        self.latency_s = np.array(latency_s).reshape([len(axis) for axis in axes])
        self.estimator = BandwidthEstimator(profile.link)
        self._planned_bps = self.estimator.bandwidth_bps
        self._current, self._at_stake_s, self._num_devices = 0, 0.0, len(profile.devices)

    @property
    def bandwidth_bps(self) -> float:
        return self.estimator.bandwidth_bps

    def predict(self, seq_len: int, bandwidth_bps: float) -> np.ndarray:
        """Seconds of one request under each plan."""
        slowness = np.clip(1 / bandwidth_bps, self.slowness[0], self.slowness[-1])
        return _between(self.slowness, slowness, _between(self.seq_lens, seq_len, self.latency_s))

    def choose(self, seq_len: int) -> Choice:
        """The plan for the next request, by all observations so far."""
        if self.estimator.end_request():
            self._at_stake_s = 0.0
        before = int(self.predict(seq_len, self._planned_bps).argmin())
        now = self.predict(seq_len, self.bandwidth_bps)
        best = int(now.argmin())
        switched = bool(now[best] < (1 - SWITCH_GAIN) * now[before])
        if switched:
            self._planned_bps = self.bandwidth_bps
        self._current = best if switched else before
        self._at_stake_s += now[self._current] - self.predict(seq_len, 1 / self.slowness[0]).min()
        return Choice(self._current, float(now[self._current]), switched)

    def observe(self, kind: str, num_bytes: float, seconds: float) -> None:
        """Reports one collective of the request under the plan chosen last."""
        self.estimator.observe(kind, num_bytes, seconds, self.plans[self._current].num_devices)

    def needs_probe(self) -> bool:
        """Whether an all_gather of `PROBE_BYTES` a device is due before the next request, only to learn the rate.

        It is due if requests since the last message that showed the rate might have saved far more than the probe
        takes, were the link as fast as it can be.
        """
        probe_s = self.estimator.link.at(self.bandwidth_bps).collective_s("all_gather", PROBE_BYTES, self._num_devices)
        return self._at_stake_s > PROBE_WORTH * probe_s

    def observe_probe(self, num_bytes: float, seconds: float) -> None:
        """Reports that all_gather, of all devices: bytes that one sent, and its duration. It counts in full."""
        rate = self.estimator.rate("all_gather", num_bytes, seconds, self._num_devices)
        self.estimator.bandwidth_bps = rate or self.bandwidth_bps
        self._at_stake_s = 0.0


def _between(axis: np.ndarray, value: float, table: np.ndarray) -> np.ndarray:
    """`table` [plans, axis, ...] at `value`, interpolated linearly between the two nearest entries of the axis."""
    if len(axis) == 1:
        return table[:, 0]
    right = int(np.clip(np.searchsorted(axis, value), 1, len(axis) - 1))
    share = (value - axis[right - 1]) / (axis[right] - axis[right - 1])
    return (1 - share) * table[:, right - 1] + share * table[:, right]
