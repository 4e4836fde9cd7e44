"""Bootstrap intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL, NUM_RESAMPLINGS, SEED = 0.95, 4000, 0


class Interval(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(strata: Sequence[Sequence[float]]) -> Interval:
    """95 % percentile bootstrap interval of the mean of the strata's means; each stratum is resampled within itself.

    Values that are not finite make it so.
    """
    rng = np.random.default_rng(SEED)
    arrays = [np.asarray(values, float) for values in strata]
    picks = [rng.integers(len(values), size=(NUM_RESAMPLINGS, len(values))) for values in arrays]
    means = np.mean([values[pick].mean(1) for values, pick in zip(arrays, picks, strict=True)], axis=0)
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean([values.mean() for values in arrays])), float(low), float(high))


def paired_bootstrap_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """95 % percentile bootstrap interval of the mean difference of pairs, after minus before."""
    return bootstrap_interval([(np.asarray(after, float) - np.asarray(before, float)).tolist()])
