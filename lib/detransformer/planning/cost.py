"""Cost model: what a plan computes, sends and keeps on each device, and how long that takes (Section III-C).

`device_steps` lists a device's compute segments and collectives in the order in which the executor runs them; the
latency is their sum, each segment at its slowest device's pace. One row of `LAYER_COSTS` a strategy. No torch.

Shapes as in `parallel.strategies`: B, T, D, H, s, I, P, d, A; t, h, p are the device's own.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from transformers import BertConfig

from detransformer.models.sizes import embedding_parameters, layer_parameters, pooler_parameters
from detransformer.parallel.partition import bounds
from detransformer.parallel.plan import HIDDEN, REPLICATE, SEQ, STRATEGIES, Plan
from detransformer.planning.profile import ClusterProfile

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Compute:
    """Local work between two collectives."""

    flops: float
    strategy: str


@dataclass(frozen=True)
class Collective:
    """One call; `num_bytes` are those this rank sends, counted as `parallel.comm` counts them."""

    kind: str
    num_bytes: int


Step = Compute | Collective


@dataclass(frozen=True)
class Sizes:
    """A request on one device: the numbers that the rows below need."""

    config: BertConfig
    plan: Plan
    rank: int
    batch_size: int
    seq_len: int

    @property
    def ranks(self) -> int:
        return self.plan.num_devices

    def all_reduce(self) -> Collective:
        """Of X [B, T, D]."""
        num_bytes = FLOAT_BYTES * self.batch_size * self.seq_len * self.config.hidden_size
        return Collective("all_reduce", 2 * (self.ranks - 1) * num_bytes // self.ranks)

    def all_gather(self, sizes: list[int] | tuple[int, ...], unit: int) -> Collective:
        """Of parts of `sizes` rows with `unit` numbers a row; padded to the longest part."""
        return Collective("all_gather", FLOAT_BYTES * (self.ranks - 1) * max(sizes) * unit)

    def gather_tokens(self) -> Collective:
        return self.all_gather(self.plan.tokens(self.seq_len), self.batch_size * self.config.hidden_size)


def _replicate_steps(z: Sizes) -> list[Step]:
    width, inner = z.config.hidden_size, z.config.intermediate_size
    per_token = 8 * width * width + 4 * z.seq_len * width + 4 * width * inner
    return [Compute(z.batch_size * z.seq_len * per_token, "replicate")]


def _tensor_steps(z: Sizes) -> list[Step]:
    width, rows = z.config.hidden_size, z.batch_size * z.seq_len
    own = z.plan.heads[z.rank] * width // z.config.num_attention_heads  # h*s
    attention = rows * (8 * width * own + 4 * z.seq_len * own)
    ffn = rows * 4 * width * z.plan.ffn_columns[z.rank]
    return [Compute(attention, "tensor"), z.all_reduce(), Compute(ffn, "tensor"), z.all_reduce()]


def _sequence_steps(z: Sizes) -> list[Step]:
    width, inner = z.config.hidden_size, z.config.intermediate_size
    rows = z.batch_size * z.plan.tokens(z.seq_len)[z.rank]
    rest = rows * (2 * width * width + 4 * z.seq_len * width + 4 * width * inner)
    gathers = [z.gather_tokens(), z.gather_tokens()]
    return [Compute(rows * 6 * width * width, "sequence"), *gathers, Compute(rest, "sequence")]


def _block_steps(z: Sizes) -> list[Step]:
    width, attention = _slice_widths(z.config)
    per_token = 8 * width * attention + 4 * z.seq_len * attention + 4 * width * z.config.intermediate_size
    return [Compute(z.plan.sub_blocks[z.rank] * z.batch_size * z.seq_len * per_token, "block")]


def _slice_widths(config: BertConfig) -> tuple[int, int]:
    """(d, A) of a decoupled layer."""
    width = config.hidden_size // config.num_divisions
    return width, width if config.attention_width == "narrow" else config.hidden_size


def _whole_parameters(config: BertConfig, plan: Plan, rank: int) -> int:
    return layer_parameters(config, "original")


def _tensor_parameters(config: BertConfig, plan: Plan, rank: int) -> int:
    width, columns = config.hidden_size, plan.ffn_columns[rank]
    own = plan.heads[rank] * width // config.num_attention_heads
    return 4 * width * own + 3 * own + width + 2 * width * columns + columns + width + 4 * width


def _block_parameters(config: BertConfig, plan: Plan, rank: int) -> int:
    return layer_parameters(config, "decoupled") * plan.sub_blocks[rank] // config.num_divisions


@dataclass(frozen=True)
class LayerCost:
    """A strategy's row: its steps for a request, and the parameters a device keeps of one layer."""

    steps: Callable[[Sizes], list[Step]]
    parameters: Callable[[BertConfig, Plan, int], int]


LAYER_COSTS = {
    "block": LayerCost(_block_steps, _block_parameters),
    "tensor": LayerCost(_tensor_steps, _tensor_parameters),
    "sequence": LayerCost(_sequence_steps, _whole_parameters),
    "replicate": LayerCost(_replicate_steps, _whole_parameters),
}


