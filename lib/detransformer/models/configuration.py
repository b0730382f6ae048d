"""Configuration of decoupled BERT (DATE 2024, Section III-B, Figs. 4 and 5).

A decoupled model is a stack of `num_hidden_layers` (l) layers cut in `num_original_layers` (Nb) groups. The last layer
of each group is an original Transformer layer; the others are decoupled layers of `num_divisions` (Ndiv) sub-blocks.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

ATTENTION_WIDTHS = ("full", "narrow")


@strict
class DecoupledBertConfig(BertConfig):
    """`BertConfig` plus the three choices of structure decoupling.

    Args:
        num_original_layers: Nb, how many of the `num_hidden_layers` stay original; the last layer always does. Where Nb
            does not divide the number of layers, group sizes differ by one. Nb = `num_hidden_layers` is plain BERT.
        num_divisions: Ndiv, the number of sub-blocks in a decoupled layer; must divide `hidden_size`.
        attention_width: `"full"` is the published layer (every sub-block has all heads at full head size, Eq. 2);
            `"narrow"` keeps attention inside the slice (head size `hidden_size / num_attention_heads / Ndiv`), the
            size that the authors' released latency code times.

    Raises:
        ValueError: for sizes that do not divide, naming the value, the limit and a remedy.
    """

    model_type = "decoupled_bert"

    num_original_layers: int = 4
    num_divisions: int = 4
    attention_width: Literal["full", "narrow"] = "full"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_decoupling(
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_original_layers,
            self.num_divisions,
            self.attention_width,
        )


def check_decoupling(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_original_layers: int,
    num_divisions: int,
    attention_width: str = "full",
) -> None:
    """Raises ValueError where a model of these sizes cannot be decoupled so."""
    if not 1 <= num_original_layers <= num_layers:
        raise ValueError(
            f"num_original_layers={num_original_layers} is outside 1..{num_layers}: "
            f"the last of the {num_layers} layers is always original. Choose a value in that range."
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
    if attention_width == "narrow" and (hidden_size // num_heads) % num_divisions:
        raise ValueError(
            f"num_divisions={num_divisions} does not divide the head size {hidden_size // num_heads}: the narrow "
            f'sub-block keeps 1/Ndiv of every head. Choose a divisor of it, or attention_width="full".'
        )


def layer_kinds(config: BertConfig) -> tuple[str, ...]:
    """`"original"` or `"decoupled"` for each layer, first to last; the last of each group is original (Fig. 5).

    A plain `BertConfig` is all original.
    """
    num_layers = config.num_hidden_layers
    num_original = getattr(config, "num_original_layers", num_layers)
    return tuple(
        "original" if (i + 1) * num_original // num_layers > i * num_original // num_layers else "decoupled"
        for i in range(num_layers)
    )


def config_fields(config: BertConfig) -> dict:
    """The arguments that make a configuration like `config`, of its class or another."""
    derived = ("model_type", "architectures", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in derived}


def decoupled_config(
    original: BertConfig, num_original_layers: int, num_divisions: int, attention_width: str = "full"
) -> DecoupledBertConfig:
    """The configuration of `original`, decoupled; ValueError where its sizes do not divide so."""
    return DecoupledBertConfig(
        **config_fields(original),
        num_original_layers=num_original_layers,
        num_divisions=num_divisions,
        attention_width=attention_width,
    )


PRESET_SIZES = {
    "bert-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "bert-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


def preset_config(
    name: str,
    num_original_layers: int | None = None,
    num_divisions: int = 4,
    attention_width: str = "full",
) -> BertConfig:
    """BERT-Base or BERT-Large (DATE 2024, Section IV-A), original or, with `num_original_layers`, decoupled."""
    if name not in PRESET_SIZES:
        raise ValueError(f"model {name!r} is unknown: choose one of {', '.join(PRESET_SIZES)}, or a checkpoint folder.")
    original = BertConfig(**PRESET_SIZES[name])
    if num_original_layers is None:
        return original
    return decoupled_config(original, num_original_layers, num_divisions, attention_width)
