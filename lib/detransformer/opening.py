"""Opens a checkpoint: checks its configuration and weights strictly.

All code that runs, prices or converts a checkpoint opens it here. An option that changes the mathematics is computed as
in transformers or refused by name; missing and unknown weights are refused too.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.utils import logging

from detransformer.folders import find_folder
from detransformer.models.auto import DECOUPLED_CLASS, SYNC_CLASS
from detransformer.models.configuration import (
    FAMILIES,
    Family,
    architecture,
    family_of,
    ffn_size,
    generates,
    head_of,
    max_tokens,
    original_type,
    read_generation,
)
from detransformer.models.naming import naming_of
from detransformer.parallel.weights import WeightSource, refuse_pointer

VOCABULARY_FILES = (  # one is enough
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
BUFFERS = re.compile(r"embeddings\.(position_ids|token_type_ids)$|(^|\.)h\.\d+\.attn\.(masked_)?bias$")
# Options of which one value is supported, since other values change the mathematics.
ENCODER_OPTIONS = {"is_decoder": False, "position_embedding_type": "absolute"}
OPTIONS = {"add_cross_attention": False, "pruned_heads": {}, "quantization_config": None}
NOT_THE_MODELS = ("model_type", "_attn_implementation", "return_dict")  # set anew, or read by other programs
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a runnable model, and its configuration, whose `architectures` name the class.

    `unused`: weights in its files that the class lacks; `fresh`: weights of a head that the files lack.
    """

    path: Path
    config: PretrainedConfig
    unused: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    @property
    def decoupled(self) -> bool:
        return hasattr(self.config, "num_original_layers")

    @property
    def note(self) -> str:
        """A sentence about unused weights; empty if all are used."""
        names = sorted({name.rsplit(".", 1)[0] for name in self.unused})
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{self.path} has weights that are not used: {', '.join(names[:3])}{more}." if names else ""


# --- The configuration -------------------------------------------------------------------------------------------


def read_configuration(folder: str | Path, images: bool = False) -> PretrainedConfig:
    """The checked configuration of the model in `folder`, original or decoupled.

    Args:
        images: whether a ViT is accepted, which plans run and commands do not.

    Raises:
        ValueError: for a damaged file, an unsupported model type, head or option, or inconsistent sizes.
    """
    folder = find_folder(folder)
    fields = _read_json(folder / "config.json")
    made_as = fields.get("architectures")
    if made_as is not None and not (isinstance(made_as, list) and all(isinstance(name, str) for name in made_as)):
        raise ValueError(f"{folder}/config.json: architectures is {made_as!r}, and must be a list of class names.")
    kind = fields.get("model_type") or _type_of(fields)
    family = original_type(kind) if isinstance(kind, str) else None
    if family == "vit" and not images:
        raise ValueError(f"{folder} is a ViT, which looks at images: give a model of text, or `decompose` the ViT.")
    if family not in FAMILIES:
        raise ValueError(
            f"{folder} is not supported: model_type is {kind!r}, and must be of one of "
            f"{', '.join(family.name for family in FAMILIES.values())} ({', '.join(FAMILIES)})."
        )
    try:
        kept = {name: value for name, value in fields.items() if name not in NOT_THE_MODELS}
        config = CONFIG_MAPPING[kind].from_dict(kept)
    except Exception as error:  # transformers raises errors of many kinds for a broken configuration
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(f"{folder}/config.json cannot be read ({' '.join(lines[:2])}): save it again.") from None
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    if generates(config) and (folder / "generation_config.json").is_file():
        read_generation(config, _read_json(folder / "generation_config.json"))
    return config


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} is not a checkpoint: it has no {path.name}; give a folder that save_pretrained made."
        )
    refuse_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy the checkpoint again.") from None
    return fields


def _type_of(fields: dict) -> str | None:
    """The model type of a configuration that names none, from its class or from a field that only one type has."""
    made_as = next(iter(fields.get("architectures") or []), "")
    stems = {family.stem: kind for kind, family in FAMILIES.items() if made_as.startswith(family.stem)}
    if stems:
        return stems[max(stems, key=len)]
    telling = {"n_embd": "gpt2", "n_heads": "distilbert", "type_vocab_size": "bert"}
    return next((kind for name, kind in telling.items() if name in fields), None)


