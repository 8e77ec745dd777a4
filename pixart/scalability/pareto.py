"""The front of runs: what nothing does better for less, and the size that does best for a given compute."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.resampling import counts
from pixart.scalability.intervals import (
    LEAST_RUNS,
    MOST_UNDEFINED,
    clusters,
    estimate_as_json,
    interval_of_runs,
    positive,
)


def pareto(compute: Sequence[float], loss: Sequence[float], *, upper: bool = False) -> np.ndarray:
    """Places of the points that are their lower hull in log-log, by rising compute: int64.

    Of what no other point reaches with less compute, only the corners of the convex hull are kept, so
    that a straight line or a curve that flattens is met from below. upper: more is better, as of a score.
    ValueError for numbers that are not positive and finite.
    """
    x, y = np.log(positive("compute", compute)), np.log(positive("loss", loss))
    if len(x) != len(y):
        raise ValueError(f"compute and loss must be as long, got {len(x)} and {len(y)} numbers")
    return lower_hull(x, -y if upper else y)


def lower_hull(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`pareto` of logs."""
    order = np.lexsort((y, x))
    best = np.minimum.accumulate(y[order])
    falls = np.concatenate([[True], best[1:] < best[:-1]])
    corners: list[int] = []
    for place in order[falls]:
        while len(corners) > 1 and _is_above(x, y, corners[-2], corners[-1], place):
            corners.pop()
        corners.append(int(place))
    return np.array(corners)


def _is_above(x: np.ndarray, y: np.ndarray, left: int, middle: int, right: int) -> bool:
    """Whether the middle point is not below the line between the others."""
    rise = (y[right] - y[left]) * (x[middle] - x[left])
    return bool((y[middle] - y[left]) * (x[right] - x[left]) >= rise)


@dataclass(frozen=True)
class Optimum:
    """The size with the lowest loss at a given compute. size and loss: None where nothing could be fitted.
    sizes: how many sizes were compared. reasons: why it is not identified, a sentence each."""

    compute: float
    size: Estimate | None
    loss: Estimate | None
    sizes: int
    reasons: tuple[str, ...] = ()

    @property
    def identified(self) -> bool:
        return not self.reasons

    def as_json(self) -> dict[str, Any]:
        return {
            "compute": self.compute,
            "identified": self.identified,
            "reasons": list(self.reasons),
            "size": self.size and estimate_as_json(self.size),
            "loss": self.loss and estimate_as_json(self.loss),
            "sizes": self.sizes,
        }


def compute_optimal(
    sizes: Sequence[float],
    compute: Sequence[float],
    loss: Sequence[float],
    runs: Sequence[Hashable],
    at: float,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Optimum:
    """N* at the compute `at`: the lowest point of a parabola of log loss against log size (IsoFLOP profiles
    of Hoffmann et al. 2022, arXiv 2203.15556), with its 95 % interval by a bootstrap over runs.

    Each run is read at `at` on a straight line in log-log between its measurements on either side; runs
    that do not reach it, or begin above it, do not count. A run has one size. ValueError for bad numbers.
    """
    log_size, level = _at_compute(sizes, compute, loss, runs, at)
    different = len(np.unique(log_size))
    if len(log_size) < LEAST_RUNS or different < LEAST_RUNS:
        reason = (
            f"{different} sizes were measured around this compute, at least {LEAST_RUNS} are needed"
        )
        return Optimum(at, None, None, different, (reason,))
    middle = float(log_size.mean())
    whole = _vertex(log_size - middle, level, np.ones((1, len(level))))[0]
    drawn = np.concatenate(
        [
            _vertex(log_size - middle, level, weights)
            for weights in counts(len(level), resamples, seed)
        ]
    )
    reasons = _reasons(whole, drawn, log_size - middle)
    if not np.isfinite(whole).all():
        return Optimum(at, None, None, different, reasons)
    size = interval_of_runs(np.exp(np.clip(drawn[:, 0] + middle, -700, 700)), len(level))
    low = interval_of_runs(np.exp(drawn[:, 1]), len(level))
    method = "bootstrap over runs"
    return Optimum(
        at,
        Estimate(math.exp(whole[0] + middle), *size, len(level), method),
        Estimate(math.exp(whole[1]), *low, len(level), method),
        different,
        reasons,
    )


def _at_compute(
    sizes: Sequence[float],
    compute: Sequence[float],
    loss: Sequence[float],
    runs: Sequence[Hashable],
    at: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each run that reaches `at`: log size and log loss there."""
    log_size = np.log(positive("size", sizes))
    x, y = np.log(positive("compute", compute)), np.log(positive("loss", loss))
    target = math.log(positive("the compute to compare at", [at])[0])
    if not len(log_size) == len(x) == len(y) == len(runs):
        raise ValueError("sizes, compute, loss and runs must be as long as each other")
    places = clusters(runs)
    found = []
    for run in range(int(places.max()) + 1):
        own = np.flatnonzero(places == run)
        if np.ptp(log_size[own]) > 1e-9:
            raise ValueError(f"run {runs[own[0]]!r} must have one size, it has several")
        own = own[np.argsort(x[own], kind="stable")]
        if x[own[0]] <= target + 1e-9 and target <= x[own[-1]] + 1e-9:
            found.append((log_size[own[0]], np.interp(target, x[own], y[own])))
    points = np.array(found).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _vertex(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Place and height of the lowest point of a weighted parabola, and its bend, once for each row of
    weights: (fits, 3). NaN where there are fewer than three different x; place and height NaN where it
    opens downwards."""
    present = np.stack([weights[:, x == one].sum(axis=1) > 0 for one in np.unique(x)], axis=1)
    enough = present.sum(axis=1) >= 3
    columns = np.stack([np.ones_like(x), x, x**2])
    normal = np.einsum("bn,in,jn->bij", weights, columns, columns, optimize=True)
    normal[~enough] = np.eye(3)
    height, slope, bend = np.linalg.solve(normal, (weights @ (columns * y).T)[:, :, None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.stack([-slope / (2 * bend), height - slope**2 / (4 * bend), bend], axis=1)
    found[~enough] = np.nan
    found[bend <= 0, :2] = np.nan
    return found


def _reasons(whole: np.ndarray, drawn: np.ndarray, x: np.ndarray) -> tuple[str, ...]:
    if not np.isfinite(whole).all():
        return ("loss against size has no lowest point: its parabola opens downwards",)
    reasons = []
    if not x.min() < whole[0] < x.max():
        side = "above the largest" if whole[0] >= x.max() else "below the smallest"
        reasons.append(f"the lowest point is {side} size that was tried")
    undefined = float(np.isnan(drawn[:, 2]).mean())
    if undefined > MOST_UNDEFINED:
        reasons.append(f"{undefined:.0%} of the resamples have fewer than three sizes")
    elif interval_of_runs(drawn[:, 2], len(x))[0] <= 0:
        reasons.append("whether the parabola opens upwards is not told")
    return tuple(reasons)
