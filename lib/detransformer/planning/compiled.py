"""The cost model compiled: all plans of one split, for `planning.search` and for clusters of many devices.

The cost model is a max-plus system: a device's time moves on by what it computes, and a collective begins when the last
device has started it. What happens from one layer's first output to the next one's depends on the two strategies alone,
so each pair is compiled once, to a max-plus matrix [n, n] over n = R + 1 + K numbers: when each device and the link are
free, and when collectives still under way arrive. Devices that compute and keep the same are one of the R.

What is computed and sent is asked of the cost model's own rows, once for all P ranks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from transformers import PretrainedConfig

from detransformer.models.configuration import layer_kinds
from detransformer.models.sizes import embedding_parameters, pooler_parameters
from detransformer.parallel.partition import split
from detransformer.parallel.plan import REPLICATE, STRATEGIES, Plan
from detransformer.planning.cost import (
    FLOAT_BYTES,
    LAYER_COSTS,
    Arrival,
    Compute,
    Prediction,
    Sizes,
    Start,
    Step,
    Tape,
    Wait,
    activation_bytes,
    cache_bytes,
    end_steps,
    reshard_steps,
)
from detransformer.planning.profile import ClusterProfile


class AllRanks(Sizes):
    """`Sizes` of all ranks at once: `rank` is 0..P-1, and what differs by rank is an array [P], on the tape too."""

    @cached_property
    def chunks(self) -> list[np.ndarray]:
        return [np.array(chunk) for chunk in self.plan.tokens(self.seq_len)]

    @property
    def tokens_share(self) -> np.ndarray:
        return np.array(self.plan.tokens_share)

    @property
    def words(self) -> np.ndarray:
        return np.array(self.plan.vocabulary(self.config.vocab_size))

    def product(self, num_tokens, num_in, num_out, copies=1) -> Compute:
        numbers, tokens = copies * num_in * num_out, self.batch_size * num_tokens
        return Compute(2 * tokens * numbers, weight_bytes=FLOAT_BYTES * numbers * (tokens > 0))

    def all_reduce(self, num_tokens, role) -> Arrival:
        if not role or self.plan.wire == "float32":
            return super().all_reduce(num_tokens, role)
        rows, width = np.array(split(self.batch_size * num_tokens, [1.0] * self.ranks)), self.config.hidden_size
        gather = ("all_gather", *self.gather_bytes([(size, width) for size in rows], role))
        return replace(self._scatter((rows, width), role), then=gather)

    def scatter_sum(self, chunk) -> Arrival:
        return self._scatter((self.batch_size, chunk, self.config.hidden_size), "sum")

    def _scatter(self, shape, role) -> Arrival:
        num_bytes = self.message(shape, role)  # [P]: of each rank's part
        return self.tape.start("reduce_scatter", num_bytes.sum() - num_bytes, (self.ranks - 1) * num_bytes)

    def gather_bytes(self, shapes, role):
        own = self.message(np.array(shapes).T, role)
        return (self.ranks - 1) * own, own.sum() - own

    def exchange(self, kind, shapes, role, received) -> Arrival:
        return self.tape.start(kind, self._to_others(shapes, role), received)

    def from_others(self, shape, role):
        return self._to_others([shape(rank) for rank in range(self.ranks)], role)

    def _to_others(self, shapes, role) -> np.ndarray:
        """Bytes [P] of all `shapes` but a rank's own, where each entry of a shape is a number or an array [P]."""
        columns = [np.array(column) for column in zip(*shapes, strict=True)]  # [P] or [P, P]
        num_bytes = self.message([c[:, None] if c.ndim == 1 else c for c in columns], role)
        return num_bytes.sum(0) - np.broadcast_to(num_bytes, (self.ranks, self.ranks)).diagonal()


def as_arrays(plan: Plan) -> Plan:
    """`plan` with its sizes as arrays, to be looked up for all ranks at once."""
    return replace(plan, **{name: np.array(getattr(plan, name)) for name in ("heads", "ffn_columns", "sub_blocks")})


def least_bytes(config: PretrainedConfig, seq_len: int, batch_size: int = 1) -> int:
    """What a device needs to take any part in a request: embeddings, what the model ends in, activations."""
    ends = embedding_parameters(config) + pooler_parameters(config)
    return FLOAT_BYTES * ends + activation_bytes(config, seq_len, batch_size)


def memory_bytes(config: PretrainedConfig, plan: Plan, seq_len: int, batch_size: int = 1, past: int = 0) -> np.ndarray:
    """What each rank of `plan` keeps [P], as `cost.predict` counts it."""
    plan, ranks = as_arrays(plan), np.arange(plan.num_devices)
    layers = sum(n * LAYER_COSTS[name].parameters(config, plan, ranks) for name, n in Counter(plan.strategies).items())
    cached = cache_bytes(config, plan, ranks, past + seq_len, batch_size)
    return np.broadcast_to(FLOAT_BYTES * layers + least_bytes(config, seq_len, batch_size) + cached, len(ranks))


