"""Prices of all plans of one split: recorded layers composed as a max-plus system.

Compute advances a device's time. A collective begins when the last device has started it and the collective before it
has left the link. What happens from one layer's first output to the next layer's depends only on their two strategies,
so it is one piece. A piece is applied to a state: when each device and the link are free, and when collectives still
under way arrive. Applied to the unit vectors, it is a matrix of the max-plus algebra, for `planning.search`.

Equal devices with equal parts count as one; R different ones are followed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from transformers import PretrainedConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.layer import STRATEGIES
from detransformer.parallel.plan import Plan
from detransformer.planning.memory import layer_bytes
from detransformer.planning.profile import ClusterProfile, DeviceProfile
from detransformer.planning.recorder import Recorder, interleaved, layouts_of, segments
from detransformer.planning.tape import WHOLE, Compute, Recording, Start, Wait


def compute_seconds(step: Compute, device: DeviceProfile) -> float:
    """Seconds that `device` computes."""
    return device.compute_s(step.flops, step.strategy, step.weight_bytes, step.share, step.tokens, step.num_chunks)


def strategies_of(config: PretrainedConfig, kind: str, num_devices: int) -> list[str]:
    """The strategies that can run a layer of this kind on `num_devices` devices."""
    if kind == "original" and num_devices == 1:
        return [WHOLE]  # as fast as all others
    fitting = [name for name, strategy in STRATEGIES.items() if strategy.layer_kind == kind]
    too_many = num_devices > config.num_attention_heads
    return [name for name in fitting if not (too_many and "heads" in STRATEGIES[name].splits)]


@dataclass(frozen=True)
class Message:
    """The `number`-th collective of a layer: bytes that the busiest rank sends, and how long it occupies the links."""

    number: int
    kind: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Row:
    """A layer under a strategy: steps (seconds [R], `Message`, `Wait`, `Pull`, `Arrive`), cut where it yields a chunk.

    `kept` [R]: bytes of weights, keys and values.
    """

    name: str
    in_layout: str
    out_layout: str
    segments: list[list]
    kept: np.ndarray

    @cached_property
    def pending(self) -> list[int]:
        """Collectives started before the first output and waited for after it."""
        started = {step.number for step in self.segments[0] if isinstance(step, Message)}
        return sorted(started & {step.number for part in self.segments[1:] for step in part if isinstance(step, Wait)})


@dataclass
class State:
    """Times [R, m] at which devices are free, [m] at which the link is free, and [m] at which collectives arrive."""

    now: np.ndarray
    free: np.ndarray
    done: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    compute_s: np.ndarray | float = 0.0
    messages: list[Message] = field(default_factory=list)


class Pieces:
    """All plans that differ from `plan` only in the strategies of the original layers.

    Args:
        plan: its devices, split, wire, chunks and `direct` hold for all plans; its strategies do not matter.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        profile: ClusterProfile,
        seq_len: int = 128,
        batch_size: int = 1,
        past: int = 0,
    ):
        self.config, self.plan, self.link = config, plan, profile.link
        local = plan if plan.splits_layers else plan.on_one_device()
        self.recorder = Recorder(config, local, seq_len, batch_size, past)
        splits = ("heads", "tokens_share", "ffn_columns", "sub_blocks")
        ranks = range(plan.num_devices) if plan.splits_layers else [0] * plan.num_devices
        parts = [
            (profile.devices[device], profile.link.share(device), *self.recorder.taken(rank, splits))
            for device, rank in zip(plan.device_ids, ranks, strict=True)
        ]
        group = {part: number for number, part in enumerate(dict.fromkeys(parts))}
        self.group_of = [group[part] for part in parts]
        self.first_of_group = [self.group_of.index(number) for number in range(len(group))]
        self.ranks = [ranks[place] for place in self.first_of_group]
        self.devices = [device for device, *_ in group]
        self.num_ranks = local.num_devices
        self._rows: dict[str, Row] = {}
        self._reshards: dict[tuple[str, str], list[list] | None] = {}

    # Rows ------------------------------------------------------------------------------------------------------------

    def row(self, name: str) -> Row:
        """The layer under strategy `name`; `start` and `end` are the model's parts before and after all layers."""
        if name not in self._rows:
            recorder, kept = self.recorder, np.zeros(len(self.ranks))
            recordings = [recorder.layer(name, rank) for rank in self.ranks]
            if name in STRATEGIES:
                weights = [layer_bytes(recorder.sizes, name, recorder.plan, rank) for rank in self.ranks]
                kept = np.array([w + r.cache_bytes for w, r in zip(weights, recordings, strict=True)], float)
            self._rows[name] = Row(name, *layouts_of(name), self._steps(recordings), kept)
        return self._rows[name]

    def choices(self) -> list[list[Row]]:
        """The rows to choose from: at the start, for each layer, and at the end."""
        kinds = layer_kinds(self.config)
        by_kind = {kind: list(map(self.row, strategies_of(self.config, kind, self.num_ranks))) for kind in set(kinds)}
        return [[self.row("start")], *(by_kind[kind] for kind in kinds), [self.row("end")]]

    def _steps(self, recordings: Sequence[Recording]) -> list[list]:
        """Merges the recordings of all R: seconds, and how long messages take."""
        number, cut = 0, []
        for same in zip(*(recording.segments for recording in recordings), strict=True):
            steps: list = []
            events = zip(*([step for step in own if not isinstance(step, Compute)] for own in same), strict=True)
            for products in zip(*map(segments, same), strict=True):
                pairs = zip(products, self.devices, strict=True)
                seconds = np.array([sum(compute_seconds(step, d) for step in own) for own, d in pairs], float)
                if seconds.any():
                    steps.append(seconds)
                alike = next(events, None)
                if alike and isinstance(alike[0], Start):
                    steps.append(self._message(number, alike))
                    number += 1
                elif alike:
                    steps.append(alike[0])
            cut.append(steps)
        return cut

    def _message(self, number: int, starts: Sequence[Start]) -> Message:
        seconds = self.link.exchange_s([starts[group] for group in self.group_of], self.plan.device_ids)
        return Message(number, starts[0].kind, max(start.num_bytes for start in starts), seconds)

    def _moved(self, source: Row, target: Row) -> list[list] | None:
        """The resharding between two rows; None if X is passed on."""
        key = source.out_layout, target.in_layout
        if key not in self._reshards:
            recordings = [self.recorder.reshard(*key, rank) for rank in self.ranks]
            self._reshards[key] = None if recordings[0] is None else self._steps(recordings)
        return self._reshards[key]

    # Pieces ----------------------------------------------------------------------------------------------------------

    def _advance(self, source: Row, target: Row, state: State) -> State:
        """From the first output of `source` to that of `target`."""
        now, free, done = state.now, state.free, {("source", n): at for (_, n), at in state.done.items()}
        compute_s, messages = state.compute_s, list(state.messages)
        for owner, steps in interleaved(source.segments, self._moved(source, target), target.segments):
            for step in steps:
                if isinstance(step, Message):
                    free = np.maximum(now.max(0), free) + step.seconds
                    done[owner, step.number] = free
                    messages.append(step)
                elif isinstance(step, Wait):
                    now = np.maximum(now, done[owner, step.number])
                else:
                    now = now + step[:, None]
                    compute_s = compute_s + step
        free = np.maximum(free, now.max(0))  # nothing begins before the last device is ready
        return State(now, free, {("target", n): done["target", n] for n in target.pending}, compute_s, messages)

    def matrix(self, source: Row, target: Row, num_pending: int) -> np.ndarray:
        """The piece as a max-plus matrix [n, n] over devices, link and `num_pending` collectives: n = R + 1 + K."""
        ranks = len(self.ranks)
        units = np.full((ranks + 1 + num_pending,) * 2, -np.inf)
        np.fill_diagonal(units, 0.0)
        done = dict(zip((("target", n) for n in source.pending), units[ranks + 1 :], strict=False))
        after = self._advance(source, target, State(units[:ranks], units[ranks], done))
        matrix = np.full_like(units, -np.inf)
        matrix[:ranks], matrix[ranks] = after.now, after.free
        for place, number in enumerate(target.pending, ranks + 1):
            matrix[place] = after.done["target", number]
        return matrix

    def run(self, strategies: Sequence[str]) -> State:
        """The state after a request whose layers run by `strategies`."""
        state = State(np.zeros((len(self.ranks), 1)), np.zeros(1))
        for source, target in pairwise(self.row(name) for name in ("start", *strategies, "end")):
            state = self._advance(source, target, state)
        return state

    def price(self, strategies: Sequence[str]) -> tuple[float, float, list[tuple[str, int]]]:
        """(latency, compute of the busiest device, (kind, bytes) of each collective) of one request."""
        state = self.run(strategies)
        sent = [(message.kind, message.num_bytes) for message in state.messages]
        return float(state.now.max()), float(np.max(state.compute_s)), sent
