"""The objective of the policy search: validation loss plus weighted latency (CoFormer 2025, Section III-B, Eqs. 7, 8).

The loss of the uncalibrated sub-models stands in for the error that they have once they are calibrated.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from detransformer.coformer.decomposer import Importance, decompose, magnitude_importance
from detransformer.coformer.policy import Original, Policy, scale_policy
from detransformer.coformer.predictor import Latency, Predict, fastest_device, latency, roofline_s
from detransformer.coformer.tasks import BoostTask
from detransformer.planning.profile import ClusterProfile


@dataclass(frozen=True)
class Evaluation:
    """Psi(C) = L_val + delta T of one policy, and its two terms."""

    loss: float
    latency_s: float
    objective: float

    @classmethod
    def of(cls, loss: float, latency_s: float, delta: float) -> "Evaluation":
        return cls(float(loss), float(latency_s), float(loss + delta * latency_s))


@dataclass(frozen=True)
class Evaluator:
    """Eq. 8 as a function of the policy: decomposes, measures the validation loss, predicts the latency.

    Args:
        model: the large model, with a task head.
        batches: a small part of the samples, on which all policies are compared.
        importance: of `model`'s parts.
        cluster, predictors: as in `predictor.latency`; pooled features are sent.
        delta: what a second counts in units of loss.
        priced_as: sizes of a larger model of the same kind, by which latency is predicted (`scale_policy`); None: as
            large as `model` is. Of a small model a device's share of the time is that of its messages alone.
    """

    model: PreTrainedModel
    batches: Sequence[Mapping[str, torch.Tensor]]
    importance: Importance
    original: Original
    cluster: ClusterProfile
    predictors: Sequence[Predict] | None = None
    delta: float = 1.0
    priced_as: Original | None = None

    def latency(self, policy: Policy) -> Latency:
        priced = self.priced_as or self.original
        return latency(scale_policy(policy, self.original, priced), priced, self.cluster, self.predictors)

    def __call__(self, policy: Policy) -> Evaluation:
        losses = validation_loss(decompose(self.model, policy, self.importance), self.batches)
        return Evaluation.of(sum(losses) / len(losses), self.latency(policy).total_s, self.delta)


def make_evaluator(
    model: PreTrainedModel,
    task: BoostTask,
    cluster: ClusterProfile,
    latency_weight: float = 1.0,
    num_rows: int = 256,
    seed: int = 0,
    predictors: Sequence[Predict] | None = None,
    seq_len: int | None = None,
    priced_as: Original | None = None,
) -> Evaluator:
    """Psi of Eq. 8 for sub-models of `model` on `cluster`, over `num_rows` training samples of `task`.

    Args:
        latency_weight: delta, in units of loss for the time that the whole model takes on the fastest device; so it
            does not depend on how fast devices are.
        seq_len: as in `Original.of`.
    """
    original = Original.of(model.config, seq_len)
    priced = priced_as or original
    whole_s = roofline_s(priced.whole, priced, cluster.devices[fastest_device(cluster.devices)])
    batches, importance = training_batches(task, num_rows, seed), magnitude_importance(model)
    delta = latency_weight / whole_s
    return Evaluator(model, batches, importance, original, cluster, predictors, delta, priced_as)


def training_batches(task: BoostTask, num_rows: int, seed: int = 0, batch_size: int = 64) -> list[dict]:
    """So many training samples (rounded up to batches) with their labels, as models take them."""
    batches, labels = [], torch.from_numpy(task.train_labels)
    for step in range(-(-min(num_rows, len(labels)) // batch_size)):
        batch = task.train_batch(seed, step, min(batch_size, len(labels)))
        batches.append(batch.inputs | {"labels": labels[torch.from_numpy(batch.rows)]})
    return batches


@torch.inference_mode()
def validation_loss(
    sub_models: Sequence[PreTrainedModel], batches: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[float, ...]:
    """The validation loss L_n of each sub-model, the mean over samples; Eq. 7 is the mean over them.

    Eq. 7 sums over samples, which scales the loss with the size of the data set and so delta with it; the text calls it
    the average. Models are put in eval mode for it.

    Raises:
        ValueError: for a model that gives no loss.
    """
    losses, batches = [], list(batches)
    for model in sub_models:
        was_training = model.training
        model.eval()
        total = count = 0
        for batch in batches:
            loss = getattr(model(**{name: value.to(model.device) for name, value in batch.items()}), "loss", None)
            if loss is None:
                raise ValueError(
                    f"{type(model).__name__} gave no loss: take sub-models with a head, and batches with labels."
                )
            size = len(next(iter(batch.values())))
            total, count = total + size * float(loss), count + size
        model.train(was_training)
        losses.append(total / count)
    return tuple(losses)
