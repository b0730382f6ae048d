"""Random and uniform policies within C1-C6, and policies grown to their limits (CoFormer 2025, Eq. 8 and Fig. 11)."""

from dataclasses import replace
from itertools import product

import numpy as np

from detransformer.coformer.policy import (
    Limits,
    Original,
    Policy,
    SubModelConfig,
    flops,
    memory_bytes,
    violations,
)


def sample_policy(rng: np.random.Generator, original: Original, limits: Limits | None, num_devices: int) -> Policy:
    """A random policy within C1-C6, its widths in multiples of `hidden_step` and `ffn_step`.

    Each device draws its share of embedding, heads and FFN, which varies from layer to layer; a part of the original
    may stay unused. Nothing is rejected: a sub-model above its device's limits is made smaller until it fits.

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
    return _within(rng, configs, original, limits)


def mutate_policy(rng: np.random.Generator, policy: Policy, original: Original, limits: Limits | None) -> Policy:
    """A valid policy near `policy`: one to three changes of a sub-model's layers, width, heads or FFN.

    What the sub-models then have too much of together (C2-C4) is taken from the one that has most of it.
    """
    configs = list(policy.sub_models)
    for _ in range(rng.integers(1, 4)):
        n = int(rng.integers(len(configs)))
        configs[n] = _mutated(rng, configs[n], original)
        configs = _shared_out(configs, n, original)
    return _within(rng, configs, original, limits)


def uniform_policy(original: Original, num_devices: int, limits: Limits | None = None) -> Policy:
    """The same sub-model for each device (the uniform decomposition of Fig. 11): 1/N of embedding, heads and FFN.

    It has all layers, or fewer where a device's limits ask for it.

    Raises:
        ValueError: if not even one layer of it fits, naming the constraint.
    """
    _check_room(original, num_devices)
    width = original.hidden_size // num_devices // original.hidden_step * original.hidden_step
    heads = original.num_heads // num_devices
    ffn = original.ffn_size // num_devices // original.ffn_step * original.ffn_step
    for layers in range(original.num_layers, 0, -1):
        policy = Policy((SubModelConfig(layers, width, (heads,) * layers, (ffn,) * layers),) * num_devices)
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
        config = _shrunk(rng, config, original, min(limits.flops), min(limits.memory_bytes), "the smallest")
    return Policy((config,) * num_devices)


def _check_room(original: Original, num_devices: int) -> None:
    """Each device needs one step of everything."""
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
    """Shares near `share`: a device that is given much of one thing tends to be given much of all."""
    return rng.dirichlet(1 + 10 * share)


def _draw(rng: np.random.Generator, num_parts: int, share: np.ndarray) -> np.ndarray:
    """At least one part each, and the rest by `share` with chance; mostly all parts are used, at times as few as half.

    `share` need not sum to 1.
    """
    unused = int(num_parts * max(0.0, rng.uniform(-0.5, 0.5)))
    used = max(num_parts - unused, len(share))
    return 1 + rng.multinomial(used - len(share), share / share.sum())


def _mutated(rng: np.random.Generator, config: SubModelConfig, original: Original) -> SubModelConfig:
    """One change of up to three steps of one sub-model, within the original's own sizes."""
    kind = ("layers", "width", "heads", "ffn")[rng.integers(4)]
    change = (-3, -2, -1, 1, 2, 3)[rng.integers(6)]
    if kind == "width":
        widest = original.hidden_size // original.hidden_step * original.hidden_step
        width = int(np.clip(config.hidden_size + change * original.hidden_step, original.hidden_step, widest))
        return replace(config, hidden_size=width)
    if kind == "layers":  # some are left out, or come twice: layers are like others near them
        wanted = int(np.clip(config.num_layers + change, 1, original.num_layers))
        kept = np.sort(rng.choice(config.num_layers, wanted, replace=wanted > config.num_layers))
        heads, ffn = ([sizes[layer] for layer in kept] for sizes in (config.num_heads, config.ffn_sizes))
        return SubModelConfig(wanted, config.hidden_size, heads, ffn)
    start, stop = sorted(rng.integers(0, config.num_layers + 1, 2))
    start, stop = (start, stop) if start < stop else (0, config.num_layers)
    name, step, most = "num_heads", 1, original.num_heads
    if kind == "ffn":
        name, step, most = "ffn_sizes", original.ffn_step, original.ffn_size // original.ffn_step * original.ffn_step
    sizes = np.array(getattr(config, name))
    sizes[start:stop] = np.clip(sizes[start:stop] + change * step, step, most)
    return replace(config, **{name: tuple(sizes)})


