"""Recordings of layers: one for each strategy, part of a layer, request size and wire format; and their composition.

`device_steps` is what one device does for a whole request; `planning.pieces` prices all plans of one split. Recordings
contain no bandwidth, speed or latency. Shapes as in `parallel.strategies`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

import detransformer.models  # noqa: F401  registers decoupled models
from detransformer.models.configuration import is_decoder, layer_kinds
from detransformer.opening import model_class
from detransformer.parallel.executor import ending_of
from detransformer.parallel.layer import (
    HIDDEN,
    REPLICATE,
    SEQ,
    STRATEGIES,
    UNSUMMED,
    KeyValueCache,
    Request,
    Strategy,
    chunks_of,
)
from detransformer.parallel.partition import split
from detransformer.parallel.plan import Plan
from detransformer.parallel.reshard import reshard
from detransformer.parallel.weights import WeightSource
from detransformer.parallel.wire import message_bytes
from detransformer.planning.tape import (
    Arrive,
    Compute,
    Pull,
    Recording,
    Start,
    Step,
    Tape,
    TapeComm,
    Wait,
    without_numbers,
)

MAX_KEPT = 4096  # recordings of each kind, some 10 kB each


def sizes_of(config: PretrainedConfig) -> str:
    """`config` as JSON, for a model that has one layer of each kind: all that recordings depend on."""
    fields, names = config.to_dict(), config.attribute_map
    fields[names.get("num_hidden_layers", "num_hidden_layers")] = len(set(layer_kinds(config)))
    if "num_original_layers" in fields:
        fields["num_original_layers"] = 1
    return json.dumps(fields, sort_keys=True)


@lru_cache(MAX_KEPT)
def small_model(sizes: str) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """The model with one layer of each kind, and its weights on the meta device."""
    fields = json.loads(sizes)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = model_class(config)(config) if config.architectures else AutoModel.from_config(config)
        return config, model.state_dict()


@dataclass(frozen=True)
class _Part:
    """One rank's part of a request: `plan` has only the splits that a strategy looks at."""

    rank: int
    num_ranks: int
    plan: Plan
    chunks: tuple[tuple[int, tuple[int, ...]], ...]  # tokens of each chunk, in all and of each device
    batch_size: int
    past: int
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        return sum(total for total, _ in self.chunks)

    def request(self, cache: KeyValueCache | None = None) -> Request:
        """The request as its layers see it."""
        return Request(self.batch_size, chunks_of(self.chunks), cache=cache)

    def shapes(self, layout: str, config: PretrainedConfig) -> list[tuple[int, int, int]]:
        """The shape of each chunk of X in `layout`."""
        if layout == HIDDEN:
            width = config.hidden_size // config.num_divisions
            return [(self.plan.sub_blocks[self.rank], self.batch_size * total, width) for total, _ in self.chunks]
        if layout == UNSUMMED:
            rows = 1 + (self.plan.sub_blocks[self.rank] if self.plan.sub_blocks else 1)
            return [(rows, self.batch_size, total, config.hidden_size) for total, _ in self.chunks]
        if layout == SEQ:
            return [(self.batch_size, tokens[self.rank], config.hidden_size) for _, tokens in self.chunks]
        return [(self.batch_size, total, config.hidden_size) for total, _ in self.chunks]


@lru_cache(MAX_KEPT)
def _record_layer(sizes: str, name: str, strategy: type[Strategy], part: _Part) -> Recording:
    if part.past > 2:  # only attention depends on it, linearly
        one, two = (_record_layer(sizes, name, strategy, replace(part, past=past)) for past in (1, 2))
        pairs = (zip(*same, strict=True) for same in zip(one.segments, two.segments, strict=True))
        more = part.past - 1
        segments = tuple(
            tuple(replace(a, flops=a.flops + more * (b.flops - a.flops)) if isinstance(a, Compute) else a for a, b in s)
            for s in pairs
        )
        per_token = one.cache_bytes // (1 + part.num_tokens)
        return Recording(segments, per_token * (part.past + part.num_tokens))
    config, state = small_model(sizes)
    share = strategy.share(part.plan, part.rank)
    tape = Tape(strategy=name, share=share, tokens=part.batch_size * part.num_tokens, num_chunks=len(part.chunks))
    comm, number = TapeComm(part.rank, part.num_ranks, tape), layer_kinds(config).index(strategy.layer_kind)
    layer = strategy(config, part.plan, comm, WeightSource(state, part.dtype), number)
    cache = None
    if is_decoder(config):
        cache = KeyValueCache(part.past + part.num_tokens)
        cache.num_tokens = part.past
    chunks = tape.arriving(part.shapes(strategy.in_layout, config), part.dtype)
    with torch.inference_mode(), tape:
        segments = [tape.cut() for _ in layer(chunks, part.request(cache))]
    return Recording((*segments, tape.cut()), cache.num_bytes if cache else 0)


