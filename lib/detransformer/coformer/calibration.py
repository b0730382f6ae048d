"""Calibration of a policy's sub-models, and their aggregator (CoFormer 2025, Algorithm 1, lines 11 to 16).

No test sample is looked at before the last line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from detransformer.coformer.aggregator import Aggregator
from detransformer.coformer.booster import BoostConfig, BoostResult, boost, load_calibrated
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.fusion import (
    AggregatorConfig,
    Outputs,
    collect_outputs,
    ensemble_accuracy,
    train_aggregator,
)
from detransformer.coformer.policy import Limits, Original, Policy, check_policy
from detransformer.coformer.tasks import BoostTask


@dataclass(frozen=True)
class Calibrated:
    """Calibrated sub-models of one policy, and their aggregator.

    Args:
        boosted: of each sub-model, in the devices' order.
        train, test: the sub-models' outputs for all samples.
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
    seq_len: int | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Calibrated:
    """Decomposes `model` by `policy`, boosts its sub-models, trains an aggregator; resumable, kept in `output_dir`.

    Args:
        kind, pooling: of the aggregator.
        seq_len: tokens of a request, by which `limits` are checked, as in `Original.of`.
        on_step: as in `boost`.

    Raises:
        ValueError: for a policy outside C1-C6, or what `boost` refuses.
    """
    check_policy(policy, Original.of(model.config, seq_len), limits)
    folder = Path(output_dir)
    cut = decompose(model, policy)
    boosted = boost(cut, model, task, boosting, folder, on_step)
    calibrated = load_calibrated(boosted, cut)
    splits = ("train", "test") if task.held_labels is None else ("train", "test", "held")
    train, test, *held = (collect_outputs(calibrated, task, split, folder, pooling=pooling) for split in splits)
    classes, seed = task.num_classes, boosting.seed
    aggregator = train_aggregator(
        kind, train.features, train.labels, aggregation, seed, num_labels=classes, pooling=pooling
    ).aggregator
    accuracies = [ensemble_accuracy(aggregator, part.features, part.logits, part.labels) for part in (test, *held)]
    accuracy, held_out_accuracy = (*accuracies, math.nan)[:2]
    return Calibrated(policy, tuple(boosted), tuple(calibrated), train, test, aggregator, accuracy, held_out_accuracy)


def score_table(
    made: Calibrated, task: BoostTask, large: float, lost: pd.DataFrame, names: Sequence[str]
) -> pd.DataFrame:
    """Scores of the large model and of each sub-model alone, and the accuracies of `fusion.missing_table`."""
    rows = [("the large model", task.metric, large)]
    rows += [(f"{name} alone", task.metric, r.score) for name, r in zip(names, made.boosted, strict=True)]
    for row in lost.itertuples():
        who = f"all but {names[row.missing - 1]}" if row.missing else f"all {len(names)}, aggregated"
        rows.append((who, "accuracy", row.accuracy))
    return pd.DataFrame(rows, columns=["who answers", "metric", "test score"])
