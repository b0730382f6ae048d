"""The strategies: how the devices run one layer together. One class each; layouts in `plan.STRATEGIES`.

A strategy loads its device's weights once and maps X from its in-layout to its out-layout. X comes in chunks of tokens,
so that one chunk travels while another is computed; with one chunk all runs in turn. A layer takes each chunk when it
has arrived, needs all of them for its attention, and gives out its own chunks one after another. Where it communicates
it calls `comm`; everything else is local.

BERT's LayerNorms stand after the residuals, GPT-2's before attention and FFN; GPT-2 attends to what came before only,
and keeps K and V of it (`KeyValueCache`).

Shapes: B batch, T tokens (of a chunk, where one chunk is meant), t this device's tokens, D hidden, H heads, h this
device's heads, s head size, I the intermediate size, P sub-blocks, p this device's sub-blocks, d = D/P, A attention
width of a sub-block.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from detransformer.models.decoupled_bert import merge_hidden, split_hidden
from detransformer.parallel.comm import Comm, Pending, joined
from detransformer.parallel.parameters import LayerParameters
from detransformer.parallel.partition import bounds
from detransformer.parallel.plan import HIDDEN, REPLICATE, SEQ, Plan
from detransformer.parallel.weights import WeightSource


@dataclass(frozen=True)
class Chunk:
    """Tokens start..stop of a request, and how many of them each device takes under shard(seq)."""

    index: int
    start: int
    stop: int
    tokens: Sequence[int]

    def of(self, rank: int) -> tuple[int, int]:
        """Where device `rank`'s tokens stand in the chunk."""
        return bounds(self.tokens, rank)


class KeyValueCache:
    """Keys and values of a decoder's earlier tokens, this device's part: each layer's K and V, [rows, capacity, A]."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_tokens = 0  # that all layers hold
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def join(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps k and v [rows, T, A] of the tokens after `num_tokens`; returns those of all, [rows, T_all, A]."""
        rows, new, width = k.shape
        if layer not in self._layers:
            self._layers[layer] = k.new_zeros(rows, self.capacity, width), v.new_zeros(rows, self.capacity, width)
        stop = self.num_tokens + new
        for kept, part in zip(self._layers[layer], (k, v), strict=True):
            kept[:, self.num_tokens : stop] = part
        return tuple(kept[:, :stop] for kept in self._layers[layer])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)


@dataclass(frozen=True)
class Request:
    """What a layer needs to know of the request besides X."""

    batch_size: int
    chunks: Sequence[Chunk]
    mask: torch.Tensor | None  # bool [B or 1, 1, 1 or T, T_all]: whether (each token's) query may attend to a key
    cache: KeyValueCache | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        batch_size: int,
        seq_len: int,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> "Request":
        chunks, start = [], 0
        for i, tokens in enumerate(plan.tokens(seq_len)):
            chunks.append(Chunk(i, start, start + sum(tokens), tokens))
            start += sum(tokens)
        return cls(batch_size, chunks, mask, cache)

    def mask_of(self, start: int, stop: int) -> torch.Tensor | None:
        """The mask of the queries of tokens start..stop."""
        return self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, start:stop]


