"""Opens trained classifiers to decompose (BERT, GPT-2, ViT), each with the task that it learned."""

import json
import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from detransformer.coformer.tasks import BoostTask, ImageTask, TextTask
from detransformer.training.config import FinetuneConfig
from detransformer.training.data.images import IMAGE_SIZE, open_images
from detransformer.training.data.tasks import get_task
from detransformer.training.data.text import text_for

FAMILIES = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "vit": "ViTForImageClassification",
}


def family_of(folder: Path) -> str:
    """`bert`, `gpt2` or `vit`; ValueError if `folder` has no classifier of these."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no checkpoint (no config.json): give a folder of a trained classifier.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family, made_as = config.get("model_type"), (config.get("architectures") or [""])[0]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy the checkpoint again.") from error
    if FAMILIES.get(family) != made_as:
        raise ValueError(
            f"{folder} holds a {made_as or 'model without a head'} ({family}), which is not decomposed: give a "
            f"trained classifier, one of {', '.join(FAMILIES.values())}."
        )
    return family


def load_classifier(folder: Path, family: str) -> PreTrainedModel:
    """The model in float32; ValueError if its weights cannot be read."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return getattr(transformers, FAMILIES[family]).from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # safetensors, torch and transformers raise their own errors
        raise ValueError(f"the weights of {folder} cannot be read ({error}): copy the checkpoint again.") from error


def check_labels(folder: Path, task: str) -> None:
    """Raises ValueError if the classifier has the task's labels, by name, in another order."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    found = [re.sub(r"\W|_", "", str(named[number])).lower() for number in sorted(named, key=int)]
    for labels in (get_task(task).labels, ("not_equivalent", "equivalent")):  # MRPC's other names
        usual = [re.sub(r"\W|_", "", label).lower() for label in labels]
        if sorted(found) == sorted(usual) and found != usual:
            raise ValueError(
                f"{folder} has its labels in the order {', '.join(named[n] for n in sorted(named, key=int))}, and "
                f"{task} in the order {', '.join(labels)}: reorder the rows of the head, and id2label with them."
            )


def learned_task(
    folder: Path, family: str, task: str | None, source: str, cache: Path, seq_len: int, rows: int | None
) -> BoostTask:
    """The classifier's task with at most `rows` samples; text is cut by the classifier's own tokenizer.

    Raises:
        ValueError: for a missing task or one of another kind, images of another size, or no tokenizer.
    """
    if family == "vit":
        if task not in (None, "CIFAR-100"):
            raise ValueError(f"--task {task} is for text, and {folder} looks at images: omit it, or give CIFAR-100.")
        size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("image_size")
        if size != IMAGE_SIZE:
            raise ValueError(
                f"{folder} looks at images of {size} pixels and CIFAR-100's are {IMAGE_SIZE}: train one on these "
                "(`detransformer.training.images.train_vit`)."
            )
        return ImageTask(open_images(source, cache).cut(rows))
    if task is None:
        raise ValueError("--task is missing: name what the model was fine-tuned on, CoLA, SST-2, MRPC or MNLI.")
    check_labels(folder, task)
    data = text_for(folder, None, source, cache)
    names = ("input_ids", "attention_mask") + (("token_type_ids",) if family == "bert" else ())
    return TextTask(data, task, FinetuneConfig(seq_len=seq_len, max_train_rows=rows), names)
