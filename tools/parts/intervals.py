"""Confidence intervals over seeds."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval for the mean of n values, n - 1 degrees of freedom; nan if n < 2."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean, half = np.mean(values), stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)


def mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    """The mean, and half the width of its 95 % Student t interval (0 for a single value)."""
    low, high = t_interval(values)
    half = 0.0 if math.isnan(low) else (high - low) / 2
    return float(np.mean(values)), half
