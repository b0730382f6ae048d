"""The strategies: how the devices run one layer together. Each is one class; a new one needs nothing else.

A strategy loads its device's weights once and maps X from its in-layout to its out-layout. X comes in chunks of tokens,
so that one chunk travels while another is computed; with one chunk everything runs in turn. A layer takes each chunk as
it arrives, needs all of them for its attention, and yields its own chunks one after another. It communicates by calls
of `comm`; everything else is local.
BERT's LayerNorms stand after the residuals, GPT-2's before attention and FFN; GPT-2 attends only to earlier tokens, and
keeps their K and V (`KeyValueCache`).

Shapes: B batch, T tokens (or those of one chunk), t this device's tokens, D hidden, H heads, h this
device's heads, s head size, I the intermediate size, P sub-blocks, p this device's sub-blocks, d = D/P, A attention
width of a sub-block.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn import functional as F

from detransformer.parallel.comm import Pending
from detransformer.parallel.layer import (
    HIDDEN,
    REPLICATE,
    SEQ,
    Chunk,
    Request,
    Strategy,
    arrived,
    register,
    together,
)
from detransformer.parallel.parameters import LayerParameters
from detransformer.parallel.partition import bounds
from detransformer.parallel.reshard import gather_tokens


@register("block")
class BlockParallel(Strategy):
    """Block parallelism (BP): own sub-blocks of a decoupled layer (Eq. 2), no communication. X [p, B*T, d]."""

    layer_kind = "decoupled"
    in_layout = out_layout = HIDDEN
    splits = ("sub_blocks",)
    qkv_weights = rest_weights = cache = "own"

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
            if len(x):  # with more devices than sub-blocks, some have none
                projected = self.to_qkv(self.before(x, self.attention_norm))  # [p, B*T, 3A]
                qkv.append(projected.view(len(x) * request.batch_size, -1, 3, projected.shape[-1] // 3))
        if not qkv:
            yield from xs
            return
        for context, x in zip(self.attended(qkv, request, copies=len(xs[0])), xs, strict=True):  # [p*B, T, A]
            yield self.after_attention(context.reshape(*x.shape[:2], -1), x)


@register("tensor")
class TensorParallel(Strategy):
    """Tensor parallelism (Megatron's TP): own heads and FFN columns, two all_reduces. X [B, T, D]."""

    splits = ("heads", "ffn_columns")
    qkv_weights = rest_weights = cache = "own"

    def load(self, parameters: LayerParameters) -> None:
        self.load_attention(parameters, own_heads=True)
        self.load_rest(parameters, own_columns=True)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        """Partial sums of the projection and of the FFN, each summed over the devices."""
        xs, qkv = self.projected(chunks)
        sums = [self.start_sum(self.out(context)) for context in self.attended(qkv, request)]  # of [B, T, h*s]
        ffns = []
        for summed, x in zip(sums, xs, strict=True):
            x = self.add(summed.wait().add_(self.out_bias), x, self.attention_norm)
            ffns.append((self.start_sum(self.ffn(x)), x))
        for summed, x in ffns:
            yield self.add(summed.wait().add_(self.ffn_bias), x, self.ffn_norm)


@register("sequence")
class SequenceParallel(Strategy):
    """Sequence parallelism (SP): own tokens and all weights; K and V of all tokens by one all_gather. X [B, t, D].

    A device's own K and V are exact; those of other tokens pass through the plan's wire format.
    """

    in_layout = out_layout = SEQ
    splits = ("tokens_share",)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, queries, owns, gathers = [], [], [], []
        for x, chunk in zip(arrived(chunks), request.chunks, strict=True):
            xs.append(x)
            q, kv = self.qkv(x).split((1, 2), dim=2)
            queries.append(q[:, :, 0])
            owns.append(kv.permute(2, 1, 0, 3))
            shapes = [(2, tokens, len(x), kv.shape[-1]) for tokens in chunk.tokens]
            gathers.append(self.comm.start_all_gather(owns[-1], shapes, self.plan.wire))
        parts = [gather.wait() for gather in gathers]
        for every, own in zip(parts, owns, strict=True):
            every[self.comm.rank] = own
        k, v = together([part for every in parts for part in every]).transpose(1, 2)  # [B, T, D] each
        k, v = self.remember(k, v, request)
        for q, x, chunk in zip(queries, xs, request.chunks, strict=True):
            start, stop = chunk.of(self.comm.rank)
            mask = request.mask_of(chunk.start + start, chunk.start + stop)
            yield self.after_attention(self.attend(q, k, v, mask), x)


@register("ulysses")
class Ulysses(SequenceParallel):
    """Ulysses: own tokens and all weights, attention on own heads between two all_to_alls. X [B, t, D].

    Half of SP's bytes on four devices; all weights everywhere (Jacobs et al., DeepSpeed-Ulysses, 2023).
    """

    splits = ("tokens_share", "heads")
    cache = "own"

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, exchanges = [], []
        for x, chunk in zip(arrived(chunks), request.chunks, strict=True):
            xs.append(x)
            exchanges.append(self.tokens_to_heads(self.qkv(x), chunk))
        qkv = [exchange.wait() for exchange in exchanges]  # [B, T, 3, h*s]
        yield from self.after_exchange(self.attended(qkv, request), xs, request)


@register("heads")
class Heads(Strategy):
    """Attention by heads, the rest by tokens: 1/P of Q, K, V's weights, one all_to_all. X [B, T, D] -> [B, t, D]."""

    out_layout = SEQ
    splits = ("tokens_share", "heads")
    qkv_weights = cache = "own"

    def load(self, parameters: LayerParameters) -> None:
        self.load_attention(parameters, own_heads=True)
        self.load_rest(parameters)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv = [], []
        for x, chunk in zip(arrived(chunks), request.chunks, strict=True):
            xs.append(self.own_tokens(x, chunk))
            qkv.append(self.qkv(x))
        yield from self.after_exchange(self.attended(qkv, request), xs, request)


@register("galaxy")
class Galaxy(TensorParallel):
    """Galaxy's hybrid: TP in attention and FFN, residuals and LayerNorms by tokens. X [B, t, D].

    Each all_reduce of TP becomes a reduce_scatter and an all_gather, between which a device has only its own tokens
    (Ye et al., Galaxy, INFOCOM 2024); in chunks, these overlap with the products before and after, as in the paper.
    """

    in_layout = out_layout = SEQ
    splits = ("heads", "ffn_columns", "tokens_share")

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
        """Starts gathering all tokens of each chunk."""
        wire = self.plan.number_format
        return [gather_tokens(x, self.comm, chunk, wire) for x, chunk in zip(xs, request.chunks, strict=True)]

    def scatter(self, partial: torch.Tensor, chunk: Chunk) -> Pending:
        """Starts summing over devices; this one receives its own tokens."""
        parts = partial.split(list(chunk.tokens), dim=1)
        return self.comm.start_reduce_scatter(parts, self.plan.number_format)


@register("replicate")
class Replicate(Strategy):
    """Every device runs the whole layer (Plan 3, Section III-C): no communication, all weights. X [B, T, D]."""

    in_layout = out_layout = REPLICATE

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv = self.projected(chunks)
        for context, x in zip(self.attended(qkv, request), xs, strict=True):
            yield self.after_attention(context, x)
