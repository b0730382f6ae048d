"""What a plan keeps on each device: weights (counted by loading them without numbers), keys and values, activations."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from transformers import PretrainedConfig

from detransformer.models.configuration import ffn_size, is_decoder
from detransformer.parallel.executor import embeddings_of, ending_of
from detransformer.parallel.layer import STRATEGIES, Strategy
from detransformer.parallel.plan import Plan, keeps_whole
from detransformer.parallel.weights import WeightSource
from detransformer.planning.recorder import MAX_KEPT, Recorder, Sizes, load_layer, sizes_of, small_model
from detransformer.planning.tape import Tape, TapeComm

FLOAT_BYTES = 4


@lru_cache(MAX_KEPT)
def ends_bytes(sizes: Sizes) -> tuple[int, int, int]:
    """Bytes of weights before the layers, after the layers, and of both together, since they may share some."""
    config, state = small_model(sizes)
    plan, comm, taken = Plan("", (), (1,), (1.0,), (1,), (1,)), TapeComm(0, 1, Tape()), []
    for first, last in ((True, False), (False, True), (True, True)):
        source = WeightSource(state)
        if first:
            embeddings_of(config, source)
        if last:
            ending_of(config, source, plan, comm)
        taken.append(source.num_bytes)
    return tuple(taken)


Part = tuple[type[Strategy], int, int, int]  # a strategy, and a device's own heads, columns and sub-blocks


@lru_cache(MAX_KEPT)
def _layer_bytes(sizes: Sizes, parts: tuple[Part, ...], keeps_whole: bool = False) -> int:
    """Bytes of a layer's weights that a device keeps to run it by each of `parts` (of `_own_part`)."""
    config, state = small_model(sizes)
    source = WeightSource(state)
    whole = config.num_attention_heads, ffn_size(config), getattr(config, "num_divisions", 1)
    for strategy, *own in parts:
        heads, columns, blocks = ((size, total - size) for size, total in zip(own, whole, strict=True))
        plan = Plan("", (), heads, (1.0, 1.0), columns, blocks)
        load_layer(sizes, strategy, plan, TapeComm(0, 2, Tape()), source, keeps_whole)
    return source.num_bytes


def layer_bytes(sizes: Sizes, name: str, plan: Plan, rank: int) -> int:
    """Bytes of weights that device `rank` keeps of one layer under strategy `name`."""
    return _layer_bytes(sizes, (_own_part(name, plan, rank),))


def _own_part(name: str, plan: Plan, rank: int) -> Part:
    """A device's own part of a layer's weights under a strategy; 0 for what the strategy does not split."""
    strategy = STRATEGIES[name]
    fields = "heads", "ffn_columns", "sub_blocks"
    return strategy, *(getattr(plan, field)[rank] if field in strategy.splits else 0 for field in fields)


def held_bytes(config: PretrainedConfig, plans: Sequence[Plan], device: int) -> int:
    """Bytes of weights that the cluster's `device` keeps to run any of `plans`, which split layers alike."""
    sizes, total = sizes_of(config), 0
    plans = [plan for plan in plans if device in plan.device_ids]
    for layer in range(config.num_hidden_layers):
        parts = []
        for plan in plans:
            rank = plan.device_ids.index(device)
            if layer in plan.layers(rank):
                local, rank = (plan, rank) if plan.splits_layers else (plan.on_one_device(), 0)
                parts.append(_own_part(plan.strategies[layer], local, rank))
        if parts:
            whole = len(plans) > 1 and any(keeps_whole(plan, layer, device) for plan in plans)
            total += _layer_bytes(sizes, tuple(dict.fromkeys(parts)), whole)
    first = any(not plan.stages or plan.device_ids[0] == device for plan in plans)
    last = any(not plan.stages or plan.device_ids[-1] == device for plan in plans)
    if first or last:
        total += ends_bytes(sizes)[2 if first and last else 0 if first else 1]
    return total


def weights_bytes(config: PretrainedConfig, plan: Plan) -> list[int]:
    """Bytes of weights that each rank of `plan` keeps: embeddings, its part of the layers, the model's ending."""
    if plan.stages:
        return [held_bytes(config, [plan], device) for device in plan.device_ids]
    sizes, counts = sizes_of(config), Counter(plan.strategies)
    local, ranks = (plan, range(plan.num_devices)) if plan.splits_layers else (plan.on_one_device(), (0,))
    layers = [sum(n * layer_bytes(sizes, name, local, rank) for name, n in counts.items()) for rank in ranks]
    each = [ends_bytes(sizes)[2] + num_bytes for num_bytes in layers]
    return each if len(each) == plan.num_devices else each * plan.num_devices


def activation_bytes(config: PretrainedConfig, seq_len: int, batch_size: int) -> int:
    """Upper bound on what one layer keeps alive at once: X twice, Q, K, V, context, scores, the FFN's inner state."""
    blocks = getattr(config, "num_divisions", 1)
    per_token = 6 * config.hidden_size * blocks + config.num_attention_heads * seq_len * blocks
    return FLOAT_BYTES * batch_size * seq_len * (per_token + ffn_size(config) * blocks)


def cache_bytes(config: PretrainedConfig, plan: Plan, rank: int, num_tokens: int, batch_size: int = 1) -> int:
    """Bytes of K and V of `num_tokens` tokens of a decoder that device `rank` keeps; 0 for an encoder.

    A decoupled layer of full attention width has Ndiv times an original layer's keys and values.
    """
    if not is_decoder(config):
        return 0
    local, own = (plan, rank) if plan.splits_layers else (plan.on_one_device(), 0)
    names = [plan.strategies[layer] for layer in plan.layers(rank)]
    recorder = Recorder(config, local, 1, batch_size, past=1)
    return num_tokens * sum(n * recorder.layer(name, own).cache_bytes // 2 for name, n in Counter(names).items())


def memory_bytes(config: PretrainedConfig, plan: Plan, seq_len: int, batch_size: int = 1, past: int = 0) -> list[int]:
    """Bytes that each rank of `plan` keeps: weights, a decoder's keys and values, the largest layer's activations."""
    activations = activation_bytes(config, seq_len, batch_size)
    return [
        weights + activations + cache_bytes(config, plan, rank, past + seq_len, batch_size)
        for rank, weights in enumerate(weights_bytes(config, plan))
    ]


def least_bytes(config: PretrainedConfig, seq_len: int, batch_size: int = 1) -> int:
    """Bytes that a device needs to take any part in a request: embeddings, the model's ending, activations."""
    return ends_bytes(sizes_of(config))[2] + activation_bytes(config, seq_len, batch_size)
