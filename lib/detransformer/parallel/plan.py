"""Makes plans and checks them: one strategy a layer, the split sizes of each device, the wire format of messages.

The executor runs a plan, the cost model prices it, and a table's row names it. The published methods are points in this
space (`published_plan`); docs/design.md describes layouts and strategies.
"""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PretrainedConfig

import detransformer.parallel.sync  # noqa: F401  registers the strategies, with those that it builds on
from detransformer.models.configuration import architecture, ffn_size, layer_kinds
from detransformer.parallel.layer import STRATEGIES, UNSUMMED
from detransformer.parallel.methods import BLOCK_METHODS, DIRECT_METHODS, ORIGINAL_LAYER_STRATEGY, SHARDS_LAYERS
from detransformer.parallel.partition import Plan, bounds, split


def check_plan(plan: Plan, config: PretrainedConfig) -> None:
    """Raises ValueError unless the plan fits a model of `config`."""
    kinds = layer_kinds(config)
    unknown = set(plan.strategies) - set(STRATEGIES)
    if unknown:
        raise ValueError(f"strategy {sorted(unknown)[0]!r} is unknown: choose from {', '.join(STRATEGIES)}.")
    if len(plan.strategies) != len(kinds):
        raise ValueError(f"the plan has {len(plan.strategies)} layers, the model {len(kinds)}: make it for this model.")
    for i, (name, kind) in enumerate(zip(plan.strategies, kinds, strict=True)):
        if STRATEGIES[name].layer_kind != kind:
            raise ValueError(
                f"strategy {name!r} at layer {i} is for {STRATEGIES[name].layer_kind} layers, and this one is "
                f"{kind}: choose another strategy."
            )
    for rank in range(1, len(plan.stages)):
        first = bounds(plan.stages, rank)[0]
        if first < len(kinds) and STRATEGIES[plan.strategies[first]].in_layout == UNSUMMED:
            raise ValueError(
                f"stages={list(plan.stages)} cut the model before layer {first}, where X is not whole (a "
                f"{kinds[first]!r} layer): cut it where everything has been added up, or take another plan."
            )
    dtensor = {ORIGINAL_LAYER_STRATEGY["dtensor"]}
    if plan.runs == "dtensor" and (architecture(config) != "bert" or set(plan.strategies) != dtensor):
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
        parts = getattr(plan, name)
        if (parts or name != "stages") and (len(parts) != plan.num_devices or sum(parts) != size):
            raise ValueError(
                f"the plan's {name} are {list(parts)}: it must be {plan.num_devices} numbers that add up to {size}."
            )
    if len(plan.tokens_share) != plan.num_devices or not sum(plan.tokens_share):
        raise ValueError(
            f"the plan's tokens_share is {list(plan.tokens_share)}: it must be {plan.num_devices} numbers, not all 0."
        )


def keeps_whole(plan: Plan, layer: int, device: int) -> bool:
    """Whether the cluster's `device` keeps some weights of `layer` whole."""
    if device not in plan.device_ids or layer not in plan.layers(plan.device_ids.index(device)):
        return False
    strategy = STRATEGIES[plan.strategies[layer]]
    return not plan.splits_layers or "all" in (strategy.qkv_weights, strategy.rest_weights)


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
