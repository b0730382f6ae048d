"""Adaptive placement (DATE 2024, Section III-C): of the plans that fit the memory, the fastest one by prediction.

`place` compares the paper's three plans over all devices. `place_freely` searches all plans: which devices take part,
the number of chunks, the format of messages, and, by `search`, each layer's strategy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from transformers import PretrainedConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.plan import Plan, published_plan, strategies_for
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.planning.pieces import Pieces, strategies_of
from detransformer.planning.problem import MIB, Alternative, Problem, device_speeds, search_space, splits
from detransformer.planning.profile import ClusterProfile

if TYPE_CHECKING:
    import pandas as pd

CHUNKS = (1, 2, 4)  # more save little, and make a real device's products small and less efficient
ALL_COUNTS = 8  # up to this, all numbers of devices are tried; above, powers of 2 and the best one's neighbourhood
TIE = 1e-9  # relative; fewer chunks win a tie
WIRE_TOLERANCE = 0.02  # a more exact format wins if it costs no more than this


@dataclass(frozen=True)
class Placement:
    """The chosen plan and all compared plans, fastest first; a sentence about devices that take no part."""

    chosen: Alternative
    alternatives: tuple[Alternative, ...]
    left_out: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        return self.chosen.plan

    def table(self) -> "pd.DataFrame":
        """One row for each alternative, fastest first."""
        import pandas as pd  # late: the worker that plans on a board does without

        return pd.DataFrame(
            {
                "method": a.plan.method,
                "plan": a.plan.describe(),
                "predicted_s": a.prediction.latency_s,
                "compute_s": a.prediction.compute_s,
                "comm_s": a.prediction.comm_s,
                "memory_bytes": max(a.prediction.memory_bytes),
                "fits": a.fits,
                "chosen": a is self.chosen,
                "reason": a.reason,
            }
            for a in self.alternatives
        )


def place(
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    methods: Sequence[str] | None = None,
    wire: str = "float32",
) -> Placement:
    """Chooses among `methods` (default: `search_space`) for all devices of `profile`, split by their speeds.

    Args:
        memory_budget_bytes: memory for a plan on each device; default: each device's own memory.

    Raises:
        ValueError: if no candidate fits, saying how much memory the smallest misses.
    """
    problem = Problem(config, profile, seq_len, batch_size, memory_budget_bytes)
    alternatives = problem.published(methods or search_space(config), wire)
    return Placement(_fastest(alternatives), _sorted(alternatives))


def place_freely(
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    wires: Sequence[str] = ("float32",),
) -> Placement:
    """Chooses devices, chunks and every original layer's strategy; sizes are split by speed, and by memory if needed.

    The fastest devices are tried, 1, 2 and so on (and those of the widest links, if links differ), so that a device
    which only slows the others down is left out. Also listed: the best plan for each number of devices, each strategy
    for all layers and with another for the last, the paper's plans, and one device alone.

    Args:
        wires: formats of messages to choose from; the most exact one within 2% of the fastest is taken.

    Raises:
        ValueError: if no candidate fits, saying how much memory the smallest misses.
    """
    problem = Problem(config, profile, seq_len, batch_size, memory_budget_bytes)
    found = [_Candidates(problem, wire, order) for wire in wires for order in problem.orders]
    fitting = [candidates for candidates in found if candidates.by_count]
    published = dict.fromkeys((*search_space(config), "single"))
    if not fitting:
        return place(config, profile, seq_len, batch_size, memory_budget_bytes, published, wires[0])
    limit_s = (1 + WIRE_TOLERANCE) * min(candidates.best.latency_s for candidates in fitting)
    near = [candidates for candidates in fitting if candidates.best.latency_s <= limit_s]
    taken = min(near, key=lambda candidates: (WIRE_FORMATS.index(candidates.wire), candidates.best.latency_s))
    listed = [taken.best, *taken.by_count.values(), *taken.rivals(), *problem.published(published, taken.wire)]
    others = [candidates.best for candidates in fitting if candidates is not taken]
    chosen = _fastest(listed)
    return Placement(chosen, _sorted([*listed, *others]), taken.left_out(chosen))


def method_plan(
    method: str, config: PretrainedConfig, profile: ClusterProfile, wire: str = "float32", **request: int | None
) -> Plan:
    """The plan that a method's name stands for on all devices; a planned method may leave devices out.

    Args:
        request: seq_len, batch_size and memory_budget_bytes, for planned methods.
    """
    if method in ("auto", "bp+auto"):  # of the unmodified model, of the decoupled one
        return replace(place_freely(config, profile, wires=(wire,), **request).plan, method=method)
    if method in ("bp+paper", "bp+narrow"):  # bp+narrow: the same on the model of narrow sub-blocks
        return replace(place(config, profile, wire=wire, **request).plan, method=method)
    return published_plan(method, config, device_speeds(profile), wire)


def first_counts(num_devices: int) -> list[int]:
    """The numbers of devices to try first: all if they are few, else the powers of 2."""
    powers = [2**k for k in range(num_devices.bit_length()) if 2**k < num_devices]
    return list(range(1, num_devices + 1)) if num_devices <= ALL_COUNTS else [*powers, num_devices]


def chunk_counts(seq_len: int, num_devices: int) -> tuple[int, ...]:
    """The members of `CHUNKS` that make sense for this request and number of devices."""
    return tuple(count for count in CHUNKS if count == 1 or (count <= seq_len and num_devices > 1))


class _Candidates:
    """The fastest plan of the first n devices of `order`, by n, in one wire format."""

    def __init__(self, problem: Problem, wire: str, order: Sequence[int]):
        self.problem, self.wire, self.order = problem, wire, order
        self.by_count: dict[int, Alternative] = {}
        self.tried: dict[int, list[Pieces]] = {}
        for count in first_counts(len(order)):
            self._try(count)
        while counts := self._around_best():
            for count in counts:
                self._try(count)

    @property
    def best(self) -> Alternative:
        """The fastest plan; of equals the one of fewest devices."""
        return min(self.by_count.values(), key=lambda a: (a.latency_s, a.plan.num_devices))

    def _around_best(self) -> list[int]:
        """Numbers of devices halfway between the best one and its neighbours, if not tried yet."""
        if not self.by_count:
            return []
        tried = sorted(self.tried)
        place = tried.index(self.best.plan.num_devices)
        halfway = [(tried[place] + other) // 2 for other in tried[max(place - 1, 0) : place + 2]]
        return [count for count in halfway if count not in self.tried]

    def _try(self, count: int) -> None:
        """Finds the fastest plan of the first `count` devices; with one, on the first device that holds the model."""
        problem, devices = self.problem, sorted(self.order[:count])
        if count == 1:
            (needed,) = problem.needed(splits(problem, devices, self.wire)[0])
            devices = [next((i for i in self.order if problem.budgets[i] >= needed), *devices)]
        self.tried[count], best = [], None
        for plan in splits(problem, devices, self.wire):
            for num_chunks in chunk_counts(problem.seq_len, count)[::-1]:
                pieces = problem.pieces(replace(plan, num_chunks=num_chunks))
                self.tried[count].append(pieces)
                strategies = problem.fastest(pieces, best.latency_s * (1 + TIE) if best else np.inf)
                if strategies:
                    best = problem.alternative(replace(pieces.plan, strategies=strategies), pieces)
        if best:
            self.by_count[count] = best

    def rivals(self) -> list[Alternative]:
        """On the devices of the best plan: each strategy for all original layers, and with others for the last one.

        The last layer is chosen separately because the result is gathered after it.
        """
        tried, config = self.tried[self.best.plan.num_devices], self.problem.config
        last = max((i for i, kind in enumerate(layer_kinds(config)) if kind == "original"), default=None)
        if last is None:
            return []

        def priced(rest: str, final: str) -> list[Alternative]:
            names = list(strategies_for(config, rest))
            names[last] = final
            return [self.problem.alternative(replace(p.plan, strategies=tuple(names)), p) for p in tried]

        names = strategies_of(config, "original", self.best.plan.num_devices)
        uniform = [a for name in names for a in priced(name, name)]
        rest = min(uniform, key=lambda a: (not a.fits, a.latency_s)).plan.strategies[last]
        return uniform + [a for name in names if name != rest for a in priced(rest, name)]

    def left_out(self, chosen: Alternative) -> tuple[str, ...]:
        """A sentence for the devices that cannot take part, and one for those that would make the plan slower."""
        problem, sentences = self.problem, []
        unable = sorted(set(range(len(problem.speeds))) - set(self.order))
        for i in unable:
            why = f"{problem.least / MIB:.0f} MiB for embeddings and activations are above its budget"
            sentences.append(f"{self._named([i])} left out: {why} of {problem.budgets[i] / MIB:.0f} MiB")
        count = max(self.tried)
        if slower := sorted(set(self.order[:count]) - set(chosen.plan.device_ids)):
            why = f"with {'it' if len(slower) == 1 else 'them'} "
            if count in self.by_count:
                why += f"{self.by_count[count].latency_s:.3g} s instead of {chosen.latency_s:.3g} s"
            else:
                why = why + "no plan fits the memory" if self.tried[count] else "the model has no more sub-blocks"
            sentences.append(f"{self._named(slower)} left out: {why}")
        return tuple(sentences)

    def _named(self, devices: Sequence[int]) -> str:
        """`device 3 (Raspberry Pi 4B) is`, `devices 2 (...) and 3 (...) are`, of many `28 devices (0, 1, ...) are`."""
        if len(devices) > 4:
            return f"{len(devices)} devices ({', '.join(map(str, devices[:3]))}, ...) are"
        *names, last = (f"{i} ({self.problem.profile.devices[i].name})" for i in devices)
        return f"devices {', '.join(names)} and {last} are" if names else f"device {last} is"


def _fastest(alternatives: Sequence[Alternative]) -> Alternative:
    """The fastest alternative that fits, the first of equals.

    Raises:
        ValueError: if none fits, naming the plan that lacks least, what it lacks, and what would help.
    """
    fitting = [a for a in alternatives if a.fits]
    if fitting:
        return min(fitting, key=lambda a: a.latency_s)
    smallest = min(alternatives, key=lambda a: a.over_bytes)
    activations = smallest.prediction.activation_bytes / MIB
    raise ValueError(
        f"no plan fits: even the smallest, {smallest.plan.method}, {smallest.reason}. Give the devices more memory, "
        f"take more devices or a smaller model, or shorten requests ({activations:.0f} MiB of it are activations)."
    )


def _sorted(alternatives: Sequence[Alternative]) -> tuple[Alternative, ...]:
    """Alternatives that fit first, then by latency; of equal plans only the first."""
    distinct: dict[Plan, Alternative] = {}
    for alternative in alternatives:
        alone = alternative.plan.num_devices == 1  # sends nothing, in any format
        key = replace(alternative.plan, method="", **({"wire": "float32", "direct": False} if alone else {}))
        distinct.setdefault(key, alternative)
    return tuple(sorted(distinct.values(), key=lambda a: (not a.fits, a.latency_s)))


# Why this plan -------------------------------------------------------------------------------------------------------


def bottleneck(plan: Plan, config: PretrainedConfig, profile: ClusterProfile, *request: int) -> str:
    """What limits `plan`, as a line of text; `request` as for `limits`."""
    shares = limits(plan, config, profile, *request)
    parts = sorted(((share, what) for what, share in shares.items() if share >= 0.005), reverse=True)
    return "Bottleneck: " + ", ".join(f"{what} {share:.0%}" for share, what in parts) + "."


def limits(plan: Plan, config: PretrainedConfig, profile: ClusterProfile, *request: int) -> dict[str, float]:
    """How `plan` spends its latency, in shares that add up to 1; `request`: seq_len, batch_size, past.

    Rate and steps of the links may hide each other: each share is the mean of its effect with and without the other.
    """

    def latency_s(profile: ClusterProfile) -> float:
        return Pieces(config, plan, profile, *request).price(plan.strategies)[0]

    def without(profile: ClusterProfile, rate: bool, steps: bool) -> ClusterProfile:
        link = replace(profile.link, step_latency_s={"*": 0.0}, delay_s=0.0) if steps else profile.link
        return replace(profile, link=link.at(float("inf")) if rate else link)

    whole_s, no_rate_s, no_steps_s, local_s = (
        latency_s(without(profile, *cut)) for cut in ((False, False), (True, False), (False, True), (True, True))
    )
    tireless = replace(profile, devices=tuple(replace(d, memory_bytes_per_s=None) for d in profile.devices))
    compute_s = latency_s(without(tireless, rate=True, steps=True))
    rate_s = (whole_s - no_rate_s + no_steps_s - local_s) / 2
    return {
        "compute": compute_s / whole_s,
        "reading weights": (local_s - compute_s) / whole_s,
        "bytes on the links": rate_s / whole_s,
        "latency of messages": (whole_s - local_s - rate_s) / whole_s,
    }
