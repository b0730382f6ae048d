"""An ensemble on disk: sub-models, aggregator and policy of one decomposed model, to be served (CoFormer, Fig. 3).

FOLDER/ensemble.json      policy, the large model's sizes, which device aggregates
FOLDER/sub_model_0/ ..    Hugging Face model folders, one a device
FOLDER/aggregator/        what makes one answer of their features or logits
FOLDER/tokenizer files    where the model reads text
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from detransformer.checkpoints import copy_tokenizer
from detransformer.coformer.aggregator import (
    Aggregator,
    features_and_logits,
    load_aggregator,
    pool_features,
    save_aggregator,
)
from detransformer.coformer.policy import Original, Policy
from detransformer.files import atomic_folder
from detransformer.typed_json import from_json

DESCRIPTION = "ensemble.json"
VERSION = 1


@dataclass(frozen=True)
class Ensemble:
    """What `FOLDER/ensemble.json` says; `central` is the number of the device that aggregates."""

    folder: Path
    policy: Policy
    original: Original
    central: int
    model_type: str

    @property
    def num_devices(self) -> int:
        return self.policy.num_devices

    def sub_model(self, number: int) -> PreTrainedModel:
        """The classifier of one device, in eval mode."""
        images = self.model_type == "vit"
        auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
        return auto.from_pretrained(self.folder / f"sub_model_{number}").eval()

    def aggregator(self) -> Aggregator:
        return load_aggregator(self.folder / "aggregator")


def save_ensemble(
    folder: str | Path,
    sub_models: Sequence[PreTrainedModel],
    aggregator: Aggregator,
    policy: Policy,
    original: Original,
    central: int,
    tokenizer_of: str | Path | None = None,
) -> Ensemble:
    """Writes an ensemble; `tokenizer_of` is the large model's folder where it reads text.

    Raises:
        ValueError: where sub-models, aggregator, policy and central device do not belong together.
    """
    count = policy.num_devices
    if len(sub_models) != count or len(aggregator.widths) != count:
        raise ValueError(
            f"the policy is of {count} sub-models, {len(sub_models)} and an aggregator of {len(aggregator.widths)} "
            "are given: give one sub-model a device and the aggregator that was trained on them."
        )
    if not 0 <= central < count:
        raise ValueError(f"central={central} is outside 0..{count - 1}: give the number of the device that aggregates.")
    model_type = sub_models[0].config.model_type.removeprefix("coformer_")
    with atomic_folder(Path(folder)) as temporary:
        for number, sub_model in enumerate(sub_models):
            sub_model.save_pretrained(temporary / f"sub_model_{number}")
        save_aggregator(aggregator, temporary / "aggregator")
        if tokenizer_of is not None:
            copy_tokenizer(str(tokenizer_of), temporary)
        described = {
            "version": VERSION,
            "policy": policy.to_dict(),
            "original": dataclasses.asdict(original),
            "central": central,
            "model_type": model_type,
        }
        (temporary / DESCRIPTION).write_text(json.dumps(described, indent=1), encoding="utf-8")
    return load_ensemble(folder)


def is_ensemble(folder: str | Path) -> bool:
    """Whether `folder` is one that `detransformer decompose` wrote."""
    return (Path(folder) / DESCRIPTION).is_file()


def load_ensemble(folder: str | Path) -> Ensemble:
    """The ensemble of `folder`; ValueError that names the file and the remedy where it is missing or damaged."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} holds no ensemble (no {DESCRIPTION}): make one with `detransformer decompose`.")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Ensemble(
            Path(folder),
            Policy.from_dict(known["policy"]),
            from_json(Original, known["original"]),
            known["central"],
            known["model_type"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): decompose the model again.") from error


@torch.inference_mode()
def answer(sub_model: PreTrainedModel, inputs: dict, aggregator: Aggregator) -> torch.Tensor:
    """What one device sends: features pooled as `aggregator` wants them [B, d_n], or logits [B, C]; float32."""
    features, logits = features_and_logits(sub_model, inputs)
    if not aggregator.learned:
        return logits.float()
    return pool_features(features, inputs.get("attention_mask"), aggregator.pooling).float()


@torch.inference_mode()
def aggregate(aggregator: Aggregator, answers: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Logits [B, C] of what has come, None for a device that sent nothing."""
    return aggregator(answers) if aggregator.learned else aggregator(None, answers)


def whole_answer(ensemble: Ensemble, inputs: dict, present: Sequence[bool] | None = None) -> torch.Tensor:
    """The ensemble's logits [B, C] in one process: the reference of a distributed run."""
    aggregator = ensemble.aggregator()
    here = [True] * ensemble.num_devices if present is None else present
    answers = [
        answer(ensemble.sub_model(number), inputs, aggregator) if here[number] else None
        for number in range(ensemble.num_devices)
    ]
    return aggregate(aggregator, answers)
