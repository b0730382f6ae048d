"""The plan: one strategy a layer, the split sizes a device, the wire format.

A plan is what the executor runs, what the cost model prices and what a row of a table names. The published methods are
points in this space (`published_plan`); layouts and strategies are those of the README's section on the formalism.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from transformers import BertConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.partition import split

# Layouts of a hidden state X [B, T, D] over devices
REPLICATE = "replicate"  # every device holds all of X
HIDDEN = "shard(hidden)"  # its sub-blocks' feature slices, all tokens
SEQ = "shard(seq)"  # its tokens, all features


@dataclass(frozen=True)
class Signature:
    """What a strategy runs and the layouts it asks for and leaves."""

    layer_kind: str
    in_layout: str
    out_layout: str


STRATEGIES = {
    "block": Signature("decoupled", HIDDEN, HIDDEN),
    "tensor": Signature("original", REPLICATE, REPLICATE),
    "sequence": Signature("original", SEQ, SEQ),
    "replicate": Signature("original", REPLICATE, REPLICATE),
}
WIRE_FORMATS = ("float32",)


@dataclass(frozen=True)
class Plan:
    """One way to run one model over `num_devices` devices.

    Args:
        method: the name it goes by in tables (`bp+tp`, ...).
        strategies: one of `STRATEGIES` a layer, first to last.
        heads, tokens_share, ffn_columns, sub_blocks: what each device takes; tokens are split per request, in
            proportion to `tokens_share`, since the sequence length belongs to the request.
        stages: pipeline only: layers a device, in order; empty for every other plan.
        wire: number format of messages.
    """

    method: str
    strategies: tuple[str, ...]
    heads: tuple[int, ...]
    tokens_share: tuple[float, ...]
    ffn_columns: tuple[int, ...]
    sub_blocks: tuple[int, ...]
    stages: tuple[int, ...] = ()
    wire: str = "float32"

    def __post_init__(self):
        if self.wire not in WIRE_FORMATS:
            raise ValueError(f"wire={self.wire!r} is unknown: choose one of {', '.join(WIRE_FORMATS)}.")
        unknown = set(self.strategies) - set(STRATEGIES)
        if unknown:
            raise ValueError(f"strategy {sorted(unknown)[0]!r} is unknown: choose from {', '.join(STRATEGIES)}.")

    @property
    def num_devices(self) -> int:
        return len(self.heads)

    @property
    def splits_layers(self) -> bool:
        """Whether the devices share each layer (model parallelism); otherwise each runs layers whole."""
        return self.num_devices > 1 and self.method not in ("dp", "pp")

    def on_one_device(self) -> "Plan":
        """The same layers, each run whole: what one device of a pipeline or of data parallelism does."""
        return replace(
            self,
            heads=(sum(self.heads),),
            tokens_share=(1.0,),
            ffn_columns=(sum(self.ffn_columns),),
            sub_blocks=(sum(self.sub_blocks),),
            stages=(),
        )

    def tokens(self, seq_len: int) -> list[int]:
        """Tokens each device takes of a request of `seq_len` under `sequence`."""
        return split(seq_len, self.tokens_share)

    def describe(self) -> str:
        """Short text, e.g. `2 block + tensor, x4`, or the stages of a pipeline."""
        if self.stages:
            return "stages of " + "+".join(map(str, self.stages)) + " layers"
        runs = [(name, len(list(run))) for name, run in groupby(self.strategies)]
        for period in range(1, len(runs) + 1):
            repeats, rest = divmod(len(runs), period)
            if not rest and runs[:period] * repeats == runs:
                words = " + ".join(name if count == 1 else f"{count} {name}" for name, count in runs[:period])
                return words if repeats == 1 else f"({words}) x{repeats}"
        raise AssertionError("a sequence is always one repeat of itself")

    def check(self, config: BertConfig) -> None:
        """Raises ValueError unless this plan fits a model of `config`."""
        kinds = layer_kinds(config)
        if len(self.strategies) != len(kinds):
            raise ValueError(
                f"the plan has {len(self.strategies)} layers, the model {len(kinds)}: make it for this model."
            )
        for i, (name, kind) in enumerate(zip(self.strategies, kinds, strict=True)):
            if STRATEGIES[name].layer_kind != kind:
                raise ValueError(
                    f"strategy {name!r} at layer {i} needs a {STRATEGIES[name].layer_kind} layer, not a {kind} one."
                )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Plan":
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


# What each published method does with an original layer; decoupled layers go to `block`.
ORIGINAL_LAYER_STRATEGY = {
    "single": "replicate",
    "dp": "replicate",
    "pp": "replicate",
    "tp": "tensor",
    "sp": "sequence",
    "bp+tp": "tensor",
    "bp+sp": "sequence",
    "bp+allgather": "replicate",
}
BLOCK_METHODS = ("bp+tp", "bp+sp", "bp+allgather")  # the paper's Plans 1 to 3 (Section III-C)
METHODS = (*ORIGINAL_LAYER_STRATEGY, "bp+auto")


def published_plan(method: str, config: BertConfig, speeds: Sequence[float] = (1.0,)) -> Plan:
    """The plan of a published method on devices of these relative `speeds` (one entry a device).

    `single` and `dp` keep the whole model on a device; `pp` cuts the layers in stages (EdgeShard's form); `tp`, `sp`
    need a model of original layers; `bp+...` need a decoupled one (DATE 2024, Section III-C).

    Raises:
        ValueError: for an unknown method, or one that does not fit the model.
    """
    if method not in ORIGINAL_LAYER_STRATEGY:
        raise ValueError(f"method {method!r} is unknown: choose from {', '.join(METHODS)}.")
    kinds = layer_kinds(config)
    decoupled = "decoupled" in kinds
    if method in BLOCK_METHODS and not decoupled:
        raise ValueError(f"{method} needs a decoupled model: decouple the checkpoint first (`detransformer decouple`).")
    if method in ("tp", "sp") and decoupled:
        raise ValueError(
            f"{method} runs original layers only, and this model is decoupled: use bp+tp, bp+sp or bp+auto."
        )
    blocks = config.num_divisions if decoupled else 1
    if method in BLOCK_METHODS and len(speeds) > blocks:
        raise ValueError(
            f"{len(speeds)} devices cannot share {blocks} sub-blocks: use at most {blocks} devices, "
            f"or a model of at least {len(speeds)} divisions."
        )
    if method in ("tp", "sp") and len(speeds) > config.num_attention_heads:
        raise ValueError(f"{len(speeds)} devices cannot share {config.num_attention_heads} heads: use fewer devices.")
    if method == "pp" and len(speeds) > len(kinds):
        raise ValueError(f"{len(speeds)} devices cannot share {len(kinds)} layers: use at most {len(kinds)} devices.")
    if method == "single":
        speeds = speeds[:1]
    return Plan(
        method=method,
        strategies=tuple("block" if kind == "decoupled" else ORIGINAL_LAYER_STRATEGY[method] for kind in kinds),
        heads=tuple(split(config.num_attention_heads, speeds)),
        tokens_share=tuple(float(s) for s in speeds),
        ffn_columns=tuple(split(config.intermediate_size, speeds)),
        sub_blocks=tuple(split(blocks, speeds)),
        stages=tuple(split(len(kinds), speeds)) if method == "pp" else (),
    )
