"""Adaptive placement (DATE 2024, Section III-C): of the plans that fit the memory, the one of least summed time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import BertConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.plan import BLOCK_METHODS, Plan, published_plan
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.profile import ClusterProfile


@dataclass(frozen=True)
class Alternative:
    """One candidate; `reason` says in words why it was left out, or is empty."""

    plan: Plan
    prediction: Prediction
    reason: str

    @property
    def fits(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Placement:
    """The chosen plan and all that were looked at, fastest first."""

    chosen: Alternative
    alternatives: tuple[Alternative, ...]

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


def search_space(config: BertConfig) -> tuple[str, ...]:
    """The paper's three plans for a decoupled model; TP, SP and one device for an original one."""
    return BLOCK_METHODS if "decoupled" in layer_kinds(config) else ("tp", "sp", "single")


def place(
    config: BertConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    methods: Sequence[str] | None = None,
) -> Placement:
    """Chooses among `methods` (default: `search_space`) for all devices of `profile`.

    Args:
        memory_budget_bytes: what a plan may take on each device; default: each device's own memory.

    Raises:
        ValueError: if no candidate fits, saying how much memory the smallest misses.
    """
    alternatives = []
    for method in methods or search_space(config):
        plan = published_plan(method, config, [1.0] * len(profile.devices))
        prediction = predict(config, plan, profile, seq_len, batch_size)
        alternatives.append(Alternative(plan, prediction, _lacking(prediction, profile, memory_budget_bytes)))
    fitting = [a for a in alternatives if a.fits]
    if not fitting:
        smallest = min(alternatives, key=lambda a: max(a.prediction.memory_bytes))
        raise ValueError(
            f"no plan fits: even the smallest, {smallest.plan.method}, {smallest.reason}. "
            "Give the devices more memory, add devices, or take a smaller model."
        )
    alternatives.sort(key=lambda a: (not a.fits, a.prediction.latency_s))
    best = min(fitting, key=lambda a: a.prediction.latency_s)
    return Placement(best, tuple(alternatives))


def auto_plan(config: BertConfig, profile: ClusterProfile, **request) -> Plan:
    """BP+Auto: the plan that `place` chooses, under its table name."""
    return replace(place(config, profile, **request).plan, method="bp+auto")


def _lacking(prediction: Prediction, profile: ClusterProfile, budget: int | None) -> str:
    for rank, needed in enumerate(prediction.memory_bytes):
        device = profile.devices[rank]
        limit = device.memory_bytes if budget is None else budget
        if needed > limit:
            return (
                f"needs {needed / 2**20:.0f} MiB on device {rank} ({device.name}), {(needed - limit) / 2**20:.0f} MiB "
                f"more than its budget of {limit / 2**20:.0f} MiB"
            )
    return ""
