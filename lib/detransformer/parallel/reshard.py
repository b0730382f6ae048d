"""Moves X from the layout that a layer leaves to the layout that the next takes. Shapes as in `parallel.strategies`."""

from collections.abc import Iterable

import torch

from detransformer.models.stacked import merge_hidden, split_hidden
from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.layer import HIDDEN, REPLICATE, SEQ, UNSUMMED, Chunk, Request, together
from detransformer.parallel.partition import Plan, bounds


def gather_tokens(x: torch.Tensor, comm: Comm, chunk: Chunk, wire: str) -> Pending:
    """Shard(seq) -> Replicate: [B, t, D] -> [B, T, D] by one all_gather."""
    shapes = [(tokens, len(x), x.shape[-1]) for tokens in chunk.tokens]
    pending = comm.start_all_gather(x.transpose(0, 1), shapes, wire)
    return pending.then(lambda parts: together(parts, dim=0).transpose(0, 1))


def gather_hidden(x: torch.Tensor, plan: Plan, comm: Comm, batch_size: int, chunk: Chunk) -> Pending:
    """Shard(hidden) -> Replicate: [p, B*T, d] -> [B, T, D] by one all_gather."""
    shapes = [(blocks, *x.shape[1:]) for blocks in plan.sub_blocks]
    pending = comm.start_all_gather(x, shapes, plan.number_format)
    return pending.then(lambda parts: merge_hidden(together(parts, dim=0), batch_size))


def hidden_to_tokens(x: torch.Tensor, plan: Plan, comm: Comm, batch_size: int, chunk: Chunk) -> Pending:
    """Shard(hidden) -> Shard(seq): [p, B*T, d] -> [B, t, D] by one all_to_all, 1/P of an all_gather's bytes."""
    parts = x.unflatten(1, (batch_size, -1)).split(list(chunk.tokens), dim=2)  # [p, B, t, d]
    shapes = [(blocks, *parts[comm.rank].shape[1:]) for blocks in plan.sub_blocks]
    pending = comm.start_all_to_all(parts, shapes, plan.number_format)
    return pending.then(lambda parts: together(parts, dim=0).permute(1, 2, 0, 3).flatten(2))


def tokens_to_hidden(x: torch.Tensor, plan: Plan, comm: Comm, chunk: Chunk) -> Pending:
    """Shard(seq) -> Shard(hidden): [B, t, D] -> [p, B*T, d] by one all_to_all."""
    blocks = x.unflatten(-1, (sum(plan.sub_blocks), -1)).permute(2, 0, 1, 3)  # [P, B, t, d]
    parts = blocks.split(list(plan.sub_blocks))
    shapes = [(*parts[comm.rank].shape[:2], tokens, blocks.shape[-1]) for tokens in chunk.tokens]
    pending = comm.start_all_to_all(parts, shapes, plan.number_format)
    return pending.then(lambda parts: together(parts, dim=2).flatten(1, 2))


def add_unsummed(x: torch.Tensor, comm: Comm, chunk: Chunk, wire: str) -> Pending:
    """Unsummed -> Replicate: [1 + n, B, T, D] -> [B, T, D] by one all_reduce."""
    pending = comm.start_all_reduce(x[1:].sum(0), wire)
    return pending.then(lambda summed: summed + x[0])


def reshard(
    chunks: Iterable[torch.Tensor], source: str, target: str, plan: Plan, comm: Comm, request: Request
) -> Iterable[Pending]:
    """Moves X's chunks from one layout to another, the next layer's.

    Chunks that need no message are passed on lazily, and so computed as late as possible. Chunks that need one are
    computed at once, one after another, each sent while the next is computed.
    """
    if source == target or source == REPLICATE or comm.num_ranks == 1:
        pairs = zip(chunks, request.chunks, strict=True)
        return (Pending(_local(x, source, target, plan, comm, chunk)) for x, chunk in pairs)

    def start(x: torch.Tensor, chunk: Chunk) -> Pending:
        if plan.direct and (source, target) == (HIDDEN, SEQ):
            return hidden_to_tokens(x, plan, comm, request.batch_size, chunk)
        if plan.direct and (source, target) == (SEQ, HIDDEN):
            return tokens_to_hidden(x, plan, comm, chunk)
        if source == UNSUMMED:
            everything = add_unsummed(x, comm, chunk, plan.number_format)
        elif source == HIDDEN:
            everything = gather_hidden(x, plan, comm, request.batch_size, chunk)
        else:
            everything = gather_tokens(x, comm, chunk, plan.number_format)
        return everything.then(lambda x: _local(x, REPLICATE, target, plan, comm, chunk))

    return [start(x, chunk) for x, chunk in zip(chunks, request.chunks, strict=True)]


def _local(x: torch.Tensor, source: str, target: str, plan: Plan, comm: Comm, chunk: Chunk) -> torch.Tensor:
    """A change of layout without messages: out of Replicate, or between any two on one device."""
    if source == target:
        return x
    if source == UNSUMMED:  # one device, which has all contributions
        x = x.sum(0)
    if source == HIDDEN:  # one device, which has all sub-blocks
        x = merge_hidden(x, x.shape[1] // (chunk.stop - chunk.start))
    if target == HIDDEN:
        start, stop = bounds(plan.sub_blocks, comm.rank)
        return split_hidden(x, sum(plan.sub_blocks))[start:stop].contiguous()
    if target == SEQ:
        start, stop = chunk.of(comm.rank)
        return x[:, start:stop]
    return x