# A layer's operations: compute seconds [P], `Message`, `Wait`, `Pull` and `Arriving`


@dataclass(frozen=True)
class Message:
    """The `number`-th collective of a row: bytes that the busiest rank sends, and how long the links are taken."""

    number: int
    kind: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Pull:
    """Here the layer before has to give out its next chunk."""

    chunk: int


@dataclass(frozen=True)
class Arriving:
    """A chunk on its way into a row; as an operation, the wait for it."""

    tape: Tape
    chunk: int

    def wait(self) -> None:
        self.tape.steps.append(self)


@dataclass(frozen=True, eq=False)
class Row:
    """A layer under a strategy: operations, cut where it gives out its chunks; bytes [P] of weights, and with cache.

    `pending`: collectives started before the first output and waited for after it.
    """

    name: str
    in_layout: str
    out_layout: str
    segments: list[list]
    weights: np.ndarray
    kept: np.ndarray

    @cached_property
    def pending(self) -> list[int]:
        started = {op.number for op in self.segments[0] if isinstance(op, Message)}
        return sorted(started & {op.number for part in self.segments[1:] for op in part if isinstance(op, Wait)})


@dataclass(frozen=True)
class Piece:
    """From one layer's first output to the next one's: max-plus matrix [n, n], compute seconds [R], messages."""

    matrix: np.ndarray
    compute_s: np.ndarray
    messages: list[Message]


def _arriving(tape: Tape, num_chunks: int) -> Iterator[Arriving]:
    for chunk in range(num_chunks):
        tape.steps.append(Pull(chunk))
        yield Arriving(tape, chunk)
    tape.steps.append(Pull(num_chunks))


def _record(z: Sizes, steps: Callable[[Sizes, Iterable], Iterator]) -> list[list[Step]]:
    """What a row writes to the tape, cut at its outputs."""
    z.tape.steps, z.tape.num_started, segments = [], 0, []
    for _ in steps(z, _arriving(z.tape, len(z.chunks))):
        segments.append(z.tape.steps)
        z.tape.steps = []
    return [*segments, z.tape.steps]


def _end(z: Sizes, arriving: Iterable) -> Iterator:
    """What follows the last layer, as `cost.device_steps` has it."""
    for arrival in arriving:
        arrival.wait()
    end_steps(z)
    yield from z.chunks


