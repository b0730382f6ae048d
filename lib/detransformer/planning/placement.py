"""Adaptive placement (DATE 2024, Section III-C): of the plans that fit the memory, the one predicted to be fastest.

`place` looks at the paper's three plans, over all devices. `place_freely` looks at all plans: which devices take part,
in how many chunks a request is run, in which format messages travel, and, by `search`, each layer's strategy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PretrainedConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.layer import STRATEGIES
from detransformer.parallel.methods import PAPER_METHODS
from detransformer.parallel.plan import Plan, layer_plan, published_plan, strategies_for
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.memory import least_bytes, memory_bytes
from detransformer.planning.pieces import Pieces
from detransformer.planning.profile import ClusterProfile
from detransformer.planning.search import fastest
from detransformer.planning.tape import WHOLE

CHUNKS = (1, 2, 4)  # more save little and cost a real device efficiency: its products become small
ALL_COUNTS = 8  # of up to so many devices every number is tried; of more, powers of 2 and what lies around the best
MEMORY_ROUNDS = 20  # so often is work moved away from devices that lack memory
TIE = 1e-9  # relative: fewer chunks are taken
WIRE_TOLERANCE = 0.02  # a more exact format is taken where it costs no more than this
MIB = 2**20


@dataclass(frozen=True)
class Alternative:
    """One candidate; `reason` says in words why it does not fit, or is empty."""

    plan: Plan
    prediction: Prediction
    reason: str

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def latency_s(self) -> float:
        return self.prediction.latency_s


@dataclass(frozen=True)
class Placement:
    """The chosen plan and all that were looked at, fastest first; a sentence for devices that take no part."""

    chosen: Alternative
    alternatives: tuple[Alternative, ...]
    left_out: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


def device_speeds(profile: ClusterProfile) -> list[float]:
    """How fast each device computes, relative to the fastest: by its rate on whole layers."""
    rates = [1 / device.compute_s(1.0, WHOLE) for device in profile.devices]
    return [rate / max(rates) for rate in rates]


def search_space(config: PretrainedConfig) -> tuple[str, ...]:
    """The paper's three plans for a decoupled model; TP, SP and one device for an original one."""
    return PAPER_METHODS if "decoupled" in layer_kinds(config) else ("tp", "sp", "single")