class Strategy:
    """One layer on one device. Subclasses load weights in `load` and compute in `__call__`.

    `keeps_whole` and `packs` as in `LayerParameters`. `chunks` are X's, in the in-layout, each a `Pending`.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        comm: Comm,
        weights: WeightSource,
        layer: int,
        keeps_whole: bool = False,
        packs: bool = True,
    ):
        self.config = config
        self.plan = plan
        self.comm = comm
        self.layer = layer
        self.head_size = config.hidden_size // config.num_attention_heads
        parameters = LayerParameters(config, weights, layer, keeps_whole, packs)
        naming = parameters.naming
        self.pre_norm, self.eps = naming.pre_norm, getattr(config, naming.eps)
        self.activation = ACT2FN[getattr(config, naming.activation)]
        self.load(parameters)  # a device keeps its own part, not the source

    def load(self, parameters: LayerParameters) -> None:
        raise NotImplementedError

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        """Gives out X's chunks in the out-layout."""
        raise NotImplementedError

    @property
    def own_heads(self) -> tuple[int, int]:
        """Columns start..stop of Q, K and V that belong to this device's heads."""
        start, stop = bounds(self.plan.heads, self.comm.rank)
        return start * self.head_size, stop * self.head_size

    def load_attention(self, parameters: LayerParameters, own_heads: bool) -> None:
        """Q, K and V packed in one product, D -> 3A, of this device's heads or all."""
        self.to_qkv = parameters.qkv(self.own_heads if own_heads else None)

    def load_rest(self, parameters: LayerParameters, own_columns: bool = False) -> None:
        """Output projection, FFN and LayerNorms: whole, or of own heads' inputs and own inner columns of the FFN."""
        columns = bounds(self.plan.ffn_columns, self.comm.rank) if own_columns else None
        self.ffn_in = parameters.linear("ffn_in", outputs=columns)
        self.ffn_out = parameters.linear("ffn_out", inputs=columns)
        self.out = parameters.linear("out", inputs=self.own_heads if own_columns else None)
        if own_columns:  # added once to the sum over devices
            self.ffn_bias, self.out_bias = parameters.bias("ffn_out"), parameters.bias("out")
        self.load_norms(parameters)

    def load_norms(self, parameters: LayerParameters, part: tuple[int, int] | None = None) -> None:
        self.attention_norm = parameters.norm("attention_norm", part)
        self.ffn_norm = parameters.norm("ffn_norm", part)

    def norm(self, x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, eps=self.eps)

    def before(self, x: torch.Tensor, norm: list[torch.Tensor]) -> torch.Tensor:
        """What attention or FFN reads of X."""
        return self.norm(x, norm) if self.pre_norm else x

    def add(self, y: torch.Tensor, x: torch.Tensor, norm: list[torch.Tensor]) -> torch.Tensor:
        """The residual x and y, which attention or FFN has made of it; y is written over."""
        return y.add_(x) if self.pre_norm else self.norm(y.add_(x), norm)

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN of x's tokens, or a partial sum of it, where this device has some of its inner columns."""
        return self.ffn_out(self.activation(self.ffn_in(self.before(x, self.ffn_norm))))

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, 3, A]."""
        return self.to_qkv(self.before(x, self.attention_norm)).unflatten(-1, (3, -1))

    def projected(self, chunks: Iterable[Pending]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """X's chunks, and Q, K, V of each, which is computed as soon as that chunk has arrived."""
        xs, qkv = [], []
        for x in arrived(chunks):
            xs.append(x)
            qkv.append(self.qkv(x))
        return xs, qkv

    def after_attention(self, context: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Projection, FFN, residuals and LayerNorms of x's tokens, with all weights: [B, t, D] -> [B, t, D]."""
        x = self.add(self.out(context), x, self.attention_norm)
        return self.add(self.ffn(x), x, self.ffn_norm)

    def attended(self, qkv: Sequence[torch.Tensor], request: Request, copies: int = 1) -> Iterator[torch.Tensor]:
        """Attention of each chunk's q over all k and v: chunks [B, T, 3, A] -> [B, T, A] one after another.

        With `copies` c the rows are c times the request's sequences.
        """
        k, v = together([part[:, :, 1] for part in qkv]), together([part[:, :, 2] for part in qkv])
        k, v = self.remember(k, v, request)
        for part, chunk in zip(qkv, request.chunks, strict=True):
            mask = request.mask_of(chunk.start, chunk.stop)
            if mask is not None and len(mask) > 1:  # one of all sequences is that of all copies
                mask = mask.repeat(copies, 1, 1, 1)
            yield attend(part[:, :, 0], k, v, self.head_size, mask)

    def remember(self, k: torch.Tensor, v: torch.Tensor, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [rows, T, A] of the request's tokens, after those of earlier ones where they are kept."""
        return request.cache.join(self.layer, k, v) if request.cache else (k, v)

    def own_tokens(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        start, stop = chunk.of(self.comm.rank)
        return x[:, start:stop]

    def tokens_to_heads(self, qkv: torch.Tensor, chunk: Chunk) -> Pending:
        """Own tokens, all heads -> all tokens, own heads, by one all_to_all: [B, t, 3, D] -> [B, T, 3, h*s]."""
        parts = qkv.split([heads * self.head_size for heads in self.plan.heads], dim=-1)
        shapes = [(len(qkv), tokens, 3, parts[self.comm.rank].shape[-1]) for tokens in chunk.tokens]
        return self.comm.start_all_to_all(parts, shapes, self.plan.wire, f"qkv{chunk.index}").then(together)

    def heads_to_tokens(self, context: torch.Tensor, chunk: Chunk) -> Pending:
        """All tokens, own heads -> own tokens, all heads, by one all_to_all: [B, T, h*s] -> [B, t, D]."""
        parts = context.split(list(chunk.tokens), dim=1)
        shapes = [(*parts[self.comm.rank].shape[:2], heads * self.head_size) for heads in self.plan.heads]
        pending = self.comm.start_all_to_all(parts, shapes, self.plan.wire, f"context{chunk.index}")
        return pending.then(lambda parts: together(parts, dim=-1))


def together(parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """`torch.cat` along the tokens, or `dim`; without a copy where there is one part."""
    return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0]


def arrived(chunks: Iterable[Pending]) -> Iterator[torch.Tensor]:
    """The chunks of X, each waited for when it is asked for."""
    return (chunk.wait() for chunk in chunks)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_size: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Scaled dot-product attention: q [B, t, A], k and v [B, T, A] -> [B, t, A]."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, head_size)).transpose(1, 2)  # [B, H, T, s]

    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask).transpose(1, 2).flatten(2)


class Replicate(Strategy):
    """Every device runs the whole layer (Plan 3, Section III-C): no communication, all weights. X [B, T, D]."""

    def load(self, parameters: LayerParameters) -> None:
        self.load_attention(parameters, own_heads=False)
        self.load_rest(parameters)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv = self.projected(chunks)
        for context, x in zip(self.attended(qkv, request), xs, strict=True):
            yield self.after_attention(context, x)


class SequenceParallel(Replicate):
    """Sequence parallelism (SP): own tokens x all weights, K and V of all tokens by one all_gather. X [B, t, D]."""

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, queries, gathers = [], [], []
        for x, chunk in zip(arrived(chunks), request.chunks, strict=True):
            xs.append(x)
            q, kv = self.qkv(x).split((1, 2), dim=2)
            queries.append(q[:, :, 0])
            shapes = [(2, tokens, len(x), kv.shape[-1]) for tokens in chunk.tokens]
            gathers.append(
                self.comm.start_all_gather(kv.permute(2, 1, 0, 3), shapes, self.plan.wire, f"kv{chunk.index}")
            )
        k, v = together([part for gather in gathers for part in gather.wait()]).transpose(1, 2)  # [B, T, D] each
        k, v = self.remember(k, v, request)
        for q, x, chunk in zip(queries, xs, request.chunks, strict=True):
            start, stop = chunk.of(self.comm.rank)
            mask = request.mask_of(chunk.start + start, chunk.start + stop)
            yield self.after_attention(attend(q, k, v, self.head_size, mask), x)


class Ulysses(SequenceParallel):
    """Ulysses: own tokens x all weights, attention on own heads between two all_to_alls. X [B, t, D].

    Half of SP's bytes on four devices; all weights everywhere (Jacobs et al., DeepSpeed-Ulysses, 2023).
    """

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, exchanges = [], []
        for x, chunk in zip(arrived(chunks), request.chunks, strict=True):
            xs.append(x)
            exchanges.append(self.tokens_to_heads(self.qkv(x), chunk))
        contexts = self.attended([exchange.wait() for exchange in exchanges], request)  # [B, T, h*s]
        exchanges = [self.heads_to_tokens(c, chunk) for c, chunk in zip(contexts, request.chunks, strict=True)]
        for exchange, x in zip(exchanges, xs, strict=True):
            yield self.after_attention(exchange.wait(), x)


class Heads(Strategy):
    """Attention by heads, the rest by tokens: 1/P of Q, K, V's weights, one all_to_all. X [B, T, D] -> [B, t, D]."""

    def load(self, parameters: LayerParameters) -> None:
        self.load_attention(parameters, own_heads=True)
        self.load_rest(parameters)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv = [], []
        for x, chunk in zip(arrived(chunks), request.chunks, strict=True):
            xs.append(self.own_tokens(x, chunk))
            qkv.append(self.qkv(x))
        contexts = self.attended(qkv, request)  # [B, T, h*s]
        exchanges = [self.heads_to_tokens(c, chunk) for c, chunk in zip(contexts, request.chunks, strict=True)]
        for exchange, x in zip(exchanges, xs, strict=True):
            yield self.after_attention(exchange.wait(), x)


class TensorParallel(Strategy):
    """Tensor parallelism (Megatron's TP): own heads and FFN columns, two all_reduces. X [B, T, D]."""

    def load(self, parameters: LayerParameters) -> None:
        self.load_attention(parameters, own_heads=True)
        self.load_rest(parameters, own_columns=True)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv = self.projected(chunks)
        yield from self.rest(self.attended(qkv, request), xs)  # of contexts [B, T, h*s]

    def rest(self, contexts: Iterable[torch.Tensor], xs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Partial sums of the projection and of the FFN, each added up over the devices."""
        wire = self.plan.wire
        sums = [self.comm.start_all_reduce(self.out(context), wire, f"sum{i}") for i, context in enumerate(contexts)]
        ffns = []
        for i, (summed, x) in enumerate(zip(sums, xs, strict=True)):
            x = self.add(summed.wait().add_(self.out_bias), x, self.attention_norm)
            ffns.append((self.comm.start_all_reduce(self.ffn(x), wire, f"sum{i}"), x))
        for summed, x in ffns:
            yield self.add(summed.wait().add_(self.ffn_bias), x, self.ffn_norm)


class Galaxy(TensorParallel):
    """Galaxy's hybrid: TP in attention and FFN, residuals and LayerNorms by tokens. X [B, t, D].

    Each all_reduce of TP is cut in a reduce_scatter and an all_gather, between which a device has only its tokens
    (Ye et al., Galaxy, INFOCOM 2024); in chunks, these overlap with the products before and after, as in the paper.
    """

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs = list(arrived(chunks))
        qkv = [self.qkv(x) for x in arrived(self.gather(xs, request))]
        partials = (self.out(context) for context in self.attended(qkv, request))
        sums = [self.scatter(partial, chunk) for partial, chunk in zip(partials, request.chunks, strict=True)]
        xs = [
            self.add(summed.wait().add_(self.out_bias), x, self.attention_norm)
            for summed, x in zip(sums, xs, strict=True)
        ]
        sums = []
        for x, chunk in zip(arrived(self.gather(xs, request)), request.chunks, strict=True):
            sums.append(self.scatter(self.ffn(x), chunk))
        for summed, x in zip(sums, xs, strict=True):
            yield self.add(summed.wait().add_(self.ffn_bias), x, self.ffn_norm)

    def gather(self, xs: Sequence[torch.Tensor], request: Request) -> list[Pending]:
        wire = self.plan.wire
        return [gather_tokens(x, self.comm, chunk, wire) for x, chunk in zip(xs, request.chunks, strict=True)]

    def scatter(self, partial: torch.Tensor, chunk: Chunk) -> Pending:
        parts = partial.split(list(chunk.tokens), dim=1)
        return self.comm.start_reduce_scatter(parts, self.plan.wire, f"sum{chunk.index}")


class BlockParallel(Strategy):
    """Block parallelism (BP): own sub-blocks of a decoupled layer (Eq. 2), no communication. X [p, B*T, d]."""

    def load(self, parameters: LayerParameters) -> None:
        part = bounds(self.plan.sub_blocks, self.comm.rank)
        self.to_qkv, self.out, self.ffn_in, self.ffn_out = (
            parameters.blocks(role, part) for role in ("qkv", "out", "ffn_in", "ffn_out")
        )  # d -> 3A, A -> d, d -> I, I -> d
        self.load_norms(parameters, part)
        self.head_size = self.out.weight.shape[1] // self.config.num_attention_heads  # narrow ones are smaller

    def norm(self, x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        weight, bias = parameters
        if len(weight) == 1:
            return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], eps=self.eps)
        return torch.addcmul(bias.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=self.eps), weight.unsqueeze(1))

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv = [], []
        for x in arrived(chunks):
            xs.append(x)
            if len(x):  # with more devices than sub-blocks, some have none and nothing to do
                projected = self.to_qkv(self.before(x, self.attention_norm))  # [p, B*T, 3A]
                qkv.append(projected.view(len(x) * request.batch_size, -1, 3, projected.shape[-1] // 3))
        if not qkv:
            yield from xs
            return
        for context, x in zip(self.attended(qkv, request, copies=len(xs[0])), xs, strict=True):  # [p*B, T, A]
            yield self.after_attention(context.reshape(*x.shape[:2], -1), x)


STRATEGY_CLASSES = {
    "block": BlockParallel,
    "tensor": TensorParallel,
    "sequence": SequenceParallel,
    "ulysses": Ulysses,
    "heads": Heads,
    "galaxy": Galaxy,
    "replicate": Replicate,
}


def gather_tokens(x: torch.Tensor, comm: Comm, chunk: Chunk, wire: str) -> Pending:
    """Shard(seq) -> Replicate: [B, t, D] -> [B, T, D] by one all_gather."""
    shapes = [(tokens, len(x), x.shape[-1]) for tokens in chunk.tokens]
    pending = comm.start_all_gather(x.transpose(0, 1), shapes, wire, f"tokens{chunk.index}")
    return pending.then(lambda parts: joined(parts).transpose(0, 1))


def gather_hidden(x: torch.Tensor, plan: Plan, comm: Comm, batch_size: int, chunk: Chunk) -> Pending:
    """Shard(hidden) -> Replicate: [p, B*T, d] -> [B, T, D] by one all_gather."""
    shapes = [(blocks, *x.shape[1:]) for blocks in plan.sub_blocks]
    pending = comm.start_all_gather(x, shapes, plan.wire, f"hidden{chunk.index}")
    return pending.then(lambda parts: merge_hidden(joined(parts), batch_size))


def hidden_to_tokens(x: torch.Tensor, plan: Plan, comm: Comm, batch_size: int, chunk: Chunk) -> Pending:
    """Shard(hidden) -> Shard(seq): [p, B*T, d] -> [B, t, D] by one all_to_all, 1/P of an all_gather's bytes."""
    parts = x.unflatten(1, (batch_size, -1)).split(list(chunk.tokens), dim=2)  # [p, B, t, d]
    shapes = [(blocks, *parts[comm.rank].shape[1:]) for blocks in plan.sub_blocks]
    pending = comm.start_all_to_all(parts, shapes, plan.wire, f"hidden{chunk.index}")
    return pending.then(lambda parts: together(parts, dim=0).permute(1, 2, 0, 3).flatten(2))


def tokens_to_hidden(x: torch.Tensor, plan: Plan, comm: Comm, chunk: Chunk) -> Pending:
    """Shard(seq) -> Shard(hidden): [B, t, D] -> [p, B*T, d] by one all_to_all."""
    blocks = x.unflatten(-1, (sum(plan.sub_blocks), -1)).permute(2, 0, 1, 3)  # [P, B, t, d]
    parts = blocks.split(list(plan.sub_blocks))
    shapes = [(*parts[comm.rank].shape[:2], tokens, blocks.shape[-1]) for tokens in chunk.tokens]
    pending = comm.start_all_to_all(parts, shapes, plan.wire, f"tokens{chunk.index}")
    return pending.then(lambda parts: together(parts, dim=2).flatten(1, 2))


def reshard(
    chunks: Iterable[torch.Tensor], source: str, target: str, plan: Plan, comm: Comm, request: Request
) -> Iterable[Pending]:
    """Moves X's chunks from one layout to another, the next layer's.

    What needs no message is passed on as it comes, and so computed as late as can be. What needs one is computed at
    once, chunk after chunk, each sent while the next is computed.
    """
    if source == target or source == REPLICATE or comm.num_ranks == 1:
        pairs = zip(chunks, request.chunks, strict=True)
        return (Pending(_local(x, source, target, plan, comm, chunk)) for x, chunk in pairs)

    def start(x: torch.Tensor, chunk: Chunk) -> Pending:
        if plan.direct and (source, target) == (HIDDEN, SEQ):
            return hidden_to_tokens(x, plan, comm, request.batch_size, chunk)
        if plan.direct and (source, target) == (SEQ, HIDDEN):
            return tokens_to_hidden(x, plan, comm, chunk)
        if source == HIDDEN:
            everything = gather_hidden(x, plan, comm, request.batch_size, chunk)
        else:
            everything = gather_tokens(x, comm, chunk, plan.wire)
        return everything.then(lambda x: _local(x, REPLICATE, target, plan, comm, chunk))

    return [start(x, chunk) for x, chunk in zip(chunks, request.chunks, strict=True)]


def _local(x: torch.Tensor, source: str, target: str, plan: Plan, comm: Comm, chunk: Chunk) -> torch.Tensor:
    """A change of layout without messages: out of Replicate, or between any two on one device."""
    if source == target:
        return x
    if source == HIDDEN:  # one device, which has all sub-blocks
        x = merge_hidden(x, x.shape[1] // (chunk.stop - chunk.start))
    if target == HIDDEN:
        start, stop = bounds(plan.sub_blocks, comm.rank)
        return split_hidden(x, sum(plan.sub_blocks))[start:stop].contiguous()
    if target == SEQ:
        start, stop = chunk.of(comm.rank)
        return x[:, start:stop]
    return x
