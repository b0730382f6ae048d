"""Shared by all strategies: a request's chunks, a decoder's cache, and the base class of strategies.

Shapes as in `parallel.strategies`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.parameters import LayerParameters
from detransformer.parallel.partition import Plan, bounds
from detransformer.parallel.weights import WeightSource

# Layouts of a hidden state X [B, T, D] over devices
REPLICATE = "replicate"  # every device holds all of X
HIDDEN = "shard(hidden)"  # its sub-blocks' feature slices, all tokens
SEQ = "shard(seq)"  # its tokens, all features
UNSUMMED = "unsummed"  # the common X, and own contributions still to be added: [1 + n, B, T, D]

STRATEGIES: dict[str, type["Strategy"]] = {}  # by name, as `register` adds them


def register(name: str) -> Callable[[type["Strategy"]], type["Strategy"]]:
    """Registers a strategy under `name` for plans, the executor and the planner."""

    def add(strategy: type["Strategy"]) -> type["Strategy"]:
        STRATEGIES[name] = strategy
        return strategy

    return add


@dataclass(frozen=True)
class Chunk:
    """Tokens start..stop of a request, and how many of them each device takes under shard(seq)."""

    start: int
    stop: int
    tokens: Sequence[int]

    def of(self, rank: int) -> tuple[int, int]:
        """Start and stop of device `rank`'s tokens in the chunk."""
        return bounds(self.tokens, rank)


def chunks_of(sizes: Iterable[tuple[int, Sequence[int]]]) -> list[Chunk]:
    """Consecutive chunks of these sizes, each (tokens in all, tokens of each device)."""
    chunks, start = [], 0
    for total, tokens in sizes:
        chunks.append(Chunk(start, start + total, tokens))
        start += total
    return chunks


class KeyValueCache:
    """This device's keys and values of a decoder's earlier tokens: each layer's K and V, [rows, capacity, A]."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_tokens = 0  # that all layers hold
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def join(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k and v [rows, T, A] of the tokens after `num_tokens`; returns those of all, [rows, T_all, A]."""
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
    """What a layer needs to know about the request besides X."""

    batch_size: int
    chunks: Sequence[Chunk]
    mask: torch.Tensor | None = None  # bool [B or 1, 1, 1 or T, T_all]: whether a query may attend to a key
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
        """The request [batch_size, seq_len], in the chunks of `plan`."""
        return cls(batch_size, chunks_of((sum(tokens), tokens) for tokens in plan.tokens(seq_len)), mask, cache)

    def mask_of(self, start: int, stop: int) -> torch.Tensor | None:
        """The mask for the queries of tokens start..stop."""
        return self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, start:stop]


