"""Random and uniform policies within C1-C6, and policies grown to their limits (CoFormer 2025, Eq. 8 and Fig. 11)."""

from dataclasses import replace
from itertools import product

import numpy as np

from detransformer.coformer.policy import Limits, Original, Policy, SubModelConfig, flops, memory_bytes, violations

KINDS = ("width", "ffn", "heads", "layers")  # kinds of changes
MAX_STEPS = 3  # in one random change
NUM_TRIES = 20  # random changes tried until one breaks no constraint


def sample_policy(rng: np.random.Generator, original: Original, limits: Limits | None, num_devices: int) -> Policy:
    """A random policy within C1-C6, its widths in multiples of `hidden_step` and `ffn_step`.

    Each device draws its share of embedding, heads and FFN, which varies by layer; a part of the original may stay
    unused. Nothing is rejected: a sub-model above its device's limits is shrunk until it fits.

    Raises:
        ValueError: if no policy exists, naming the constraint.
    """
    _check_room(original, num_devices)
    share = rng.dirichlet(np.full(num_devices, 2.0))
    num_layers = rng.integers(1, original.num_layers + 1, num_devices)
    widths = original.hidden_step * _draw(rng, original.hidden_size // original.hidden_step, _vary(rng, share))
    head_share, ffn_share = _vary(rng, share), _vary(rng, share)
    heads, ffn = ([[] for _ in range(num_devices)] for _ in range(2))
    for layer in range(max(num_layers)):
        there = np.flatnonzero(num_layers > layer)  # sub-models that have this layer
        layer_heads = _draw(rng, original.num_heads, head_share[there])
        layer_ffn = original.ffn_step * _draw(rng, original.ffn_size // original.ffn_step, ffn_share[there])
        for n, num_heads, ffn_size in zip(there, layer_heads, layer_ffn, strict=True):
            heads[n].append(num_heads)
            ffn[n].append(ffn_size)
    configs = [SubModelConfig(len(h), int(w), h, f) for w, h, f in zip(widths, heads, ffn, strict=True)]
    if limits is not None:
        most = list(zip(limits.flops, limits.memory_bytes, strict=True))
        configs = [_shrunk(rng, config, original, most[n], f"device {n}") for n, config in enumerate(configs)]
    return Policy(tuple(configs))


def mutate_policy(rng: np.random.Generator, policy: Policy, original: Original, limits: Limits | None) -> Policy:
    """A valid policy near `policy`: one to four random changes of a sub-model's layers, width, heads or FFN.

    Changes that break a constraint are drawn again, at most `NUM_TRIES` times; then `policy` itself is returned.
    """
    for _ in range(NUM_TRIES):
        configs = list(policy.sub_models)
        for _ in range(rng.integers(1, 5)):
            n, kind = rng.integers(len(configs)), KINDS[rng.integers(len(KINDS))]
            first, last = sorted(rng.integers(0, configs[n].num_layers, 2))
            steps = rng.integers(1, MAX_STEPS + 1) * rng.choice((-1, 1))
            configs[n] = _changed(configs[n], kind, range(first, last + 1), int(steps), original)
        mutated = Policy(tuple(configs))
        if not violations(mutated, original, limits):
            return mutated
    return policy


def uniform_policy(original: Original, num_devices: int, limits: Limits | None = None) -> Policy:
    """The same sub-model for each device (the uniform decomposition of Fig. 11): 1/N of embedding, heads and FFN.

    It has all layers, or fewer if a device's limits require it.

    Raises:
        ValueError: if not even one layer of it fits, naming the constraint.
    """
    width = original.hidden_size // num_devices // original.hidden_step * original.hidden_step
    ffn = original.ffn_size // num_devices // original.ffn_step * original.ffn_step
    for layers in range(original.num_layers, 0, -1):
        config = SubModelConfig.alike(layers, width, original.num_heads // num_devices, ffn)
        policy = Policy((config,) * num_devices)
        found = violations(policy, original, limits)
        if not found:
            return policy
    raise ValueError(f"no uniform policy of {num_devices} devices: {found[0]}.")


def sample_uniform_policy(
    rng: np.random.Generator, original: Original, limits: Limits | None, num_devices: int
) -> Policy:
    """A random policy within C1-C6 that gives each device the same sub-model."""
    _check_room(original, num_devices)
    layers = int(rng.integers(1, original.num_layers + 1))
    width_step, ffn_step = original.hidden_step, original.ffn_step
    width = width_step * rng.integers(1, original.hidden_size // width_step // num_devices + 1)
    heads = rng.integers(1, original.num_heads // num_devices + 1, layers)
    ffn = ffn_step * rng.integers(1, original.ffn_size // ffn_step // num_devices + 1, layers)
    config = SubModelConfig(layers, int(width), heads, ffn)
    if limits is not None:
        config = _shrunk(rng, config, original, (min(limits.flops), min(limits.memory_bytes)), "the smallest")
    return Policy((config,) * num_devices)


def filled(policy: Policy, original: Original, limits: Limits) -> Policy:
    """`policy` grown step by step until it reaches its limits or nothing is left to give (C1-C6).

    A search may stay below its limits; rows that are compared at equal FLOPs should not.
    """
    grows = True
    while grows:
        grows = False
        for number, kind in product(range(policy.num_devices), KINDS):
            for layer in range(policy.sub_models[number].num_layers if kind in ("ffn", "heads") else 1):
                larger = _changed(policy.sub_models[number], kind, [layer], 1, original)
                grown = Policy((*policy.sub_models[:number], larger, *policy.sub_models[number + 1 :]))
                if not violations(grown, original, limits):
                    policy, grows = grown, True
    return policy


def _changed(config: SubModelConfig, kind: str, layers, steps: int, original: Original) -> SubModelConfig:
    """`config` by `steps` wider (narrower, if negative), with more heads or FFN columns in `layers`, or deeper.

    Nothing falls below one step. Added layers have the smallest sizes; layers are removed from the end.
    """
    if kind == "width":
        return replace(config, hidden_size=max(config.hidden_size + steps * original.hidden_step, original.hidden_step))
    heads, ffn_sizes = list(config.num_heads), list(config.ffn_sizes)
    if kind == "layers":
        heads, ffn_sizes = heads + [1] * steps, ffn_sizes + [original.ffn_step] * steps
        count = max(config.num_layers + steps, 1)
        return SubModelConfig(count, config.hidden_size, heads[:count], ffn_sizes[:count])
    sizes, step = (heads, 1) if kind == "heads" else (ffn_sizes, original.ffn_step)
    for layer in layers:
        sizes[layer] = max(sizes[layer] + steps * step, step)
    return replace(config, num_heads=heads, ffn_sizes=ffn_sizes)


def _check_room(original: Original, num_devices: int) -> None:
    """Raises ValueError unless each device can have one step of everything."""
    for name, what, parts in (
        ("C2", f"{original.hidden_step} embedding dimensions", original.hidden_size // original.hidden_step),
        ("C3", "one head", original.num_heads),
        ("C4", f"{original.ffn_step} FFN columns", original.ffn_size // original.ffn_step),
    ):
        if parts < num_devices:
            raise ValueError(
                f"{name}: {num_devices} sub-models of at least {what} each need more than the original has: "
                "take fewer devices."
            )


def _vary(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    """Shares near `share`: a device with much of one thing tends to get much of all."""
    return rng.dirichlet(1 + 10 * share)


def _draw(rng: np.random.Generator, num_parts: int, share: np.ndarray) -> np.ndarray:
    """At least one part each, the rest at random by `share`; mostly all parts are used, sometimes as few as half.

    `share` need not sum to 1.
    """
    unused = int(num_parts * max(0.0, rng.uniform(-0.5, 0.5)))
    used = max(num_parts - unused, len(share))
    return 1 + rng.multinomial(used - len(share), share / share.sum())


def _shrunk(
    rng: np.random.Generator, config: SubModelConfig, original: Original, most: tuple[float, float], device: str
) -> SubModelConfig:
    """`config` made smaller, one of its sizes by an eighth at a time, until it is within `most` FLOPs and bytes."""

    def less(size: int, step: int = 1) -> int:
        parts = size // step
        return step * max(1, parts - max(1, parts // 8))

    while (over := flops(config, original) > most[0]) or memory_bytes(config, original) > most[1]:
        layers = max(1, config.num_layers - max(1, (config.num_layers - 1) // 8))
        smaller = [
            # The last layers go, so that the k-th layers of other sub-models, which C3 and C4 add up, stay the same.
            SubModelConfig(layers, config.hidden_size, config.num_heads[:layers], config.ffn_sizes[:layers]),
            replace(config, hidden_size=less(config.hidden_size, original.hidden_step)),
            replace(config, num_heads=tuple(map(less, config.num_heads))),
            replace(config, ffn_sizes=tuple(less(size, original.ffn_step) for size in config.ffn_sizes)),
        ]
        smaller = [other for other in smaller if other != config]
        if not smaller:
            name = "C5" if over else "C6"
            raise ValueError(f"{name}: the smallest sub-model is above the limit of {device}: raise it.")
        config = smaller[rng.integers(len(smaller))]
    return config
