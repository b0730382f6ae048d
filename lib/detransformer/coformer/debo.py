"""DeBo: from a trained classifier to sub-models on devices (CoFormer 2025, Algorithm 1).

    search_policy     lines 1 to 10: the decomposition policy, by the loss of uncalibrated sub-models and their latency
    calibrate_policy  lines 11 to 16: sub-models cut out, boosted one after the other, and an aggregator on top of them

No test sample is looked at before the last line: policies are compared on training samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from detransformer.coformer.aggregator import Aggregator
from detransformer.coformer.booster import (
    BoostConfig,
    BoostResult,
    BoostTask,
    boost,
    load_calibrated,
)
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.evaluator import Evaluator, fastest_device, roofline_s
from detransformer.coformer.fusion import (
    AggregatorConfig,
    Outputs,
    collect_outputs,
    ensemble_accuracy,
    train_aggregator,
)
from detransformer.coformer.policy import (
    Limits,
    Original,
    Policy,
    SubModelConfig,
    check_policy,
    encode,
    mutate_policy,
    sample_policy,
    sample_uniform_policy,
)
from detransformer.coformer.search import SearchResult, bayesian_search, random_search
from detransformer.planning.profile import ClusterProfile
from detransformer.training.config import check_positive

METHODS = ("bayesian", "random", "uniform")  # of a search (Fig. 11)


@dataclass(frozen=True)
class SearchConfig:
    """How a policy is looked for.

    Args:
        num_initial, num_iterations: random policies first, then chosen ones.
        latency_weight: delta of Eq. 8, in units of loss for the time that the whole model takes on the fastest device;
            so it does not depend on how fast devices are.
        num_rows: training samples on which policies are compared.
        sent_tokens: as in `evaluator.latency`; 1: pooled features.
        seed: of policies and samples.
    """

    num_initial: int = 10
    num_iterations: int = 40
    latency_weight: float = 1.0
    num_rows: int = 256
    sent_tokens: int | None = 1
    seed: int = 0

    def __post_init__(self):
        check_positive(self, "num_initial", "num_rows", "sent_tokens")
        if self.num_iterations < 0 or self.latency_weight < 0:
            raise ValueError(
                f"num_iterations={self.num_iterations} and latency_weight={self.latency_weight} must not be below 0."
            )


def make_evaluator(
    model: PreTrainedModel,
    task: BoostTask,
    cluster: ClusterProfile,
    config: SearchConfig,
    predictors: Sequence[Callable[[SubModelConfig], float]] | None = None,
    seq_len: int | None = None,
    priced_as: Original | None = None,
) -> Evaluator:
    """Psi of Eq. 8 for sub-models of `model` on `cluster`; arguments as in `search_policy`."""
    original = Original.of(model.config, seq_len)
    central = fastest_device(cluster.devices)
    priced = priced_as or original
    whole_s = roofline_s(priced.whole, priced, cluster.devices[central])
    return Evaluator(
        model,
        search_batches(task, config.num_rows, config.seed),
        original,
        cluster,
        predictors,
        delta=config.latency_weight / whole_s,
        central=central,
        sent_tokens=config.sent_tokens,
        priced_as=priced_as,
    ).with_importance()


def search_batches(task: BoostTask, num_rows: int, seed: int = 0, batch_size: int = 64) -> list[dict]:
    """So many training samples (rounded up to batches) with their labels, as models take them."""
    batches, labels = [], torch.from_numpy(task.train_labels)
    for step in range(-(-min(num_rows, len(labels)) // batch_size)):
        batch = task.train_batch(seed, step, min(batch_size, len(labels)))
        batches.append(batch.inputs | {"labels": labels[torch.from_numpy(batch.rows)]})
    return batches


def search_policy(
    model: PreTrainedModel,
    task: BoostTask,
    cluster: ClusterProfile,
    config: SearchConfig,
    limits: Limits | None = None,
    method: str = "bayesian",
    predictors: Sequence[Callable[[SubModelConfig], float]] | None = None,
    history: str | Path | None = None,
    seq_len: int | None = None,
    priced_as: Original | None = None,
    evaluator: Evaluator | None = None,
    fit_length_scale: bool = False,
    progress: bool = False,
) -> SearchResult:
    """The policy of the least Psi among `num_initial + num_iterations` that are evaluated.

    Args:
        model: the trained classifier.
        limits: of each device; None: C1 to C4 alone.
        method: `"bayesian"`, or with as many evaluations `"random"` or `"uniform"` (the same sub-model everywhere).
        predictors, seq_len: as in `latency` and `Original.of`.
        priced_as: as in `Evaluator`.
        history: file by which an interrupted search goes on.
        evaluator: that of an earlier search with the same arguments, whose importance is found already.
        fit_length_scale: as in `bayesian_search`.

    Raises:
        ValueError: for an unknown method, or where no policy is within the limits.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}.")
    if evaluator is None:
        evaluator = make_evaluator(model, task, cluster, config, predictors, seq_len, priced_as)
    original, count = evaluator.original, len(cluster.devices)
    draw = sample_uniform_policy if method == "uniform" else sample_policy

    def sample(rng: np.random.Generator) -> Policy:
        return draw(rng, original, limits, count)

    if method != "bayesian":
        total = config.num_initial + config.num_iterations
        return random_search(evaluator, sample, total, config.seed, history, method, progress)
    return bayesian_search(
        evaluator,
        sample,
        lambda policy: encode(policy, original),
        config.num_initial,
        config.num_iterations,
        config.seed,
        mutate=lambda rng, policy: mutate_policy(rng, policy, original, limits),
        history=history,
        fit_length_scale=fit_length_scale,
        progress=progress,
    )


