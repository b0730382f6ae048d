"""Decomposition policies: the sub-models into which a large transformer is cut (CoFormer 2025, Section III-B, Eq. 8).

A policy names one sub-model a device, C_n = {l_n, d_n, h_n^{1:l_n}, D_n^{1:l_n}}. This file has its constraints, its
costs and its encoding for the Gaussian process, all pure functions of sizes.

Letters: L, d, h, D layers, embedding width, heads and FFN width of the large model; s its head size, which sub-models
keep; S tokens; A = h_n^k s the attention width of a sub-model's layer, which is not its embedding width d_n.
"""

import math
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from transformers import PretrainedConfig

from detransformer.models.configuration import ffn_size, max_tokens
from detransformer.models.sizes import embedding_parameters

FLOAT_BYTES = 4
NUM_STEPS = 24  # into which widths are divided when policies are drawn
SIZES = ("num_layers", "hidden_size", "num_heads", "ffn_size")  # L, d, h, D


@dataclass(frozen=True)
class SubModelConfig:
    """C_n: one sub-model's sizes; heads and FFN widths by layer, first to last.

    Raises:
        ValueError: for a size below 1, or lists that are not one entry a layer.
    """

    num_layers: int
    hidden_size: int
    num_heads: tuple[int, ...]
    ffn_sizes: tuple[int, ...]

    def __post_init__(self):
        for name in ("num_heads", "ffn_sizes"):
            sizes = tuple(int(size) for size in getattr(self, name))
            if len(sizes) != self.num_layers:
                raise ValueError(f"{name} lists {len(sizes)} layers and num_layers={self.num_layers}: list each layer.")
            object.__setattr__(self, name, sizes)
        if min(self.num_layers, self.hidden_size, *self.num_heads, *self.ffn_sizes) < 1:
            raise ValueError(f"{self} has a size below 1: every layer needs a head and an FFN column.")

    @classmethod
    def alike(cls, num_layers: int, hidden_size: int, num_heads: int, ffn_size: int) -> "SubModelConfig":
        """A sub-model whose layers all have the same sizes."""
        return cls(num_layers, hidden_size, (num_heads,) * num_layers, (ffn_size,) * num_layers)

    @property
    def mean_heads(self) -> float:
        return sum(self.num_heads) / self.num_layers

    @property
    def mean_ffn_size(self) -> float:
        return sum(self.ffn_sizes) / self.num_layers


@dataclass(frozen=True)
class Policy:
    """C = {C_1, ..., C_N}: a sub-model for each device, in the devices' order."""

    sub_models: tuple[SubModelConfig, ...]

    @property
    def num_devices(self) -> int:
        return len(self.sub_models)

    @property
    def widths(self) -> tuple[int, ...]:
        """d_n of each sub-model."""
        return tuple(config.hidden_size for config in self.sub_models)


@dataclass(frozen=True)
class Original:
    """The large model {L, d, h, D}, and the other sizes that its sub-models' FLOPs and memory depend on.

    Args:
        num_layers, hidden_size, num_heads, ffn_size: L, d, h, D.
        seq_len: S, tokens of a request; for an image its patches and the class token.
        embedding_rows: numbers kept outside the layers for each embedding dimension: embeddings and LayerNorms.
        patch_values: numbers in an image patch, which one product reads; 0: tokens are looked up.
        has_pooler: whether there is BERT's d x d product on the first token.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    seq_len: int = 128
    embedding_rows: int = 0
    patch_values: int = 0
    has_pooler: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def hidden_step(self) -> int:
        """Embedding widths of drawn policies are multiples of this: 32 for BERT-Base and DeiT-B."""
        return max(1, self.hidden_size // NUM_STEPS)

    @property
    def ffn_step(self) -> int:
        """As `hidden_step`, for FFN widths: 128 for BERT-Base and DeiT-B."""
        return max(1, self.ffn_size // NUM_STEPS)

    @property
    def whole(self) -> SubModelConfig:
        """The large model as a sub-model of itself."""
        return SubModelConfig.alike(*(getattr(self, name) for name in SIZES))

    @classmethod
    def of(cls, config: PretrainedConfig, seq_len: int | None = None) -> "Original":
        """The sizes of a BERT, GPT-2 or ViT; `seq_len` defaults to 128 (an image: its own number of tokens).

        Raises:
            ValueError: for another model.
        """
        if config.model_type not in ("bert", "gpt2", "vit"):
            raise ValueError(f"model type {config.model_type!r} cannot be decomposed: choose a BERT, GPT-2 or ViT.")
        sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, ffn_size(config)
        if config.model_type == "vit":
            patch = np.broadcast_to(config.patch_size, 2)  # height, width
            tokens, values = max_tokens(config), config.num_channels * int(patch.prod())
            rows = tokens + 1 + values + 1 + 2  # positions, class token, patch weights and bias, last LayerNorm
            return cls(*sizes, seq_len or tokens, rows, values)
        rows = embedding_parameters(config) // config.hidden_size
        return cls(*sizes, seq_len or 128, rows, has_pooler=config.model_type == "bert")


@dataclass(frozen=True)
class Limits:
    """Omega_n and Phi_n: the most FLOPs of a request and the most bytes on each device (C5, C6 of Eq. 8)."""

    flops: tuple[float, ...]
    memory_bytes: tuple[float, ...]

    @classmethod
    def share(cls, original: Original, share: float, num_devices: int) -> "Limits":
        """Each device may spend `share` of the large model's FLOPs (the 30, 40 and 50% of Fig. 13)."""
        return cls((share * flops(original.whole, original),) * num_devices, (math.inf,) * num_devices)


