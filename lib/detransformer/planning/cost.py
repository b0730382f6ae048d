"""Cost model: what a plan computes, sends and keeps on each device, and how long that takes (Section III-C).

`device_steps` lists what a device computes, starts and waits for, in the order in which the executor does; the latency
is what a small simulation of all devices and the link makes of it. One row of `LAYER_COSTS` a strategy. No torch.

Shapes as in `parallel.strategies`: B, T, D, H, s, I, P, d, A; t, h, p are the device's own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PretrainedConfig

from detransformer.models.configuration import ffn_size, layer_kinds
from detransformer.models.sizes import embedding_parameters, layer_parameters, pooler_parameters
from detransformer.parallel.partition import bounds, split
from detransformer.parallel.plan import HIDDEN, REPLICATE, SEQ, STRATEGIES, Plan, is_decoder
from detransformer.parallel.wire import message_bytes
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Compute:
    """Local work between two starts or waits; `weight_bytes` are those that it reads from memory.

    Small products run at another rate: which one depends on the strategy, on the device's share of the layer under it
    (0 to 1), and on the request's tokens and how many chunks they are cut in.
    """

    flops: float
    strategy: str = ""
    weight_bytes: float = 0.0
    share: float = 1.0
    tokens: int = 1
    num_chunks: int = 1


@dataclass(frozen=True)
class Start:
    """A collective begins; `num_bytes` are those this rank sends, counted as `parallel.comm` counts them.

    `received_bytes` are those it receives: they matter where links differ.
    """

    kind: str
    num_bytes: int
    received_bytes: int = 0


@dataclass(frozen=True)
class Wait:
    """The device waits for the `number`-th collective that was started."""

    number: int


Step = Compute | Start | Wait


class Tape:
    """One device's steps, in the order in which the executor takes them."""

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks
        self.steps: list[Step] = []
        self.num_started = 0

    def start(self, kind: str, num_bytes: int, received_bytes: int | None = None) -> "Arrival":
        """With one rank there is nothing to send, but for a pipeline's messages. As much is received unless given."""
        if self.num_ranks == 1 and kind not in ("send", "receive"):
            return Arrival(self)
        self.steps.append(Start(kind, num_bytes, num_bytes if received_bytes is None else received_bytes))
        self.num_started += 1
        return Arrival(self, self.num_started - 1)


@dataclass(frozen=True)
class Arrival:
    """What `parallel.comm.Pending` is to the executor: a wait to come, and what is started after it."""

    tape: Tape
    number: int | None = None
    then: tuple[str, int, int] | None = (
        None  # (kind, bytes, received bytes) of a collective that is made as soon as this one is there
    )

    def wait(self) -> None:
        if self.number is not None:
            self.tape.steps.append(Wait(self.number))
            if self.then:
                self.tape.start(*self.then).wait()


