"""A planning problem: a model, a request and devices with their memory; and how sizes may be split over them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PretrainedConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.layer import STRATEGIES
from detransformer.parallel.methods import PAPER_METHODS
from detransformer.parallel.plan import Plan, layer_plan, published_plan, strategies_for
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.memory import least_bytes, memory_bytes
from detransformer.planning.pieces import Pieces, strategies_of
from detransformer.planning.profile import ClusterProfile
from detransformer.planning.search import fastest
from detransformer.planning.tape import WHOLE

MEMORY_ROUNDS = 20  # how often work is moved away from devices that lack memory
MIB = 2**20


@dataclass(frozen=True)
class Alternative:
    """One candidate; `reason` says why it does not fit, or is empty.

    `over_bytes`: how far the device that lacks most is over its budget; at most 0 if the plan fits.
    """

    plan: Plan
    prediction: Prediction
    over_bytes: int
    reason: str

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def latency_s(self) -> float:
        return self.prediction.latency_s


def device_speeds(profile: ClusterProfile) -> list[float]:
    """Each device's compute speed relative to the fastest, by its rate on whole layers."""
    rates = [1 / device.compute_s(1.0, WHOLE) for device in profile.devices]
    return [rate / max(rates) for rate in rates]


def search_space(config: PretrainedConfig) -> tuple[str, ...]:
    """The paper's three plans for a decoupled model; TP, SP and one device for an original one."""
    return PAPER_METHODS if "decoupled" in layer_kinds(config) else ("tp", "sp", "single")


@dataclass(frozen=True)
class Problem:
    """A planning problem: the model on the cluster, a request's sizes, and the bytes available on each device."""

    config: PretrainedConfig
    profile: ClusterProfile
    seq_len: int
    batch_size: int
    budget: int | None = None

    @cached_property
    def budgets(self) -> list[int]:
        return [device.memory_bytes if self.budget is None else self.budget for device in self.profile.devices]

    @cached_property
    def speeds(self) -> list[float]:
        return device_speeds(self.profile)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The devices, fastest first; of equals the one with the wider link, then the first."""
        return tuple(sorted(range(len(self.speeds)), key=lambda i: (-self.speeds[i], -self.profile.link.share(i), i)))

    @cached_property
    def least(self) -> int:
        """Bytes that a device needs to take any part: embeddings, the model's ending, activations."""
        return least_bytes(self.config, self.seq_len, self.batch_size)

    @cached_property
    def orders(self) -> list[tuple[int, ...]]:
        """The devices of `order` that can take part; if links differ, also ordered by the widest link."""
        able = tuple(i for i in self.order if self.budgets[i] >= self.least) or self.order
        return list(dict.fromkeys((able, tuple(sorted(able, key=lambda i: -self.profile.link.share(i))))))

    @property
    def request(self) -> tuple[int, int]:
        return self.seq_len, self.batch_size

    def needed(self, plan: Plan) -> np.ndarray:
        """Bytes that each rank of `plan` keeps [P]."""
        return np.array(memory_bytes(self.config, plan, *self.request))

    def room(self, plan: Plan) -> np.ndarray:
        """Bytes available to each rank of `plan` [P]."""
        return np.array([self.budgets[i] for i in plan.device_ids])

    def lacks(self, plan: Plan) -> bool:
        """Whether `plan` exceeds some device's memory."""
        return bool((self.needed(plan) > self.room(plan)).any())

    def pieces(self, plan: Plan) -> Pieces:
        """Prices of all plans of this split."""
        return Pieces(self.config, plan, self.profile, *self.request)

    def fastest(self, pieces: Pieces, below_s: float = np.inf) -> tuple[str, ...] | None:
        """`search.fastest` within the budgets."""
        room = self.room(pieces.plan)[pieces.first_of_group] - float(self.least)
        return fastest(pieces, room, below_s)

    def alternative(self, plan: Plan, pieces: Pieces | None = None) -> Alternative:
        """`plan` with its predicted cost, and whether it fits."""
        prediction = predict(self.config, plan, self.profile, *self.request, pieces=pieces)
        needed = zip(plan.device_ids, prediction.memory_bytes, strict=True)
        over, device, memory = max((num_bytes - self.budgets[i], i, num_bytes) for i, num_bytes in needed)
        reason = (
            f"needs {memory / MIB:.0f} MiB on device {device} ({self.profile.devices[device].name}), "
            f"{over / MIB:.0f} MiB more than its budget of {(memory - over) / MIB:.0f} MiB"
        )
        return Alternative(plan, prediction, over, reason if over > 0 else "")

    def published(self, methods: Iterable[str], wire: str) -> list[Alternative]:
        """The plans of these methods over all devices, split by speed; over the fastest ones if all are too many.

        `single` takes the fastest device.
        """
        return [self.alternative(self.plan_of(method, wire)) for method in methods]

    def plan_of(self, method: str, wire: str) -> Plan:
        for count in range(1 if method == "single" else len(self.order), 1, -1):
            devices = sorted(self.order[:count])
            try:
                return on_devices(published_plan(method, self.config, [self.speeds[i] for i in devices], wire), devices)
            except ValueError:  # more devices than heads or sub-blocks
                continue
        published_plan(method, self.config, [1.0], wire)  # or says why it is not for this model
        return on_devices(replace(published_plan("single", self.config, wire=wire), method=method), self.order[:1])


def on_devices(plan: Plan, devices: Sequence[int]) -> Plan:
    """`plan` on these devices; the first ones in order need not be listed."""
    return replace(plan, devices=() if list(devices) == list(range(len(devices))) else tuple(devices))


def splits(problem: Problem, devices: Sequence[int], wire: str = "float32") -> list[Plan]:
    """A plan of these devices split by speed; if that lacks memory, others whose weights go where there is more.

    Tokens are always split by speed. Empty if there are more devices than sub-blocks.
    """
    config, speeds = problem.config, [problem.speeds[i] for i in devices]

    def split(strategy: str, shares: Sequence[float]) -> Plan:
        plan = layer_plan("bp+auto", config, strategies_for(config, strategy), shares, wire)
        return on_devices(replace(plan, tokens_share=tuple(speeds)), devices)

    def within_memory(strategy: str) -> Plan | None:
        plan, shares, nothing = split(strategy, speeds), np.array(speeds), (0,) * len(devices)
        least = problem.needed(replace(plan, heads=nothing, ffn_columns=nothing, sub_blocks=nothing))
        room = problem.room(plan)
        for _ in range(MEMORY_ROUNDS if (least <= room).all() else 0):
            needed = problem.needed(plan)
            over = needed > room
            if not over.any():
                return plan
            part = np.divide(room - least, needed - least, out=np.ones(len(devices)), where=over)
            shares = shares * np.where(over, np.clip(part, 0.1, 0.9), 1.0)
            plan = split(strategy, (shares / shares.max()).tolist())
        return None

    if len(devices) > getattr(config, "num_divisions", len(devices)):
        return []
    if len(devices) == 1:
        return [on_devices(published_plan("single", config, wire=wire), devices)]
    plans = [split(WHOLE, speeds)]
    if problem.lacks(plans[0]):
        # One strategy for each way to keep weights: a whole layer, some of it, a device's own part.
        names = strategies_of(config, "original", len(devices))
        keeping = {(STRATEGIES[name].qkv_weights, STRATEGIES[name].rest_weights): name for name in names}
        plans += [plan for name in keeping.values() if (plan := within_memory(name))]
    return list({(plan.heads, plan.ffn_columns, plan.sub_blocks): plan for plan in reversed(plans)}.values())[::-1]
