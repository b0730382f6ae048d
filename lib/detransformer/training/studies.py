"""Sets of training runs: structures with what they vary, and the curve of calibration over tokens."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from detransformer.training.calibration import CalibrationConfig, CalibrationResult, calibrate
from detransformer.training.config import ModelRow
from detransformer.training.data import TrainingData


def calibration_curve(
    teacher: str | Path,
    row: ModelRow,
    budgets: Sequence[float],
    config: CalibrationConfig,
    data: TrainingData,
    output_dir: str | Path,
) -> list[CalibrationResult]:
    """`row` as it is cut, after the closed form, and trained on each number of tokens, one going on from another.

    Args:
        budgets: tokens trained on in all, ascending; each has a schedule of its own.

    Raises:
        ValueError: for budgets that do not ascend, and as `calibrate`.
    """
    untrained = dataclasses.replace(config, num_steps=0)
    found = [calibrate(teacher, row, dataclasses.replace(untrained, fit_sequences=0), data, output_dir)]
    if not row.is_original and config.fit_sequences:
        found.append(calibrate(teacher, row, untrained, data, output_dir))
    for budget in budgets:
        done = found[-1].tokens
        steps = round((budget - done) / config.tokens_per_step)
        if steps < 1:
            raise ValueError(
                f"a budget of {budget:,.0f} tokens is not above {done:,}: give ascending numbers of tokens."
            )
        chosen = dataclasses.replace(config, num_steps=steps, seed=config.seed + done)
        found.append(calibrate(teacher, row, chosen, data, output_dir, found[-1]))
    return found


def structures(rows: Iterable[ModelRow]) -> list[ModelRow]:
    """`rows` and, before each, the published structure it varies; each once."""
    wanted: dict[ModelRow, None] = {}
    for row in rows:
        wanted[ModelRow(row.model, row.num_original_layers, row.num_divisions)] = None
        wanted[row] = None
    return list(wanted)
