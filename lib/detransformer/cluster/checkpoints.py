"""Checkpoints for latency runs: presets of the real size with random weights, or a user's folder.

Latency does not depend on the weights' values, but parity checks do: presets get non-zero biases and random LayerNorm
parameters, and plans are compared with the saved output of each checkpoint's Hugging Face model on one device.
"""

import hashlib
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save
from transformers import BertModel, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel

from detransformer.cluster.hello import model_facts
from detransformer.files import atomic_folder, atomic_write
from detransformer.models import decouple
from detransformer.models.configuration import generates, max_tokens, preset_config
from detransformer.opening import Checkpoint, load_model, open_checkpoint, read_configuration
from detransformer.presets import PLANNING_ONLY, PRESETS
from detransformer.settings import cache_folder

SEED = 0


def original_checkpoint(model: str) -> Checkpoint:
    """The original model: a preset's name (random weights, made once and cached) or a folder.

    Raises:
        ValueError: if it is neither, the preset is for planning only, or the folder has no runnable model.
    """
    if model in PLANNING_ONLY:
        raise ValueError(
            f"model {model!r} is for planning only, its weights are not made: choose one of "
            f"{', '.join(name for name in PRESETS if name not in PLANNING_ONLY)}, or a checkpoint folder."
        )
    if model not in PRESETS:
        return open_checkpoint(model)

    def build() -> PreTrainedModel:
        torch.manual_seed(SEED)
        config = preset_config(model)
        built = (GPT2LMHeadModel if generates(config) else BertModel)(config)
        for name, parameter in built.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name or ".ln_" in name:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        return built

    return _cached(f"{model}-original", build)


def decoupled_checkpoint(model: str, config: PretrainedConfig) -> Checkpoint:
    """The decoupled model of `config`: sliced from `original_checkpoint(model)`, or that itself if it is decoupled."""
    original = original_checkpoint(model)
    if original.decoupled:
        return original
    name = model
    if model not in PRESETS:
        name = "folder-" + hashlib.sha256(str(model_facts(str(original.path))).encode()).hexdigest()[:12]
    layers, divisions, width = config.num_original_layers, config.num_divisions, config.attention_width

    def build() -> PreTrainedModel:
        return decouple(load_model(original), layers, divisions, width)

    return _cached(f"{name}-nb{layers}-ndiv{divisions}-{width}", build)


def _cached(name: str, build) -> Checkpoint:
    folder = cache_folder() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            with atomic_folder(folder) as temporary:
                build().save_pretrained(temporary, max_shard_size="50GB")
    return Checkpoint(folder, read_configuration(folder))


def request(checkpoint: Checkpoint, seq_len: int, batch_size: int, folder: Path) -> dict[str, str]:
    """Random tokens [batch_size, seq_len], unmasked as published, and the Hugging Face model's output for them.

    Returns the safetensors files of both: `inputs` and `reference`, as arguments of `jobs.run_plan`.
    A user's checkpoint may change, so its request is made anew for each session, in `folder`.

    Raises:
        ValueError: if the model has fewer positions than `seq_len`.
    """
    limit = max_tokens(checkpoint.config)
    if not 1 <= seq_len <= limit:
        raise ValueError(f"seq_len={seq_len} is outside 1..{limit}, the model's positions.")
    if cache_folder() in checkpoint.path.parents:  # a preset never changes: its request is kept for later sessions
        folder = cache_folder() / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{checkpoint.path.name}-seq{seq_len}-batch{batch_size}"
    inputs, reference = folder / f"{stem}-inputs.safetensors", folder / f"{stem}-reference.safetensors"
    if not reference.is_file():
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(checkpoint.config.vocab_size, (batch_size, seq_len), generator=generator)
        model = load_model(checkpoint, torch.float32).base_model
        with torch.inference_mode():
            output = model(input_ids=ids).last_hidden_state.contiguous()
        for path, tensors in ((inputs, {"input_ids": ids}), (reference, {"last_hidden_state": output})):
            with atomic_write(path, "wb") as file:
                file.write(save(tensors))
    return {"inputs": str(inputs), "reference": str(reference)}