@dataclass(frozen=True)
class Sizes:
    """A request in one layer on one device: the numbers that the rows below need, and the tape they write to.

    `itemsize` is the bytes of a number as computed; `past` counts a decoder's earlier tokens, whose K and V are kept.
    """

    config: PretrainedConfig
    plan: Plan
    rank: int
    batch_size: int
    seq_len: int
    tape: Tape
    itemsize: int = FLOAT_BYTES
    past: int = 0

    @property
    def ranks(self) -> int:
        return self.plan.num_devices

    @cached_property
    def chunks(self) -> list[list[int]]:
        """Tokens by chunk and device."""
        return self.plan.tokens(self.seq_len)

    def own(self, chunk: Sequence[int]) -> int:
        """This device's tokens of a chunk."""
        return chunk[self.rank]

    @property
    def own_width(self) -> int:
        """Columns of this device's heads, h*s."""
        return self.head_width(self.rank)

    @property
    def words(self) -> int:
        """Words of the vocabulary that this device looks at for a decoder's next token."""
        return self.plan.vocabulary(self.config.vocab_size)[self.rank]

    def head_width(self, rank: int) -> int:
        return self.plan.heads[rank] * (self.config.hidden_size // self.config.num_attention_heads)

    def share(self, strategy: str) -> float:
        """This device's part of a layer under `strategy`: of its sub-blocks, heads or tokens."""
        if strategy == "replicate":
            return 1.0
        if strategy == "block":
            return self.plan.sub_blocks[self.rank] / self.config.num_divisions
        if strategy in ("tensor", "galaxy"):
            return self.plan.heads[self.rank] / self.config.num_attention_heads
        return self.tokens_share / sum(self.plan.tokens_share)

    @property
    def tokens_share(self) -> float:
        return self.plan.tokens_share[self.rank]

    # Operations, of all sequences of the request -------------------------------------------------------------------

    def compute(self, strategy: str, *products: Compute, num_chunks: int | None = None) -> None:
        """Writes down products of a layer under `strategy`, whose tokens come in `num_chunks` (default: the plan's)."""
        how = dict(share=self.share(strategy), tokens=self.batch_size * self.seq_len)
        how["num_chunks"] = len(self.chunks) if num_chunks is None else num_chunks
        self.tape.steps += [replace(product, strategy=strategy, **how) for product in products]

    def product(self, num_tokens: int, num_in: int, num_out: int, copies: int = 1) -> Compute:
        """So many tokens of each sequence through a matrix, whose weights are read once; `copies` of both."""
        numbers = copies * num_in * num_out
        tokens = self.batch_size * num_tokens
        return Compute(2 * tokens * numbers, weight_bytes=FLOAT_BYTES * numbers if tokens else 0)

    def projections(self, num_queries: int, num_keys: int, width: int) -> tuple[Compute, Compute]:
        """Q of so many tokens, K and V of so many, `width` columns each."""
        hidden = self.config.hidden_size
        return self.product(num_queries, hidden, width), self.product(num_keys, hidden, 2 * width)

    def scores(self, num_queries: int, width: int, num_keys: int | None = None) -> Compute:
        """Attention of so many queries over `num_keys` tokens (default: all, masked ones too)."""
        keys = self.past + self.seq_len if num_keys is None else num_keys
        return Compute(self.batch_size * 4 * num_queries * keys * width)

    def out(self, num_tokens: int, width: int) -> Compute:
        """The attention's output projection, from `width` columns."""
        return self.product(num_tokens, width, self.config.hidden_size)

    def ffn(self, num_tokens: int, columns: int | None = None) -> Compute:
        columns = ffn_size(self.config) if columns is None else columns
        return self.product(num_tokens, self.config.hidden_size, columns, copies=2)

    # Messages ------------------------------------------------------------------------------------------------------

    def message(self, shape: Sequence[int], role: str | None) -> int:
        """Bytes of a tensor of `shape` in the format that the plan gives `role` (None: as computed)."""
        return message_bytes(shape, self.plan.wire if role else "float32", self.itemsize)

    def all_reduce(self, num_tokens: int, role: str | None) -> Arrival:
        """Of [batch_size, num_tokens, D]; compressed, it is a reduce_scatter of rows and an all_gather."""
        rows, width = self.batch_size * num_tokens, self.config.hidden_size
        if not role or self.plan.wire == "float32":
            num_bytes = rows * width * self.itemsize
            return self.tape.start("all_reduce", 2 * (self.ranks - 1) * num_bytes // self.ranks)
        shapes = [(size, width) for size in split(rows, [1.0] * self.ranks)]
        gather = ("all_gather", *self.gather_bytes(shapes, role))
        received = (self.ranks - 1) * self.message(shapes[self.rank], role)
        return replace(self.exchange("reduce_scatter", shapes, role, received), then=gather)

    def gather_bytes(self, shapes: Sequence[Sequence[int]], role: str | None) -> tuple[int, int]:
        """(sent, received) of one tensor a device, each one's to all others."""
        own = self.message(shapes[self.rank], role)
        return (self.ranks - 1) * own, sum(self.message(shape, role) for shape in shapes) - own

    def all_gather(self, shapes: Sequence[Sequence[int]], role: str | None) -> Arrival:
        return self.tape.start("all_gather", *self.gather_bytes(shapes, role))

    def exchange(self, kind: str, shapes: Sequence[Sequence[int]], role: str | None, received: int) -> Arrival:
        """`shapes[r]` goes to device r, and `received` bytes come from all of them."""
        num_bytes = sum(self.message(s, role) for r, s in enumerate(shapes) if r != self.rank)
        return self.tape.start(kind, num_bytes, received)

    def from_others(self, shape: Callable[[int], Sequence[int]], role: str | None) -> int:
        """Bytes of `shape(r)` from each other device r."""
        return sum(self.message(shape(rank), role) for rank in range(self.ranks) if rank != self.rank)

    def gather_tokens(self, chunk: Sequence[int]) -> Arrival:
        return self.all_gather([(t, self.batch_size, self.config.hidden_size) for t in chunk], "tokens")

    def scatter_sum(self, chunk: Sequence[int]) -> Arrival:
        """A reduce_scatter of partial sums by tokens."""
        shapes = [(self.batch_size, t, self.config.hidden_size) for t in chunk]
        return self.exchange("reduce_scatter", shapes, "sum", self.from_others(lambda _: shapes[self.rank], "sum"))

    def tokens_to_heads(self, chunk: Sequence[int]) -> Arrival:
        shapes = [(self.batch_size, self.own(chunk), 3, self.head_width(rank)) for rank in range(self.ranks)]
        received = self.from_others(lambda rank: (self.batch_size, chunk[rank], 3, self.own_width), "qkv")
        return self.exchange("all_to_all", shapes, "qkv", received)

    def heads_to_tokens(self, chunk: Sequence[int]) -> Arrival:
        received = self.from_others(lambda rank: (self.batch_size, self.own(chunk), self.head_width(rank)), "context")
        shapes = [(self.batch_size, t, self.own_width) for t in chunk]
        return self.exchange("all_to_all", shapes, "context", received)


# Rows: each follows its strategy's `__call__` step by step. `arriving` are X's chunks; a row gives out (None)
# when the strategy would give out a chunk.

Chunks = Iterable[Arrival]


def _replicate(z: Sizes, arriving: Chunks) -> Iterator[None]:
    width = z.config.hidden_size
    for arrival, chunk in zip(arriving, z.chunks, strict=True):
        arrival.wait()
        z.compute("replicate", *z.projections(sum(chunk), sum(chunk), width))
    for chunk in z.chunks:
        total = sum(chunk)
        z.compute("replicate", z.scores(total, width), z.out(total, width), z.ffn(total))
        yield


def _tensor(z: Sizes, arriving: Chunks) -> Iterator[None]:
    for arrival, chunk in zip(arriving, z.chunks, strict=True):
        arrival.wait()
        z.compute("tensor", *z.projections(sum(chunk), sum(chunk), z.own_width))
    yield from _tensor_rest(z, [sum(chunk) for chunk in z.chunks], "sum", "tensor")


def _tensor_rest(z: Sizes, tokens: Sequence[int], role: str | None, strategy: str) -> Iterator[None]:
    sums = []
    for total in tokens:
        z.compute(strategy, z.scores(total, z.own_width), z.out(total, z.own_width))
        sums.append(z.all_reduce(total, role))
    ffns = []
    for summed, total in zip(sums, tokens, strict=True):
        summed.wait()
        z.compute(strategy, z.ffn(total, z.plan.ffn_columns[z.rank]))
        ffns.append(z.all_reduce(total, role))
    for summed in ffns:
        summed.wait()
        yield


def _galaxy(z: Sizes, arriving: Chunks) -> Iterator[None]:
    for arrival in arriving:
        arrival.wait()
    for arrival, chunk in zip([z.gather_tokens(chunk) for chunk in z.chunks], z.chunks, strict=True):
        arrival.wait()
        z.compute("galaxy", *z.projections(sum(chunk), sum(chunk), z.own_width))
    sums = []
    for chunk in z.chunks:
        z.compute("galaxy", z.scores(sum(chunk), z.own_width), z.out(sum(chunk), z.own_width))
        sums.append(z.scatter_sum(chunk))
    for summed in sums:
        summed.wait()
    sums = []
    for arrival, chunk in zip([z.gather_tokens(chunk) for chunk in z.chunks], z.chunks, strict=True):
        arrival.wait()
        z.compute("galaxy", z.ffn(sum(chunk), z.plan.ffn_columns[z.rank]))
        sums.append(z.scatter_sum(chunk))
    for summed in sums:
        summed.wait()
        yield


def _sequence(z: Sizes, arriving: Chunks) -> Iterator[None]:
    width, gathers = z.config.hidden_size, []
    for arrival, chunk in zip(arriving, z.chunks, strict=True):
        arrival.wait()
        z.compute("sequence", *z.projections(z.own(chunk), z.own(chunk), width))
        gathers.append(z.all_gather([(2, t, z.batch_size, width) for t in chunk], "kv"))
    for gather in gathers:
        gather.wait()
    for chunk in z.chunks:
        own = z.own(chunk)
        z.compute("sequence", z.scores(own, width), z.out(own, width), z.ffn(own))
        yield


def _ulysses(z: Sizes, arriving: Chunks) -> Iterator[None]:
    exchanges = []
    for arrival, chunk in zip(arriving, z.chunks, strict=True):
        arrival.wait()
        z.compute("ulysses", *z.projections(z.own(chunk), z.own(chunk), z.config.hidden_size))
        exchanges.append(z.tokens_to_heads(chunk))
    for exchange in exchanges:
        exchange.wait()
    yield from _by_heads(z, "ulysses")


def _by_heads(z: Sizes, strategy: str) -> Iterator[None]:
    """Attention on own heads, an all_to_all, and the rest of the layer on own tokens."""
    exchanges = []
    for chunk in z.chunks:
        z.compute(strategy, z.scores(sum(chunk), z.own_width))
        exchanges.append(z.heads_to_tokens(chunk))
    for exchange, chunk in zip(exchanges, z.chunks, strict=True):
        exchange.wait()
        z.compute(strategy, z.out(z.own(chunk), z.config.hidden_size), z.ffn(z.own(chunk)))
        yield


def _heads(z: Sizes, arriving: Chunks) -> Iterator[None]:
    for arrival, chunk in zip(arriving, z.chunks, strict=True):
        arrival.wait()
        z.compute("heads", *z.projections(sum(chunk), sum(chunk), z.own_width))
    yield from _by_heads(z, "heads")


def _block(z: Sizes, arriving: Chunks) -> Iterator[None]:
    (width, attention), blocks = _slice_widths(z.config), z.plan.sub_blocks[z.rank]
    for arrival, chunk in zip(arriving, z.chunks, strict=True):
        arrival.wait()
        z.compute("block", z.product(sum(chunk), width, 3 * attention, blocks))
    for chunk in z.chunks:
        z.compute(
            "block",
            z.scores(sum(chunk), blocks * attention),
            z.product(sum(chunk), attention, width, blocks),
            z.product(sum(chunk), width, ffn_size(z.config), 2 * blocks),
        )
        yield


def _slice_widths(config: PretrainedConfig) -> tuple[int, int]:
    """(d, A) of a decoupled layer."""
    width = config.hidden_size // config.num_divisions
    return width, width if config.attention_width == "narrow" else config.hidden_size


def _qkv_parameters(config: PretrainedConfig, plan: Plan, rank: int, kind: str, kept: str) -> int:
    """Of Q, K and V of one layer of `kind`, of which device `rank` keeps its `own` part or `all`."""
    width = config.hidden_size
    if kind == "decoupled":
        slice_width, attention = _slice_widths(config)
        blocks = config.num_divisions if kept == "all" else plan.sub_blocks[rank]
        return blocks * 3 * attention * (slice_width + 1)
    own = width if kept == "all" else plan.heads[rank] * width // config.num_attention_heads
    return 3 * own * (width + 1)


def _rest_parameters(config: PretrainedConfig, plan: Plan, rank: int, kind: str, kept: str) -> int:
    """Of the layer's output projection, FFN and LayerNorms."""
    if kind == "decoupled" or kept == "all":
        rest = layer_parameters(config, kind) - _qkv_parameters(config, plan, rank, kind, "all")
        return rest if kept == "all" else rest * plan.sub_blocks[rank] // config.num_divisions
    width, columns = config.hidden_size, plan.ffn_columns[rank]
    own = plan.heads[rank] * width // config.num_attention_heads
    return width * own + width + 2 * width * columns + columns + width + 4 * width


def _parameters(strategy: str) -> Callable[[PretrainedConfig, Plan, int], int]:
    """Of one layer under `strategy`, on device `rank`."""
    signature = STRATEGIES[strategy]

    def count(config: PretrainedConfig, plan: Plan, rank: int) -> int:
        qkv = _qkv_parameters(config, plan, rank, signature.layer_kind, signature.qkv)
        return qkv + _rest_parameters(config, plan, rank, signature.layer_kind, signature.rest)

    return count


@dataclass(frozen=True)
class LayerCost:
    """A strategy's row: its steps for a request, and its parameters."""

    steps: Callable[[Sizes, Chunks], Iterator[None]]
    parameters: Callable[[PretrainedConfig, Plan, int], int]


LAYER_COSTS = {
    "block": LayerCost(_block, _parameters("block")),
    "tensor": LayerCost(_tensor, _parameters("tensor")),
    "sequence": LayerCost(_sequence, _parameters("sequence")),
    "ulysses": LayerCost(_ulysses, _parameters("ulysses")),
    "heads": LayerCost(_heads, _parameters("heads")),
    "galaxy": LayerCost(_galaxy, _parameters("galaxy")),
    "replicate": LayerCost(_replicate, _parameters("replicate")),
}


def reshard_steps(chunks: Iterator[None], source: str, target: str, z: Sizes) -> Chunks:
    """X's chunks in another layout, as `parallel.strategies.reshard` does it: sent as they come, or passed on."""
    if source == target or source == REPLICATE or z.ranks == 1:
        return (Arrival(z.tape) for _ in chunks)
    width = z.config.hidden_size // getattr(z.config, "num_divisions", 1)
    blocks = z.plan.sub_blocks

    def start(chunk: Sequence[int]) -> Arrival:
        if z.plan.direct and (source, target) == (HIDDEN, SEQ):
            received = z.from_others(lambda rank: (blocks[rank], z.batch_size, z.own(chunk), width), "hidden")
            shapes = [(blocks[z.rank], z.batch_size, t, width) for t in chunk]
            return z.exchange("all_to_all", shapes, "hidden", received)
        if z.plan.direct and (source, target) == (SEQ, HIDDEN):
            received = z.from_others(lambda rank: (blocks[z.rank], z.batch_size, chunk[rank], width), "tokens")
            shapes = [(b, z.batch_size, z.own(chunk), width) for b in blocks]
            return z.exchange("all_to_all", shapes, "tokens", received)
        if source == SEQ:
            return z.gather_tokens(chunk)
        return z.all_gather([(b, z.batch_size * sum(chunk), width) for b in blocks], "hidden")

    return [start(chunk) for _, chunk in zip(chunks, z.chunks, strict=True)]


def device_steps(
    config: PretrainedConfig,
    plan: Plan,
    rank: int,
    seq_len: int,
    batch_size: int = 1,
    itemsize: int = FLOAT_BYTES,
    past: int = 0,
) -> list[Step]:
    """What device `rank` does for one request, in order; the executor makes the same starts and waits in that order.

    A decoder's request ends with its next token; with `past` tokens kept, `seq_len` new ones follow them.
    """
    layers = range(len(plan.strategies))
    local = plan if plan.splits_layers else plan.on_one_device()
    tape = Tape(local.num_devices)
    z = Sizes(config, local, rank if plan.splits_layers else 0, batch_size, seq_len, tape, itemsize, past)

    def stage_message() -> int:
        return z.message((batch_size, seq_len, config.hidden_size), "stage")

    if plan.stages:
        layers = range(*bounds(plan.stages, rank))
        if rank > 0:
            tape.start("receive", stage_message()).wait()
    layout = REPLICATE
    chunks: Iterator[None] = iter([None] * len(z.chunks))
    for i in layers:
        signature, row = STRATEGIES[plan.strategies[i]], LAYER_COSTS[plan.strategies[i]]
        arriving = reshard_steps(chunks, layout, signature.in_layout, z)
        chunks, layout = row.steps(z, arriving), signature.out_layout
    for arrival in reshard_steps(chunks, layout, REPLICATE, z):
        arrival.wait()
    if plan.stages and rank < plan.num_devices - 1:
        tape.start("send", stage_message()).wait()
    else:
        end_steps(z)
    return tape.steps


def end_steps(z: Sizes) -> None:
    """What a model ends in: the next token, by parts of the vocabulary, or the pooler."""
    width = z.config.hidden_size
    if is_decoder(z.config):
        z.compute("replicate", z.product(1, width, z.words), num_chunks=1)
        z.all_gather([(z.batch_size, 2)] * z.ranks, None).wait()
    else:
        # That it reads its weights for one token is part of the latency that presets are calibrated on.
        z.compute("replicate", Compute(z.batch_size * 2 * width**2), num_chunks=1)


def segments(steps: list[Step]) -> tuple[list[list[Compute]], list[Start]]:
    """Cuts steps at each start and each wait: (n + 1 lists of compute around n of them, what is started)."""
    computes: list[list[Compute]] = [[]]
    for step in steps:
        if isinstance(step, Compute):
            computes[-1].append(step)
        else:
            computes.append([])
    return computes, [step for step in steps if isinstance(step, Start)]


def device_parameters(config: PretrainedConfig, plan: Plan, rank: int) -> int:
    """Parameters that device `rank` keeps: embeddings, its part of the layers, what the model ends in."""
    return held_parameters(config, [plan], plan.device_ids[rank])


def held_parameters(config: PretrainedConfig, plans: Sequence[Plan], device: int) -> int:
    """Parameters that the cluster's `device` keeps to run any of `plans`, which split layers alike; shared ones once.

    Of a map that one plan needs whole another takes a view, but its part of Q, K and V, which lie packed, is a copy.
    """
    plans = [plan for plan in plans if device in plan.device_ids]
    if not plans:
        return 0
    total = 0
    for layer, kind in enumerate(layer_kinds(config)):
        by_parts = {parts: plan for plan in plans if (parts := plan.keeps(layer, device))}
        if not by_parts:
            continue
        needed = {parts[0] for parts in by_parts}
        if kind == "decoupled" and "all" in needed:
            needed = {"all"}
        rest = "all" if any(parts[1] == "all" for parts in by_parts) else "own"
        plan = next(plan for parts, plan in by_parts.items() if rest in parts)
        total += _rest_parameters(config, plan, plan.device_ids.index(device), kind, rest)
        for qkv in needed:
            plan = next(plan for parts, plan in by_parts.items() if parts[0] == qkv)
            total += _qkv_parameters(config, plan, plan.device_ids.index(device), kind, qkv)
    first = any(not plan.stages or plan.device_ids[0] == device for plan in plans)
    last = any(not plan.stages or plan.device_ids[-1] == device for plan in plans)
    return total + first * embedding_parameters(config) + last * pooler_parameters(config)


def held_bytes(config: PretrainedConfig, plans: Sequence[Plan], device: int) -> int:
    """Bytes of `held_parameters`."""
    return FLOAT_BYTES * held_parameters(config, plans, device)


def activation_bytes(config: PretrainedConfig, seq_len: int, batch_size: int) -> int:
    """Upper bound on what one layer keeps alive at once: X twice, Q, K, V, context, scores, the FFN's inner state."""
    blocks = getattr(config, "num_divisions", 1)
    per_token = 6 * config.hidden_size * blocks + config.num_attention_heads * seq_len * blocks
    return FLOAT_BYTES * batch_size * seq_len * (per_token + ffn_size(config) * blocks)


def cache_bytes(config: PretrainedConfig, plan: Plan, rank: int, num_tokens: int, batch_size: int = 1) -> int:
    """What device `rank` keeps of a decoder's K and V of `num_tokens` tokens; 0 for an encoder.

    A decoupled layer of full attention width has Ndiv times an original one's keys and values.
    """
    if not is_decoder(config):
        return 0
    per_token = 0
    for layer, kind in enumerate(layer_kinds(config)):
        signature = STRATEGIES[plan.strategies[layer]]
        whole = signature.cache == "all" or not plan.splits_layers
        if plan.stages and layer not in range(*bounds(plan.stages, rank)):
            continue
        if kind == "decoupled":
            blocks = config.num_divisions if whole else plan.sub_blocks[rank]
            per_token += 2 * blocks * _slice_widths(config)[1]
        else:
            heads = config.num_attention_heads if whole else plan.heads[rank]
            per_token += 2 * heads * config.hidden_size // config.num_attention_heads
    return FLOAT_BYTES * batch_size * num_tokens * per_token


@dataclass(frozen=True)
class Prediction:
    """What the cost model says of one request; seconds and bytes, per-device figures in rank order."""

    latency_s: float
    compute_s: float
    comm_s: float
    counts: dict[str, int]
    bytes: dict[str, int]
    weights_bytes: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    activation_bytes: int


def predict(
    config: PretrainedConfig,
    plan: Plan,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    past: int = 0,
) -> Prediction:
    """Latency and memory of one request under `plan` on the devices of `profile`; of a decoder, to its next token.

    Model parallel: when the last device is done; `compute_s` is the busiest one's, `comm_s` what it could not hide.
    Pipeline: the sum of all stages and messages (one request cannot overlap itself). Data parallel: one device's time.
    """
    needed = max(plan.device_ids) + 1
    if needed > len(profile.devices):
        raise ValueError(f"the plan needs {needed} devices and the profile has {len(profile.devices)}.")
    devices = [profile.devices[i] for i in plan.device_ids]
    steps = [device_steps(config, plan, rank, seq_len, batch_size, past=past) for rank in range(plan.num_devices)]
    rates = [
        [compute_seconds(s, device) if isinstance(s, Compute) else 0.0 for s in own]
        for device, own in zip(devices, steps, strict=True)
    ]
    if plan.stages:
        starts = [s for own in steps for s in own if isinstance(s, Start) and s.kind == "send"]
        compute_s = sum(sum(own) for own in rates)
        latency_s = compute_s + sum(stage_seconds(starts, plan, profile.link))
    else:
        starts = _busiest(steps)
        compute_s = max(sum(own) for own in rates)
        latency_s = makespan(steps, rates, collective_seconds(steps, plan, profile.link))
    sent: Counter[str] = Counter()
    for start in starts:
        sent[start.kind] += start.num_bytes
    weights = tuple(FLOAT_BYTES * device_parameters(config, plan, rank) for rank in range(plan.num_devices))
    activations = activation_bytes(config, seq_len, batch_size)
    return Prediction(
        latency_s=latency_s,
        compute_s=compute_s,
        comm_s=latency_s - compute_s,
        counts=dict(Counter(start.kind for start in starts)),
        bytes=dict(sent),
        weights_bytes=weights,
        memory_bytes=tuple(
            w + activations + cache_bytes(config, plan, rank, past + seq_len, batch_size)
            for rank, w in enumerate(weights)
        ),
        activation_bytes=activations,
    )


def compute_seconds(step: Compute, device: DeviceProfile) -> float:
    """How long `device` computes."""
    return device.compute_s(step.flops, step.strategy, step.weight_bytes, step.share, step.tokens, step.num_chunks)


def collective_seconds(steps: Sequence[Sequence[Step]], plan: Plan, link: LinkProfile) -> list[float]:
    """How long each collective of all ranks' `steps` has the links: until the one that is busiest for its rate is done.

    A device is busy with what it sends, or with what it receives where its link is slower than others'.
    """
    started = [[step for step in own if isinstance(step, Start)] for own in steps]
    if not link.shares:
        return [link.collective_s(s.kind, s.num_bytes, plan.num_devices) for s in _busiest(steps)]
    shares = [link.share(i) for i in plan.device_ids]
    seconds = []
    for same in zip(*started, strict=True):
        num_bytes = max(
            max(start.num_bytes, start.received_bytes) / share for start, share in zip(same, shares, strict=True)
        )
        seconds.append(link.collective_s(same[0].kind, num_bytes, plan.num_devices))
    return seconds


def stage_seconds(messages: Sequence[Start], plan: Plan, link: LinkProfile) -> list[float]:
    """How long each message between a pipeline's stages is under way, on its narrowest link."""
    narrowest = min(link.share(device) for device in plan.device_ids)
    return [link.collective_s(m.kind, m.num_bytes / narrowest, plan.num_devices) for m in messages]


def launched_seconds(
    config: PretrainedConfig,
    plan: Plan,
    rank: int,
    link: LinkProfile,
    seq_len: int,
    batch_size: int = 1,
    past: int = 0,
) -> list[float]:
    """How long each collective has the links that `rank` launches in one request, in its order.

    What `predict` prices, for those who pace a modelled link: every rank has the same seconds for the same collective.
    """
    ranks = [rank] if plan.stages else range(plan.num_devices)
    steps = [device_steps(config, plan, rank, seq_len, batch_size, past=past) for rank in ranks]
    if plan.stages:
        return stage_seconds([step for step in steps[0] if isinstance(step, Start)], plan, link)
    return collective_seconds(steps, plan, link)


def _busiest(steps: Sequence[Sequence[Step]]) -> list[Start]:
    """Each collective as the rank that sends most of it sees it: it ends when that one has sent."""
    started = [[step for step in own if isinstance(step, Start)] for own in steps]
    return [max(same, key=lambda start: start.num_bytes) for same in zip(*started, strict=True)]


def makespan(steps: Sequence[Sequence[Step]], compute_s: Sequence[Sequence[float]], link_s: Sequence[float]) -> float:
    """When the last device is done. All ranks have their starts and waits at the same places.

    A collective begins when the last rank has started it and the one before has left the link.
    """
    now = [0.0] * len(steps)
    done_at: list[float] = []
    for i, step in enumerate(steps[0]):
        if isinstance(step, Compute):
            now = [t + seconds[i] for t, seconds in zip(now, compute_s, strict=True)]
        elif isinstance(step, Start):
            begins = max(*now, done_at[-1]) if done_at else max(now)
            done_at.append(begins + link_s[len(done_at)])
        else:
            now = [max(t, done_at[step.number]) for t in now]
    return max(now)
