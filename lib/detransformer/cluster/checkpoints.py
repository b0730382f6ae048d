"""Checkpoints for latency runs: presets with random weights of the real size, or a user's folder.

Latency does not depend on the weights' values, but parity checks do: presets get non-zero biases and LayerNorm
parameters, and the output of each checkpoint's Hugging Face model on one device is kept, to compare plans with.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
)

from detransformer.files import atomic_folder, atomic_write
from detransformer.models import architecture, decouple
from detransformer.models.configuration import decoupled_config, preset_config
from detransformer.presets import PLANNING_ONLY, PRESETS
from detransformer.settings import cache_folder

SEED = 0
MODEL_CLASS = {"bert": BertModel, "gpt2": GPT2LMHeadModel}


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and model.safetensors, and the configuration in it."""

    path: Path
    config: PretrainedConfig

    @property
    def decoupled(self) -> bool:
        return hasattr(self.config, "num_divisions")


def original_checkpoint(model: str) -> Checkpoint:
    """The original model: a preset's name (random weights, made once and cached) or a folder.

    Raises:
        ValueError: if it is neither, the preset is for planning only, or the folder holds no BERT or GPT-2.
    """
    if model in PLANNING_ONLY:
        raise ValueError(
            f"model {model!r} is for planning only, its weights are not made: choose one of "
            f"{', '.join(name for name in PRESETS if name not in PLANNING_ONLY)}, or a checkpoint folder."
        )
    if model not in PRESETS:
        return open_folder(model)

    def build() -> PreTrainedModel:
        torch.manual_seed(SEED)
        config = preset_config(model)
        built = MODEL_CLASS[architecture(config)](config)
        for name, parameter in built.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name or ".ln_" in name:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        return built

    return _cached(f"{model}-original", build)


def decoupled_checkpoint(model: str, num_original_layers: int, num_divisions: int, attention_width: str) -> Checkpoint:
    """The decoupled model: sliced from `original_checkpoint(model)`, or `model` itself where it is decoupled."""
    original, sizes = original_checkpoint(model), (num_original_layers, num_divisions, attention_width)
    if original.decoupled:
        return original
    name = model
    if model not in PRESETS:
        stamp = (original.path / "model.safetensors").stat()
        name = "folder-" + hashlib.sha256(f"{original.path.resolve()} {stamp.st_mtime_ns}".encode()).hexdigest()[:12]
    decoupled_config(original.config, *sizes)  # checks the sizes before a large model is loaded

    def build() -> PreTrainedModel:
        return decouple(MODEL_CLASS[architecture(original.config)].from_pretrained(original.path), *sizes)

    return _cached(f"{name}-nb{num_original_layers}-ndiv{num_divisions}-{attention_width}", build)


def open_folder(folder: str | Path) -> Checkpoint:
    """A BERT or GPT-2 checkpoint in `folder`, original or decoupled."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"model {str(folder)!r} is neither a preset ({', '.join(PRESETS)}) nor a folder that exists.")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises errors of many kinds for a broken configuration
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(f"{path} holds no readable config.json ({lines[0]}): save the model there.") from None
    if not isinstance(config, BertConfig | GPT2Config):
        raise ValueError(
            f"{path} is a {config.model_type} checkpoint, not BERT or GPT-2: only these two can be run, original or "
            f"decoupled."
        )
    check_sizes(path, config)
    if not (path / "model.safetensors").is_file():
        raise ValueError(
            f"{path} has no model.safetensors: save the model with `save_pretrained` (safetensors, one file)."
        )
    return Checkpoint(path, config)


def check_sizes(path: Path, config: PretrainedConfig) -> None:
    """Raises ValueError for an impossible `config`: a size is no positive integer, or heads do not divide the width."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        size = getattr(config, name, None)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
            raise ValueError(f"{path}/config.json: {name} is {size!r}, and must be a whole number from 1.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{path}/config.json: {config.num_attention_heads} heads do not divide the hidden size "
            f"{config.hidden_size}."
        )


def _cached(name: str, build) -> Checkpoint:
    folder = cache_folder() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            with atomic_folder(folder) as temporary:
                build().save_pretrained(temporary, max_shard_size="50GB")
    return Checkpoint(folder, AutoConfig.from_pretrained(folder))


@dataclass(frozen=True)
class Request:
    """A request's inputs and the single-device output for it, as safetensors files."""

    inputs: Path
    reference: Path


def request(checkpoint: Checkpoint, seq_len: int, batch_size: int, folder: Path) -> Request:
    """Random tokens [batch_size, seq_len], unmasked as published, and the Hugging Face model's output for them.

    A user's checkpoint may change, so its request is made anew for each session, in `folder`.

    Raises:
        ValueError: if the model has fewer positions than `seq_len`.
    """
    limit = checkpoint.config.max_position_embeddings
    if not 1 <= seq_len <= limit:
        raise ValueError(f"seq_len={seq_len} is outside 1..{limit}, the positions that the model has.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1: choose how many sequences a request has.")
    if cache_folder() in checkpoint.path.parents:  # a preset never changes: its request is kept for later sessions
        folder = cache_folder() / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{checkpoint.path.name}-seq{seq_len}-batch{batch_size}"
    made = Request(folder / f"{stem}-inputs.safetensors", folder / f"{stem}-reference.safetensors")
    if not made.reference.is_file():
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(checkpoint.config.vocab_size, (batch_size, seq_len), generator=generator)
        model = AutoModel.from_pretrained(checkpoint.path).eval()
        with torch.inference_mode():
            output = model(input_ids=ids).last_hidden_state.contiguous()
        files = {made.inputs: {"input_ids": ids}, made.reference: {"last_hidden_state": output}}
        for path, tensors in files.items():
            with atomic_write(path, "wb") as file:
                file.write(save(tensors))
    return made
