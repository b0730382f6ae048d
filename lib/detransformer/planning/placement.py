"""Adaptive placement (DATE 2024, Section III-C): of the plans that fit the memory, the one predicted to be fastest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import BertConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.plan import PAPER_METHODS, STRATEGIES, Plan, layer_plan, published_plan
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.profile import ClusterProfile

CHUNKS = (1, 2, 4)  # more save little and cost a real device efficiency: its products become small


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
    return PAPER_METHODS if "decoupled" in layer_kinds(config) else ("tp", "sp", "single")


def place(
    config: BertConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    methods: Sequence[str] | None = None,
    wire: str = "float32",
    reads: str = "all",
) -> Placement:
    """Chooses among `methods` (default: `search_space`) for all devices of `profile`.

    Args:
        memory_budget_bytes: what a plan may take on each device; default: each device's own memory.

    Raises:
        ValueError: if no candidate fits, saying how much memory the smallest misses.
    """
    speeds = [1.0] * len(profile.devices)
    plans = [published_plan(m, config, speeds, wire, reads) for m in methods or search_space(config)]
    return _choose(_price(plans, config, profile, seq_len, batch_size, memory_budget_bytes))


def paper_plan(config: BertConfig, profile: ClusterProfile, **request) -> Plan:
    """BP+Auto as published: the fastest of the paper's three plans that fit."""
    return place(config, profile, **request).plan


def place_freely(
    config: BertConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    wire: str = "float32",
    reads: str = "all",
) -> Placement:
    """Chooses among all strategies for the original layers, another one for the last of them, and chunks.

    The paper's three plans are among the candidates. The last layer is its own choice because what follows it is: the
    result is gathered, or only [CLS] is read of it.
    """
    speeds, kinds = [1.0] * len(profile.devices), layer_kinds(config)
    names = [name for name, signature in STRATEGIES.items() if signature.layer_kind == "original"]

    def plans(rest: str, final: str) -> list[Plan]:
        strategies = ["block" if kind == "decoupled" else rest for kind in kinds[:-1]] + [final]
        return [layer_plan("bp+auto", config, strategies, speeds, wire, reads, num_chunks=n) for n in CHUNKS]

    def price(plans: Iterable[Plan]) -> list[Alternative]:
        return _price(plans, config, profile, seq_len, batch_size, memory_budget_bytes)

    uniform = price(plan for name in names for plan in plans(name, name))
    best = _choose(uniform).plan.strategies[-1]
    mixed = price(plan for name in names if name != best for plan in plans(best, name))
    published = price(published_plan(method, config, speeds, wire, reads) for method in search_space(config))
    return _choose([*uniform, *mixed, *published])


def auto_plan(config: BertConfig, profile: ClusterProfile, **request) -> Plan:
    """BP+Auto: the plan that `place_freely` chooses, under its table name."""
    return replace(place_freely(config, profile, **request).plan, method="bp+auto")


def _price(
    plans: Iterable[Plan],
    config: BertConfig,
    profile: ClusterProfile,
    seq_len: int,
    batch_size: int,
    budget: int | None,
) -> list[Alternative]:
    alternatives = []
    for plan in plans:
        prediction = predict(config, plan, profile, seq_len, batch_size)
        alternatives.append(Alternative(plan, prediction, _lacking(plan, prediction, profile, budget)))
    return alternatives


def _choose(alternatives: Sequence[Alternative]) -> Placement:
    """The fastest that fits, the first of equals; ValueError if none does."""
    fitting = [a for a in alternatives if a.fits]
    if not fitting:
        smallest = min(alternatives, key=lambda a: max(a.prediction.memory_bytes))
        raise ValueError(
            f"no plan fits: even the smallest, {smallest.plan.method}, {smallest.reason}. "
            "Give the devices more memory, add devices, or take a smaller model."
        )
    best = min(fitting, key=lambda a: a.prediction.latency_s)
    return Placement(best, tuple(sorted(alternatives, key=lambda a: (not a.fits, a.prediction.latency_s))))


def _lacking(plan: Plan, prediction: Prediction, profile: ClusterProfile, budget: int | None) -> str:
    for index, needed in zip(plan.device_ids, prediction.memory_bytes, strict=True):
        device = profile.devices[index]
        limit = device.memory_bytes if budget is None else budget
        if needed > limit:
            return (
                f"needs {needed / 2**20:.0f} MiB on device {index} ({device.name}), {(needed - limit) / 2**20:.0f} MiB "
                f"more than its budget of {limit / 2**20:.0f} MiB"
            )
    return ""
