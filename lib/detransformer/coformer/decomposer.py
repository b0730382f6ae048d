"""The decomposer: sub-models that inherit the large model's weights (CoFormer 2025, Fig. 14, supplementary B-1).

First `choose_parts`, a pure function, decides which layers, heads, FFN columns and embedding dimensions each sub-model
takes; then `decompose` slices. The paper removes "unimportant" neurons and "redundant" heads without saying how it
identifies them; here the parts with the larger weights are the important ones.

LayerNorms: a sub-model keeps the weight and bias entries of its d_n dimensions, and normalises over these alone. The
mean and variance of some dimensions differ from those of all, and products read fewer inputs; no weight is rescaled for
it, since the sub-models are trained afterwards (the booster). Task heads are sliced too, so that each sub-model can be
evaluated alone (Eq. 7); the aggregation takes `features`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from detransformer.coformer.policy import Original, Policy, SubModelConfig, violations
from detransformer.coformer.submodels import SUB_MODEL_CLASS, sub_model_config
from detransformer.models.naming import NAMING, Naming

LAYER_NAME = re.compile(r"^(?:bert\.|transformer\.|vit\.)?(?:encoder\.layer|layers|h)\.(\d+)\.(.+)$")
PREFIX = re.compile(r"^(?:bert|transformer|vit)\.")


def layer_axes(naming: Naming) -> dict[str, tuple[str, ...]]:
    """What cuts each axis of a layer's parameters, first axis first.

    "heads" are the columns of all heads, "qkv" those of Q, K and V packed in one.
    """
    cuts = {name: ("heads" if len(naming.qkv) == 3 else "qkv", "dims") for name in naming.qkv}
    cuts |= {naming.out: ("dims", "heads"), naming.ffn_in: ("ffn", "dims"), naming.ffn_out: ("dims", "ffn")}
    axes = {f"{name}.weight": cut[::-1] if naming.input_major else cut for name, cut in cuts.items()}
    axes |= {f"{name}.bias": cut[:1] for name, cut in cuts.items()}
    norms = (naming.attention_norm, naming.ffn_norm)
    return axes | {f"{name}.{kind}": ("dims",) for name in norms for kind in ("weight", "bias")}


LAYER_AXES = {architecture: layer_axes(naming) for architecture, naming in NAMING.items()}
OUTER_AXES = {  # outside the layers, for all three; uncut axes are None, or not listed
    r"embeddings\.\w+_embeddings\.weight|wte\.weight|wpe\.weight": (None, "dims"),
    r"embeddings\.(cls_token|position_embeddings)": (None, None, "dims"),
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": ("dims",),
    r"embeddings\.LayerNorm\.\w+|ln_f\.\w+|layernorm\.\w+": ("dims",),
    r"pooler\.dense\.weight": ("pooled", "dims"),
    r"pooler\.dense\.bias": ("pooled",),
    r"(classifier|score)\.weight": (None, "dims"),
    r"classifier\.bias": (None,),
}


@dataclass(frozen=True)
class Importance:
    """The importance of each part of the large model: dimensions [d], heads [L, h], FFN columns [L, D]."""

    dims: np.ndarray
    heads: np.ndarray
    ffn: np.ndarray


@dataclass(frozen=True)
class Parts:
    """The parts of the large model that one sub-model takes, ascending: layers, dimensions, heads and FFN by layer."""

    layers: np.ndarray
    dims: np.ndarray
    heads: tuple[np.ndarray, ...]
    ffn: tuple[np.ndarray, ...]


# Importance ------------------------------------------------------------------------------------------------------


def magnitude_importance(model: PreTrainedModel) -> Importance:
    """The L2 norm of the weights that read and write a dimension, a head or an FFN column."""
    original = Original.of(model.config)
    dims = np.zeros(original.hidden_size)
    heads = np.zeros((original.num_layers, original.num_heads))
    ffn = np.zeros((original.num_layers, original.ffn_size))
    for name, value in model.named_parameters():
        layer, axes = axes_of(name, model.config.model_type)
        for axis, role in enumerate(axes):
            if role is None or role == "pooled":  # the pooler's outputs are not the embedding's dimensions
                continue
            others = [other for other in range(value.ndim) if other != axis]
            squares = value.detach() ** 2
            sums = (squares.sum(others) if others else squares).double().cpu().numpy()
            if role == "dims":
                dims += sums
            elif role == "ffn":
                ffn[layer] += sums
            else:  # [(3,) h, s] of "qkv" or "heads"
                heads[layer] += sums.reshape(-1, original.num_heads, original.head_size).sum((0, 2))
    return Importance(*(np.sqrt(scores) for scores in (dims, heads, ffn)))


def axes_of(name: str, architecture: str) -> tuple[int | None, tuple[str | None, ...]]:
    """(layer or None, what cuts each axis) of a parameter of a BERT, GPT-2 or ViT."""
    found = LAYER_NAME.match(name)
    if found and found[2] in LAYER_AXES[architecture]:
        return int(found[1]), LAYER_AXES[architecture][found[2]]
    for pattern, axes in () if found else OUTER_AXES.items():
        if re.fullmatch(pattern, PREFIX.sub("", name)):
            return None, axes
    raise ValueError(f"parameter {name} of {architecture} is not known to the decomposer: it cannot be sliced.")


# Parts -----------------------------------------------------------------------------------------------------------


def choose_parts(importance: Importance, policy: Policy) -> list[Parts]:
    """The parts of the large model that each sub-model takes.

    The parts of a layer, and the embedding dimensions, are *dealt* like cards: ranked by importance, then one to each
    sub-model in turn until each has as many as the policy says. So no two have the same part (C2-C4 leave enough for
    all), each has important ones, a small one has the best few, and the least important are left over. If parts were
    cut in a row, the first sub-model would get all the good ones; if all had the same parts, they would err alike, and
    their ensemble would gain nothing. The sub-model that begins changes from layer to layer.

    C3 and C4 count k-th layers, and the k-th layers of two sub-models may come from different layers of the large
    model. If sub-models ask for more of one layer than it has, the most important parts are given twice.

    Layers are spread over the depth: the norms of a layer's weights say little about its worth.
    """
    num_layers, configs = len(importance.heads), policy.sub_models
    dims = deal(importance.dims, policy.widths)
    sources = [choose_layers(num_layers, c.num_layers) for c in configs]
    heads, ffn = ([[] for _ in configs] for _ in range(2))  # for each sub-model, by layer
    for layer in range(num_layers):
        users = [(n, list(own).index(layer)) for n, own in enumerate(sources) if layer in own]  # and their layer k
        for hands, scores, counts in (
            (heads, importance.heads[layer], [configs[n].num_heads[k] for n, k in users]),
            (ffn, importance.ffn[layer], [configs[n].ffn_sizes[k] for n, k in users]),
        ):
            for (n, _), hand in zip(users, deal(scores, counts, first=layer), strict=True):
                hands[n].append(hand)
    return [Parts(s, d, tuple(h), tuple(f)) for s, d, h, f in zip(sources, dims, heads, ffn, strict=True)]


def choose_layers(num_original: int, num_layers: int) -> np.ndarray:
    """`num_layers` of `num_original` layers, ascending and spread evenly, including the first and the last.

    A single layer is the first, which was trained to read embeddings.
    """
    return np.round(np.linspace(0, num_original - 1, num_layers)).astype(int)


def deal(scores: np.ndarray, counts: Sequence[int], first: int = 0) -> list[np.ndarray]:
    """`counts[n]` items for each n, ascending: the best are dealt in turn, starting at `first` (modulo their number).

    An item is given twice only after all have been given, and never to the same n.
    """
    order, hands = np.argsort(-scores, kind="stable").tolist(), [[] for _ in counts]
    players = [(first + i) % len(counts) for i in range(len(counts))]
    turns = [n for dealt in range(max(counts, default=0)) for n in players if dealt < counts[n]]
    for item, n in zip(order, turns, strict=False):
        hands[n].append(item)
    for hand, count in zip(hands, counts, strict=True):
        hand += [item for item in order if item not in hand][: count - len(hand)]
    return [np.sort(np.array(hand, dtype=int)) for hand in hands]


# Slicing ---------------------------------------------------------------------------------------------------------


def decompose(model: PreTrainedModel, policy: Policy) -> list[PreTrainedModel]:
    """The sub-models of `policy`, with `model`'s head and weights sliced from its own.

    A single sub-model of the full size equals `model`.

    Args:
        model: a `BertForSequenceClassification`, `GPT2ForSequenceClassification` or `ViTForImageClassification`.

    Raises:
        ValueError: for a model of another class, or a policy outside C1-C4.
    """
    if type(model) not in SUB_MODEL_CLASS:
        raise ValueError(
            f"{type(model).__name__} cannot be decomposed: "
            f"load the checkpoint as one of {', '.join(c.__name__ for c in SUB_MODEL_CLASS)}."
        )
    if broken := violations(policy, Original.of(model.config)):
        raise ValueError(f"{broken[0]}.")
    parts = choose_parts(magnitude_importance(model), policy)
    return [_sub_model(model, c, p) for c, p in zip(policy.sub_models, parts, strict=True)]


def _sub_model(model: PreTrainedModel, sizes: SubModelConfig, parts: Parts) -> PreTrainedModel:
    config = sub_model_config(model.config, sizes, parts.layers.tolist())
    with no_init_weights():  # every weight comes from `model`
        made = SUB_MODEL_CLASS[type(model)](config)
    made = made.to(next(model.parameters()).dtype)
    made.load_state_dict(slice_state(model, parts))
    return made.to(model.device).train(model.training)


def slice_state(model: PreTrainedModel, parts: Parts) -> dict[str, torch.Tensor]:
    """The state dict of the sub-model that takes `parts` of `model`."""
    original = Original.of(model.config)
    number = {int(layer): k for k, layer in enumerate(parts.layers)}  # of a layer in the sub-model
    sliced = {}
    for name, value in model.state_dict().items():
        layer, axes = axes_of(name, model.config.model_type)
        kept = {"dims": parts.dims, "pooled": parts.dims}
        if layer is not None:
            if layer not in number:
                continue
            k, (start, stop) = number[layer], LAYER_NAME.match(name).span(1)
            name = f"{name[:start]}{k}{name[stop:]}"
            columns = (parts.heads[k][:, None] * original.head_size + np.arange(original.head_size)).ravel()  # [h_n s]
            packed = np.concatenate([columns + i * original.hidden_size for i in range(3)])
            kept |= {"heads": columns, "qkv": packed, "ffn": parts.ffn[k]}
        for axis, role in enumerate(axes):
            if role is not None:
                value = value.index_select(axis, torch.as_tensor(kept[role], device=value.device))
        sliced[name] = value.contiguous()
    return sliced
