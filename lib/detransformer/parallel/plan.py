"""The plan: one strategy a layer, the split sizes of each device, the wire format of messages.

The executor runs a plan, the cost model prices it, and a table's row names it. The published methods are points in this
space (`published_plan`); docs/design.md describes layouts and strategies.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Annotated, Literal

from pydantic import Field
from transformers import PretrainedConfig

import detransformer.parallel.sync  # noqa: F401  registers the strategies, with those that it builds on
from detransformer.models.configuration import architecture, ffn_size, layer_kinds
from detransformer.parallel.layer import STRATEGIES, UNSUMMED
from detransformer.parallel.methods import BLOCK_METHODS, DIRECT_METHODS, ORIGINAL_LAYER_STRATEGY, SHARDS_LAYERS
from detransformer.parallel.partition import bounds, split
from detransformer.parallel.wire import TOKEN_FORMATS, check_wire
from detransformer.typed_json import STRICT, from_json

Counts = tuple[Annotated[int, Field(strict=True, ge=0, lt=2**31)], ...]
Shares = tuple[Annotated[float, Field(strict=True, ge=0, lt=1e18, allow_inf_nan=False)], ...]


@dataclass(frozen=True)
class Plan:
    """One way to run one model over `num_devices` devices.

    Args:
        method: its name in tables (`bp+tp`, ...); only a label.
        strategies: one of `STRATEGIES` a layer, first to last.
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
        unknown = set(self.strategies) - set(STRATEGIES)
        if unknown:
            raise ValueError(f"strategy {sorted(unknown)[0]!r} is unknown: choose from {', '.join(STRATEGIES)}.")

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

    def check(self, config: PretrainedConfig) -> None:
        """Raises ValueError unless this plan fits a model of `config`."""
        kinds = layer_kinds(config)
        if len(self.strategies) != len(kinds):
            raise ValueError(
                f"the plan has {len(self.strategies)} layers, the model {len(kinds)}: make it for this model."
            )
        for i, (name, kind) in enumerate(zip(self.strategies, kinds, strict=True)):
            if STRATEGIES[name].layer_kind != kind:
                raise ValueError(
                    f"strategy {name!r} at layer {i} is for {STRATEGIES[name].layer_kind} layers, and this one is "
                    f"{kind}: choose another strategy."
                )
        for rank in range(1, len(self.stages)):
            first = bounds(self.stages, rank)[0]
            if first < len(kinds) and STRATEGIES[self.strategies[first]].in_layout == UNSUMMED:
                raise ValueError(
                    f"stages={list(self.stages)} cut the model before layer {first}, where X is not whole (a "
                    f"{kinds[first]!r} layer): cut it where everything has been added up, or take another plan."
                )
        dtensor = {ORIGINAL_LAYER_STRATEGY["dtensor"]}
        if self.runs == "dtensor" and (architecture(config) != "bert" or set(self.strategies) != dtensor):
            raise ValueError(
                "runs='dtensor' runs every layer of an unmodified BERT by 'tensor': take another model or strategies, "
                "or runs='layers'."
            )
        whole = {  # what the devices' parts must add up to
            "heads": config.num_attention_heads,
            "ffn_columns": ffn_size(config),
            "sub_blocks": getattr(config, "num_divisions", 1),
            "stages": len(kinds),
        }
        for name, size in whole.items():
            parts = getattr(self, name)
            if (parts or name != "stages") and (len(parts) != self.num_devices or sum(parts) != size):
                raise ValueError(
                    f"the plan's {name} are {list(parts)}: it must be {self.num_devices} numbers that add up to {size}."
                )
        if len(self.tokens_share) != self.num_devices or not sum(self.tokens_share):
            raise ValueError(
                f"the plan's tokens_share is {list(self.tokens_share)}: it must be {self.num_devices} numbers, not all "
                "0."
            )

    def keeps_whole(self, layer: int, device: int) -> bool:
        """Whether the cluster's `device` keeps some weights of `layer` whole."""
        if device not in self.device_ids or layer not in self.layers(self.device_ids.index(device)):
            return False
        strategy = STRATEGIES[self.strategies[layer]]
        return not self.splits_layers or "all" in (strategy.qkv_weights, strategy.rest_weights)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Plan":
        """The plan of `to_dict`, or of a user's file.

        Raises:
            ValueError: for a field that is missing, unknown or of the wrong type.
        """
        return from_json(cls, fields, "plan")


