"""How work is split over devices: pure functions from totals and speeds to sizes, and the plan, which holds the sizes.

`parallel.plan` makes and checks plans.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heapify, heapreplace
from itertools import groupby
from typing import Annotated, Literal

from pydantic import Field

from detransformer.parallel.wire import TOKEN_FORMATS, check_wire
from detransformer.typed_json import STRICT, from_json


def split(total: int, speeds: Sequence[float]) -> list[int]:
    """Splits `total` indivisible units so that the slowest device takes as little time as possible.

    Sizes are in proportion to `speeds`, rounded down; each remaining unit goes to the device that would finish it
    first (ties: the first device). This is D'Hondt's apportionment, which minimises max(size / speed).
    `split(128, [1, 1, 1])` is `[43, 43, 42]`; `split(12, [1, 1, 2, 4])` is `[1, 1, 3, 7]`.

    Raises:
        ValueError: if there is no device, or a speed is not positive.
    """
    if not speeds or min(speeds) <= 0:
        raise ValueError(f"speeds={list(speeds)}: at least one device is needed, and every speed must be above 0.")
    whole = sum(speeds)
    sizes = [int(total * speed / whole) for speed in speeds]
    waiting = [((size + 1) / speed, i) for i, (size, speed) in enumerate(zip(sizes, speeds, strict=True))]
    heapify(waiting)
    for _ in range(total - sum(sizes)):
        _, i = waiting[0]
        sizes[i] += 1
        heapreplace(waiting, ((sizes[i] + 1) / speeds[i], i))
    return sizes


def bounds(sizes: Sequence[int], rank: int) -> tuple[int, int]:
    """Start and stop of device `rank`'s part: `bounds([3, 2, 2], 1)` is `(3, 5)`."""
    start = sum(sizes[:rank])
    return start, start + sizes[rank]


Counts = tuple[Annotated[int, Field(strict=True, ge=0, lt=2**31)], ...]
Shares = tuple[Annotated[float, Field(strict=True, ge=0, lt=1e18, allow_inf_nan=False)], ...]


@dataclass(frozen=True)
class Plan:
    """One way to run one model over `num_devices` devices.

    Args:
        method: its name in tables (`bp+tp`, ...); only a label.
        strategies: one of `parallel.layer.STRATEGIES` a layer, first to last.
        heads, tokens_share, ffn_columns, sub_blocks: what each device takes; tokens are split per request, in
            proportion to `tokens_share`, since the sequence length belongs to the request.
        stages: layers of each device, in order, if `runs` is `stages`; empty for every other plan.
        wire: format of messages, one of `parallel.wire.WIRE_FORMATS`.
        direct: whether X changes from one sharded layout to the other by one all_to_all; otherwise through Replicate,
            as published.
        num_chunks: how many parts a request's tokens are cut into, so that one part travels while another is computed;
            1 as published.
        devices: the cluster's devices that take part, in rank order; empty: the first ones, in the cluster's order.
        runs: how the devices share the model: each layer together (`layers`); each some layers (`stages`, a pipeline);
            each a whole copy for its own requests (`copies`, data parallelism); or each layer together by PyTorch's
            DTensor instead of the strategies (`dtensor`).
    """

    __pydantic_config__ = STRICT

    method: str
    strategies: tuple[str, ...]
    heads: Counts
    tokens_share: Shares
    ffn_columns: Counts
    sub_blocks: Counts
    stages: Counts = ()
    wire: str = "float32"
    direct: Annotated[bool, Field(strict=True)] = False
    num_chunks: Annotated[int, Field(strict=True, ge=1)] = 1
    devices: Counts = ()
    runs: Literal["layers", "stages", "copies", "dtensor"] = "layers"

    def __post_init__(self):
        check_wire(self.wire)
        if self.devices and (len(self.devices) != len(self.heads) or len(set(self.devices)) != len(self.devices)):
            raise ValueError(f"devices={self.devices} must name {len(self.heads)} different devices, one a rank.")
        if bool(self.stages) != (self.runs == "stages"):
            raise ValueError(
                f"stages={list(self.stages)} and runs={self.runs!r} disagree: a pipeline has both runs='stages' and "
                "the layers of each device in stages, every other plan neither."
            )

    @property
    def num_devices(self) -> int:
        return len(self.heads)

    @property
    def device_ids(self) -> tuple[int, ...]:
        """The cluster's device of each rank."""
        return self.devices or tuple(range(self.num_devices))

    @property
    def number_format(self) -> str:
        """The format of all messages except `sequence`'s K and V, which alone may be in a token format."""
        return "int8" if self.wire in TOKEN_FORMATS else self.wire

    @property
    def splits_layers(self) -> bool:
        """Whether the devices share each layer (model parallelism); otherwise each runs layers whole."""
        return self.num_devices > 1 and self.runs in ("layers", "dtensor")

    def on_one_device(self) -> "Plan":
        """The same layers, each run whole: what one device of a pipeline or of data parallelism does."""
        return replace(
            self,
            heads=(sum(self.heads),),
            tokens_share=(1.0,),
            ffn_columns=(sum(self.ffn_columns),),
            sub_blocks=(sum(self.sub_blocks),),
            stages=(),
            num_chunks=1,
            devices=(),
            runs="layers",
        )

    def layers(self, rank: int) -> range:
        """The layers that device `rank` runs: its stage of a pipeline, else all."""
        return range(*bounds(self.stages, rank)) if self.stages else range(len(self.strategies))

    def tokens(self, seq_len: int) -> list[list[int]]:
        """Tokens that each device takes under `shard(seq)`: `[chunk][device]` of a request of `seq_len`."""
        chunks = split(seq_len, [1.0] * min(self.num_chunks, seq_len))
        return [split(size, self.tokens_share) for size in chunks]

    def vocabulary(self, vocab_size: int) -> list[int]:
        """Words of the vocabulary that each device scores when a decoder chooses its next token."""
        return split(vocab_size, self.tokens_share)

    def describe(self) -> str:
        """Short text, e.g. `2 block + tensor, x4`, or the stages of a pipeline."""
        if self.stages:
            return "stages of " + "+".join(map(str, self.stages)) + " layers"
        runs = [(name, len(list(run))) for name, run in groupby(self.strategies)]
        for period in range(1, len(runs) + 1):
            repeats, rest = divmod(len(runs), period)
            if not rest and runs[:period] * repeats == runs:
                words = " + ".join(name if count == 1 else f"{count} {name}" for name, count in runs[:period])
                words = words if repeats == 1 else f"({words}) x{repeats}"
                return words + (f", {self.num_chunks} chunks" if self.num_chunks > 1 else "")
        raise AssertionError("a sequence is always one repeat of itself")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Plan":
        """The plan of `to_dict`, or of a user's file.

        Raises:
            ValueError: for a field that is missing, unknown or of the wrong type.
        """
        return from_json(cls, fields, "plan")
