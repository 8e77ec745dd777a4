"""Intervals from a bootstrap over runs, and the checks of numbers that all fits share."""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.resampling import LEVEL, interval
from pixart.evaluation.statistics.student import student_quantile

LEAST_RUNS = 4
MOST_UNDEFINED = 0.1  # of resamples, above which their interval says nothing


def positive(name: str, values: Sequence[float]) -> np.ndarray:
    """As fp64, (n,). ValueError that names the first which is not a positive finite number."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be positive numbers") from None
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a list of numbers, got shape {tuple(array.shape)}")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if len(bad):
        raise ValueError(
            f"{name} must be positive and finite, as logs are fitted, got {array[bad[0]]:g} "
            f"at place {bad[0]}"
        )
    return array


def clusters(runs: Sequence[Hashable]) -> np.ndarray:
    """The run of each point as a number from 0, by first appearance: int64."""
    known = {run: place for place, run in enumerate(dict.fromkeys(runs))}
    return np.array([known[run] for run in runs], dtype=np.int64)


def interval_of_runs(values: np.ndarray, runs: int) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values, its quantiles moved outwards as Student's t with
    runs - 1 degrees of freedom wants: of few runs the plain one covers too little (80 % of 5). Hesterberg
    2015, "What Teachers Should Know about the Bootstrap", section 5.3. NaN do not count."""
    return interval(values, _level(runs))


def finite(value: float | None) -> float | None:
    """As JSON may hold it: None for what is infinite or not a number."""
    return None if value is None or not math.isfinite(value) else float(value)


def estimate_as_json(one: Estimate) -> dict[str, float | None]:
    return {"value": finite(one.value), "low": finite(one.low), "high": finite(one.high)}


def _level(runs: int) -> float:
    if runs < 2:
        return LEVEL
    stretched = math.sqrt(runs / (runs - 1)) * student_quantile((1 + LEVEL) / 2, runs - 1)
    return 2 * NormalDist().cdf(stretched) - 1
