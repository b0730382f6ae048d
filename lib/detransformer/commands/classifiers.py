"""Opens trained classifiers to decompose (BERT, GPT-2, ViT), each with the task that it learned."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from detransformer.coformer.tasks import BoostTask, ImageTask, TextTask
from detransformer.opening import Checkpoint, load_model, read_configuration
from detransformer.training.config import FinetuneConfig
from detransformer.training.data.images import IMAGE_SIZE, open_images
from detransformer.training.data.tasks import get_task
from detransformer.training.data.text import text_for

FAMILIES = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "vit": "ViTForImageClassification",
}


def open_classifier(folder: Path) -> PreTrainedModel:
    """The model in float32; ValueError if `folder` has no readable classifier of `FAMILIES`."""
    config = read_configuration(folder, images=True)
    (made_as, *_) = config.architectures or ["model without a head"]
    if FAMILIES.get(config.model_type) != made_as:
        raise ValueError(
            f"{folder} holds a {made_as} ({config.model_type}), which is not decomposed: give a trained classifier, "
            f"one of {', '.join(FAMILIES.values())}."
        )
    return load_model(Checkpoint(folder, config), torch.float32)


def check_labels(folder: Path, named: Sequence[str], task: str) -> None:
    """Raises ValueError if the classifier's labels are the task's, by name, in another order."""
    found = list(map(_plain, named))
    for labels in (get_task(task).labels, ("not_equivalent", "equivalent")):  # MRPC's other names
        usual = list(map(_plain, labels))
        if sorted(found) == sorted(usual) and found != usual:
            raise ValueError(
                f"{folder} has its labels in the order {', '.join(named)}, and {task} in the order "
                f"{', '.join(labels)}: reorder the rows of the head, and id2label with them."
            )


def _plain(label: str) -> str:
    return re.sub(r"\W|_", "", label).lower()


def learned_task(
    folder: Path, config: PretrainedConfig, task: str | None, source: str, cache: Path, seq_len: int, rows: int | None
) -> BoostTask:
    """The classifier's task with at most `rows` samples; text is cut by the classifier's own tokenizer.

    Raises:
        ValueError: for a missing task or one of another kind, images of another size, or no tokenizer.
    """
    if config.model_type == "vit":
        if task not in (None, "CIFAR-100"):
            raise ValueError(f"--task {task} is for text, and {folder} looks at images: omit it, or give CIFAR-100.")
        if config.image_size != IMAGE_SIZE:
            raise ValueError(
                f"{folder} looks at images of {config.image_size} pixels and CIFAR-100's are {IMAGE_SIZE}: train one "
                "on these (`detransformer.training.images.train_vit`)."
            )
        return ImageTask(open_images(source, cache).cut(rows))
    if task is None:
        raise ValueError("--task is missing: name what the model was fine-tuned on, CoLA, SST-2, MRPC or MNLI.")
    check_labels(folder, [label for _, label in sorted(config.id2label.items())], task)
    data = text_for(folder, None, source, cache)
    names = ("input_ids", "attention_mask") + (("token_type_ids",) if config.model_type == "bert" else ())
    return TextTask(data, task, FinetuneConfig(seq_len=seq_len, max_train_rows=rows), names)
