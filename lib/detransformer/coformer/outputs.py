"""Outputs of classifiers for all samples of a task: features and logits, computed once and kept in files.

Shapes: M samples of a split, N sub-models, d_n their widths, C classes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from detransformer.coformer.aggregator import Aggregator, features_and_logits
from detransformer.coformer.tasks import BoostTask
from detransformer.files import atomic_write
from detransformer.training.config import config_hash

UNRELATED = ("_name_or_path", "architectures", "transformers_version", "dtype")  # they change no computation


@dataclass(frozen=True)
class Outputs:
    """Features [M, d_n] and logits [M, C] of each sub-model over the samples of a split, and the labels [M]."""

    features: list[torch.Tensor]
    logits: list[torch.Tensor]
    labels: torch.Tensor

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.features)

    def answers(self, aggregator: Aggregator) -> list[torch.Tensor]:
        """The sub-models' messages to an aggregator of this kind."""
        return self.features if aggregator.learned else self.logits

    @property
    def accuracies(self) -> list[float]:
        """Each sub-model's own accuracy, times 100."""
        return [100 * float((logits.argmax(-1) == self.labels).float().mean()) for logits in self.logits]


def collect_outputs(models: Sequence[PreTrainedModel], task: BoostTask, split: str, cache_dir: str | Path) -> Outputs:
    """Each model's outputs for every sample of `split` (`train`, `test` or `held`), in float32.

    Args:
        cache_dir: folder where each model's outputs are kept, to be reused for the same weights and samples.

    Raises:
        ValueError: for a damaged file in `cache_dir`.
    """
    parts = []
    for model in models:
        key = config_hash("outputs", weights_hash(model), task.name, task.fingerprint, split)
        path = Path(cache_dir) / f"outputs-{split}-{key}.safetensors"
        if not path.exists():
            with atomic_write(path, "wb") as file:
                file.write(save(compute_outputs(model, task, split)))
        try:
            parts.append(load(path.read_bytes()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and it is computed again.") from error
    features, logits = ([part[name] for part in parts] for name in ("features", "logits"))
    return Outputs(features, logits, torch.from_numpy(getattr(task, f"{split}_labels")))


@torch.no_grad()
def compute_outputs(
    model: PreTrainedModel, task: BoostTask, split: str, batch_size: int = 250
) -> dict[str, torch.Tensor]:
    """`features` [M, d_n] and `logits` [M, C] of all samples of `split` in order; puts the model in eval mode."""
    found: dict[str, torch.Tensor] = {}
    num_rows, home, device = len(getattr(task, f"{split}_labels")), model.device, PartialState().device
    model.eval().to(device)
    with tqdm(total=num_rows, desc=f"{task.name} {split}", unit="sample", leave=False, disable=None) as bar:
        for batch in task.ordered_batches(split, batch_size):
            rows = batch.pop("rows")
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            for name, x in zip(("features", "logits"), features_and_logits(model, inputs), strict=True):
                found.setdefault(name, torch.empty(num_rows, x.shape[-1]))[rows] = x.float().cpu()
            bar.update(len(rows))
    model.to(home)
    return found


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits over a model's class, configuration and weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    told = {name: value for name, value in model.config.to_dict().items() if name not in UNRELATED}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
