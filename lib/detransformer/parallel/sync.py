"""Strategies of `models.sync_gpt2`, whose layers sum their parts later, less often or partially.

Shapes as in `parallel.strategies`; n counts the contributions in layout `unsummed` that are not added to X yet, A = D/P
is the width of a part's heads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from detransformer.models.configuration import ffn_size
from detransformer.parallel.comm import Pending
from detransformer.parallel.layer import REPLICATE, UNSUMMED, Request, Strategy, arrived, register
from detransformer.parallel.linear import Linear
from detransformer.parallel.parameters import LayerParameters
from detransformer.parallel.partition import bounds
from detransformer.parallel.strategies import TensorParallel


@register("parallel")
class ParallelBlock(TensorParallel):
    """TP of a layer whose attention and FFN read the same LayerNorm: one all_reduce. X [B, T, D]."""

    layer_kind = "parallel"

    def load_norms(self, parameters: LayerParameters, part: tuple[int, int] | None = None) -> None:
        self.attention_norm = self.ffn_norm = parameters.norm("attention_norm", part)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv = self.projected(chunks)
        contexts = zip(self.attended(qkv, request), xs, strict=True)
        sums = [self.start_sum(self.out(context).add_(self.ffn(x))) for context, x in contexts]
        for summed, x in zip(sums, xs, strict=True):
            yield summed.wait().add_(self.out_bias).add_(self.ffn_bias).add_(x)


@register("ladder")
class Ladder(TensorParallel):
    """TP of a ladder: two all_reduces, each under way while the next sub-layer computes. X [2, B, T, D]."""

    layer_kind = "ladder"
    in_layout = out_layout = UNSUMMED

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        streams, qkv, before = [], [], []
        for x in arrived(chunks):
            stream, *unsummed = x if x.ndim == 4 else (x,)
            before.append([self.start_sum(ffn) for ffn in unsummed])
            streams.append(stream)
            qkv.append(self.qkv(stream))
        sums = [self.start_sum(self.out(context)) for context in self.attended(qkv, request)]
        for stream, pending, summed in zip(streams, before, sums, strict=True):
            for ffn in pending:
                stream = stream + ffn.wait()
            partial = self.ffn(stream)
            if self.comm.rank == 0:  # once in the sum over devices
                partial = partial.add_(self.ffn_bias)
            yield torch.stack([summed.wait().add_(self.out_bias).add_(stream), partial])


@register("ladder-first")
class FirstOfLadder(Ladder):
    """A ladder's first layer: no sum is under way before it. X [B, T, D] -> [2, B, T, D]."""

    layer_kind = "ladder-first"
    in_layout = REPLICATE


@dataclass(frozen=True)
class _Part:
    """The maps of one part of a layer: D -> 3A, A -> D, D -> I/P, I/P -> D."""

    qkv: Linear
    out: Linear
    ffn_in: Linear
    ffn_out: Linear


@register("parts")
class Parts(Strategy):
    """Own parts of a layer; two all_reduces sum their shared channels. X [1 + p, B, T, D]."""

    layer_kind = "parts"
    in_layout = out_layout = UNSUMMED
    splits = ("sub_blocks",)
    qkv_weights = rest_weights = cache = "own"

    def load(self, parameters: LayerParameters) -> None:
        num_parts = self.config.num_divisions
        width, inner = self.config.hidden_size // num_parts, ffn_size(self.config) // num_parts
        self.parts = []
        for number in range(*bounds(self.plan.sub_blocks, self.comm.rank)):
            heads, columns = ((number * size, (number + 1) * size) for size in (width, inner))
            self.parts.append(
                _Part(
                    parameters.qkv(heads),
                    parameters.linear("out", inputs=heads),
                    parameters.linear("ffn_in", outputs=columns),
                    parameters.linear("ffn_out", inputs=columns),
                )
            )
        if not self.parts:
            raise ValueError(
                f"sub_blocks={list(self.plan.sub_blocks)} leaves device {self.comm.rank} without a part of the model: "
                "give each device one, or take fewer devices."
            )
        self.ffn_bias, self.out_bias = parameters.bias("ffn_out"), parameters.bias("out")
        self.load_norms(parameters)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs, qkv, steps = [], [], []
        for x in arrived(chunks):
            if x.ndim == 3:  # X is whole: no contributions yet
                x = torch.cat([x[None], x.new_zeros(len(self.parts), *x.shape)])
            xs.append(x)
            read = self.read(x, self.attention_norm)
            projected = torch.cat([part.qkv(y) for part, y in zip(self.parts, read, strict=True)])
            qkv.append(projected.unflatten(-1, (3, -1)))  # [p*B, T, 3, A]
        for context in self.attended(qkv, request, copies=len(self.parts)):  # [p*B, T, A]
            contexts = context.chunk(len(self.parts))
            steps.append(self.start([p.out(y) for p, y in zip(self.parts, contexts, strict=True)]))
        ffns = []
        for step, x in zip(steps, xs, strict=True):
            x = self.added(x, *step, self.out_bias)
            pairs = zip(self.parts, self.read(x, self.ffn_norm), strict=True)
            ffns.append((x, self.start([p.ffn_out(self.activation(p.ffn_in(y))) for p, y in pairs])))
        for x, step in ffns:
            yield self.added(x, *step, self.ffn_bias)

    def read(self, x: torch.Tensor, norm: list[torch.Tensor]) -> torch.Tensor:
        """The normalised input of each own part: [1 + p, B, T, D] -> [p, B, T, D]."""
        return self.norm(x[0] + x[1:], norm)

    def start(self, made: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Pending]:
        """Each own part's addition, [p, B, T, D], and the pending sum over all parts of its shared channels."""
        stacked = torch.stack(list(made))
        shared = stacked[..., : self.config.num_shared].sum(0)
        if not self.config.num_shared:
            return stacked, Pending(shared)
        return stacked, self.start_sum(shared)

    def added(self, x: torch.Tensor, made: torch.Tensor, shared: Pending, bias: torch.Tensor) -> torch.Tensor:
        """X with the parts' additions: for shared channels the sum of all, for the others each part's own."""
        num_shared, width = self.config.num_shared, x.shape[-1]
        stream = F.pad(shared.wait(), (0, width - num_shared)).add_(x[0]).add_(bias)
        return torch.cat([stream[None], x[1:] + F.pad(made[..., num_shared:], (num_shared, 0))])


@register("parts-first")
class FirstOfParts(Parts):
    """The first layer after everything was summed. X [B, T, D] -> [1 + p, B, T, D]."""

    layer_kind = "parts-first"
    in_layout = REPLICATE
