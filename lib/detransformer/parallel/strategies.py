"""The strategies: how the devices run one layer together. One class each; layouts in `plan.STRATEGIES`.

A strategy loads its device's weights once and maps X from its in-layout to its out-layout. Where it communicates it
calls `comm`; everything between two collectives is local.

Shapes: B batch, T tokens, t this device's tokens, D hidden, H heads, h this device's heads, s head size, I the
intermediate size, P sub-blocks, p this device's sub-blocks, d = D/P, A attention width of a sub-block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import BertConfig
from transformers.activations import ACT2FN

from detransformer.models.decoupled_bert import merge_hidden, split_hidden
from detransformer.parallel.comm import Comm
from detransformer.parallel.partition import bounds
from detransformer.parallel.plan import HIDDEN, REPLICATE, SEQ, Plan
from detransformer.parallel.weights import WeightSource


@dataclass(frozen=True)
class Request:
    """What a layer needs to know of the request besides X."""

    batch_size: int
    seq_len: int
    tokens: Sequence[int]  # per device, under shard(seq)
    mask: torch.Tensor | None  # bool [B, 1, 1, T], True where a token may be attended to


class Strategy:
    """One layer on one device. Subclasses load weights in `__init__` and compute in `__call__`."""

    def __init__(self, config: BertConfig, plan: Plan, comm: Comm, weights: WeightSource, layer: int):
        self.config = config
        self.plan = plan
        self.comm = comm
        self.eps = config.layer_norm_eps
        self.activation = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        self._weights = weights
        self._prefix = f"encoder.layer.{layer}."
        self.load()
        del self._weights  # a device keeps its own part, not the source

    def take(self, name: str, dim: int = 0, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        return self._weights.take(self._prefix + name, dim, start, stop)

    def load(self) -> None:
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, request: Request) -> torch.Tensor:
        raise NotImplementedError

    def load_qkv(self, start: int | None = None, stop: int | None = None) -> None:
        """Packs the rows start..stop of Q, K and V in one product [3A, D]."""
        names = ("query", "key", "value")
        self.qkv_weight = torch.cat([self.take(f"attention.self.{n}.weight", 0, start, stop) for n in names])
        self.qkv_bias = torch.cat([self.take(f"attention.self.{n}.bias", 0, start, stop) for n in names])

    def load_norms(self, start: int | None = None, stop: int | None = None) -> None:
        self.attention_norm = [self.take(f"attention.output.LayerNorm.{n}", 0, start, stop) for n in ("weight", "bias")]
        self.output_norm = [self.take(f"output.LayerNorm.{n}", 0, start, stop) for n in ("weight", "bias")]

    def norm(self, x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, eps=self.eps)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, mask: torch.Tensor | None):
    """Scaled dot-product attention: q [B, t, A], k and v [B, T, A] -> [B, t, A]."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, T, s]

    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask).transpose(1, 2).flatten(2)


class Replicate(Strategy):
    """Every device runs the whole layer (Plan 3, Section III-C): no communication, all weights. X [B, T, D]."""

    def load(self) -> None:
        self.load_qkv()
        self.out_weight, self.out_bias = (
            self.take("attention.output.dense.weight"),
            self.take("attention.output.dense.bias"),
        )
        self.in_weight, self.in_bias = self.take("intermediate.dense.weight"), self.take("intermediate.dense.bias")
        self.ffn_weight, self.ffn_bias = self.take("output.dense.weight"), self.take("output.dense.bias")
        self.load_norms()

    def __call__(self, x: torch.Tensor, request: Request) -> torch.Tensor:
        q, k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        return self.after_qkv(x, q, k, v, request)

    def after_qkv(self, x, q, k, v, request: Request) -> torch.Tensor:
        """Attention of q's tokens over k's and v's, projection, FFN: all local."""
        context = attend(q, k, v, self.config.num_attention_heads, request.mask)
        x = self.norm(F.linear(context, self.out_weight, self.out_bias) + x, self.attention_norm)
        inner = self.activation(F.linear(x, self.in_weight, self.in_bias))
        return self.norm(F.linear(inner, self.ffn_weight, self.ffn_bias) + x, self.output_norm)


class SequenceParallel(Replicate):
    """Sequence parallelism (SP): own tokens x all weights, K and V of all tokens by two all_gathers. X [B, t, D]."""

    def __call__(self, x: torch.Tensor, request: Request) -> torch.Tensor:
        q, k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        k, v = (gather_tokens(part, self.comm, request.tokens) for part in (k, v))
        return self.after_qkv(x, q, k, v, request)


