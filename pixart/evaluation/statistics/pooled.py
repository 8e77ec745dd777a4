"""Means of unequal groups: of all questions of a kind, and of tasks, with intervals over prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pixart.evaluation.metric import Estimate
from pixart.evaluation.statistics.intervals import wilson
from pixart.evaluation.statistics.resampling import FEW, RESAMPLES, interval, resampled

if TYPE_CHECKING:
    from pixart.evaluation.store.entries import Entry


def pooled_mean(entries: "Sequence[Entry]", values: Sequence[Sequence[float]]) -> Estimate:
    """The mean of all values, however many each entry has; prompts without any do not count. n: prompts.
    Bootstrap over prompts. ValueError where there is no value at all."""
    return mean_of_means(entries, {"": values})


def mean_of_means(
    entries: "Sequence[Entry]", groups: Mapping[str, Sequence[Sequence[float]]]
) -> Estimate:
    """The mean over groups of the mean of all values in a group. groups: by name, for each entry its
    values in it. n: prompts that have any. Bootstrap over prompts; a resample in which a group has no
    value does not count. ValueError for a group without values."""
    rows: dict[str, int] = {}
    for number, entry in enumerate(entries):
        if any(values[number] for values in groups.values()):
            rows.setdefault(entry.prompt.id, len(rows))
    order = {prompt: place for place, prompt in enumerate(sorted(rows))}
    sums, sizes = (np.zeros((len(order), len(groups))) for _ in range(2))
    for column, (name, values) in enumerate(groups.items()):
        if not any(values):
            raise ValueError(f"values must be one at least, group {name!r} has none")
        for entry, some in zip(entries, values, strict=True):
            if some:
                sums[order[entry.prompt.id], column] += sum(some)
                sizes[order[entry.prompt.id], column] += len(some)
    value = float((sums.sum(0) / sizes.sum(0)).mean())

    def statistic(weights: np.ndarray) -> np.ndarray:
        of = weights @ sizes
        # Rows in which a group has nothing have no mean.
        means = np.divide(weights @ sums, of, out=np.full(of.shape, np.nan), where=of > 0)
        return means.mean(1)

    n = len(order)
    notes = (f"of {n} prompts only: the interval is rather too narrow",) if n < FEW else ()
    if n == 1:
        note = "one prompt says nothing about others: its interval is infinite"
        return Estimate(value, -math.inf, math.inf, n, "none", (note,))
    if value in (0.0, 1.0) and _are_proportions(groups):
        # All alike: the bootstrap would know of nothing else.
        low, high = wilson(value * n, n)
        return Estimate(value, low, high, n, "Wilson over prompts", notes)
    low, high = interval(resampled(n, statistic, RESAMPLES, 0))
    return Estimate(value, low, high, n, "bootstrap over prompts", notes)


def _are_proportions(groups: Mapping[str, Sequence[Sequence[float]]]) -> bool:
    return all(0 <= one <= 1 for values in groups.values() for some in values for one in some)