def strategies_for(config: PretrainedConfig, original: str) -> tuple[str, ...]:
    """One strategy a layer: `original` for original layers, the only strategy for each other kind of layer."""
    names = {strategy.layer_kind: name for name, strategy in STRATEGIES.items()} | {"original": original}
    return tuple(names[kind] for kind in layer_kinds(config))


def published_plan(
    method: str, config: PretrainedConfig, speeds: Sequence[float] = (1.0,), wire: str = "float32"
) -> Plan:
    """The plan of a named method on devices of these relative `speeds` (one entry a device).

    `single` and `dp` keep the whole model on a device; `pp` cuts the layers in stages; `tp`, `sp`, `ulysses`,
    `galaxy` and `dtensor` need a model of original layers; `bp+...` need a decoupled one (DATE 2024, Section III-C).

    Raises:
        ValueError: for an unknown method, or one that does not fit the model.
    """
    if method not in ORIGINAL_LAYER_STRATEGY:
        raise ValueError(f"method {method!r} is unknown: choose from {', '.join(ORIGINAL_LAYER_STRATEGY)}.")
    kinds = layer_kinds(config)
    decoupled = "decoupled" in kinds
    if method in BLOCK_METHODS and not decoupled:
        raise ValueError(f"{method} needs a decoupled model: decouple the checkpoint first (`detransformer decouple`).")
    if method in SHARDS_LAYERS and decoupled:
        raise ValueError(
            f"{method} runs original layers only, and this model is decoupled: use bp+tp, bp+sp or bp+auto."
        )
    if method == "pp" and len(speeds) > len(kinds):
        raise ValueError(f"{len(speeds)} devices cannot share {len(kinds)} layers: use at most {len(kinds)} devices.")
    if method == "single":
        speeds = speeds[:1]
    strategies = strategies_for(config, ORIGINAL_LAYER_STRATEGY[method])
    plan = layer_plan(method, config, strategies, speeds, wire, direct=method in DIRECT_METHODS)
    if method == "pp":
        return replace(plan, runs="stages", stages=tuple(split(len(kinds), speeds)))
    return replace(plan, runs={"dp": "copies", "dtensor": "dtensor"}.get(method, "layers"))


def layer_plan(
    method: str,
    config: PretrainedConfig,
    strategies: Sequence[str],
    speeds: Sequence[float],
    wire: str = "float32",
    direct: bool = True,
    num_chunks: int = 1,
    devices: Sequence[int] = (),
) -> Plan:
    """A plan of any `strategies`, one a layer, with all sizes split by `speeds`, over `devices` (default: the first).

    Raises:
        ValueError: if there are more devices than sub-blocks or heads to share.
    """
    blocks = getattr(config, "num_divisions", 1)
    split_by = {name for strategy in set(strategies) for name in STRATEGIES[strategy].splits}
    if "sub_blocks" in split_by and len(speeds) > blocks:
        raise ValueError(
            f"{len(speeds)} devices cannot share {blocks} sub-blocks: use at most {blocks} devices, "
            f"or a model of at least {len(speeds)} divisions."
        )
    if "heads" in split_by and len(speeds) > config.num_attention_heads:
        raise ValueError(f"{len(speeds)} devices cannot share {config.num_attention_heads} heads: use fewer devices.")
    return Plan(
        method=method,
        strategies=tuple(strategies),
        heads=tuple(split(config.num_attention_heads, speeds)),
        tokens_share=tuple(float(s) for s in speeds),
        ffn_columns=tuple(split(ffn_size(config), speeds)),
        sub_blocks=tuple(split(blocks, speeds)),
        wire=wire,
        direct=direct,
        num_chunks=num_chunks,
        devices=tuple(devices),
    )
