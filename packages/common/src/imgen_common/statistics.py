"""Bootstrap intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    strata: Sequence[Sequence[float]], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of the strata's means; each stratum is resampled within itself."""
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(values, float) for values in strata]
    means = np.mean([values[rng.integers(len(values), size=(draws, len(values)))].mean(1) for values in arrays], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([values.mean() for values in arrays])), float(low), float(high))


def paired_bootstrap_interval(
    before: Sequence[float], after: Sequence[float], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean difference of pairs, after minus before."""
    difference = np.asarray(after, float) - np.asarray(before, float)
    return bootstrap_interval([difference.tolist()], level=level, draws=draws, seed=seed)
