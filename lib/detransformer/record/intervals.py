"""Bootstrap intervals of speedups and medians, and intervals of means over seeds."""

import json
import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
MIN_SAMPLES = 10  # requests per method; with fewer, a speedup has no interval
NUM_ERRORS = 2  # standard errors on each side of a mean over seeds
SEED, RESAMPLES = 0, 2000


def bootstrap_ratio(numerator_samples: Sequence[float], denominator_samples: Sequence[float]) -> tuple[float, float]:
    """A 95% bootstrap percentile interval of median(numerator) / median(denominator).

    Sample i of both belongs to round i of interleaved requests, so rounds are resampled: a disturbance of a round slows
    both.

    Raises:
        ValueError: if the two have different lengths, or none.
    """
    above, below = (np.asarray(samples, dtype=float) for samples in (numerator_samples, denominator_samples))
    if above.shape != below.shape or above.ndim != 1 or not len(above):
        raise ValueError(f"{above.size} and {below.size} samples cannot be paired; give one of each per round.")
    rounds = np.random.default_rng(SEED).integers(0, len(above), (RESAMPLES, len(above)))
    return _percentiles(np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1))


def bootstrap_median(samples: Sequence[float]) -> tuple[float, float]:
    """A 95% bootstrap percentile interval of the median; NaN for fewer than `MIN_SAMPLES`."""
    if len(samples) < MIN_SAMPLES:
        return math.nan, math.nan
    drawn = np.random.default_rng(SEED).choice(np.asarray(samples, dtype=float), (RESAMPLES, len(samples)))
    return _percentiles(np.median(drawn, axis=1))


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def samples_of(cell: object) -> list[float]:
    """The samples in a table's cell, a JSON list; none if the cell is empty."""
    return json.loads(cell) if isinstance(cell, str) and cell else []


def around(mean: float, std_error: float) -> tuple[float, float]:
    """Two standard errors on each side of a mean; NaN for one seed, which has no error."""
    return mean - NUM_ERRORS * std_error, mean + NUM_ERRORS * std_error