@lru_cache(MAX_KEPT)
def _record_reshard(sizes: str, source: str, target: str, part: _Part) -> Recording | None:
    """Segments: those that start each chunk's transfer, then those that wait for it; None if no message is needed."""
    tape = Tape()
    comm, started = TapeComm(part.rank, part.num_ranks, tape), []

    def given_out() -> Iterator[torch.Tensor]:
        for number, shape in enumerate(part.shapes(source, small_model(sizes)[0])):
            if number:
                started.append(tape.cut())
            yield without_numbers(shape, part.dtype)
        started.append(tape.cut())

    chunks = reshard(given_out(), source, target, part.plan, comm, part.request())
    if not isinstance(chunks, list):
        return None
    waits = []
    with tape:
        for chunk in chunks:
            chunk.wait()
            waits.append(tape.cut())
    return Recording((*started, *waits))


@lru_cache(MAX_KEPT)
def _record_end(sizes: str, part: _Part) -> Recording:
    """The model's ending: pooler or task head, or a decoder's next token."""
    tape = Tape(tokens=part.batch_size * part.num_tokens)
    config, state = small_model(sizes)
    shapes = part.shapes(REPLICATE, config)
    xs = [chunk.wait() for chunk in tape.arriving(shapes, part.dtype)]
    source = WeightSource(state, part.dtype)
    head = ending_of(config, source, part.plan, TapeComm(part.rank, part.num_ranks, tape))
    with torch.inference_mode(), tape:
        head(xs[-1])
    steps = tape.cut()
    if not is_decoder(config):  # presets are calibrated on a latency that includes reading them
        steps = tuple(replace(step, weight_bytes=0) if isinstance(step, Compute) else step for step in steps)
    return Recording((steps, *((),) * len(shapes)))


class Recorder:
    """The recordings of one split of a request: of each rank, under any strategy.

    Args:
        plan: its devices share each layer; its strategies do not matter.
        past: a decoder's cached tokens before the request's.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        seq_len: int,
        batch_size: int = 1,
        past: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.sizes, self.plan = config, sizes_of(config), plan
        self.tokens = plan.tokens(seq_len)
        self.common = dict(num_ranks=plan.num_devices, batch_size=batch_size, past=past, dtype=dtype)
        self._parts: dict[tuple[str, ...], tuple[list[int], dict]] = {}

    def shapes(self, name: str, rank: int) -> list[tuple[int, int, int]]:
        """The shape of each chunk of X that a layer under strategy `name` takes."""
        return self._part(rank, STRATEGIES[name].splits).shapes(STRATEGIES[name].in_layout, self.config)

    def layer(self, name: str, rank: int) -> Recording:
        """One layer under strategy `name`; `start` and `end` are the model's parts before and after all layers."""
        if name == "start":  # all chunks are ready
            return Recording(((),) * (len(self.tokens) + 1))
        if name == "end":
            return _record_end(self.sizes, self._part(rank, ("tokens_share",)))
        return _record_layer(self.sizes, name, STRATEGIES[name], self._part(rank, STRATEGIES[name].splits))

    def reshard(self, source: str, target: str, rank: int) -> Recording | None:
        """The resharding between two layouts of X; None if no message is needed."""
        fields = {SEQ: ("tokens_share",), HIDDEN: ("sub_blocks",), REPLICATE: (), UNSUMMED: ()}
        if source == target or source == REPLICATE or self.plan.num_devices == 1:
            return None
        return _record_reshard(self.sizes, source, target, self._part(rank, (*fields[source], *fields[target])))

    def _part(self, rank: int, fields: tuple[str, ...]) -> _Part:
        """Rank's part by these splits; ranks with equal parts share the first one's."""
        if fields not in self._parts:
            plan, by_token = self.plan, "tokens_share" in fields
            seen: dict[tuple, int] = {}
            first = [seen.setdefault(self.taken(r, fields), r) for r in range(plan.num_devices)]
            chunks = tuple((sum(tokens), tuple(tokens) if by_token else ()) for tokens in self.tokens)
            known = Plan("", (), (), (), (), (), wire=plan.wire, direct=plan.direct)
            known = replace(known, **{name: getattr(plan, name) for name in fields})
            self._parts[fields] = first, dict(plan=known, chunks=chunks, **self.common)
        first, alike = self._parts[fields]
        return _Part(rank=first[rank], **alike)

    def taken(self, rank: int, fields: Sequence[str]) -> tuple:
        """The sizes of `rank` in these splits: ranks of equal sizes do the same."""
        taken = [getattr(self.plan, name)[rank] for name in fields]
        if "tokens_share" in fields:
            taken += [tokens[rank] for tokens in self.tokens]
            if is_decoder(self.config):
                taken.append(self.plan.vocabulary(self.config.vocab_size)[rank])
        if self.plan.number_format != "float32":  # a compressed all_reduce splits rows evenly
            equal = [1.0] * self.plan.num_devices
            taken += [split(self.common["batch_size"] * sum(tokens), equal)[rank] for tokens in self.tokens]
        return tuple(taken)


