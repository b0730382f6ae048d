"""Static and run-time planning (TPDS 2025): which plans a cluster holds at once, and which of them runs a request.

Offline, `static_plans` picks a few plans that serve the expected requests and links well and whose weights fit the
devices together. At run time `RuntimePlanner` takes one of them for each request, by its length and by the link's rate
as the traffic itself has shown it. A table of predictions makes that a look-up.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from detransformer.parallel.plan import Plan
from detransformer.planning.cost import activation_bytes, held_bytes, predict
from detransformer.planning.placement import place_freely
from detransformer.planning.profile import ClusterProfile, LinkProfile, latency_steps

MIN_GAIN = 0.05  # by which another plan must be faster to replace the one in use: rates are known to some percent
MIN_BYTES = 16_384  # a smaller message shows the link's latency, not its rate
BEST_SHARE = 0.75  # of a request's rates the quantile that counts: waiting for a late peer only makes a rate smaller
NOISE = 0.1  # by which an estimate may err without being corrected at once
SMOOTHING = 0.5  # of a rise, and of noise
BLIND_REQUESTS = 5  # that send too little to show the rate, until the link is worth a probe


@dataclass(frozen=True)
class Choice:
    """The plan of a request: its index among those held, its predicted seconds, and whether it replaced another.

    `switched` compares with the last request of the same kind: another length may have another plan at any time.
    """

    index: int
    predicted_s: float
    switched: bool


class BandwidthEstimator:
    """The links' rate, from how long collectives took: falls at once, rises with some smoothing, ignores noise.

    `link` gives the step latencies and efficiencies that are taken off, and the rate that is believed at first.
    """

    def __init__(self, link: LinkProfile):
        self._link = link
        self.bandwidth_bps = link.bandwidth_bps
        self.num_blind = 0  # requests since the last one that showed a rate

    def rate_bps(self, kind: str, num_bytes: int, seconds: float, num_devices: int) -> float:
        """The rate at which a collective of `num_devices` takes `seconds`, `LinkProfile.collective_s` turned round."""
        latency = self._link.step_latency_s.get(kind, self._link.step_latency_s["*"])
        efficiency = self._link.efficiency.get(kind, self._link.efficiency["*"])
        return 8 * num_bytes / (max(seconds - latency_steps(kind, num_devices) * latency, 1e-6) * efficiency)

    def observe(self, transfers: Sequence[tuple[str, int, float]], num_devices: int) -> None:
        """A request's, or a probe's, collectives: kind, bytes the busiest device sent, and seconds each."""
        rates = [self.rate_bps(*transfer, num_devices) for transfer in transfers if transfer[1] >= MIN_BYTES]
        if not rates:
            self.num_blind += 1
            return
        self.num_blind = 0
        seen = float(np.quantile(rates, BEST_SHARE))
        if seen < (1 - NOISE) * self.bandwidth_bps:
            self.bandwidth_bps = seen
        else:
            self.bandwidth_bps *= (seen / self.bandwidth_bps) ** SMOOTHING


class RuntimePlanner:
    """Chooses among held `plans`, request by request.

    Args:
        profile: devices and link; its rate is what is believed at first.
        seq_lens, batch_sizes: for which latencies are predicted beforehand; lengths between are interpolated, a batch
            counts as the next larger one.
        bandwidths_bps: rates likewise; between them time is linear in 1 / rate, which is exact where messages are not
            hidden.

    Raises:
        ValueError: without a plan, a length, a batch size or a rate.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plans: Sequence[Plan],
        profile: ClusterProfile,
        seq_lens: Sequence[int],
        batch_sizes: Sequence[int],
        bandwidths_bps: Sequence[float],
    ):
        if not (plans and seq_lens and batch_sizes and bandwidths_bps):
            raise ValueError("plans, seq_lens, batch_sizes and bandwidths_bps must each name at least one.")
        self.plans = tuple(plans)
        self._seq_lens, self._batch_sizes = np.array(sorted(seq_lens)), np.array(sorted(batch_sizes))
        self._per_bps = np.sort(1 / np.array(bandwidths_bps))
        self._estimator = BandwidthEstimator(profile.link)
        profiles = [ClusterProfile(profile.devices, profile.link.at(1 / x)) for x in self._per_bps]
        self.predicted_s = np.array(
            [
                [
                    [[predict(config, plan, p, int(n), int(b)).latency_s for p in profiles] for n in self._seq_lens]
                    for b in self._batch_sizes
                ]
                for plan in self.plans
            ]
        )  # [plan, batch, length, rate]
        self._last: dict[tuple[int, int], int] = {}
        self._plan: Plan = self.plans[0]

    @property
    def bandwidth_bps(self) -> float:
        """The links' rate as it is believed now."""
        return self._estimator.bandwidth_bps

    def latencies_s(self, batch_size: int, seq_len: int) -> np.ndarray:
        """[plans]: what each is predicted to take on the link as it is believed to be."""
        batch = min(int(np.searchsorted(self._batch_sizes, batch_size)), len(self._batch_sizes) - 1)
        above = min(int(np.searchsorted(self._seq_lens, seq_len)), len(self._seq_lens) - 1)
        below = max(above - 1, 0)
        span = self._seq_lens[above] - self._seq_lens[below]
        share = 1.0 if span == 0 else min(1.0, (seq_len - self._seq_lens[below]) / span)
        table = self.predicted_s[:, batch]
        by_rate = (1 - share) * table[:, below] + share * table[:, above]
        per_bps = 1 / self.bandwidth_bps
        return np.array([np.interp(per_bps, self._per_bps, row) for row in by_rate])

    def choose(self, batch_size: int, seq_len: int) -> Choice:
        """The plan of this request. The one that its kind had before stays unless another is `MIN_GAIN` faster."""
        seconds = self.latencies_s(batch_size, seq_len)
        best, kind = int(seconds.argmin()), (batch_size, seq_len)
        before = self._last.get(kind)
        if before is not None and seconds[before] <= (1 + MIN_GAIN) * seconds[best]:
            best = before
        self._last[kind] = best
        self._plan = self.plans[best]
        return Choice(best, float(seconds[best]), before is not None and best != before)

    def observe(self, transfers: Sequence[tuple[str, int, float]], num_devices: int | None = None) -> None:
        """What the last request's collectives took (`BandwidthEstimator.observe`), or a probe's of `num_devices`."""
        self._estimator.observe(transfers, num_devices or self._plan.num_devices)

    @property
    def needs_probe(self) -> bool:
        """Whether the last requests sent so little that the link may have changed unseen, and it would matter."""
        return self._estimator.num_blind >= BLIND_REQUESTS and len(self.plans) > 1


