"""An ensemble on disk: sub-models, aggregator and policy of one decomposed model, to be served (CoFormer, Fig. 3).

FOLDER/ensemble.json            policy, sizes of the large model and of the aggregator, which device aggregates
FOLDER/sub_model_0/ ..          Hugging Face model folders, one a device
FOLDER/aggregator.safetensors   weights and means of the aggregator, which makes one answer of features or logits
FOLDER/tokenizer files          if the model reads text
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from detransformer.checkpoints import copy_tokenizer
from detransformer.coformer.aggregator import Aggregator, features_and_logits, make_aggregator
from detransformer.coformer.policy import Original, Policy
from detransformer.files import atomic_folder
from detransformer.typed_json import from_json

DESCRIPTION, WEIGHTS = "ensemble.json", "aggregator.safetensors"


@dataclass(frozen=True)
class Ensemble:
    """Sub-models and aggregator in a folder; `central` is the number of the device that aggregates."""

    folder: Path
    policy: Policy
    original: Original
    central: int
    model_type: str
    aggregator_sizes: dict

    @property
    def num_devices(self) -> int:
        return self.policy.num_devices

    def sub_model(self, number: int) -> PreTrainedModel:
        """The classifier of one device, in eval mode."""
        images = self.model_type == "vit"
        auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
        return auto.from_pretrained(self.folder / f"sub_model_{number}").eval()

    def aggregator(self) -> Aggregator:
        """The aggregator, in eval mode; ValueError naming the file if its weights are missing."""
        aggregator, weights = make_aggregator(**self.aggregator_sizes), self.folder / WEIGHTS
        try:
            aggregator.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{weights} is missing, damaged or of other sizes ({error}): train it again.") from error
        return aggregator.eval()


def save_ensemble(
    folder: str | Path,
    sub_models: Sequence[PreTrainedModel],
    aggregator: Aggregator,
    policy: Policy,
    original: Original,
    central: int,
    tokenizer_of: str | Path | None = None,
) -> Ensemble:
    """Writes an ensemble; `tokenizer_of` is the large model's folder, if it reads text."""
    assert len(sub_models) == len(aggregator.widths) == policy.num_devices > central >= 0
    model_type = sub_models[0].config.model_type.removeprefix("coformer_")
    described = {"policy": asdict(policy), "original": asdict(original), "central": central, "model_type": model_type}
    described["aggregator_sizes"] = {name: getattr(aggregator, name) for name in ("kind", "widths", "num_labels")}
    with atomic_folder(Path(folder)) as temporary:
        for number, sub_model in enumerate(sub_models):
            sub_model.save_pretrained(temporary / f"sub_model_{number}")
        save_file(aggregator.state_dict(), temporary / WEIGHTS)
        if tokenizer_of is not None:
            copy_tokenizer(str(tokenizer_of), temporary)
        (temporary / DESCRIPTION).write_text(json.dumps(described, indent=1), encoding="utf-8")
    return load_ensemble(folder)


def load_ensemble(folder: str | Path) -> Ensemble:
    """The ensemble in `folder`; ValueError naming the file and the remedy if it is missing or damaged."""
    path = Path(folder) / DESCRIPTION
    try:
        return from_json(Ensemble, json.loads(path.read_text(encoding="utf-8")) | {"folder": Path(folder)})
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {DESCRIPTION}: make an ensemble with `detransformer decompose`.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): decompose the model again.") from error


@torch.inference_mode()
def answer(sub_model: PreTrainedModel, inputs: dict, aggregator: Aggregator) -> torch.Tensor:
    """The message of one device: features [B, d_n] or logits [B, C], as `aggregator` needs; float32."""
    features, logits = features_and_logits(sub_model, inputs)
    return (features if aggregator.learned else logits).float()


@torch.inference_mode()
def whole_answer(ensemble: Ensemble, inputs: dict, present: Sequence[bool] | None = None) -> torch.Tensor:
    """The ensemble's logits [B, C] in one process: the reference of a distributed run."""
    aggregator = ensemble.aggregator()
    answers = [answer(ensemble.sub_model(n), inputs, aggregator) for n in range(ensemble.num_devices)]
    return aggregator(answers, present)
