"""The bootstrap: which of n units each resample has, and the interval of what is computed of them.

Everything is decided by (n, resamples, seed): neither memory nor the number of threads changes a draw.
"""

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEW = (
    10  # units: below, a percentile interval covers less than it says (about 90 % at 10, 80 % at 5)
)
_CHUNK = 2**22  # numbers in memory at a time


def picks(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices below n, drawn with replacement: (resamples, n) in all, in chunks of rows, int64."""
    if n < 1 or resamples < 1:
        raise ValueError(f"n and resamples must be at least 1, got {n} and {resamples}")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(0, n, size=(min(rows, resamples - start), n))


def counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n units is in each resample: the same draws as `picks`, as multinomial weights
    whose rows sum to n, fp64."""
    for drawn in picks(n, resamples, seed):
        rows = np.arange(len(drawn))[:, None] * n
        weights = np.bincount((drawn + rows).ravel(), minlength=drawn.size)
        yield weights.reshape(drawn.shape).astype(np.float64)


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of resampled values: percentile interval. Resamples in which the statistic
    is not defined (NaN) do not count; (-inf, inf) if most of them are."""
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values):
        return -math.inf, math.inf
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled(
    n: int, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> np.ndarray:
    """What `statistic` makes of weights (rows, n), for every resample: (resamples,)."""
    return np.concatenate([statistic(weights) for weights in counts(n, resamples, seed)])


def quantile_of_normal(level: float) -> float:
    """z with P(|N(0, 1)| < z) = level: 1.96 for 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
