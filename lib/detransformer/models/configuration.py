"""Model families, and the configurations of their decoupled models.

BERT: DATE 2024, Section III-B, Figs. 4 and 5; GPT-2: its extension in TPDS 2025; the others by analogy.

A decoupled model has `num_hidden_layers` (l) layers in `num_original_layers` (Nb) groups. The last layer of each group
is an original Transformer layer; the others are decoupled layers of `num_divisions` (Ndiv) sub-blocks. The original
layers may also stand elsewhere (`original_placement`), which the papers do not try.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from detransformer.presets import GPT2_SIZES, PRESET_SIZES, PRESETS, AttentionWidth, OriginalPlacement

ATTENTION_WIDTHS, ORIGINAL_PLACEMENTS = get_args(AttentionWidth), get_args(OriginalPlacement)


@dataclass(kw_only=True)
class Decoupling:
    """The four settings that a decoupled model's configuration adds to the original's.

    Args:
        num_original_layers: Nb, how many of the `num_hidden_layers` stay original. Where Nb does not divide the number
            of layers, group sizes differ by one. Nb = `num_hidden_layers` is the original model.
        num_divisions: Ndiv, the number of sub-blocks in a decoupled layer; must divide `hidden_size`.
        attention_width: `"full"` is the published layer (every sub-block has all heads at full head size, Eq. 2);
            `"narrow"` keeps attention inside the slice (head size `hidden_size / num_attention_heads / Ndiv`), the
            size that the authors' released latency code times.
        original_placement: `"last"` makes the last layer of each of the Nb groups original, as published (Fig. 5), and
            so the model's last; `"first"` the first of each group; `"bottom"`, `"middle"` and `"top"` make Nb layers in
            a row original: the first, those in the middle (rounded towards the first), the last.

    Raises:
        ValueError: for sizes that do not divide, naming the value, the limit and a remedy.
    """

    num_original_layers: int = 4
    num_divisions: int = 4
    attention_width: AttentionWidth = "full"
    original_placement: OriginalPlacement = "last"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if getattr(self, "add_cross_attention", False):
            raise ValueError("a decoupled model attends to its own tokens only: set add_cross_attention=False.")
        if getattr(self, "is_decoder", False) and architecture(self) != "gpt2":
            raise ValueError(f"a {self.model_type} is an encoder: set is_decoder=False.")
        if not getattr(self, "qkv_bias", True):  # ViT's
            raise ValueError("qkv_bias=False: a decoupled ViT has biases of Q, K and V; choose a ViT with them.")
        if not 1 <= self.num_original_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_original_layers={self.num_original_layers} is outside 1..{self.num_hidden_layers}: "
                f"at least one of the {self.num_hidden_layers} layers is original. Choose a value in that range."
            )
        if self.num_divisions < 1 or self.hidden_size % self.num_divisions:
            good = ", ".join(str(n) for n in range(1, 17) if self.hidden_size % n == 0)
            raise ValueError(
                f"num_divisions={self.num_divisions} does not divide hidden_size={self.hidden_size}: every sub-block "
                f"takes an equal slice of the hidden axis. Choose one of {good}."
            )
        if self.attention_width == "narrow" and self.hidden_size // self.num_attention_heads % self.num_divisions:
            raise ValueError(
                f"num_divisions={self.num_divisions} does not divide the head size "
                f"{self.hidden_size // self.num_attention_heads}: the narrow "
                f'sub-block keeps 1/Ndiv of every head. Choose a divisor of it, or attention_width="full".'
            )

    @property
    def slice_width(self) -> int:
        """d, the width of a sub-block's slice of the hidden axis."""
        return self.hidden_size // self.num_divisions

    @property
    def slice_attention_width(self) -> int:
        """A, the width of a sub-block's attention."""
        return self.hidden_size if self.attention_width == "full" else self.slice_width

    @property
    def per_layer_config(self) -> list[PretrainedConfig]:
        """One configuration a layer, for sizing a decoder's cache: `head_dim` is the width of a head in it, P*s."""
        configs = [copy.copy(self) for _ in range(self.num_hidden_layers)]
        for config, kind in zip(configs, layer_kinds(self), strict=True):
            wider = self.num_divisions if kind == "decoupled" and self.attention_width == "full" else 1
            config.head_dim = wider * self.hidden_size // self.num_attention_heads
        return configs

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: `transformers` would copy this file beside the weights; models save a module of their own."""


def _decoupled(original: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """`original` plus the choices of `Decoupling`."""
    members = {
        "__module__": __name__,
        "__doc__": f"`{original.__name__}` plus the choices of `Decoupling`.",
        "model_type": f"decoupled_{original.model_type}",
    }
    return strict(type(f"Decoupled{original.__name__}", (Decoupling, original), members))


DecoupledBertConfig = _decoupled(BertConfig)
DecoupledRobertaConfig = _decoupled(RobertaConfig)
DecoupledXLMRobertaConfig = _decoupled(XLMRobertaConfig)
DecoupledCamembertConfig = _decoupled(CamembertConfig)
DecoupledDistilBertConfig = _decoupled(DistilBertConfig)
DecoupledGPT2Config = _decoupled(GPT2Config)
DecoupledViTConfig = _decoupled(ViTConfig)


@dataclass(frozen=True)
class Family:
    """One model type and the names of its classes.

    Args:
        name: the name in prose.
        stem: the beginning of its class names in transformers.
        architecture: its kind of layer, `"bert"`, `"distilbert"`, `"gpt2"` or `"vit"`.
        decoupled: the configuration class of its decoupled models.
        pads_positions: whether positions are counted from the padding token's id, over tokens that are not padding.
    """

    name: str
    stem: str
    architecture: str
    decoupled: type[PretrainedConfig]
    pads_positions: bool = False

    @property
    def class_endings(self) -> dict[str, str]:
        """The ending of its class names, by head."""
        return {"gpt2": DECODER_HEADS, "vit": IMAGE_HEADS}.get(self.architecture, ENCODER_HEADS)

    def class_name(self, head: str) -> str:
        """The name of transformers' class with this head."""
        return self.stem + self.class_endings[head]