@dataclass(frozen=True)
class Calibrated:
    """Sub-models of one policy that have learned again, and what became of them together.

    Args:
        boosted: of each sub-model, in the devices' order.
        train, test: what they say of all samples.
        aggregator: of the kind asked for.
        accuracy: of the ensemble on the test samples, times 100.
        held_out_accuracy: on training samples that nothing was trained on; NaN where the task holds none out.
    """

    policy: Policy
    boosted: tuple[BoostResult, ...]
    sub_models: tuple[PreTrainedModel, ...]
    train: Outputs
    test: Outputs
    aggregator: Aggregator
    accuracy: float
    held_out_accuracy: float


def calibrate_policy(
    model: PreTrainedModel,
    policy: Policy,
    task: BoostTask,
    boosting: BoostConfig,
    aggregation: AggregatorConfig,
    output_dir: str | Path,
    kind: str = "coformer",
    pooling: str = "first",
    limits: Limits | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    seq_len: int | None = None,
) -> Calibrated:
    """Decomposes `model` by `policy`, boosts its sub-models, trains an aggregator; resumable, kept in `output_dir`.

    Args:
        kind, pooling: of the aggregator.
        seq_len: tokens of a request, by which `limits` are checked, as in `Original.of`.

    Raises:
        ValueError: for a policy outside C1-C6, or what `boost` refuses.
    """
    check_policy(policy, Original.of(model.config, seq_len), limits)
    folder = Path(output_dir)
    cut = decompose(model, policy)
    boosted = boost(cut, model, task, boosting, folder, on_step)
    calibrated = load_calibrated(boosted, cut)
    train, test = (collect_outputs(calibrated, task, split, folder, pooling=pooling) for split in ("train", "test"))
    aggregator = train_aggregator(
        kind,
        train.features,
        train.labels,
        aggregation,
        boosting.seed,
        num_labels=task.num_classes,
        pooling=pooling,
    ).aggregator
    accuracy = ensemble_accuracy(aggregator, test.features, test.logits, test.labels)
    held_out_accuracy = math.nan
    if task.held_labels is not None:
        held = collect_outputs(calibrated, task, "held", folder, pooling=pooling)
        held_out_accuracy = ensemble_accuracy(aggregator, held.features, held.logits, held.labels)
    return Calibrated(policy, tuple(boosted), tuple(calibrated), train, test, aggregator, accuracy, held_out_accuracy)
