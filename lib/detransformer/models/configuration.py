"""Configuration of decoupled BERT (DATE 2024, Section III-B, Figs. 4 and 5) and GPT-2 (its extension in TPDS 2025).

A decoupled model is a stack of `num_hidden_layers` (l) layers cut in `num_original_layers` (Nb) groups. The last layer
of each group is an original Transformer layer; the others are decoupled layers of `num_divisions` (Ndiv) sub-blocks.
The original layers may stand elsewhere too (`original_placement`), which the papers do not try.
"""

import copy
from typing import get_args

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, GPT2Config, PretrainedConfig

from detransformer.presets import GPT2_SIZES, PRESET_SIZES, PRESETS, AttentionWidth, OriginalPlacement

ATTENTION_WIDTHS, ORIGINAL_PLACEMENTS = get_args(AttentionWidth), get_args(OriginalPlacement)


class _Decoupled:
    """Mixin of the two configurations below."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: `transformers` would copy this file beside the weights, where models save a module of their own."""


@strict
class DecoupledBertConfig(_Decoupled, BertConfig):
    """`BertConfig` plus the four choices of structure decoupling.

    Args:
        num_original_layers: Nb, how many of the `num_hidden_layers` stay original. Where Nb does not divide the number
            of layers, group sizes differ by one. Nb = `num_hidden_layers` is plain BERT.
        num_divisions: Ndiv, the number of sub-blocks in a decoupled layer; must divide `hidden_size`.
        attention_width: `"full"` is the published layer (every sub-block has all heads at full head size, Eq. 2);
            `"narrow"` keeps attention inside the slice (head size `hidden_size / num_attention_heads / Ndiv`), the
            size that the authors' released latency code times.
        original_placement: `"last"` makes the last layer of each of the Nb groups original, as published (Fig. 5), and
            so the model's last; `"first"` the first of each group; `"bottom"`, `"middle"` and `"top"` make Nb layers in
            a row original: the first, those in the middle (the earlier ones where it is not whole), the last.

    Raises:
        ValueError: for sizes that do not divide, naming the value, the limit and a remedy.
    """

    model_type = "decoupled_bert"

    num_original_layers: int = 4
    num_divisions: int = 4
    attention_width: AttentionWidth = "full"
    original_placement: OriginalPlacement = "last"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _check_config(self)


@strict
class DecoupledGPT2Config(_Decoupled, GPT2Config):
    """`GPT2Config` plus the four choices of structure decoupling, as in `DecoupledBertConfig`.

    Raises:
        ValueError: for sizes that do not divide, naming the value, the limit and a remedy.
    """

    model_type = "decoupled_gpt2"

    num_original_layers: int = 4
    num_divisions: int = 4
    attention_width: AttentionWidth = "full"
    original_placement: OriginalPlacement = "last"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _check_config(self)

    @property
    def per_layer_config(self) -> list[PretrainedConfig]:
        """Of each layer, for what sizes a cache by it: `head_dim` is the width of a head in the cache, P*s."""
        configs = [copy.copy(self) for _ in range(self.num_hidden_layers)]
        for config, kind in zip(configs, layer_kinds(self), strict=True):
            wider = self.num_divisions if kind == "decoupled" and self.attention_width == "full" else 1
            config.head_dim = wider * self.hidden_size // self.num_attention_heads
        return configs


DECOUPLED_CONFIG = {"bert": DecoupledBertConfig, "gpt2": DecoupledGPT2Config}


def _check_config(config: DecoupledBertConfig | DecoupledGPT2Config) -> None:
    check_decoupling(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_original_layers,
        config.num_divisions,
        config.attention_width,
        config.original_placement,
    )