def _shared_out(configs: list[SubModelConfig], changed: int, original: Original) -> list[SubModelConfig]:
    """C2-C4 again after sub-model `changed` grew: what is too much is taken from the others that have most."""
    widths = _lowered([c.hidden_size for c in configs], changed, original.hidden_step, original.hidden_size)
    heads, ffn = [list(c.num_heads) for c in configs], [list(c.ffn_sizes) for c in configs]
    for sizes, step, most in ((heads, 1, original.num_heads), (ffn, original.ffn_step, original.ffn_size)):
        for layer in range(max(map(len, sizes))):
            there = [n for n, own in enumerate(sizes) if layer < len(own)]
            spared = there.index(changed) if changed in there else -1
            lowered = _lowered([sizes[n][layer] for n in there], spared, step, most)
            for n, size in zip(there, lowered, strict=True):
                sizes[n][layer] = size
    return [SubModelConfig(len(h), w, h, f) for w, h, f in zip(widths, heads, ffn, strict=True)]


def _lowered(sizes: list[int], spared: int, step: int, most: int) -> list[int]:
    """`sizes` with a sum of at most `most`, none below `step`; the one at `spared` is lowered last."""
    sizes = list(sizes)
    while sum(sizes) > most:
        # `_check_room` made sure that there is one above a step.
        largest = max(range(len(sizes)), key=lambda n: (sizes[n] > step, n != spared, sizes[n]))
        sizes[largest] -= step
    return sizes


def _within(
    rng: np.random.Generator, configs: list[SubModelConfig], original: Original, limits: Limits | None
) -> Policy:
    """The policy of `configs`, those above their device's limits (C5, C6) made smaller."""
    if limits is not None:
        room = enumerate(zip(configs, limits.flops, limits.memory_bytes, strict=True))
        configs = [_shrunk(rng, config, original, *most, f"device {n}") for n, (config, *most) in room]
    return Policy(tuple(configs))


def _shrunk(
    rng: np.random.Generator,
    config: SubModelConfig,
    original: Original,
    max_flops: float,
    max_memory: float,
    device: str,
) -> SubModelConfig:
    """`config` made smaller, an eighth of one of its sizes at a time, until it is within both limits."""
    while (over := flops(config, original) > max_flops) or memory_bytes(config, original) > max_memory:
        layers = max(1, config.num_layers - max(1, (config.num_layers - 1) // 8))
        smaller = [
            # The last layers go: the k-th layers of other sub-models, which C3 and C4 count together, stay the same.
            SubModelConfig(layers, config.hidden_size, config.num_heads[:layers], config.ffn_sizes[:layers]),
            replace(config, hidden_size=_eighth_less(config.hidden_size, original.hidden_step)),
            replace(config, num_heads=tuple(_eighth_less(heads, 1) for heads in config.num_heads)),
            replace(config, ffn_sizes=tuple(_eighth_less(size, original.ffn_step) for size in config.ffn_sizes)),
        ]
        smaller = [other for other in smaller if other != config]
        if not smaller:
            name = "C5" if over else "C6"
            raise ValueError(f"{name}: the smallest sub-model is above the limit of {device}: raise it.")
        config = smaller[rng.integers(len(smaller))]
    return config


def _eighth_less(size: int, step: int) -> int:
    """In steps, and one step at least stays."""
    parts = size // step
    return step * max(1, parts - max(1, parts // 8))


def filled(policy: Policy, original: Original, limits: Limits) -> Policy:
    """`policy` grown step by step until it is at its limits or nothing is left to give (C1-C6).

    A search is free to stay below its limits; rows that are compared at equal FLOPs should not.
    """
    grows = True
    while grows:
        grows = False
        for number, kind in product(range(policy.num_devices), ("width", "ffn", "heads", "layers")):
            for layer in range(policy.sub_models[number].num_layers if kind in ("ffn", "heads") else 1):
                larger = _one_step_more(policy.sub_models[number], kind, layer, original)
                grown = Policy((*policy.sub_models[:number], larger, *policy.sub_models[number + 1 :]))
                if not violations(grown, original, limits):
                    policy, grows = grown, True
    return policy


def _one_step_more(config: SubModelConfig, kind: str, layer: int, original: Original) -> SubModelConfig:
    """`config` wider, or with more FFN columns or heads in one layer, or with one more layer, the smallest."""
    heads, ffn_sizes = list(config.num_heads), list(config.ffn_sizes)
    if kind == "width":
        return replace(config, hidden_size=config.hidden_size + original.hidden_step)
    if kind == "layers":
        return SubModelConfig(len(heads) + 1, config.hidden_size, [*heads, 1], [*ffn_sizes, original.ffn_step])
    sizes, step = (heads, 1) if kind == "heads" else (ffn_sizes, original.ffn_step)
    sizes[layer] += step
    return replace(config, num_heads=heads, ffn_sizes=ffn_sizes)
