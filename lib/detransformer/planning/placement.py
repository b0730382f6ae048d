"""Adaptive placement (DATE 2024, Section III-C): of the plans that fit the memory, the one predicted to be fastest.

`place` looks at the paper's three plans, over all devices. `place_freely` looks at all plans: which devices take part,
in how many chunks a request is run, in which format messages travel, and, by `search`, each layer's strategy.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PretrainedConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.plan import PAPER_METHODS, Plan, layer_plan, published_plan
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.planning.compiled import Compiled, least_bytes, memory_bytes
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.profile import ClusterProfile
from detransformer.planning.search import fastest

CHUNKS = (1, 2, 4)  # more save little and cost a real device efficiency: its products become small
ALL_COUNTS = 8  # of up to so many devices every number is tried; of more, powers of 2 and what lies around the best
MEMORY_ROUNDS = 20  # so often is work moved away from devices that lack memory
TIE = 1e-9  # relative: fewer chunks are taken
WIRE_TOLERANCE = 0.02  # a more exact format is taken where it costs no more than this


@dataclass(frozen=True)
class Alternative:
    """One candidate; `reason` says in words why it was left out, or is empty."""

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
    """The chosen plan and all that were looked at, fastest first.

    `left_out` has a sentence for each device (or group of them) that takes no part. `exact`: whether no plan of the
    same devices, split, chunks and format is faster, by the cost model.
    """

    chosen: Alternative
    alternatives: tuple[Alternative, ...]
    left_out: tuple[str, ...] = ()
    exact: bool = True

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


def device_speeds(profile: ClusterProfile) -> list[float]:
    """How fast each device computes, relative to the fastest: by its rate on whole layers."""
    rates = [1 / device.compute_s(1.0, "replicate") for device in profile.devices]
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

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        return layer_kinds(self.config)

    def needed(self, plan: Plan) -> np.ndarray:
        return memory_bytes(self.config, plan, self.seq_len, self.batch_size, self.past)

    def budgets_of(self, plan: Plan) -> list[int]:
        return [self.budgets[i] for i in plan.device_ids]

    def lacks(self, plan: Plan) -> bool:
        return bool((self.needed(plan) > self.budgets_of(plan)).any())

    def name_devices(self, devices: Sequence[int]) -> str:
        """`device 3 (Raspberry Pi 4B) is`, `devices 2 (...) and 3 (...) are`, of many `28 devices (0, 1, ...) are`."""
        if len(devices) > 4:
            return f"{len(devices)} devices ({', '.join(map(str, devices[:3]))}, ...) are"
        *names, last = (f"{i} ({self.profile.devices[i].name})" for i in devices)
        return f"devices {', '.join(names)} and {last} are" if names else f"device {last} is"

    def compiled(self, plan: Plan) -> Compiled:
        return Compiled(
            self.config, plan, self.profile, self.seq_len, self.batch_size, self.past, self.budgets_of(plan)
        )

    def alternative(self, plan: Plan, compiled: Compiled | None = None) -> Alternative:
        if plan.num_devices > 1 and not plan.splits_layers:  # a pipeline, data parallelism
            prediction = predict(self.config, plan, self.profile, self.seq_len, self.batch_size, self.past)
        else:
            prediction = (compiled or self.compiled(plan)).price(plan.strategies)
        return Alternative(plan, prediction, self.lacking(plan, prediction))

    def lacking(self, plan: Plan, prediction: Prediction) -> str:
        over, device, needed = self.missing(plan, prediction)
        if over <= 0:
            return ""
        return (
            f"needs {needed / 2**20:.0f} MiB on device {device} ({self.profile.devices[device].name}), "
            f"{over / 2**20:.0f} MiB more than its budget of {(needed - over) / 2**20:.0f} MiB"
        )

    def missing(self, plan: Plan, prediction: Prediction) -> tuple[int, int, int]:
        """(bytes over budget, device, bytes needed) of the device that lacks most."""
        needed = zip(plan.device_ids, prediction.memory_bytes, strict=True)
        return max((memory - self.budgets[i], i, memory) for i, memory in needed)

    def published(self, methods: Iterable[str], wire: str) -> list[Alternative]:
        """The plans of these methods' names over all devices, split by speed; over the fastest where all are too many.

        `single` takes the fastest device.
        """
        speeds, order = self.speeds, self.order
        found = []
        for method in methods:
            for devices in _shrinking(order[:1] if method == "single" else order):
                alone = len(devices) == 1
                try:
                    plan = published_plan(method, self.config, [speeds[i] for i in devices], wire)
                except ValueError:  # more devices than heads or sub-blocks
                    if alone:
                        raise
                    continue
                if alone:  # every method computes layers whole
                    whole = published_plan("single", self.config, [1.0], wire)
                    plan = replace(whole, method=method, tokens_share=plan.tokens_share)
                found.append(self.alternative(_on(plan, devices)))
                break
        return found


def _shrinking(order: Sequence[int]) -> Iterator[list[int]]:
    return (sorted(order[:count]) for count in range(len(order), 0, -1))


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


def paper_plan(config: PretrainedConfig, profile: ClusterProfile, **request: object) -> Plan:
    """BP+Auto as published: the fastest of the paper's three plans that fit."""
    return place(config, profile, **request).plan


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
    if not fitting:
        raise ValueError(_nothing_fits(problem, [a for candidates in found for a in candidates.smallest()]))
    limit_s = (1 + WIRE_TOLERANCE) * min(candidates.best.latency_s for candidates in fitting)
    near = [candidates for candidates in fitting if candidates.best.latency_s <= limit_s]
    taken = min(near, key=lambda candidates: (WIRE_FORMATS.index(candidates.wire), candidates.best.latency_s))
    listed = [taken.best, *taken.by_count.values(), *taken.rivals()]
    published = problem.published(dict.fromkeys((*search_space(config), "single")), taken.wire)
    placement = _choose(problem, [*listed, *published])
    others = [candidates.best for candidates in fitting if candidates is not taken]
    left_out = taken.left_out(placement.chosen)
    alternatives = _sorted([*placement.alternatives, *others])
    return Placement(placement.chosen, alternatives, left_out, all(candidates.exact for candidates in fitting))