def check_decoupling(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_original_layers: int,
    num_divisions: int,
    attention_width: str = "full",
    original_placement: str = "last",
) -> None:
    """Raises ValueError where a model of these sizes cannot be decoupled so."""
    if not 1 <= num_original_layers <= num_layers:
        raise ValueError(
            f"num_original_layers={num_original_layers} is outside 1..{num_layers}: "
            f"at least one of the {num_layers} layers is original. Choose a value in that range."
        )
    if num_divisions < 1 or hidden_size % num_divisions:
        good = ", ".join(str(n) for n in range(1, 17) if hidden_size % n == 0)
        raise ValueError(
            f"num_divisions={num_divisions} does not divide hidden_size={hidden_size}: every sub-block takes an equal "
            f"slice of the hidden axis. Choose one of {good}."
        )
    if attention_width not in ATTENTION_WIDTHS:
        raise ValueError(
            f"attention_width={attention_width!r} is unknown: choose one of {', '.join(ATTENTION_WIDTHS)}."
        )
    if original_placement not in ORIGINAL_PLACEMENTS:
        raise ValueError(
            f"original_placement={original_placement!r} is unknown: choose one of {', '.join(ORIGINAL_PLACEMENTS)}."
        )
    if attention_width == "narrow" and (hidden_size // num_heads) % num_divisions:
        raise ValueError(
            f"num_divisions={num_divisions} does not divide the head size {hidden_size // num_heads}: the narrow "
            f'sub-block keeps 1/Ndiv of every head. Choose a divisor of it, or attention_width="full".'
        )


def architecture(config: PretrainedConfig) -> str:
    """`"bert"` or `"gpt2"`, original or decoupled; ValueError for any other model."""
    name = config.model_type.removeprefix("decoupled_")
    if name not in DECOUPLED_CONFIG:
        raise ValueError(
            f"model type {config.model_type!r} is neither BERT nor GPT-2: choose a model of one of these two."
        )
    return name


def ffn_size(config: PretrainedConfig) -> int:
    """I, the inner width of the FFN; GPT-2's is four times the hidden size where its configuration names none."""
    if architecture(config) == "bert":
        return config.intermediate_size
    return config.n_inner or 4 * config.hidden_size


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """`"original"` or `"decoupled"` for each layer, first to last, by `original_placement` (published: Fig. 5).

    A plain `BertConfig` or `GPT2Config` is all original.
    """
    num_layers = config.num_hidden_layers
    num_original = getattr(config, "num_original_layers", num_layers)
    placement = getattr(config, "original_placement", "last")
    if placement in ("last", "first"):
        ends = [-(-group * num_layers // num_original) for group in range(num_original + 1)]  # rounded up
        original = {end - 1 for end in ends[1:]} if placement == "last" else set(ends[:-1])
    else:
        rest = num_layers - num_original
        start = {"bottom": 0, "middle": rest // 2, "top": rest}[placement]
        original = set(range(start, start + num_original))
    return tuple("original" if i in original else "decoupled" for i in range(num_layers))


def config_fields(config: PretrainedConfig) -> dict:
    """The arguments that make a configuration like `config`, of its class or another."""
    derived = ("model_type", "architectures", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in derived}


def decoupled_config(
    original: PretrainedConfig,
    num_original_layers: int,
    num_divisions: int,
    attention_width: str = "full",
    original_placement: str = "last",
) -> DecoupledBertConfig | DecoupledGPT2Config:
    """The configuration of `original`, a BERT or GPT-2, decoupled; ValueError where its sizes do not divide so."""
    return DECOUPLED_CONFIG[architecture(original)](
        **config_fields(original),
        num_original_layers=num_original_layers,
        num_divisions=num_divisions,
        attention_width=attention_width,
        original_placement=original_placement,
    )


def preset_config(
    name: str,
    num_original_layers: int | None = None,
    num_divisions: int = 4,
    attention_width: str = "full",
) -> PretrainedConfig:
    """A model of BERT's or GPT-2's published sizes (DATE 2024, Section IV-A), original or, with Nb, decoupled."""
    if name not in PRESETS:
        raise ValueError(f"model {name!r} is unknown: choose one of {', '.join(PRESETS)}, or a checkpoint folder.")
    original = BertConfig(**PRESET_SIZES[name]) if name in PRESET_SIZES else GPT2Config(**GPT2_SIZES[name])
    if num_original_layers is None:
        return original
    return decoupled_config(original, num_original_layers, num_divisions, attention_width)