class Strategy:
    """One layer on one device: which weights it keeps (`load`), and what it computes and sends (`__call__`).

    The planner prices a strategy by recording this code (`planning.tape`), so a new strategy is one subclass:

        layer_kind: the kind of layer that it runs, such as `original` or `decoupled`.
        in_layout, out_layout: the layouts of X that it takes and leaves.
        splits: the fields of `Plan` that divide a layer; it may read no others. A device's share of the layer is its
            share of the first one; without any, every device runs the whole layer.
        qkv_weights, rest_weights: whether a device keeps its `own` part or `all` of the weights of Q, K and V, and of
            the other weights.
        cache: whether a decoder caches keys and values of its `own` heads (or sub-blocks) or of `all` of them.
            Strategies with the same value may take turns in one generation.
    """

    layer_kind = "original"
    in_layout = out_layout = REPLICATE
    splits: tuple[str, ...] = ()
    qkv_weights = rest_weights = cache = "all"

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
        """`keeps_whole` and `packs` as in `LayerParameters`."""
        self.config = config
        self.plan = plan
        self.comm = comm
        self.layer = layer
        self.head_size = config.hidden_size // config.num_attention_heads
        parameters = LayerParameters(config, weights, layer, keeps_whole, packs)
        naming = parameters.naming
        self.pre_norm, self.eps = naming.pre_norm, naming.eps_of(config)
        self.activation = ACT2FN[getattr(config, naming.activation)]
        self.load(parameters)  # a device keeps its own part, not the source

    def load(self, parameters: LayerParameters) -> None:
        """Loads this device's weights, here all of them."""
        self.load_attention(parameters)
        self.load_rest(parameters)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        """Yields X's chunks in the out-layout; `chunks` are X's in the in-layout."""
        raise NotImplementedError

    @classmethod
    def share(cls, plan: Plan, rank: int) -> float:
        """Device `rank`'s share of a layer, from 0 to 1."""
        if not cls.splits:
            return 1.0
        parts = getattr(plan, cls.splits[0])
        return parts[rank] / sum(parts)

    @property
    def own_heads(self) -> tuple[int, int]:
        """Columns start..stop of Q, K and V that belong to this device's heads."""
        start, stop = bounds(self.plan.heads, self.comm.rank)
        return start * self.head_size, stop * self.head_size

    def load_attention(self, parameters: LayerParameters, own_heads: bool = False) -> None:
        """Loads Q, K and V packed in one product, D -> 3A, of this device's heads or all."""
        self.to_qkv = parameters.qkv(self.own_heads if own_heads else None)

    def load_rest(self, parameters: LayerParameters, own_columns: bool = False) -> None:
        """Loads output projection, FFN and LayerNorms: whole, or for own heads and own inner columns of the FFN."""
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
        """The input of attention or FFN: X, in pre-norm models normalised."""
        return self.norm(x, norm) if self.pre_norm else x

    def add(self, y: torch.Tensor, x: torch.Tensor, norm: list[torch.Tensor]) -> torch.Tensor:
        """Adds the residual x to y, the output of attention or FFN, in place; post-norm models then normalise."""
        return y.add_(x) if self.pre_norm else self.norm(y.add_(x), norm)

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN of x's tokens, or a partial sum of it if this device has only some inner columns."""
        return self.ffn_out(self.activation(self.ffn_in(self.before(x, self.ffn_norm))))

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, 3, A]."""
        return self.to_qkv(self.before(x, self.attention_norm)).unflatten(-1, (3, -1))

    def projected(self, chunks: Iterable[Pending]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """X's chunks, and Q, K, V of each, computed as soon as that chunk has arrived."""
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

        With `copies` c there are c times as many rows as sequences in the request.
        """
        k, v = together([part[:, :, 1] for part in qkv]), together([part[:, :, 2] for part in qkv])
        k, v = self.remember(k, v, request)
        for part, chunk in zip(qkv, request.chunks, strict=True):
            mask = request.mask_of(chunk.start, chunk.stop)
            if mask is not None and len(mask) > 1:  # a mask of length 1 serves all copies
                mask = mask.repeat(copies, 1, 1, 1)
            yield self.attend(part[:, :, 0], k, v, mask)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Scaled dot-product attention: q [B, t, A], k and v [B, T, A] -> [B, t, A]."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # [B, H, T, s]

        scale = attention_scale(self.config, self.layer, self.head_size)
        context = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask, scale=scale)
        return context.transpose(1, 2).flatten(2)

    def remember(self, k: torch.Tensor, v: torch.Tensor, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [rows, T, A] of the request's tokens, after the cached ones if there is a cache."""
        return request.cache.join(self.layer, k, v) if request.cache else (k, v)

    def start_sum(self, partial: torch.Tensor) -> Pending:
        """Starts summing `partial` over the devices."""
        return self.comm.start_all_reduce(partial, self.plan.number_format)

    def own_tokens(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        start, stop = chunk.of(self.comm.rank)
        return x[:, start:stop]

    def tokens_to_heads(self, qkv: torch.Tensor, chunk: Chunk) -> Pending:
        """Own tokens, all heads -> all tokens, own heads, by one all_to_all: [B, t, 3, D] -> [B, T, 3, h*s]."""
        parts = qkv.split([heads * self.head_size for heads in self.plan.heads], dim=-1)
        shapes = [(len(qkv), tokens, 3, parts[self.comm.rank].shape[-1]) for tokens in chunk.tokens]
        return self.comm.start_all_to_all(parts, shapes, self.plan.number_format).then(together)

    def heads_to_tokens(self, context: torch.Tensor, chunk: Chunk) -> Pending:
        """All tokens, own heads -> own tokens, all heads, by one all_to_all: [B, T, h*s] -> [B, t, D]."""
        parts = context.split(list(chunk.tokens), dim=1)
        shapes = [(*parts[self.comm.rank].shape[:2], heads * self.head_size) for heads in self.plan.heads]
        pending = self.comm.start_all_to_all(parts, shapes, self.plan.number_format)
        return pending.then(lambda parts: together(parts, dim=-1))

    def after_exchange(
        self, contexts: Iterable[torch.Tensor], xs: Sequence[torch.Tensor], request: Request
    ) -> Iterator[torch.Tensor]:
        """The rest of the layer for own tokens x, after attention by own heads: chunks [B, T, h*s] -> [B, t, D]."""
        exchanges = [self.heads_to_tokens(c, chunk) for c, chunk in zip(contexts, request.chunks, strict=True)]
        for exchange, x in zip(exchanges, xs, strict=True):
            yield self.after_attention(exchange.wait(), x)


def together(parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """`torch.cat` along the tokens, or `dim`; without a copy if there is one part."""
    return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0]


def arrived(chunks: Iterable[Pending]) -> Iterator[torch.Tensor]:
    """The chunks of X, each waited for when requested."""
    return (chunk.wait() for chunk in chunks)


def attention_scale(config: PretrainedConfig, layer: int, head_size: int) -> float:
    """The factor on attention scores: the root of 1/s, unless a GPT-2's configuration says otherwise."""
    scale = head_size**-0.5 if getattr(config, "scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale
