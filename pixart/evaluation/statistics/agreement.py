"""How far raters agree, and how alike two orders are; intervals by a bootstrap over what was rated."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.resampling import RESAMPLES, interval, resampled

_BLOCK = 512  # columns of a matrix of pairs in memory at a time


def cohen_kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Agreement of two raters above chance, of labels without order (Cohen 1960): 1 all, 0 as by chance.

    first[i] and second[i]: the labels of item i. ValueError where both always give the same one label,
    of which it is not defined.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"both must have rated the same items, got {len(first)} and {len(second)} labels"
        )
    labels = _places([*first, *second])
    k, n = len(labels), len(first)
    if k == 1:
        raise ValueError(f"kappa needs two different labels, all {n} items have {first[0]!r}")
    cells = np.zeros((n, k * k))
    for item, (one, other) in enumerate(zip(first, second, strict=True)):
        cells[item, labels[one] * k + labels[other]] = 1

    def kappa(weights: np.ndarray) -> np.ndarray:
        table = (weights @ cells).reshape(-1, k, k) / n
        agreed = np.trace(table, axis1=1, axis2=2)
        by_chance = (table.sum(axis=2) * table.sum(axis=1)).sum(axis=1)
        return _ratio(agreed - by_chance, 1 - by_chance)

    return _estimate(kappa, n, resamples, seed)


def krippendorff_alpha(
    ratings: Sequence[Sequence[Hashable | None]], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Agreement of any number of raters, of labels without order (Krippendorff 2011): 1 all, 0 as by
    chance.

    ratings: for each item the labels that it got, None for a rater who gave none. Items with fewer than
    two labels do not count; n: the others. ValueError if there is none, or only one label.
    """
    pairable = [[label for label in item if label is not None] for item in ratings]
    pairable = [item for item in pairable if len(item) > 1]
    labels = _places(label for item in pairable for label in item)
    if len(labels) < 2:
        raise ValueError(
            f"alpha needs items with two labels or more, and two different labels, got "
            f"{len(pairable)} such items and {len(labels)} labels"
        )
    table = np.zeros((len(pairable), len(labels)))
    for place, item in enumerate(pairable):
        for label in item:
            table[place, labels[label]] += 1
    of_item = table.sum(axis=1)
    disagreed = (of_item**2 - (table**2).sum(axis=1)) / (of_item - 1)

    def alpha(weights: np.ndarray) -> np.ndarray:
        totals = weights @ table
        n = totals.sum(axis=1)
        observed = weights @ disagreed / n
        expected = (n**2 - (totals**2).sum(axis=1)) / (n * (n - 1))
        return _ratio(expected - observed, expected)

    return _estimate(alpha, len(pairable), resamples, seed)


def spearman(
    x: Sequence[float], y: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Spearman's correlation of ranks, ties at their mean rank. x[i], y[i]: of item i. ValueError where
    one side is constant."""
    left, right = _varied("x", x), _varied("y", y)
    _check_pairs(left, right)

    def rho(weights: np.ndarray) -> np.ndarray:
        ranks = [_centred_ranks(side, weights) for side in (left, right)]
        product = (weights * ranks[0] * ranks[1]).sum(axis=1)
        squares = [(weights * rank**2).sum(axis=1) for rank in ranks]
        return _ratio(product, np.sqrt(squares[0] * squares[1]))

    return _estimate(rho, len(left), resamples, seed)


def kendall(
    x: Sequence[float], y: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Kendall's tau-b: pairs in the same order less pairs in the other, ties heeded. Time n² x resamples:
    5 s at n = 1,000. ValueError where one side is constant."""
    left, right = _varied("x", x), _varied("y", y)
    _check_pairs(left, right)
    sides = [np.unique(side, return_inverse=True)[1] for side in (left, right)]

    def tau(weights: np.ndarray) -> np.ndarray:
        score = np.zeros(len(weights))
        for start in range(0, len(left), _BLOCK):
            block = slice(start, start + _BLOCK)
            signs = np.sign(np.subtract.outer(left, left[block]))
            signs *= np.sign(np.subtract.outer(right, right[block]))
            score += (weights @ signs * weights[:, block]).sum(axis=1)
        pairs = weights.sum(axis=1) ** 2
        untied = [pairs - (_totals(side, weights) ** 2).sum(axis=1) for side in sides]
        return _ratio(score, np.sqrt(untied[0] * untied[1]))

    return _estimate(tau, len(left), resamples, seed)


def _estimate(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, resamples: int, seed: int
) -> Estimate:
    value = float(statistic(np.ones((1, n)))[0])
    if n == 1:
        note = "one item says nothing about others: its interval is infinite"
        return Estimate(value, -math.inf, math.inf, n, "none", (note,))
    low, high = interval(resampled(n, statistic, resamples, seed))
    return Estimate(value, low, high, n, "bootstrap over items")


def _places(labels: Iterable[Hashable]) -> dict[Hashable, int]:
    """Of each label, its place in the order of first appearance."""
    return {label: place for place, label in enumerate(dict.fromkeys(labels))}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where it is not defined: a resample may have one label only. Below is a difference of sums:
    what rounding leaves of 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 1e-12, above / below, np.nan)


def _varied(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers")
    if len(np.unique(array)) < 2:
        raise ValueError(f"{name} must have two different values, got {len(array)} alike")
    return array


def _check_pairs(left: np.ndarray, right: np.ndarray) -> None:
    if len(left) != len(right):
        raise ValueError(f"x and y must be as long, got {len(left)} and {len(right)} values")


def _totals(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weight of each distinct value: (rows, values)."""
    order = np.argsort(places, kind="stable")
    starts = np.flatnonzero(np.diff(places[order], prepend=-1))
    return np.add.reduceat(weights[:, order], starts, axis=1)


def _centred_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rank of each item among weighted items, ties at their mean, less the mean of all: (rows, n)."""
    places = np.unique(values, return_inverse=True)[1]
    totals = _totals(places, weights)
    ranks = np.cumsum(totals, axis=1) - totals / 2
    return ranks[:, places] - weights.sum(axis=1, keepdims=True) / 2
