"""What a plan keeps on each device: weights (counted by loading them without numbers), keys and values, activations."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from transformers import PretrainedConfig

from detransformer.models.configuration import ffn_size, is_decoder, layer_kinds
from detransformer.parallel.executor import embeddings_of, ending_of
from detransformer.parallel.layer import STRATEGIES, Strategy
from detransformer.parallel.plan import Plan, keeps_whole
from detransformer.parallel.weights import WeightSource
from detransformer.planning.recorder import MAX_KEPT, Recorder, sizes_of, small_model, split_of
from detransformer.planning.tape import Tape, TapeComm

FLOAT_BYTES = 4


@lru_cache(MAX_KEPT)
def ends_bytes(sizes: str, first: bool = True, last: bool = True) -> int:
    """Bytes of weights before the layers (`first`) and after them (`last`), which may share some."""
    config, state = small_model(sizes)
    source = WeightSource(state)
    if first:
        embeddings_of(config, source)
    if last:
        ending_of(config, source, Plan("", (), (1,), (1.0,), (1,), (1,)), TapeComm(0, 1, Tape()))
    return source.num_bytes


Part = tuple[type[Strategy], int, int, int]  # a strategy, and a device's own heads, columns and sub-blocks


@lru_cache(MAX_KEPT)
def _layer_bytes(sizes: str, parts: tuple[Part, ...], keeps_whole: bool = False) -> int:
    """Bytes of a layer's weights that a device keeps to run it by each of `parts` (of `_own_part`)."""
    config, state = small_model(sizes)
    source = WeightSource(state)
    whole = config.num_attention_heads, ffn_size(config), getattr(config, "num_divisions", 1)
    for strategy, *own in parts:
        heads, columns, blocks = ((size, total - size) for size, total in zip(own, whole, strict=True))
        plan = Plan("", (), heads, (1.0, 1.0), columns, blocks)
        layer = layer_kinds(config).index(strategy.layer_kind)
        strategy(config, plan, TapeComm(0, 2, Tape()), source, layer, keeps_whole)  # takes its weights
    return source.num_bytes


def layer_bytes(sizes: str, name: str, plan: Plan, rank: int) -> int:
    """Bytes of weights that device `rank` keeps of one layer under strategy `name`."""
    return _layer_bytes(sizes, (_own_part(name, plan, rank),))


def _own_part(name: str, plan: Plan, rank: int) -> Part:
    """A device's own part of a layer's weights under a strategy; 0 for what the strategy does not split."""
    (plan, rank), strategy = split_of(plan, rank), STRATEGIES[name]
    fields = "heads", "ffn_columns", "sub_blocks"
    return strategy, *(getattr(plan, field)[rank] if field in strategy.splits else 0 for field in fields)


def held_bytes(config: PretrainedConfig, plans: Sequence[Plan], device: int) -> int:
    """Bytes of weights that the cluster's `device` keeps to run any of `plans`, which split layers alike."""
    return _held_bytes(sizes_of(config), plans, device)


def _held_bytes(sizes: str, plans: Sequence[Plan], device: int) -> int:
    used = [(plan, plan.device_ids.index(device)) for plan in plans if device in plan.device_ids]
    own = []  # each layer's strategy by plan; None: in no stage of this device
    for plan, rank in used:
        stage = plan.layers(rank)
        own.append([name if layer in stage else None for layer, name in enumerate(plan.strategies)])
    total, layers = 0, list(zip(*own, strict=True))
    for names, count in Counter(layers).items():
        parts = [_own_part(name, *where) for name, where in zip(names, used, strict=True) if name]
        whole = len(used) > 1 and any(keeps_whole(plan, layers.index(names), device) for plan, _ in used)
        total += count * _layer_bytes(sizes, tuple(dict.fromkeys(parts)), whole)
    first = any(not plan.stages or rank == 0 for plan, rank in used)
    last = any(not plan.stages or rank == plan.num_devices - 1 for plan, rank in used)
    return total + ends_bytes(sizes, first, last)


def weights_bytes(config: PretrainedConfig, plan: Plan) -> list[int]:
    """Bytes of weights that each rank of `plan` keeps: embeddings, its part of the layers, the model's ending."""
    sizes = sizes_of(config)
    return [_held_bytes(sizes, [plan], device) for device in plan.device_ids]


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
    local, own = split_of(plan, rank)
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
    return ends_bytes(sizes_of(config)) + activation_bytes(config, seq_len, batch_size)