def _check(config: PretrainedConfig) -> None:
    for name in SIZES[:3] if architecture(config) == "vit" else SIZES:
        size = getattr(config, name, None)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
            raise ValueError(f"{name} is {size!r}, and must be a whole number from 1.")
    if not 0 < ffn_size(config) < 2**31:
        raise ValueError(f"the FFN's inner width is {ffn_size(config)}, and must be a whole number from 1.")
    if architecture(config) == "bert" and not 0 < config.type_vocab_size < 2**31:
        raise ValueError(f"type_vocab_size is {config.type_vocab_size}, and must be a whole number from 1.")
    for name, value in (OPTIONS if architecture(config) == "gpt2" else OPTIONS | ENCODER_OPTIONS).items():
        found = getattr(config, name, value)
        if found != value and (found or value):
            raise ValueError(f"{name} is {found!r}, and only {value!r} is supported: take another checkpoint.")
    naming = naming_of(config)
    activation = getattr(config, naming.activation)
    if activation not in ACT2FN:
        raise ValueError(f"{naming.activation} is {activation!r}, which transformers has no function for.")
    if not 0 < naming.eps_of(config) < 1:
        raise ValueError(f"{naming.eps} is {naming.eps_of(config)!r}, and must be a small number above 0.")
    padding = getattr(config, "pad_token_id", None)  # a ViT has none
    if family_of(config).pads_positions and (not isinstance(padding, int) or padding < 0 or max_tokens(config) < 1):
        raise ValueError(f"pad_token_id is {padding!r}, and must be a token: positions are counted from it.")
    if getattr(config, "problem_type", None) not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {config.problem_type!r}, and must be one of {PROBLEM_TYPES[1:]}.")
    head_of(config)


# --- The weights -------------------------------------------------------------------------------------------------