def reshard_steps(source: str, target: str, z: Sizes) -> list[Step]:
    """Collectives that move X between two layouts; a slice of a replicated X costs nothing."""
    if source == target or source == REPLICATE:
        return []
    if source == SEQ:
        return [z.gather_tokens()]
    assert source == HIDDEN
    width = z.config.hidden_size // z.config.num_divisions
    return [z.all_gather(z.plan.sub_blocks, z.batch_size * z.seq_len * width)]


def device_steps(config: BertConfig, plan: Plan, rank: int, seq_len: int, batch_size: int = 1) -> list[Step]:
    """What device `rank` does for one request, in order: never two `Compute` in a row, `Compute` first and last."""
    layers = range(len(plan.strategies))
    local = plan if plan.splits_layers else plan.on_one_device()
    z = Sizes(config, local, rank if plan.splits_layers else 0, batch_size, seq_len)
    message_bytes = FLOAT_BYTES * batch_size * seq_len * config.hidden_size
    steps: list[Step] = []
    if plan.stages:
        layers = range(*bounds(plan.stages, rank))
        steps += [Collective("receive", message_bytes)] if rank > 0 else []
    layout = REPLICATE
    for i in layers:
        signature = STRATEGIES[plan.strategies[i]]
        steps += reshard_steps(layout, signature.in_layout, z)
        steps += LAYER_COSTS[plan.strategies[i]].steps(z)
        layout = signature.out_layout
    steps += reshard_steps(layout, REPLICATE, z)
    if plan.stages and rank < plan.num_devices - 1:
        steps.append(Collective("send", message_bytes))
    else:
        steps.append(Compute(batch_size * 2 * config.hidden_size**2, "replicate"))  # pooler
    if z.ranks == 1:
        steps = [s for s in steps if isinstance(s, Compute) or s.kind in ("send", "receive")]
    return steps


def segments(steps: list[Step]) -> tuple[list[list[Compute]], list[Collective]]:
    """Splits steps at the collectives: n collectives lie between n + 1 lists of compute."""
    computes: list[list[Compute]] = [[]]
    collectives = []
    for step in steps:
        if isinstance(step, Compute):
            computes[-1].append(step)
        else:
            collectives.append(step)
            computes.append([])
    return computes, collectives


def device_parameters(config: BertConfig, plan: Plan, rank: int) -> int:
    """Parameters that device `rank` keeps: embeddings, its part of the layers, pooler."""
    layers = range(len(plan.strategies))
    local, local_rank = (plan, rank) if plan.splits_layers else (plan.on_one_device(), 0)
    total = embedding_parameters(config) + pooler_parameters(config)
    if plan.stages:
        layers = range(*bounds(plan.stages, rank))
        total = embedding_parameters(config) if rank == 0 else 0
        total += pooler_parameters(config) if rank == plan.num_devices - 1 else 0
    return total + sum(LAYER_COSTS[plan.strategies[i]].parameters(config, local, local_rank) for i in layers)


def activation_bytes(config: BertConfig, seq_len: int, batch_size: int) -> int:
    """Upper bound on what one layer keeps alive at once: X twice, Q, K, V, context, scores, the FFN's inner state."""
    blocks = getattr(config, "num_divisions", 1)
    per_token = 6 * config.hidden_size * blocks + config.num_attention_heads * seq_len * blocks
    return FLOAT_BYTES * batch_size * seq_len * (per_token + config.intermediate_size * blocks)


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


def predict(
    config: BertConfig, plan: Plan, profile: ClusterProfile, seq_len: int = 128, batch_size: int = 1
) -> Prediction:
    """Latency and memory of one request under `plan` on the devices of `profile`.

    Model parallel: the sum over segments of the slowest device's compute, plus the collectives. Pipeline: the sum of
    all stages and messages (one request cannot overlap itself). Data parallel: one device's time.
    """
    if plan.num_devices > len(profile.devices):
        raise ValueError(f"the plan needs {plan.num_devices} devices and the profile has {len(profile.devices)}.")
    ranks = range(plan.num_devices)
    per_rank = [segments(device_steps(config, plan, r, seq_len, batch_size)) for r in ranks]
    seconds = [
        [sum(profile.devices[r].compute_s(c.flops, c.strategy) for c in part) for part in per_rank[r][0]] for r in ranks
    ]
    if plan.stages:
        compute_s = sum(sum(parts) for parts in seconds)
        collectives = [c for r in ranks for c in per_rank[r][1] if c.kind == "send"]
    else:
        compute_s = sum(max(parts) for parts in zip(*seconds, strict=True))
        collectives = per_rank[0][1]
    comm_s = sum(profile.link.collective_s(c.kind, c.num_bytes, plan.num_devices) for c in collectives)
    sent: Counter[str] = Counter()
    for c in collectives:
        sent[c.kind] += c.num_bytes
    weights = tuple(FLOAT_BYTES * device_parameters(config, plan, r) for r in ranks)
    activations = activation_bytes(config, seq_len, batch_size)
    return Prediction(
        latency_s=compute_s + comm_s,
        compute_s=compute_s,
        comm_s=comm_s,
        counts=dict(Counter(c.kind for c in collectives)),
        bytes=dict(sent),
        weights_bytes=weights,
        memory_bytes=tuple(w + activations for w in weights),
    )
