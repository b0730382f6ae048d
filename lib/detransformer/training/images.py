"""A ViT (Dosovitskiy et al. 2021) trained from scratch on small images: the large model that CoFormer decomposes.

Published: DeiT-B, pre-trained on ImageNet, on CIFAR-100 (CoFormer 2025, Section IV). Here: a small
`ViTForImageClassification` of transformers, with the recipe that scores best on held-out training images. A finished
run is not repeated; an interrupted one is resumed.

Shapes: B batch, C classes; images [B, 3, 32, 32], (32 / patch_size)^2 + 1 tokens.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from detransformer.training.config import (
    PRECISIONS,
    StepRecipe,
    check_divides,
    config_hash,
    fraction,
    not_negative,
    one_of,
    positive,
)
from detransformer.training.data.images import IMAGE_SIZE, MEAN, NUM_CHANNELS, STD, ImageData
from detransformer.training.loop import Objective, Run, fit, micro_batches
from detransformer.training.results import Result, as_result, read_result, write_result

EVAL_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class ImageConfig(StepRecipe):
    """A ViT's sizes and its training recipe.

    Args:
        hidden_size, num_layers, num_heads, intermediate_size: None for the last is 4 * hidden_size.
        patch_size: pixels per side; 4 gives 65 tokens an image, 8 gives 17.
        dropout: of hidden states and attention.
        label_smoothing: share of a label that is spread over all classes.
    """

    hidden_size: int = positive(192)
    num_layers: int = positive(9)
    num_heads: int = positive(3)
    intermediate_size: int | None = positive(None)
    patch_size: int = positive(4)
    num_steps: int = positive(10_000)
    global_batch_size: int = positive(128)
    micro_batch_size: int = positive(128)
    weight_decay: float = not_negative(0.05)
    dropout: float = fraction(0.0)
    label_smoothing: float = fraction(0.1)
    mixed_precision: str = one_of("auto", PRECISIONS)

    def __post_init__(self):
        super().__post_init__()
        check_divides("patch_size", self.patch_size, "image_size", IMAGE_SIZE, "patches cover the image")
        check_divides("num_heads", self.num_heads, "hidden_size", self.hidden_size, "every head takes an equal part")

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


def train_best_vit(recipes: Sequence[ImageConfig], data: ImageData, output_dir: str | Path) -> Result:
    """Trains a ViT by each recipe; returns the one that gets most held-out images right. Test images choose nothing.

    Raises:
        ValueError: if no images are held out, or as `train_vit`.
    """
    if "held" not in data.labels:
        raise ValueError("no images are held out to choose a recipe by: call hold_out with a share first.")
    return max((train_vit(recipe, data, output_dir) for recipe in recipes), key=lambda made: made.held_out_accuracy)


def train_vit(config: ImageConfig, data: ImageData, output_dir: str | Path) -> Result:
    """Trains a ViT from scratch into a folder of its own under `output_dir` (model/, history.csv, result.json).

    Returns:
        The run's accuracy, train_accuracy and held_out_accuracy (times 100; NaN if no images are held out), num_steps,
        seed, precision, source, note.

    Raises:
        ValueError: for a damaged checkpoint, or a loss that is not finite.
    """
    identity = config_hash("vit", config, data.name, data.fingerprint)
    name = f"vit-{config.num_layers}x{config.hidden_size}-patch{config.patch_size}-{config.num_steps}steps"
    run = Run(name, Path(output_dir) / f"{name}-{identity[:6]}", identity)
    done = read_result(run)
    if done is not None:
        return as_result(run, done)
    set_seed(config.seed)
    model = ViTForImageClassification(config.vit_config(data.num_classes))
    set_seed(config.seed + 1)  # dropout

    def loss(model: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor, **_) -> torch.Tensor:
        logits = model(pixel_values=pixel_values).logits.float()  # [B, C]
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

    batches = micro_batches(partial(data.train_batch, config.seed), config)
    trained = fit(Objective(model, loss), batches, config, config.num_steps, run)
    scored = model  # in the number format of training, which is fast
    if config.mixed_precision == "bf16-weights":
        scored = copy.deepcopy(model).to(torch.bfloat16)
    seen = data.cut(max_train_rows=len(data.labels["test"]))
    num_tokens = (IMAGE_SIZE // config.patch_size) ** 2 + 1  # of an image, [CLS] included
    epochs = config.num_steps * config.global_batch_size / len(data.labels["train"])
    record = {
        "accuracy": evaluate_images(scored, data),
        "train_accuracy": evaluate_images(scored, seen, split="train"),
        "held_out_accuracy": evaluate_images(scored, data, split="held") if "held" in data.labels else math.nan,
        "num_steps": config.num_steps,
        "seed": config.seed,
        "precision": config.mixed_precision,
        "source": data.name,
        "note": f"{config.num_layers} layers, hidden {config.hidden_size}, {num_tokens} tokens, "
        f"{epochs:.3g} epochs; {data.note}",
        "config": dataclasses.asdict(config),
    }
    save = (model.save_pretrained, save_preprocessor)
    return as_result(run, write_result(run, trained, record, "images", config.global_batch_size, *save))


def save_preprocessor(folder: Path) -> None:
    """Writes how a picture becomes the model's input, as Hugging Face's image processors read it."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessorPil(size=size, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)


@torch.no_grad()
def evaluate_images(model: nn.Module, data: ImageData, split: str = "test") -> float:
    """Accuracy times 100 of `model` (pixel_values -> .logits [B, C]) over a split, in the model's own number format."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    batches = data.ordered_batches(split, EVAL_BATCH)
    for batch in tqdm(batches, f"{split} accuracy", unit="batch", leave=False, disable=None):
        predicted = model(pixel_values=batch["pixel_values"].to(device)).logits.argmax(-1).cpu()
        right += int((predicted == batch["labels"]).sum())
    return 100 * right / len(data.labels[split])