def open_checkpoint(folder: str | Path, head: str | None = None, fresh_head: bool = False) -> Checkpoint:
    """Opens the model in `folder`; checks its configuration and the names and shapes of its weights.

    Args:
        head: replaces the head that it was saved with.
        fresh_head: whether the files may lack the head's weights (`Checkpoint.fresh`).

    Raises:
        ValueError: as `read_configuration`, and for weights that are damaged, missing, of another shape, or unknown in
            the model's body.
    """
    path = find_folder(folder)
    config, source = read_configuration(path), WeightSource(path)
    family = family_of(config)
    shapes = source.shapes()
    if head is not None and head not in family.class_endings:
        raise ValueError(f"--head {head} is not for {family.name}; choose one of {', '.join(family.class_endings)}.")
    if not config.architectures:
        config.architectures = [family.class_name(_head_by(set(shapes), family))]
    if head is not None and head != head_of(config):
        config.architectures = [family.class_name(head)]
    found = {_bare(name, config): shape for name, shape in shapes.items()}
    model = _empty_model(config, "pooler.dense.weight" in found)
    expected = {_bare(name, config): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = {name.partition(".")[0] for name in model.base_model.state_dict()}
    tied = {_bare(name, config) for name in model.all_tied_weights_keys}
    missing = sorted(set(expected) - set(found) - tied)
    lost = [name for name in missing if not fresh_head or name.partition(".")[0] in parts]
    unknown = sorted(name for name in set(found) - set(expected) if not BUFFERS.search(name))
    strange = [name for name in unknown if name.partition(".")[0] in parts - {"pooler"}]
    if lost:
        raise ValueError(
            f"the weights in {path} are not a whole {type(model).__name__}: {len(lost)} tensors are missing, first "
            f"{lost[0]}{f', and {unknown[0]} is not known' if unknown else ''}; save or copy the checkpoint again."
        )
    if head is None and generates(config) and not config.tie_word_embeddings and "lm_head.weight" not in found:
        raise ValueError(
            f"the weights in {path} have no LM head, and config.json does not tie it to the word embeddings "
            "(tie_word_embeddings is False): save the model with its head."
        )
    if strange:
        raise ValueError(
            f"the weights in {path} are not those of a {type(model).__name__} as config.json describes it: "
            f"{len(strange)} tensors are not known, first {strange[0]}; they would be left out."
        )
    for name in sorted(set(expected) & set(found)):
        if expected[name] != found[name]:
            raise ValueError(
                f"the weights in {path} do not fit config.json: {name} is {list(found[name])}, and would be "
                f"{list(expected[name])}; copy the checkpoint again."
            )
        source.check_type(name)
    return Checkpoint(path, config, tuple(unknown), tuple(missing))


def _bare(name: str, config: PretrainedConfig) -> str:
    """A tensor's name without the prefix that models with a head add."""
    return name.removeprefix(f"{model_class(config).base_model_prefix}.")


def _head_by(names: set[str], family: Family) -> str:
    """The head of a checkpoint that names no class, from its tensors' names."""

    def has(*endings: str) -> bool:
        return any(name.endswith(endings) for name in names)

    if has("classifier.out_proj.weight", "pre_classifier.weight", "score.weight"):
        return "classification"
    if has("classifier.weight"):
        return "classification" if has("pooler.dense.weight") else "token-classification"
    if has("qa_outputs.weight"):
        return "question-answering"
    if family.architecture == "gpt2":
        return "causal-lm"
    return "masked-lm" if has("cls.predictions.bias", "lm_head.bias", "vocab_projector.bias") else "base"


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a configuration names: transformers' own, a decoupled one or one of `models.sync_gpt2`."""
    if hasattr(config, "sync"):
        return SYNC_CLASS[config.architectures[0]]
    original = getattr(transformers, config.architectures[0].removeprefix("Decoupled"))
    return DECOUPLED_CLASS[original] if hasattr(config, "num_original_layers") else original


def _pooler(config: PretrainedConfig, has_pooler: bool) -> dict[str, bool]:
    """`add_pooling_layer` for a class without a head; nothing for other classes and for DistilBERT."""
    return {"add_pooling_layer": has_pooler} if architecture(config) == "bert" and head_of(config) == "base" else {}


def _empty_model(config: PretrainedConfig, has_pooler: bool) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return model_class(config)(copy.deepcopy(config), **_pooler(config, has_pooler))
    except Exception as error:  # torch asserts and raises errors of several kinds
        raise ValueError(f"config.json describes no model that can be made ({error}): correct it.") from None


def load_model(checkpoint: Checkpoint, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model in transformers' own class, in evaluation mode.

    Raises:
        ValueError: if it cannot be loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = checkpoint.config
    pooler = _pooler(config, "pooler.dense.weight" in WeightSource(checkpoint.path))
    try:
        return model_class(config).from_pretrained(checkpoint.path, config=config, dtype=dtype, **pooler).eval()
    except Exception as error:  # safetensors, torch and transformers raise their own errors
        if getattr(error, "errno", None):
            raise
        raise ValueError(f"{checkpoint.path} cannot be loaded ({' '.join(str(error).split())[:160]}).") from error


# --- The tokenizer -----------------------------------------------------------------------------------------------


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has a tokenizer; otherwise transformers would make one without a vocabulary."""
    return any((Path(folder) / name).is_file() for name in VOCABULARY_FILES)


def load_tokenizer(folder: str | Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; the model's `config` gives its class if no file names one.

    Raises:
        ValueError: if it is absent or damaged.
    """
    try:
        if not has_tokenizer(folder):
            raise ValueError(f"no {VOCABULARY_FILES[0]}")
        for name in VOCABULARY_FILES:
            if (Path(folder) / name).is_file():
                refuse_pointer(Path(folder) / name)
        return AutoTokenizer.from_pretrained(folder, config=config)
    except Exception as error:  # tokenizers raises errors of its own
        raise ValueError(
            f"{folder} has no readable tokenizer ({(str(error).splitlines() or [''])[0]}): save it there with "
            "the model, or run on random tokens (--tokens)."
        ) from None