def layouts_of(name: str) -> tuple[str, str]:
    """The layouts of X that `Recorder.layer` of this name takes and leaves."""
    return (STRATEGIES[name].in_layout, STRATEGIES[name].out_layout) if name in STRATEGIES else (REPLICATE, REPLICATE)


def split_of(plan: Plan, rank: int) -> tuple[Plan, int]:
    """The plan by which device `rank` runs its layers, and its rank in it: alone, if each device runs layers whole."""
    return (plan, rank) if plan.splits_layers else (plan.on_one_device(), 0)


def interleaved(
    source: Sequence[Sequence], moved: Sequence[Sequence] | None, target: Sequence[Sequence]
) -> Iterator[tuple[str, Sequence]]:
    """The steps from the first output of one layer to that of the next, in order, each with its owner.

    Args:
        source, target: the two layers' segments.
        moved: the segments of the resharding between them; None: chunks are passed on.
    """
    num_chunks = len(source) - 1
    if moved:
        for start, rest in zip(moved[:num_chunks], source[1:], strict=True):
            yield "moved", start
            yield "source", rest
    for step in target[0]:
        if isinstance(step, Pull):
            if not moved and step.chunk:
                yield "source", source[step.chunk]
        elif isinstance(step, Arrive):
            if moved:
                yield "moved", moved[num_chunks + step.chunk]
        else:
            yield "target", [step]


def device_steps(
    config: PretrainedConfig,
    plan: Plan,
    rank: int,
    seq_len: int,
    batch_size: int = 1,
    past: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Step]:
    """What device `rank` does for one request, in order: `Compute`, `Start` and `Wait`.

    A decoder's request ends with its next token; its `seq_len` new tokens follow `past` cached ones.
    """
    local, own = split_of(plan, rank)
    recorder = Recorder(config, local, seq_len, batch_size, past, dtype)
    names = ["start", *(plan.strategies[layer] for layer in plan.layers(rank)), "end"]
    recordings = [recorder.layer(name, own) for name in names]
    is_last = not plan.stages or rank == plan.num_devices - 1
    if not is_last:  # passes X on
        recordings[-1] = Recording(((Pull(0), Arrive(0), Pull(1)),))

    message = message_bytes((batch_size, seq_len, config.hidden_size), plan.number_format, dtype.itemsize)
    steps: list[Step] = []
    started: list[list[int]] = [[] for _ in names]  # the numbers of each layer's starts
    num_started = 0
    if plan.stages and rank > 0:
        steps, num_started = [Start("receive", message), Wait(0)], 1
    for i, ((before, source), (after, target)) in enumerate(pairwise(zip(names, recordings, strict=True))):
        moved = recorder.reshard(layouts_of(before)[1], layouts_of(after)[0], own)
        numbers = {"source": started[i], "moved": [], "target": started[i + 1]}
        for owner, part in interleaved(source.segments, moved and moved.segments, target.segments):
            for step in part:
                if isinstance(step, Start):
                    numbers[owner].append(num_started)
                    num_started += 1
                steps.append(Wait(numbers[owner][step.number]) if isinstance(step, Wait) else step)
    if not is_last:
        steps += [Start("send", message), Wait(num_started)]
    return steps


def segments(steps: Sequence[Step]) -> list[list[Compute]]:
    """The products before each start and each wait, and after the last one."""
    parts: list[list[Compute]] = [[]]
    for step in steps:
        if isinstance(step, Compute):
            parts[-1].append(step)
        else:
            parts.append([])
    return parts
