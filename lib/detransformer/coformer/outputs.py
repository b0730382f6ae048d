"""What classifiers say of all samples of a task: pooled features and logits, computed once and kept in files.

Shapes: M samples of a split, N sub-models, d_n their widths, C classes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from detransformer.coformer.aggregator import Aggregator, features_and_logits, pool_features
from detransformer.coformer.tasks import BoostTask
from detransformer.files import atomic_write
from detransformer.training.config import config_hash

UNRELATED = ("_name_or_path", "architectures", "transformers_version", "dtype")  # to what a configuration computes


@dataclass(frozen=True)
class Outputs:
    """Pooled features [M, d_n] and logits [M, C] of each sub-model over the samples of a split, and the labels [M].

    Raises:
        ValueError: for features that are not pooled or not of as many samples as there are labels.
    """

    features: list[torch.Tensor]
    logits: list[torch.Tensor]
    labels: torch.Tensor
    pooling: str = "mean"

    def __post_init__(self):
        for number, x in enumerate(self.features, start=1):
            if x.dim() != 2 or len(x) != len(self.labels):
                raise ValueError(
                    f"features of sub-model {number} are {list(x.shape)} for {len(self.labels)} labels: give pooled "
                    "features [M, d_n] of the same samples."
                )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.features)

    def answers(self, aggregator: Aggregator) -> list[torch.Tensor]:
        """What the sub-models send to an aggregator of this kind."""
        return self.features if aggregator.learned else self.logits

    @property
    def accuracies(self) -> list[float]:
        """Of each sub-model alone, times 100."""
        return [100 * float((logits.argmax(-1) == self.labels).float().mean()) for logits in self.logits]


@torch.no_grad()
def compute_outputs(
    model: PreTrainedModel, task: BoostTask, split: str, pooling: str = "mean", batch_size: int = 250
) -> dict[str, torch.Tensor]:
    """`features` [M, d_n] and `logits` [M, C] of all samples of `split` by number, in float32.

    They are computed in the model's own number format, and in eval mode.
    """
    found: dict[str, torch.Tensor] = {}
    num_rows, device = len(getattr(task, f"{split}_labels")), model.device
    model.eval()
    with tqdm(total=num_rows, desc=f"{task.name} {split}", unit="sample", leave=False) as bar:
        for batch in task.ordered_batches(split, batch_size):
            rows = batch.pop("rows")
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            features, logits = features_and_logits(model, inputs)
            pooled = pool_features(features.float(), inputs.get("attention_mask"), pooling)
            for name, x in (("features", pooled), ("logits", logits)):
                found.setdefault(name, torch.empty(num_rows, x.shape[-1]))[rows] = x.float().cpu()
            bar.update(len(rows))
    return found


def predict(model: PreTrainedModel, task: BoostTask, split: str, batch_size: int = 250) -> torch.Tensor:
    """Logits float32 [M, C] of all samples of `split`, by number."""
    return compute_outputs(model, task, split, batch_size=batch_size)["logits"]


def collect_outputs(
    sub_models: Sequence[PreTrainedModel],
    task: BoostTask,
    split: str,
    cache_dir: str | Path,
    pooling: str = "mean",
) -> Outputs:
    """What each sub-model says of every sample of `split` (`train`, `test` or `held`).

    Args:
        cache_dir: where each sub-model's part is kept, and found again for the same weights and samples.
        pooling: as in `pool_features`.

    Raises:
        ValueError: for a damaged file there.
    """
    parts = []
    for sub_model in sub_models:
        key = config_hash("outputs", weights_hash(sub_model), task.name, task.fingerprint, split, pooling)
        path = Path(cache_dir) / f"outputs-{split}-{key}.safetensors"
        parts.append(kept(path, lambda model=sub_model: compute_outputs(model, task, split, pooling)))
    features, logits = ([part[name] for part in parts] for name in ("features", "logits"))
    return Outputs(features, logits, torch.from_numpy(getattr(task, f"{split}_labels")), pooling)


def kept(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a file, which are made and written where it is not there."""
    if path.exists():
        return read_tensors(path, "delete it")
    tensors = make()
    write_tensors(path, tensors)
    return tensors


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file."""
    with atomic_write(path, "wb") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ValueError with the remedy where it is missing or damaged."""
    try:
        return load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy} and it is computed again.") from error


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits over a model's class, configuration and weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    told = {name: value for name, value in model.config.to_dict().items() if name not in UNRELATED}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