def auto_plan(config: PretrainedConfig, profile: ClusterProfile, **request: object) -> Plan:
    """BP+Auto: the plan that `place_freely` chooses, under its table name."""
    return replace(place_freely(config, profile, **request).plan, method="bp+auto")


def method_plan(
    method: str,
    config: PretrainedConfig,
    profile: ClusterProfile,
    wire: str = "float32",
    **request: int | None,
) -> Plan:
    """The plan that a method's name stands for on all devices; one that is planned may leave devices out.

    Args:
        request: seq_len, batch_size and memory_budget_bytes, of which planned methods take account.
    """
    if method in ("auto", "bp+auto"):  # of the unmodified model, of the decoupled one
        return replace(auto_plan(config, profile, wire=wire, **request), method=method)
    if method in ("bp+paper", "bp+narrow"):  # bp+narrow: the same on the model of narrow sub-blocks
        return replace(paper_plan(config, profile, wire=wire, **request), method=method)
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
        self.tried: dict[int, list[Compiled]] = {}
        self.exact = True
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
        self.tried[count] = []
        devices = sorted(self.order[:count])
        if count == 1:
            (needed,) = self.problem.needed(splits(self.problem, devices, self.wire)[0])
            devices = [next((i for i in self.order if self.problem.budgets[i] >= needed), *devices)]
        best = None
        for plan in splits(self.problem, devices, self.wire):
            for num_chunks in chunk_counts(self.problem.seq_len, count)[::-1]:
                compiled = self.problem.compiled(replace(plan, num_chunks=num_chunks))
                self.tried[count].append(compiled)
                found = fastest(compiled, best.latency_s * (1 + TIE) if best else np.inf)
                if found:
                    strategies, exact = found
                    best = self.problem.alternative(replace(compiled.plan, strategies=strategies), compiled)
                    self.exact &= exact
        if best:
            self.by_count[count] = best

    def smallest(self) -> list[Alternative]:
        """The plans that keep least."""
        tried = [compiled for part in self.tried.values() for compiled in part]
        return [self.problem.alternative(replace(c.plan, strategies=c.smallest()), c) for c in tried]

    def rivals(self) -> list[Alternative]:
        """On the devices of the best plan: each strategy for all original layers, and others for the last of them.

        The last one is its own choice because what follows it is: the result is gathered.
        """
        tried, alternative = self.tried[self.best.plan.num_devices], self.problem.alternative
        kinds = self.problem.kinds
        last = max(i for i, kind in enumerate(kinds) if kind == "original")

        def priced(rest: str, final: str) -> list[Alternative]:
            names = ["block" if kind == "decoupled" else rest for kind in kinds]
            names[last] = final
            return [alternative(replace(c.plan, strategies=tuple(names)), c) for c in tried]

        names = [row.name for row in tried[0].stages[last + 1]]
        uniform = [a for name in names for a in priced(name, name)]
        rest = min(uniform, key=lambda a: (not a.fits, a.latency_s)).plan.strategies[last]
        return uniform + [a for name in names if name != rest for a in priced(rest, name)]

    def left_out(self, chosen: Alternative) -> tuple[str, ...]:
        """A sentence for those devices that take no part in the chosen plan, by the number tried that includes them."""
        problem, used, sentences = self.problem, set(chosen.plan.device_ids), []
        for i in set(range(len(problem.speeds))) - set(self.order):
            why = f"{problem.least / 2**20:.0f} MiB for embeddings and activations are above its budget"
            sentences.append(f"{problem.name_devices([i])} left out: {why} of {problem.budgets[i] / 2**20:.0f} MiB")
        told = set(used)
        for count in sorted(self.tried):
            devices = sorted(set(self.order[:count]) - told)
            if not devices or count <= len(used):
                continue
            them = ("it" if len(devices) == 1 else "them") + ("" if told == used else ", too,")
            if count in self.by_count:
                why = f"with {them} {_instead(self.by_count[count].latency_s, chosen.latency_s)}"
            else:
                why = (
                    f"with {them} no plan fits the memory" if self.tried[count] else "the model has no more sub-blocks"
                )
            sentences.append(f"{problem.name_devices(devices)} left out: {why}")
            told.update(devices)
        return tuple(sentences)


