"""A ViT (Dosovitskiy et al. 2021) trained from scratch on small images: the large model that CoFormer decomposes.

Published: DeiT-B, pre-trained on ImageNet, on CIFAR-100 (CoFormer 2025, Section IV). Here: a small
`ViTForImageClassification` of transformers, trained with the loop, the number formats and the checkpoints of
pre-training. A finished run is not repeated; an interrupted one goes on.

Shapes: B batch, C classes; images [B, 3, 32, 32], (32 / patch_size)^2 + 1 tokens.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from detransformer.files import atomic_folder
from detransformer.training.checkpoints import (
    Checkpointer,
    Progress,
    as_result,
    read_result,
    write_history,
    write_result,
)
from detransformer.training.config import (
    OPTIMIZERS,
    PRECISIONS,
    check_choice,
    check_fraction,
    check_micro_batches,
    check_positive,
    config_hash,
)
from detransformer.training.data.images import IMAGE_SIZE, MEAN, NUM_CHANNELS, STD, ImageData
from detransformer.training.hardware import keep_freed_memory, make_accelerator, resolve_precision
from detransformer.training.pretraining import finish, prepare, train_steps

# How a picture becomes what the model reads, in the words of Hugging Face's image processors.
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


@dataclass(frozen=True)
class ImageConfig:
    """A ViT's sizes and how it is trained.

    Args:
        hidden_size, num_layers, num_heads, intermediate_size: None for the last is 4 * hidden_size.
        patch_size: pixels a side; 4 makes 65 tokens of an image, 8 makes 17.
        num_steps: optimizer steps; `steps_of_epochs` turns epochs into them.
        global_batch_size, micro_batch_size: images in one optimizer step, and in one forward pass.
        learning_rate, warmup, decay_power: linear warm-up over that fraction of the steps, then polynomial decay to 0.
        weight_decay, max_grad_norm, dropout: dropout of hidden states and attention.
        label_smoothing: share of a label that is spread over all classes.
        mixup: both parameters of the Beta distribution that two images are mixed by (Zhang et al. 2018); 0 mixes none.
        padding, flip: how far an image is moved, in pixels, and whether half of them are flipped.
        mixed_precision: as in `PretrainConfig`.
        checkpoint_every_s: seconds between checkpoints.
    """

    hidden_size: int = 192
    num_layers: int = 9
    num_heads: int = 3
    intermediate_size: int | None = None
    patch_size: int = 4
    num_steps: int = 10_000
    global_batch_size: int = 128
    micro_batch_size: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup: float = 0.1
    decay_power: float = 1.0
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    padding: int = 4
    flip: bool = True
    mixed_precision: str = "auto"
    checkpoint_every_s: float = 600.0
    seed: int = 0

    def __post_init__(self):
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "mixed_precision", PRECISIONS)
        check_positive(
            self,
            *("hidden_size", "num_layers", "num_heads", "intermediate_size", "patch_size", "num_steps"),
            *("global_batch_size", "micro_batch_size", "learning_rate", "decay_power"),
        )
        for name in ("warmup", "dropout", "label_smoothing"):
            check_fraction(self, name)
        for name in ("mixup", "padding", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0: give 0 for none.")
        if IMAGE_SIZE % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide {IMAGE_SIZE} pixels: choose 2, 4, 8 or 16.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}: choose a divisor."
            )
        check_micro_batches(self)

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    @property
    def num_tokens(self) -> int:
        """Tokens an image becomes, [CLS] included."""
        return (IMAGE_SIZE // self.patch_size) ** 2 + 1

    def vit_config(self, num_classes: int) -> ViTConfig:
        return ViTConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=self.intermediate_size or 4 * self.hidden_size,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            image_size=IMAGE_SIZE,
            patch_size=self.patch_size,
            num_channels=NUM_CHANNELS,
            num_labels=num_classes,
        )


def steps_of_epochs(num_epochs: float, data: ImageData, batch_size: int) -> int:
    """Optimizer steps in which each training image is seen `num_epochs` times."""
    return max(1, round(num_epochs * len(data.train_images) / batch_size))


@dataclass(frozen=True)
class VitResult:
    """A trained ViT: `checkpoint` is a Hugging Face model folder, `history` has a row a step; accuracies times 100."""

    checkpoint: Path
    history: pd.DataFrame
    accuracy: float
    train_accuracy: float
    chance_accuracy: float
    num_steps: int
    num_epochs: float
    num_parameters: int
    train_rows: int
    test_rows: int
    seconds: float
    images_per_s: float
    seed: int
    precision: str
    source: str
    note: str
    identity: str


class ImageBatches:
    """Training batches of `data` as `train_steps` asks for them; a function of (seed, index)."""

    def __init__(self, data: ImageData, config: ImageConfig):
        self.data, self.config = data, config

    def train_batch(self, index: int, batch_size: int) -> dict[str, torch.Tensor]:
        """pixel_values, labels [B]; with mixup also other_labels [B] and shares [B] of the first label."""
        config = self.config
        batch = self.data.train_batch(config.seed, index, batch_size, config.padding, config.flip)
        del batch["rows"]
        return mixed(batch, config.mixup, [config.seed, 2, index]) if config.mixup else batch


class ImageLoss(nn.Module):
    """A model and its mean cross-entropy as one module, so that accelerate wraps the whole forward pass."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, pixel_values, labels, other_labels=None, shares=None) -> torch.Tensor:
        logits = self.model(pixel_values=pixel_values).logits.float()  # [B, C]
        loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        if shares is not None:
            other = F.cross_entropy(logits, other_labels, reduction="none", label_smoothing=self.label_smoothing)
            loss = shares * loss + (1 - shares) * other
        return loss.mean()


