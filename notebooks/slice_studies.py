"""Which hidden units share a slice: a study of notebook 03.

The hidden units of a Transformer may be put into any order if all its weights follow: attention, feed-forward and
LayerNorm do not depend on it, and the model computes the same numbers in that order. Slices are consecutive units, so
the order decides which units a sub-block sees together. Four orders are compared: as the model was saved; random;
units together that the layers' maps couple; and similar units apart (so that each slice sees something of everything).

Shapes: D hidden, P slices, N tokens.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from detransformer.checkpoints import copy_files, copy_tokenizer
from detransformer.files import atomic_folder
from detransformer.folders import OTHER_FILES
from detransformer.opening import load_model, open_checkpoint
from detransformer.training import CalibrationConfig, ModelRow, TrainingData, calibrate
from detransformer.training.results import Result

ALONE_SHARE = 0.3  # of the steps
STARTS = 5  # of the search for slices
READS = r"(query|key|value|intermediate\.dense|pooler\.dense)\.(weight|bias)$"  # maps [out, D] that read hidden units


def reordered(model: PreTrainedModel, order: np.ndarray) -> PreTrainedModel:
    """`model`, a BERT encoder, with hidden unit `order[i]` at place i: its outputs are the same in that order."""
    index, hidden = torch.from_numpy(order), model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            reads = re.search(READS, name)
            if reads and name.endswith("bias"):
                continue  # of heads, inner units or the pooler's outputs
            axis = parameter.ndim - 1 if reads or "embeddings" in name else 0
            assert parameter.shape[axis] == hidden, name
            parameter.copy_(parameter.index_select(axis, index))
    return model


def couplings(model: PreTrainedModel) -> np.ndarray:
    """How strongly the layers' maps connect two hidden units [D, D]: products of absolute weights, sum 1 a map."""
    total = 0.0
    for layer in model.encoder.layer:
        mixed = layer.attention.output.dense.weight.abs() @ layer.attention.self.value.weight.abs()
        fed = layer.output.dense.weight.abs() @ layer.intermediate.dense.weight.abs()
        total = total + mixed / mixed.sum() + fed / fed.sum()
    return (total + total.T).detach().numpy()


@torch.no_grad()
def likeness(model: PreTrainedModel, sequences: torch.Tensor) -> np.ndarray:
    """Squared correlation of each two hidden units [D, D], mean over layers, on token ids [N, T]."""
    states = model(sequences, output_hidden_states=True).hidden_states
    return np.mean([np.corrcoef(x.flatten(0, 1).T.numpy()) ** 2 for x in states], axis=0)


def grouped(affinity: np.ndarray, num_slices: int) -> np.ndarray:
    """An order of the units in which slices of D/P units contain much of `affinity` [D, D].

    Two units are swapped as long as that gains something, from several random starts; the best result counts.
    """
    affinity, rng, ends = affinity - np.diag(np.diag(affinity)), np.random.default_rng(0), []
    for _ in range(STARTS):
        slices = rng.permutation(np.arange(len(affinity)) * num_slices // len(affinity))
        while True:
            within = affinity @ np.eye(num_slices)[slices]  # [D, P]: each unit with each slice
            moved = within[:, slices] - within[np.arange(len(slices)), slices][:, None]  # i into j's slice
            gain = np.where(slices[:, None] == slices, -np.inf, moved + moved.T - 2 * affinity)
            i, j = np.unravel_index(gain.argmax(), gain.shape)
            if gain[i, j] <= 1e-9 * affinity.max():
                break
            slices[i], slices[j] = slices[j], slices[i]
        ends.append((within[np.arange(len(slices)), slices].sum(), np.argsort(slices, kind="stable")))
    return max(ends, key=lambda end: end[0])[1]


def orders(model: PreTrainedModel, sequences: torch.Tensor, num_slices: int, num_random: int) -> dict[str, np.ndarray]:
    """name -> order of the hidden units: `as saved`, `random 1` and on, `coupled`, `spread`."""
    found = {"as saved": np.arange(model.config.hidden_size)}
    for number in range(num_random):
        found[f"random {number + 1}"] = np.random.default_rng(number).permutation(model.config.hidden_size)
    found["coupled"] = grouped(couplings(model), num_slices)
    found["spread"] = grouped(-likeness(model, sequences), num_slices)
    return found


def save_reordered(teacher: str | Path, order: np.ndarray, folder: Path) -> Path:
    """A checkpoint of the encoder of `teacher` in another order of hidden units; made once."""
    if not folder.is_dir():
        model = reordered(load_model(open_checkpoint(teacher), torch.float32), order)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            copy_tokenizer(str(teacher), temporary)
            copy_files(teacher, temporary, OTHER_FILES)
    return folder


def recipes(config: CalibrationConfig) -> dict[str, CalibrationConfig]:
    """`config` and its earlier stages: the slices as they are, and after the closed form."""
    closed = dataclasses.replace(config, num_steps=0)
    return {"sliced": dataclasses.replace(closed, fit_sequences=0), "closed form": closed, "trained": config}


def ways(config: CalibrationConfig) -> dict[str, CalibrationConfig]:
    """`config` with and without the closed form, and with and without steps that train each layer alone."""
    plain, alone = dataclasses.replace(config, fit_sequences=0), dict(alone_share=ALONE_SHARE)
    return {
        "together": plain,
        "alone, then together": dataclasses.replace(plain, **alone),
        "closed form, together": config,
        "closed form, alone, then together": dataclasses.replace(config, **alone),
    }


def slice_study(
    teacher: str | Path,
    row: ModelRow,
    recipes: Mapping[str, CalibrationConfig],
    data: TrainingData,
    output_dir: str | Path,
    num_random: int,
) -> pd.DataFrame:
    """`row` calibrated in each order of units by each named recipe: order, recipe and `errors_of`."""
    model = load_model(open_checkpoint(teacher), torch.float32)
    _, valid = data.packed_splits(next(iter(recipes.values())))
    sequences = torch.from_numpy(valid[:32].astype(np.int64))
    found = []
    for name, order in orders(model, sequences, row.num_divisions, num_random).items():
        folder = save_reordered(teacher, order, Path(output_dir) / "orders" / name.replace(" ", "-"))
        for recipe, config in recipes.items():
            result = calibrate(folder, row, config, data, Path(output_dir) / name.replace(" ", "-"))
            found.append({"order": name, "recipe": recipe} | errors_of(result))
    return pd.DataFrame(found)


def errors_of(result: Result) -> dict:
    """row, stage, tokens, error (the last layer's), mean_error and cosine of a calibration."""
    errors = result.errors
    return {
        "row": result.row.label, "stage": result.stage, "tokens": result.tokens or result.fit_tokens,
        "error": errors[-1], "mean_error": float(np.mean(errors)), "cosine": result.cosine,
    }  # fmt: skip


def alone_study(
    teacher: str | Path, row: ModelRow, recipes: Mapping[str, CalibrationConfig], data: TrainingData, output_dir: Path
) -> pd.DataFrame:
    """`row` calibrated by each of `recipes`, which differ in what precedes training all layers together."""
    found = {name: calibrate(teacher, row, config, data, output_dir) for name, config in recipes.items()}
    return pd.DataFrame({"recipe": name} | errors_of(result) for name, result in found.items())