class TensorParallel(Strategy):
    """Tensor parallelism (Megatron's TP): own heads and FFN columns, two all_reduces. X [B, T, D]."""

    def load(self) -> None:
        rank, size = self.comm.rank, self.config.hidden_size // self.config.num_attention_heads
        self.num_heads = self.plan.heads[rank]
        start, stop = (size * head for head in bounds(self.plan.heads, rank))
        self.load_qkv(start, stop)
        self.out_weight = self.take("attention.output.dense.weight", 1, start, stop)  # [D, h*s]
        self.out_bias = self.take("attention.output.dense.bias")
        start, stop = bounds(self.plan.ffn_columns, rank)
        self.in_weight = self.take("intermediate.dense.weight", 0, start, stop)
        self.in_bias = self.take("intermediate.dense.bias", 0, start, stop)
        self.ffn_weight = self.take("output.dense.weight", 1, start, stop)
        self.ffn_bias = self.take("output.dense.bias")
        self.load_norms()

    def __call__(self, x: torch.Tensor, request: Request) -> torch.Tensor:
        q, k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)  # [B, T, h*s]
        partial = F.linear(attend(q, k, v, self.num_heads, request.mask), self.out_weight)  # [B, T, D]
        x = self.norm(self.comm.all_reduce(partial) + self.out_bias + x, self.attention_norm)
        partial = F.linear(self.activation(F.linear(x, self.in_weight, self.in_bias)), self.ffn_weight)
        return self.norm(self.comm.all_reduce(partial) + self.ffn_bias + x, self.output_norm)


class BlockParallel(Strategy):
    """Block parallelism (BP): own sub-blocks of a decoupled layer (Eq. 2), no communication. X [p, B*T, d]."""

    def load(self) -> None:
        start, stop = bounds(self.plan.sub_blocks, self.comm.rank)
        names = ("query", "key", "value")
        weights = [self.take(f"attention.self.{n}.weight", 0, start, stop) for n in names]
        self.qkv_weight = torch.cat(weights, dim=1)  # [p, 3A, d]
        self.qkv_bias = torch.cat([self.take(f"attention.self.{n}.bias", 0, start, stop) for n in names], dim=1)
        self.out_weight = self.take("attention.output.dense.weight", 0, start, stop)  # [p, d, A]
        self.out_bias = self.take("attention.output.dense.bias", 0, start, stop)
        self.in_weight = self.take("intermediate.dense.weight", 0, start, stop)  # [p, I, d]
        self.in_bias = self.take("intermediate.dense.bias", 0, start, stop)
        self.ffn_weight = self.take("output.dense.weight", 0, start, stop)  # [p, d, I]
        self.ffn_bias = self.take("output.dense.bias", 0, start, stop)
        self.load_norms(start, stop)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if len(weight) == 1:  # one sub-block a device: a plain product is faster than a batch of one
            return F.linear(x[0], weight[0], bias[0]).unsqueeze(0)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    def norm(self, x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        weight, bias = parameters
        if len(weight) == 1:
            return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], eps=self.eps)
        return torch.addcmul(bias.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=self.eps), weight.unsqueeze(1))

    def __call__(self, x: torch.Tensor, request: Request) -> torch.Tensor:
        blocks, rows, _ = x.shape
        if blocks == 0:  # more devices than sub-blocks: nothing to do here
            return x
        qkv = self.linear(x, self.qkv_weight, self.qkv_bias)  # [p, B*T, 3A]
        q, k, v = qkv.unflatten(1, (request.batch_size, -1)).flatten(0, 1).chunk(3, dim=-1)  # [p*B, T, A]
        mask = None if request.mask is None else request.mask.repeat(blocks, 1, 1, 1)
        context = attend(q, k, v, self.config.num_attention_heads, mask).reshape(blocks, rows, -1)
        x = self.norm(self.linear(context, self.out_weight, self.out_bias) + x, self.attention_norm)
        inner = self.activation(self.linear(x, self.in_weight, self.in_bias))
        return self.norm(self.linear(inner, self.ffn_weight, self.ffn_bias) + x, self.output_norm)


STRATEGY_CLASSES = {
    "block": BlockParallel,
    "tensor": TensorParallel,
    "sequence": SequenceParallel,
    "replicate": Replicate,
}


def gather_tokens(x: torch.Tensor, comm: Comm, tokens: Sequence[int]) -> torch.Tensor:
    """Shard(seq) -> Replicate: [B, t, A] -> [B, T, A] by one all_gather."""
    return comm.all_gather(x.transpose(0, 1), tokens).transpose(0, 1)


def reshard(x: torch.Tensor, source: str, target: str, plan: Plan, comm: Comm, request: Request) -> torch.Tensor:
    """Moves X from one layout to another; sharded -> sharded goes through Replicate, as published (BP+SP)."""
    if source == target:
        return x
    if source == HIDDEN:
        x = merge_hidden(comm.all_gather(x, plan.sub_blocks), request.batch_size)  # [p, B*T, d] -> [B, T, D]
    elif source == SEQ:
        x = gather_tokens(x, comm, request.tokens)
    if target == HIDDEN:
        start, stop = bounds(plan.sub_blocks, comm.rank)
        x = split_hidden(x, sum(plan.sub_blocks))[start:stop].contiguous()
    elif target == SEQ:
        start, stop = bounds(request.tokens, comm.rank)
        x = x[:, start:stop]
    else:
        assert target == REPLICATE
    return x
