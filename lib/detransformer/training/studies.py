"""What the papers leave open, as sets of training runs: how little calibration needs, beside training from scratch."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from detransformer.training.config import ModelRow, PretrainConfig
from detransformer.training.data import TrainingData
from detransformer.training.distillation import CalibrationConfig, calibrate, calibration_table
from detransformer.training.jobs import run_jobs
from detransformer.training.pretraining import PretrainResult, pack, pretrain

PLAIN = {"kl_weight": 0.0, "hidden_weight": 0.0}


def calibration_study(
    teacher: PretrainResult,
    scratch: PretrainResult,
    config: PretrainConfig,
    shares: Sequence[float],
    data: TrainingData,
    output_dir: str | Path,
    num_jobs: int = 1,
) -> pd.DataFrame:
    """`teacher` sliced into `scratch`'s structure and trained on, beside training from scratch: `calibration_table`.

    For each share of the teacher's steps three runs of as many tokens: distilled, plain, from scratch. `scratch` itself
    is the fourth, at the full budget.

    Raises:
        ValueError: for a share outside 0..1 or below one step, or no shares.
    """
    if not shares:
        raise ValueError("shares is empty: give at least one share of the pre-training tokens, such as 0.1.")
    row, jobs = scratch.row, []
    for share in shares:
        if not 0 < share <= 1 or round(share * config.num_steps) < 1:
            raise ValueError(
                f"share {share} of {config.num_steps} steps is outside 1..{config.num_steps}: give one in that range."
            )
        short = dataclasses.replace(config, num_steps=round(share * config.num_steps))
        place = Path(output_dir) / f"{short.num_steps}steps"
        jobs += [(teacher, row, short, method, data, place) for method in ("distilled", "plain")]
        jobs.append((None, row, short, "from scratch", data, place))
    if num_jobs > 1:
        pack(data, config)  # once, before the workers want it
    results = run_jobs(_job, jobs, num_jobs, "calibration")
    scratched = [result for result, job in zip(results, jobs, strict=True) if job[0] is None]
    calibrated = [result for result, job in zip(results, jobs, strict=True) if job[0] is not None]
    return calibration_table(calibrated, [*scratched, scratch])


def structures(rows: Iterable[ModelRow]) -> list[ModelRow]:
    """`rows` and, before each, the published structure it varies; each once."""
    wanted: dict[ModelRow, None] = {}
    for row in rows:
        wanted[ModelRow(row.model, row.num_original_layers, row.num_divisions)] = None
        wanted[row] = None
    return list(wanted)


def _job(teacher, row, config, method, data, output_dir) -> PretrainResult:
    if teacher is None:
        return pretrain(row, config, data, output_dir)
    chosen = CalibrationConfig(config, **(PLAIN if method == "plain" else {}))
    return calibrate(teacher, row, chosen, data, output_dir)