class Compiled:
    """All plans that differ from `plan` in the strategies of the original layers alone.

    Args:
        plan: of any strategies; its devices, split, wire, chunks and `direct` are those of all plans.
        budgets: bytes that each rank may keep; None: no limits.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        profile: ClusterProfile,
        seq_len: int = 128,
        batch_size: int = 1,
        past: int = 0,
        budgets: Sequence[int] | None = None,
    ):
        self.config, self.plan, self.link = config, plan, profile.link
        self.devices = [profile.devices[i] for i in plan.device_ids]
        self.shares = np.array([profile.link.share(i) for i in plan.device_ids])
        self.local = local = plan if plan.splits_layers else plan.on_one_device()
        ranks, tape = np.arange(local.num_devices), Tape(local.num_devices)
        self.z = AllRanks(config, as_arrays(local), ranks, batch_size, seq_len, tape, past=past)
        self.num_chunks = len(self.z.chunks)
        self._rates: dict[tuple, np.ndarray] = {}
        self._reshards: dict[tuple, tuple[list, list] | None] = {}
        self._pieces: dict[tuple[Row, Row], Piece] = {}
        self._set_memory(budgets)
        self.stages = self._rows()
        rows = list({row: None for stage in self.stages for row in stage})
        self.num_pending = max(len(row.pending) for row in rows)
        differing = [op for row in rows for part in row.segments for op in part if isinstance(op, np.ndarray)]
        differing += [self.room, *(row.kept for row in rows)]
        self.groups = np.unique(np.stack(differing), axis=1, return_index=True)[1]  # one rank of each group

    def _set_memory(self, budgets: Sequence[int] | None) -> None:
        """What ranks keep under all strategies, what that leaves of the budgets, and a whole layer's more of cache."""
        z, kinds = self.z, layer_kinds(self.config)
        own = ["block" if kind == "decoupled" else "tensor" for kind in kinds]

        def cache(strategies: Sequence[str]) -> np.ndarray:
            plan, num_tokens = replace(z.plan, strategies=tuple(strategies)), z.past + z.seq_len
            return np.full(z.ranks, cache_bytes(self.config, plan, z.rank, num_tokens, z.batch_size))

        self.activations = activation_bytes(self.config, z.seq_len, z.batch_size)
        self.ends = least_bytes(self.config, z.seq_len, z.batch_size) - self.activations
        self.fixed = self.ends + self.activations + cache(own)
        whole, original = list(own), kinds.index("original")
        whole[original] = "replicate"
        self.whole_cache = cache(whole) - cache(own)  # of one original layer
        self.room = np.full(z.ranks, np.inf) if budgets is None else np.array(budgets) - self.fixed

    # Rows ------------------------------------------------------------------------------------------------------------

    def _strategies(self, kind: str) -> list[str]:
        if kind != "original":
            return ["block" if kind == "decoupled" else kind]
        if self.z.ranks == 1:
            return ["replicate"]  # as fast as all others
        shares_heads = self.z.ranks <= self.config.num_attention_heads
        return [n for n, s in STRATEGIES.items() if s.layer_kind == kind and (shares_heads or s.cache == "all")]

    def _rows(self) -> list[list[Row]]:
        """The rows to choose from: at the start, for each layer, and at the end."""
        nothing = np.zeros(self.z.ranks)
        known: dict[str, Row] = {}
        stages = [[Row("start", REPLICATE, REPLICATE, [[] for _ in range(self.num_chunks + 1)], nothing, nothing)]]
        for kind in [*layer_kinds(self.config), "end"]:
            stages.append([])
            for name in self._strategies(kind):
                if name not in known:
                    known[name] = self._row(name)
                stages[-1].append(known[name])
        return stages

    def _row(self, name: str) -> Row:
        z = self.z
        if name == "end":
            nothing = np.zeros(z.ranks)
            return Row(name, REPLICATE, REPLICATE, self._operations(_record(z, _end)), nothing, nothing)
        cost, signature = LAYER_COSTS[name], STRATEGIES[name]
        segments = _record(z, cost.steps)
        weights = np.full(z.ranks, FLOAT_BYTES * cost.parameters(self.config, z.plan, z.rank))
        kept = weights + (self.whole_cache if signature.cache == "all" else 0)
        return Row(name, signature.in_layout, signature.out_layout, self._operations(segments), weights, kept)

    def _operations(self, segments: Sequence[Sequence[Step]]) -> list[list]:
        number, cut = 0, []
        for steps in segments:
            operations: list = []
            for step in steps:
                if isinstance(step, Compute):
                    joins = operations and isinstance(operations[-1], np.ndarray)
                    operations.append(self._compute_s(step) + (operations.pop() if joins else 0.0))
                elif isinstance(step, Start):
                    operations.append(self._message(number, step))
                    number += 1
                else:
                    operations.append(step)
            cut.append(operations)
        return cut

    def _compute_s(self, step: Compute) -> np.ndarray:
        """`cost.compute_seconds` of each rank [P]."""
        key = step.strategy, step.num_chunks
        if key not in self._rates:
            shares = np.broadcast_to(step.share, len(self.devices))
            how = [(step.strategy, float(share), step.tokens, step.num_chunks) for share in shares]
            one = [
                (device.compute_s(1.0, name, 0.0, *rest), device.compute_s(0.0, name, 1.0, *rest))
                for device, (name, *rest) in zip(self.devices, how, strict=True)
            ]
            self._rates[key] = np.array(one).T
        per_flop, per_byte = self._rates[key]
        return np.maximum(step.flops * per_flop, step.weight_bytes * per_byte)

    def _message(self, number: int, start: Start) -> Message:
        """As `cost.collective_seconds` has it."""
        busiest = num_bytes = int(np.max(start.num_bytes))
        if self.link.shares:
            num_bytes = np.max(np.maximum(start.num_bytes, start.received_bytes) / self.shares)
        return Message(number, start.kind, busiest, self.link.collective_s(start.kind, num_bytes, self.z.ranks))

    # Pieces ----------------------------------------------------------------------------------------------------------

    def _resharding(self, source: Row, target: Row) -> tuple[list[list], list[list]] | None:
        """What starts each chunk's way between the rows' layouts, and what waits for it; None: X is passed on."""
        key = source.out_layout, target.in_layout
        if key not in self._reshards:
            z = self.z
            z.tape.steps, z.tape.num_started = [], 0
            arriving = reshard_steps(iter([None] * self.num_chunks), *key, z)
            self._reshards[key] = None
            if isinstance(arriving, list):
                segments = [[start] for start in z.tape.steps]
                for arrival in arriving:
                    z.tape.steps = []
                    arrival.wait()
                    segments.append(z.tape.steps)
                operations = self._operations(segments)
                self._reshards[key] = operations[: self.num_chunks], operations[self.num_chunks :]
        return self._reshards[key]

    def _between(self, source: Row, target: Row) -> Iterator[tuple[str, list]]:
        """(whose they are, operations) from the first output of `source` to that of `target`."""
        moved = self._resharding(source, target)
        if moved:
            for start, rest in zip(moved[0], source.segments[1:], strict=True):
                yield from (("moved", start), ("source", rest))
        for operation in target.segments[0]:
            if isinstance(operation, Pull):
                if not moved and operation.chunk:
                    yield "source", source.segments[operation.chunk]
            elif isinstance(operation, Arriving):
                if moved:
                    yield "moved", moved[1][operation.chunk]
            else:
                yield "target", [operation]

    def piece(self, source: Row, target: Row) -> Piece:
        if (source, target) not in self._pieces:
            self._pieces[source, target] = self._compile(source, target)
        return self._pieces[source, target]

    def _compile(self, source: Row, target: Row) -> Piece:
        """The operations between two rows, applied to the unit vectors of the max-plus algebra."""
        ranks = len(self.groups)
        units = np.full((ranks + 1 + self.num_pending,) * 2, -np.inf)
        np.fill_diagonal(units, 0.0)
        now, free = units[:ranks], units[ranks]
        done = {("source", number): unit for number, unit in zip(source.pending, units[ranks + 1 :], strict=False)}
        compute_s, messages = np.zeros(ranks), []
        for owner, operations in self._between(source, target):
            for operation in operations:
                if isinstance(operation, Message):
                    free = np.maximum(now.max(0), free) + operation.seconds
                    done[owner, operation.number] = free
                    messages.append(operation)
                elif isinstance(operation, Wait):
                    now = np.maximum(now, done[owner, operation.number])
                else:
                    now = now + operation[self.groups, None]
                    compute_s = compute_s + operation[self.groups]
        matrix = np.full_like(units, -np.inf)
        matrix[:ranks], matrix[ranks] = now, np.maximum(free, now.max(0))  # nothing begins before the last is ready
        for row, number in enumerate(target.pending, ranks + 1):
            matrix[row] = done["target", number]
        return Piece(matrix, compute_s, messages)

    def first_label(self) -> np.ndarray:
        """[n]: all is free at 0."""
        return np.where(np.arange(len(self.groups) + 1 + self.num_pending) <= len(self.groups), 0.0, -np.inf)

    # What is asked ---------------------------------------------------------------------------------------------------

    def _path(self, strategies: Sequence[str]) -> tuple[list[Row], list[Piece]]:
        names = ("start", *strategies, "end")
        rows = [next(row for row in stage if row.name == name) for name, stage in zip(names, self.stages, strict=True)]
        return rows, [self.piece(*pair) for pair in pairwise(rows)]

    def messages(self, strategies: Sequence[str]) -> list[Message]:
        """The collectives of one request, in their order."""
        return [message for piece in self._path(strategies)[1] for message in piece.messages]

    def busiest(self, strategies: Sequence[str]) -> int:
        """The rank that computes longest."""
        return int(self.groups[np.argmax(sum(piece.compute_s for piece in self._path(strategies)[1]))])

    def price(self, strategies: Sequence[str]) -> Prediction:
        """`cost.predict` of the plan with these strategies."""
        rows, pieces = self._path(strategies)
        label = self.first_label()
        for piece in pieces:
            label = (piece.matrix + label).max(-1)
        latency_s = float(label[: len(self.groups)].max())
        compute_s = float(sum(piece.compute_s for piece in pieces).max())
        messages = [message for piece in pieces for message in piece.messages]
        sent: Counter[str] = Counter()
        for message in messages:
            sent[message.kind] += message.num_bytes
        weights, kept = (sum(getattr(row, name) for row in rows) for name in ("weights", "kept"))
        return Prediction(
            latency_s=latency_s,
            compute_s=compute_s,
            comm_s=latency_s - compute_s,
            counts=dict(Counter(message.kind for message in messages)),
            bytes=dict(sent),
            weights_bytes=tuple(int(w) for w in self.ends + weights),
            memory_bytes=tuple(int(m) for m in self.fixed + kept),
            activation_bytes=self.activations,
        )

    def fits(self) -> bool:
        """Whether any plan keeps within the budgets."""
        return bool((sum(np.min([row.kept for row in stage], axis=0) for stage in self.stages) <= self.room).all())

    def smallest(self) -> tuple[str, ...]:
        """The strategies that keep least."""
        return tuple(min(stage, key=lambda row: row.kept.sum()).name for stage in self.stages[1:-1])