FAMILIES = {
    "bert": Family("BERT", "Bert", "bert", DecoupledBertConfig),
    "roberta": Family("RoBERTa", "Roberta", "bert", DecoupledRobertaConfig, pads_positions=True),
    "xlm-roberta": Family("XLM-RoBERTa", "XLMRoberta", "bert", DecoupledXLMRobertaConfig, pads_positions=True),
    "camembert": Family("CamemBERT", "Camembert", "bert", DecoupledCamembertConfig, pads_positions=True),
    "distilbert": Family("DistilBERT", "DistilBert", "distilbert", DecoupledDistilBertConfig),
    "gpt2": Family("GPT-2", "GPT2", "gpt2", DecoupledGPT2Config),
    "vit": Family("ViT", "ViT", "vit", DecoupledViTConfig),
}
ENCODER_HEADS = {
    "base": "Model",
    "masked-lm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
DECODER_HEADS = {"base": "Model", "causal-lm": "LMHeadModel"} | {
    head: ENCODER_HEADS[head] for head in ("classification", "token-classification", "question-answering")
}
IMAGE_HEADS = {"base": "Model", "image-classification": "ForImageClassification"}
# Options of generation_config.json that change which text is the likeliest, and their neutral values.
LIKELIEST_TEXT = {"num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0}
LIKELIEST_TEXT |= {"min_new_tokens": 0, "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": []}
LIKELIEST_TEXT |= {"forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": {}, "guidance_scale": 1}
WITH_TWO_HEADS = {"ForPreTraining": "masked-lm", "DoubleHeadsModel": "causal-lm"}  # class ending: the head that is kept


def original_type(model_type: str) -> str:
    """The model type from which a decoupled model, a sub-model or a `sync_gpt2` was made."""
    return re.sub("^(decoupled|coformer|sync)_", "", model_type)


def family_of(config: PretrainedConfig) -> Family:
    """The family of an original model, a decoupled model or a sub-model; ValueError if it is not in `FAMILIES`."""
    name = original_type(config.model_type)
    if name not in FAMILIES:
        known = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(f"model type {config.model_type!r} is not supported: choose a model of {known}.")
    return FAMILIES[name]


def architecture(config: PretrainedConfig) -> str:
    """The layer of a model, original or decoupled, as `Family.architecture` names it; ValueError for others."""
    return family_of(config).architecture


def head_of(config: PretrainedConfig) -> str:
    """The head (a key of `Family.class_endings`) of the class that a configuration names; `"base"` if it names none.

    Raises:
        ValueError: for a class of another family, or with another head.
    """
    (made_as, *_) = config.architectures or [""]
    family = family_of(config)
    if not made_as:
        return "base"
    endings = {ending: head for head, ending in family.class_endings.items()}
    endings |= {ending: head for ending, head in WITH_TWO_HEADS.items() if head in family.class_endings}
    if hasattr(config, "sync"):
        endings |= {ENCODER_HEADS["masked-lm"]: "masked-lm"}
    plain = made_as.removeprefix("Decoupled").removeprefix("Sync")
    stem, ending = plain[: len(family.stem)], plain[len(family.stem) :]
    if stem != family.stem or ending not in endings:
        raise ValueError(
            f"{made_as} is not supported: of {family.name}, choose one of "
            f"{', '.join(map(family.class_name, family.class_endings))}."
        )
    return endings[ending]


def generates(config: PretrainedConfig) -> bool:
    """Whether the model continues a text: a GPT-2 with its LM head, or with none (its word embeddings serve as one)."""
    return is_decoder(config) and head_of(config) in ("base", "causal-lm")


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether tokens attend to earlier ones only, as in GPT-2 unless its configuration says otherwise."""
    return architecture(config) == "gpt2" and getattr(config, "is_causal", True)


def read_generation(config: PretrainedConfig, options: dict) -> None:
    """Takes the end tokens from the fields of a generation_config.json, which transformers prefers to config.json.

    Raises:
        ValueError: for an option that changes which text is the likeliest, or an end token that is not an integer.
    """
    place = "generation_config.json"
    for name, value in LIKELIEST_TEXT.items():
        if options.get(name) not in (None, value):
            raise ValueError(f"{place}: {name} is {options[name]!r}, and only {value!r} is supported: remove it there.")
    ends = options.get("eos_token_id")
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise ValueError(f"{place}: eos_token_id is {ends!r}, and must be a token id or a list of them.")
    if ends is not None:
        config.eos_token_id = ends


def max_tokens(config: PretrainedConfig) -> int:
    """The most tokens a request may have: the positions, without those that RoBERTa leaves for padding.

    An image always has the same number: its patches and the class token.
    """
    if architecture(config) == "vit":
        sizes = (config.image_size, config.patch_size)
        sides = (size if isinstance(size, Sequence) else (size, size) for size in sizes)  # height, width
        return 1 + math.prod(image // patch for image, patch in zip(*sides, strict=True))
    unused = config.pad_token_id + 1 if family_of(config).pads_positions else 0
    return config.max_position_embeddings - unused


def ffn_size(config: PretrainedConfig) -> int:
    """I, the inner width of the FFN; for GPT-2 four times the hidden size unless its configuration names one."""
    if architecture(config) == "gpt2":
        return config.n_inner or 4 * config.hidden_size
    return config.hidden_dim if architecture(config) == "distilbert" else config.intermediate_size


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """`"original"` or `"decoupled"` for each layer, first to last, by `original_placement` (published: Fig. 5).

    A model that is not decoupled has original layers only, except those of `models.sync_gpt2`: their layers are of kind
    `sync`, with the suffix `-first` where X is whole before the layer and parts of it are still to be added after it.
    """
    num_layers = config.num_hidden_layers
    if sync := getattr(config, "sync", None):
        every = {"parallel": None, "ladder": num_layers, "parts": config.fuse_every or num_layers}[sync]
        return tuple(f"{sync}-first" if every and i % every == 0 else sync for i in range(num_layers))
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
) -> PretrainedConfig:
    """The decoupled configuration of `original`; ValueError if its sizes do not divide."""
    if hasattr(original, "sync"):
        raise ValueError(f"a model with sync={original.sync!r} cannot be decoupled: take the GPT-2 it was made of.")
    return family_of(original).decoupled(
        **config_fields(original),
        num_original_layers=num_original_layers,
        num_divisions=num_divisions,
        attention_width=attention_width,
        original_placement=original_placement,
    )


def original_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration from which `config` was decoupled, or an equal one if it is not decoupled."""
    added = {field.name for field in fields(Decoupling)}
    kind = CONFIG_MAPPING[config.model_type.removeprefix("decoupled_")]
    return kind(**{name: value for name, value in config_fields(config).items() if name not in added})


def preset_config(
    name: str,
    num_original_layers: int | None = None,
    num_divisions: int = 4,
    attention_width: str = "full",
) -> PretrainedConfig:
    """A configuration of BERT's or GPT-2's published sizes (DATE 2024, Section IV-A), decoupled if Nb is given."""
    if name not in PRESETS:
        raise ValueError(f"model {name!r} is unknown: choose one of {', '.join(PRESETS)}, or a checkpoint folder.")
    original = BertConfig(**PRESET_SIZES[name]) if name in PRESET_SIZES else GPT2Config(**GPT2_SIZES[name])
    if num_original_layers is None:
        return original
    return decoupled_config(original, num_original_layers, num_divisions, attention_width)