def static_plans(
    config: PretrainedConfig,
    profile: ClusterProfile,
    requests: Sequence[tuple[int, int]],
    bandwidths_bps: Sequence[float],
    memory_budget_bytes: int | None = None,
    max_plans: int = 4,
    wire: str = "float32",
) -> list[Plan]:
    """The plans to hold at once for `requests` (batch, length) over links of `bandwidths_bps`, all equally likely.

    Candidates are the best plans of each case over the devices that most cases want, which split layers alike and so
    share weights, and the fastest device alone. One after another is taken by how much time it saves over those taken
    already, as long as all weights together, with the largest request's activations, fit each device.

    Raises:
        ValueError: if nothing fits (as `place_freely`), or no request or rate is given.
    """
    cases = [
        (batch, length, ClusterProfile(profile.devices, profile.link.at(bps)))
        for batch, length in requests
        for bps in bandwidths_bps
    ]
    if not cases:
        raise ValueError("requests and bandwidths_bps must each name at least one.")
    placements = [
        place_freely(config, on, length, batch, memory_budget_bytes, wire=wire) for batch, length, on in cases
    ]
    wanted = Counter(p.plan.device_ids for p in placements if p.plan.num_devices > 1)
    groups = [alternative.plan.device_ids for p in placements for alternative in p.alternatives if alternative.fits]
    together = wanted.most_common(1)[0][0] if wanted else max(groups, key=len)
    candidates: dict[Plan, None] = {}
    for placement in placements:
        fitting = [a.plan for a in placement.alternatives if a.fits]
        shared = [plan for plan in fitting if plan.device_ids == together][:2]
        alone = [plan for plan in fitting if plan.num_devices == 1][:1]
        candidates |= dict.fromkeys(shared + alone)
    plans = list(candidates)
    seconds = np.array(
        [[predict(config, plan, on, length, batch).latency_s for batch, length, on in cases] for plan in plans]
    )  # [plan, case]
    room = max(activation_bytes(config, length, batch) for batch, length in requests)
    limits = [d.memory_bytes if memory_budget_bytes is None else memory_budget_bytes for d in profile.devices]
    taken: list[int] = []
    while len(taken) < max_plans:
        best_s = seconds[taken].min(axis=0) if taken else np.full(len(cases), np.inf)
        order = np.minimum(seconds, best_s).sum(axis=1).argsort()
        fitting = [
            i
            for i in order
            if i not in taken
            and all(
                held_bytes(config, [plans[j] for j in (*taken, i)], device) + room <= limit
                for device, limit in enumerate(limits)
            )
        ]
        if not fitting:
            break
        saved = best_s.sum() - np.minimum(seconds[fitting[0]], best_s).sum()
        if taken and saved < 0.01 * best_s.sum():
            break
        taken.append(int(fitting[0]))
    if not taken:
        raise ValueError("no plan fits the devices: give them more memory, add devices, or take a smaller model.")
    return [plans[i] for i in taken]