def mixed(batch: dict[str, torch.Tensor], alpha: float, seed: list[int]) -> dict[str, torch.Tensor]:
    """Each image mixed with another of its batch, by a share from Beta(alpha, alpha) of its own."""
    rng = np.random.default_rng(seed)
    partners = torch.from_numpy(rng.permutation(len(batch["labels"])))
    shares = torch.from_numpy(rng.beta(alpha, alpha, len(partners))).float()
    share = shares[:, None, None, None]
    pixels = share * batch["pixel_values"] + (1 - share) * batch["pixel_values"][partners]
    return batch | {"pixel_values": pixels, "other_labels": batch["labels"][partners], "shares": shares}


def train_vit(
    config: ImageConfig,
    data: ImageData,
    output_dir: str | Path,
    on_step: Callable[[int, float], None] | None = None,
) -> VitResult:
    """Trains a ViT from scratch into a folder of its own under `output_dir` (model/, history.csv, result.json).

    `on_step(step, loss)` is called after each step.

    Raises:
        ValueError: for a damaged checkpoint, or a loss that is not finite.
    """
    precision = resolve_precision(config.mixed_precision)
    resolved = dataclasses.replace(config, mixed_precision=precision)
    identity = config_hash("vit", resolved, data.name, data.fingerprint)
    name = f"vit-{config.num_layers}x{config.hidden_size}-patch{config.patch_size}-{config.num_steps}steps"
    folder = Path(output_dir) / f"{name}-{identity[:6]}"
    done = read_result(folder / "result.json", identity)
    if done is not None:
        return as_result(VitResult, folder, done)
    set_seed(config.seed)
    model = ViTForImageClassification(config.vit_config(data.num_classes))
    keep_freed_memory()
    accelerator = make_accelerator(precision)
    objective = ImageLoss(model, config.label_smoothing)
    objective, optimizer = prepare(objective, model, config, precision, accelerator)
    progress = Progress()
    checkpointer = Checkpointer(folder / "checkpoint", accelerator, progress, config.checkpoint_every_s, identity)
    set_seed(config.seed + 1 + accelerator.process_index)  # dropout
    checkpointer.resume()
    batches = ImageBatches(data, config)
    train_steps(objective, optimizer, batches, config, accelerator, checkpointer, name, on_step)
    trained = accelerator.unwrap_model(objective).model
    accuracy = evaluate_images(trained, data)  # in the number format it was trained in, which is the fast one
    probe = data.cut(max_train_rows=len(data.test_images))
    train_accuracy = evaluate_images(trained, probe, split="train")
    finish(optimizer)
    images = config.num_steps * config.global_batch_size
    result = {
        "identity": identity,
        "accuracy": accuracy,
        "train_accuracy": train_accuracy,
        "chance_accuracy": 100 * float(np.bincount(data.test_labels).max()) / len(data.test_labels),
        "num_steps": config.num_steps,
        "num_epochs": images / len(data.train_images),
        "num_parameters": model.num_parameters(),
        "train_rows": len(data.train_images),
        "test_rows": len(data.test_images),
        "seconds": round(progress.seconds, 3),
        "images_per_s": round(images / max(progress.seconds, 1e-9), 3),
        "seed": config.seed,
        "precision": precision,
        "source": data.name,
        "note": f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_tokens} tokens, "
        f"{images / len(data.train_images):.3g} epochs; {data.note}",
        "config": dataclasses.asdict(config),
    }
    if accelerator.is_main_process:
        (folder / "result.json").unlink(missing_ok=True)
        with atomic_folder(folder / "model") as temporary:
            trained.save_pretrained(temporary)
            (temporary / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1), encoding="utf-8")
        write_history(folder, progress, "images", config.global_batch_size)
        write_result(folder / "result.json", result)
    accelerator.wait_for_everyone()
    checkpointer.remove()
    return as_result(VitResult, folder, result)


@torch.no_grad()
def evaluate_images(model: nn.Module, data: ImageData, batch_size: int = 250, split: str = "test") -> float:
    """Accuracy times 100 of `model` (pixel_values -> .logits [B, C]) over a split, in the model's own number format."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    right = count = 0
    total = len(getattr(data, f"{split}_labels"))
    with tqdm(total=total, desc=f"{split} accuracy", unit="image", leave=False) as bar:
        for batch in data.ordered_batches(split, batch_size):
            predicted = model(pixel_values=batch["pixel_values"].to(device)).logits.argmax(-1).cpu()
            right += int((predicted == batch["labels"]).sum())
            count += len(predicted)
            bar.update(len(predicted))
    model.train(was_training)
    return 100 * right / count