@dataclass(frozen=True)
class Problem:
    """What is planned for: the model on the cluster, a request's sizes, and bytes that each device may take."""

    config: PretrainedConfig
    profile: ClusterProfile
    seq_len: int
    batch_size: int
    past: int = 0
    budget: int | None = None

    @cached_property
    def budgets(self) -> list[int]:
        return [device.memory_bytes if self.budget is None else self.budget for device in self.profile.devices]

    @cached_property
    def speeds(self) -> list[float]:
        return device_speeds(self.profile)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The devices, fastest first; of equals the one of the wider link, then the first."""
        return tuple(sorted(range(len(self.speeds)), key=lambda i: (-self.speeds[i], -self.profile.link.share(i), i)))

    @cached_property
    def least(self) -> int:
        """Bytes that a device needs to take any part: embeddings, what the model ends in, activations."""
        return least_bytes(self.config, self.seq_len, self.batch_size)

    @cached_property
    def orders(self) -> list[tuple[int, ...]]:
        """Those of `order` that can take part; and in another order, the widest link first, where links differ."""
        able = tuple(i for i in self.order if self.budgets[i] >= self.least) or self.order
        return list(dict.fromkeys((able, tuple(sorted(able, key=lambda i: -self.profile.link.share(i))))))

    @property
    def request(self) -> tuple[int, int, int]:
        return self.seq_len, self.batch_size, self.past

    def needed(self, plan: Plan) -> np.ndarray:
        """Bytes that each rank of `plan` keeps [P]."""
        return np.array(memory_bytes(self.config, plan, *self.request))

    def room(self, plan: Plan) -> np.ndarray:
        """Bytes that each rank of `plan` may take [P]."""
        return np.array([self.budgets[i] for i in plan.device_ids])

    def lacks(self, plan: Plan) -> bool:
        """Whether `plan` does not fit some device."""
        return bool((self.needed(plan) > self.room(plan)).any())

    def pieces(self, plan: Plan) -> Pieces:
        """Prices of all plans of this split."""
        return Pieces(self.config, plan, self.profile, *self.request)

    def fastest(self, pieces: Pieces, below_s: float = np.inf) -> tuple[str, ...] | None:
        """`search.fastest` within the budgets."""
        room = self.room(pieces.plan)[pieces.first_of_group] - float(self.least)
        return fastest(pieces, room, below_s)

    def alternative(self, plan: Plan, pieces: Pieces | None = None) -> Alternative:
        """`plan` with its price, and whether it fits."""
        prediction = predict(self.config, plan, self.profile, *self.request, pieces=pieces)
        over, device, needed = self.lacking(plan, prediction)
        reason = (
            f"needs {needed / MIB:.0f} MiB on device {device} ({self.profile.devices[device].name}), "
            f"{over / MIB:.0f} MiB more than its budget of {(needed - over) / MIB:.0f} MiB"
        )
        return Alternative(plan, prediction, reason if over > 0 else "")

    def lacking(self, plan: Plan, prediction: Prediction) -> tuple[int, int, int]:
        """(bytes over budget, device, bytes needed) of the device that lacks most."""
        needed = zip(plan.device_ids, prediction.memory_bytes, strict=True)
        return max((memory - self.budgets[i], i, memory) for i, memory in needed)

    def published(self, methods: Iterable[str], wire: str) -> list[Alternative]:
        """The plans of these methods' names over all devices, split by speed; over the fastest where all are too many.

        `single` takes the fastest device.
        """
        return [self.alternative(self._published(method, wire)) for method in methods]

    def _published(self, method: str, wire: str) -> Plan:
        for count in range(1 if method == "single" else len(self.order), 1, -1):
            devices = sorted(self.order[:count])
            try:
                return _on(published_plan(method, self.config, [self.speeds[i] for i in devices], wire), devices)
            except ValueError:  # more devices than heads or sub-blocks
                continue
        published_plan(method, self.config, [1.0], wire)  # or says why it is not for this model
        return _on(replace(published_plan("single", self.config, wire=wire), method=method), self.order[:1])


def _on(plan: Plan, devices: Sequence[int]) -> Plan:
    """`plan` on these devices; the first ones need no naming."""
    return replace(plan, devices=() if list(devices) == list(range(len(devices))) else tuple(devices))


def place(
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    methods: Sequence[str] | None = None,
    wire: str = "float32",
    past: int = 0,
) -> Placement:
    """Chooses among `methods` (default: `search_space`) for all devices of `profile`, split by their speeds.

    Args:
        memory_budget_bytes: what a plan may take on each device; default: each device's own memory.

    Raises:
        ValueError: if no candidate fits, saying how much memory the smallest misses.
    """
    problem = Problem(config, profile, seq_len, batch_size, past, memory_budget_bytes)
    return _choose(problem, problem.published(methods or search_space(config), wire))


def place_freely(
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    wire: str = "float32",
    past: int = 0,
    wires: Sequence[str] = (),
) -> Placement:
    """Chooses devices, chunks and every original layer's strategy; sizes are split by speed, and by memory if need be.

    The fastest devices are tried, 1, 2 and so on (and those of the widest links, where these differ), so that one which
    only slows the others down is left out. Also listed: the best plan of each number of devices, each strategy for all
    layers and with another for the last, the paper's plans, and one device alone.

    Args:
        wires: formats to choose from (default: `wire`): the most exact one within 2% of the fastest is taken.

    Raises:
        ValueError: if no candidate fits, saying how much memory the smallest misses.
    """
    problem = Problem(config, profile, seq_len, batch_size, past, memory_budget_bytes)
    found = [_Candidates(problem, one, order) for one in wires or (wire,) for order in problem.orders]
    fitting = [candidates for candidates in found if candidates.by_count]
    published = dict.fromkeys((*search_space(config), "single"))
    if not fitting:
        raise ValueError(_nothing_fits(problem, problem.published(published, found[0].wire)))
    limit_s = (1 + WIRE_TOLERANCE) * min(candidates.best.latency_s for candidates in fitting)
    near = [candidates for candidates in fitting if candidates.best.latency_s <= limit_s]
    taken = min(near, key=lambda candidates: (WIRE_FORMATS.index(candidates.wire), candidates.best.latency_s))
    listed = [taken.best, *taken.by_count.values(), *taken.rivals(), *problem.published(published, taken.wire)]
    placement = _choose(problem, listed)
    others = [candidates.best for candidates in fitting if candidates is not taken]
    return Placement(placement.chosen, _sorted([*placement.alternatives, *others]), taken.left_out(placement.chosen))


def method_plan(
    method: str, config: PretrainedConfig, profile: ClusterProfile, wire: str = "float32", **request: int | None
) -> Plan:
    """The plan that a method's name stands for on all devices; one that is planned may leave devices out.

    Args:
        request: seq_len, batch_size and memory_budget_bytes, of which planned methods take account.
    """
    if method in ("auto", "bp+auto"):  # of the unmodified model, of the decoupled one
        return replace(place_freely(config, profile, wire=wire, **request).plan, method=method)
    if method in ("bp+paper", "bp+narrow"):  # bp+narrow: the same on the model of narrow sub-blocks
        return replace(place(config, profile, wire=wire, **request).plan, method=method)
    return published_plan(method, config, device_speeds(profile), wire)


def first_counts(num_devices: int) -> list[int]:
    """The numbers of devices to try first: all of few, of many the powers of 2."""
    powers = [2**k for k in range(num_devices.bit_length()) if 2**k < num_devices]
    return list(range(1, num_devices + 1)) if num_devices <= ALL_COUNTS else [*powers, num_devices]


def chunk_counts(seq_len: int, num_devices: int) -> tuple[int, ...]:
    """Those of `CHUNKS` that make sense."""
    return tuple(count for count in CHUNKS if count == 1 or (count <= seq_len and num_devices > 1))


class _Candidates:
    """The fastest plan of the first devices of `order`, by their number, in one wire format."""

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
        """The fastest; of equals the one of fewest devices."""
        return min(self.by_count.values(), key=lambda a: (a.latency_s, a.plan.num_devices))

    def _around_best(self) -> list[int]:
        """Numbers of devices halfway between the best one and its neighbours, if not tried."""
        if not self.by_count:
            return []
        tried = sorted(self.tried)
        place = tried.index(self.best.plan.num_devices)
        halfway = [(tried[place] + other) // 2 for other in tried[max(place - 1, 0) : place + 2]]
        return [count for count in halfway if count not in self.tried]

    def _try(self, count: int) -> None:
        """Looks for the fastest plan of the first `count` devices; of one, that of the first which holds the model."""
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
        """On the devices of the best plan: each strategy for all original layers, and others for the last of them.

        The last one is its own choice because what follows it is: the result is gathered.
        """
        tried, config = self.tried[self.best.plan.num_devices], self.problem.config
        last = max(i for i, kind in enumerate(layer_kinds(config)) if kind == "original")

        def priced(rest: str, final: str) -> list[Alternative]:
            names = list(strategies_for(config, rest))
            names[last] = final
            return [self.problem.alternative(replace(p.plan, strategies=tuple(names)), p) for p in tried]

        names = tried[0].strategies("original")
        uniform = [a for name in names for a in priced(name, name)]
        rest = min(uniform, key=lambda a: (not a.fits, a.latency_s)).plan.strategies[last]
        return uniform + [a for name in names if name != rest for a in priced(rest, name)]

    def left_out(self, chosen: Alternative) -> tuple[str, ...]:
        """A sentence for those devices that take no part in the chosen plan, by the number tried that includes them."""
        problem, sentences = self.problem, []
        for i in sorted(set(range(len(problem.speeds))) - set(self.order)):
            why = f"{problem.least / MIB:.0f} MiB for embeddings and activations are above its budget"
            sentences.append(f"{self._named([i])} left out: {why} of {problem.budgets[i] / MIB:.0f} MiB")
        told = set(chosen.plan.device_ids)
        for count in sorted(self.tried):
            devices = sorted(set(self.order[:count]) - told)
            if not devices or count <= chosen.plan.num_devices:
                continue
            why = f"with {'it' if len(devices) == 1 else 'them'} "
            if count in self.by_count:
                why += f"{self.by_count[count].latency_s:.3g} s instead of {chosen.latency_s:.3g} s"
            else:
                why = why + "no plan fits the memory" if self.tried[count] else "the model has no more sub-blocks"
            sentences.append(f"{self._named(devices)} left out: {why}")
            told.update(devices)
        return tuple(sentences)

    def _named(self, devices: Sequence[int]) -> str:
        """`device 3 (Raspberry Pi 4B) is`, `devices 2 (...) and 3 (...) are`, of many `28 devices (0, 1, ...) are`."""
        if len(devices) > 4:
            return f"{len(devices)} devices ({', '.join(map(str, devices[:3]))}, ...) are"
        *names, last = (f"{i} ({self.problem.profile.devices[i].name})" for i in devices)
        return f"devices {', '.join(names)} and {last} are" if names else f"device {last} is"


def splits(problem: Problem, devices: Sequence[int], wire: str) -> list[Plan]:
    """A plan of these devices split by speed; where that lacks memory, others whose weights go where there is more.

    Tokens are always split by speed. Empty where there are more devices than sub-blocks.
    """
    config, speeds = problem.config, [problem.speeds[i] for i in devices]

    def split(strategy: str, shares: Sequence[float]) -> Plan:
        plan = layer_plan("bp+auto", config, strategies_for(config, strategy), shares, wire)
        return _on(replace(plan, tokens_share=tuple(speeds)), devices)

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
        return [_on(published_plan("single", config, wire=wire), devices)]
    plans = [split(WHOLE, speeds)]
    if problem.lacks(plans[0]):
        # One strategy for each way to keep weights: all of a layer, some of it, a device's own part.
        original = {name: s for name, s in STRATEGIES.items() if s.layer_kind == "original"}
        keeping = {(s.qkv_weights, s.rest_weights): name for name, s in original.items()}
        too_many = len(devices) > config.num_attention_heads
        names = [name for name in keeping.values() if not (too_many and "heads" in STRATEGIES[name].splits)]
        plans += [plan for name in names if (plan := within_memory(name))]
    return list({(plan.heads, plan.ffn_columns, plan.sub_blocks): plan for plan in reversed(plans)}.values())[::-1]


def _choose(problem: Problem, alternatives: Sequence[Alternative]) -> Placement:
    """The fastest that fits, the first of equals; ValueError if none does."""
    fitting = [a for a in alternatives if a.fits]
    if not fitting:
        raise ValueError(_nothing_fits(problem, alternatives))
    return Placement(min(fitting, key=lambda a: a.latency_s), _sorted(alternatives))


def _sorted(alternatives: Sequence[Alternative]) -> tuple[Alternative, ...]:
    """Those that fit first, the fastest first; of equal plans the first."""
    distinct: dict[Plan, Alternative] = {}
    for alternative in alternatives:
        alone = alternative.plan.num_devices == 1  # sends nothing, in any format
        key = replace(alternative.plan, method="", **({"wire": "float32", "direct": False} if alone else {}))
        distinct.setdefault(key, alternative)
    return tuple(sorted(distinct.values(), key=lambda a: (not a.fits, a.latency_s)))


def _nothing_fits(problem: Problem, alternatives: Sequence[Alternative]) -> str:
    """What the plan lacks that lacks least, and what would help."""
    smallest = min(alternatives, key=lambda a: problem.lacking(a.plan, a.prediction)[0])
    activations = smallest.prediction.activation_bytes / MIB
    return (
        f"no plan fits: even the smallest, {smallest.plan.method}, {smallest.reason}. Give the devices more memory, "
        f"take more devices or a smaller model, or shorten requests ({activations:.0f} MiB of it are activations)."
    )