# Costs -----------------------------------------------------------------------------------------------------------


def products(config: SubModelConfig, original: Original) -> list[tuple[int, int]]:
    """(operations, bytes of weights) of each matrix product of one request through a sub-model's backbone, in order.

    A multiply-add counts as two operations; LayerNorm, GELU and softmax, below 2%, are left out, as in `models.sizes`.
    Task heads are outside the decomposition (Section III-A, footnote 1) and its costs.
    """
    tokens, width = original.seq_len, config.hidden_size

    def linear(num_tokens: int, num_in: int, num_out: int) -> tuple[int, int]:
        return 2 * num_tokens * num_in * num_out, FLOAT_BYTES * num_in * num_out

    listed = [linear(tokens - 1, original.patch_values, width)] if original.patch_values else []
    for heads, ffn in zip(config.num_heads, config.ffn_sizes, strict=True):
        attention = heads * original.head_size
        listed += [linear(tokens, width, 3 * attention), (4 * tokens * tokens * attention, 0)]
        listed += [linear(tokens, attention, width), linear(tokens, width, ffn), linear(tokens, ffn, width)]
    return listed + ([linear(1, width, width)] if original.has_pooler else [])


def flops(config: SubModelConfig, original: Original) -> int:
    """omega(C_n): operations of one request."""
    return sum(operations for operations, _ in products(config, original))


def parameters(config: SubModelConfig, original: Original) -> int:
    """Weights and biases of the backbone: embeddings, layers, last LayerNorm, and BERT's pooler."""
    width, attention, ffn = config.hidden_size, sum(config.num_heads) * original.head_size, sum(config.ffn_sizes)
    layers = 4 * width * attention + 3 * attention + 2 * width * ffn + ffn + 6 * width * config.num_layers
    return layers + original.embedding_rows * width + (width**2 + width if original.has_pooler else 0)


def memory_bytes(config: SubModelConfig, original: Original) -> int:
    """phi(C_n): weights and activations of one request in float32.

    Activations are what the largest layer keeps alive at once: X twice, Q, K, V, context, scores and the FFN's inner
    state. This is an upper bound; for the whole model it equals `planning.memory.activation_bytes`.
    """
    tokens = original.seq_len
    layers = zip(config.num_heads, config.ffn_sizes, strict=True)
    largest = max(heads * (4 * original.head_size + tokens) + ffn for heads, ffn in layers)
    return FLOAT_BYTES * (parameters(config, original) + tokens * (2 * config.hidden_size + largest))


# Constraints -----------------------------------------------------------------------------------------------------


def violations(policy: Policy, original: Original, limits: Limits | None = None) -> list[str]:
    """The violations of C1-C6 of Eq. 8 by a policy, each sentence beginning with the constraint's name; [] if valid.

    C3 and C4 are read as printed: over the k-th layers of the sub-models, whichever layers of the original these are.
    """
    configs = policy.sub_models
    found = [
        f"C1: sub-model {n} has {c.num_layers} layers, the original {original.num_layers}: give it no more"
        for n, c in enumerate(configs)
        if c.num_layers > original.num_layers
    ]
    if sum(policy.widths) > original.hidden_size:
        found.append(
            f"C2: the sub-models' embeddings are {sum(policy.widths)} wide together, the original's "
            f"{original.hidden_size}: give some of them fewer dimensions"
        )
    for name, what, field, most in (
        ("C3", "heads", "num_heads", original.num_heads),
        ("C4", "FFN columns", "ffn_sizes", original.ffn_size),
    ):
        for layer, sizes in enumerate(zip_longest(*(getattr(c, field) for c in configs), fillvalue=0)):
            if sum(sizes) > most:
                found.append(
                    f"{name}: layer {layer} has {sum(sizes)} {what} over the sub-models, the original {most}: "
                    f"give some of them fewer {what} there"
                )
    most = zip(configs, limits.flops, limits.memory_bytes, strict=True) if limits else ()
    for n, (c, most_flops, most_bytes) in enumerate(most):
        if (spent := flops(c, original)) > most_flops:
            found.append(
                f"C5: sub-model {n} takes {spent / 1e9:.3g} GFLOP, its device {most_flops / 1e9:.3g}: make it smaller"
            )
        if (taken := memory_bytes(c, original)) > most_bytes:
            found.append(
                f"C6: sub-model {n} takes {taken / 2**20:.4g} MiB, its device has {most_bytes / 2**20:.4g}: make it "
                "smaller, its embedding first"
            )
    return found


# Encoding --------------------------------------------------------------------------------------------------------


def encode(policy: Policy, original: Original) -> np.ndarray:
    """A policy as a vector [N (2 + 2 L)] for the Gaussian process: for each sub-model l, d, heads and FFN by layer.

    All are shares of the original's, 0 for missing layers. Entries by layer are divided by sqrt(L), so that all heads
    together weigh as much in a distance as the number of layers, and a length scale of 1 is meaningful.
    """
    entries = []
    for config in policy.sub_models:
        missing = (0,) * (original.num_layers - config.num_layers)
        heads = np.array(config.num_heads + missing) / original.num_heads
        ffn = np.array(config.ffn_sizes + missing) / original.ffn_size
        alone = [config.num_layers / original.num_layers, config.hidden_size / original.hidden_size]
        entries += [alone, heads / original.num_layers**0.5, ffn / original.num_layers**0.5]
    return np.concatenate(entries)