def _instead(slower_s: float, faster_s: float) -> str:
    """`0.52 s instead of 0.47 s`, with as many digits as tell them apart."""
    texts = ((f"{slower_s:.{n}g}", f"{faster_s:.{n}g}") for n in range(3, 7))
    slower, faster = next((pair for pair in texts if pair[0] != pair[1]), (f"{slower_s:.3g}", f"{faster_s:.3g}"))
    return f"{slower} s instead of {faster} s"


def splits(problem: Problem, devices: Sequence[int], wire: str) -> list[Plan]:
    """A plan of these devices split by speed; where that lacks memory, others whose weights go where there is more.

    Tokens are always split by speed. Empty where there are more devices than sub-blocks.
    """
    config, speeds = problem.config, [problem.speeds[i] for i in devices]

    def split(strategy: str, shares: Sequence[float]) -> Plan:
        names = ["block" if kind == "decoupled" else strategy for kind in problem.kinds]
        plan = layer_plan("bp+auto", config, names, shares, wire)
        return _on(replace(plan, tokens_share=tuple(speeds)), devices)

    def within_memory(strategy: str) -> Plan | None:
        plan, shares, nothing = split(strategy, speeds), np.array(speeds), (0,) * len(devices)
        least = problem.needed(replace(plan, heads=nothing, ffn_columns=nothing, sub_blocks=nothing))
        budgets = np.array(problem.budgets_of(plan))
        for _ in range(MEMORY_ROUNDS if (least <= budgets).all() else 0):
            needed = problem.needed(plan)
            over = needed > budgets
            if not over.any():
                return plan
            part = np.divide(budgets - least, needed - least, out=np.ones(len(devices)), where=over)
            shares = shares * np.where(over, np.clip(part, 0.1, 0.9), 1.0)
            plan = split(strategy, (shares / shares.max()).tolist())
        return None

    if len(devices) > getattr(config, "num_divisions", len(devices)):
        return []
    if len(devices) == 1:
        return [_on(published_plan("single", config, wire=wire), devices)]
    plans = [split("replicate", speeds)]
    if problem.lacks(plans[0]):
        keeping = ("replicate", "heads", "tensor")  # a device keeps all of a layer, some of it, its part
        names = keeping if len(devices) <= config.num_attention_heads else keeping[:1]
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
    smallest = min(alternatives, key=lambda a: problem.missing(a.plan, a.prediction)[0])
    over, device, _ = problem.missing(smallest.plan, smallest.prediction)
    helps = ["Give the devices more memory"]
    if smallest.prediction.activation_bytes > over:
        helps.append(f"shorten requests ({smallest.prediction.activation_bytes / 2**20:.0f} MiB of it are activations)")
    total = _devices_needed(problem, device, smallest.plan.wire)
    helps.append(f"take {total} devices, more like device {device}" if total else "take a smaller model")
    what = f"{', '.join(helps[:-1])}, or {helps[-1]}"
    return f"no plan fits: even the smallest, {smallest.plan.method}, {smallest.reason}. {what}."


def _devices_needed(problem: Problem, device: int, wire: str) -> int | None:
    """How many devices would hold the model, the added ones being like `device`; None: four times as many do not."""
    devices = problem.profile.devices
    names = tuple("tensor" if kind == "original" else "block" for kind in problem.kinds)
    most = min(4 * len(devices), problem.config.num_attention_heads)
    for count in range(len(devices) + 1, most + 1):
        more = (*devices, *[devices[device]] * (count - len(devices)))
        larger = replace(problem, profile=ClusterProfile(more, replace(problem.profile.link, shares=())))
        if not all(larger.lacks(replace(plan, strategies=names)) for plan in splits(larger, range(count), wire)):
            return count
    return None
