"""Numbers with intervals: means over prompts, paired differences, proportions, AUC, agreement.

Units are prompts: pictures of one prompt are alike, and are resampled together. Everything is decided by
the seed, and nothing by the order of entries. The interval of one single unit is infinite: a caller that
writes JSON has to say so in its own way (null).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pixart.evaluation.statistics.agreement import (
    cohen_kappa,
    kendall,
    krippendorff_alpha,
    spearman,
)
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.resampling import (
    FEW,
    LEVEL,
    RESAMPLES,
    interval,
    picks,
    quantile_of_normal,
)

if TYPE_CHECKING:
    from pixart.evaluation.store.entries import Entry

__all__ = [
    "INCONCLUSIVE",
    "Difference",
    "auc",
    "cohen_kappa",
    "holm",
    "is_inconclusive",
    "kendall",
    "krippendorff_alpha",
    "mean_over_prompts",
    "paired_accuracy",
    "paired_difference",
    "spearman",
    "wilson",
]

INCONCLUSIVE = 0.013
"""Gaps of FID below this share of their mean say nothing: training the same model again moves FID by as
much ("FID lottery", 2026: several hundred SiT networks, coefficient of variation 1 to 2 %)."""


@dataclass(frozen=True)
class Difference:
    """How much b is above a: mean of b - mean of a, with its 95 % interval [low, high] and the two-sided p
    of no difference. n: prompts. method: how the interval was made."""

    difference: float
    low: float
    high: float
    p: float
    n: int
    method: str
    notes: tuple[str, ...] = ()


def mean_over_prompts(
    entries: "Sequence[Entry]",
    values: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean over prompts of the mean over a prompt's pictures; n: prompts.

    Percentile bootstrap over prompts. Of values that are all 0 or 1, Wilson's interval where each prompt
    has one picture, and where all are 0 or all 1, whose bootstrap would have no width. One prompt has an
    infinite interval else. ValueError for values that are not finite, or keys that are not unique.
    """
    means, single = _by_prompt(entries, values)
    per_prompt = np.array([means[key] for key in sorted(means)])
    n, mean = len(per_prompt), float(per_prompt.mean())
    if _are_proportions(values) and (single or mean in (0.0, 1.0)):
        low, high = wilson(mean * n, n)
        return Estimate(mean, low, high, n, "Wilson" if single else "Wilson over prompts")
    if n == 1:
        note = "one prompt says nothing about others: its interval is infinite"
        return Estimate(mean, -math.inf, math.inf, n, "none", (note,))
    low, high = interval(_resampled_means(per_prompt, resamples, seed))
    return Estimate(mean, low, high, n, "bootstrap over prompts", _notes(n))


def paired_difference(
    entries_a: "Sequence[Entry]",
    values_a: Sequence[float],
    entries_b: "Sequence[Entry]",
    values_b: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """b - a of the means over prompts, with the same resampled prompts for both.

    p: twice the smaller share of resamples on either side of 0, and at least what a test of signs could
    give, 2^(1 - prompts that differ). Where every prompt differs by the same whole 1, whose bootstrap
    would have no width: Newcombe's interval (1998, method 10) for proportions. ValueError if the
    sets of prompt ids differ.
    """
    means_a = _by_prompt(entries_a, values_a)[0]
    means_b = _by_prompt(entries_b, values_b)[0]
    if means_a.keys() != means_b.keys():
        odd = sorted(means_a.keys() ^ means_b.keys())
        raise ValueError(
            f"both must have pictures of the same prompts, {len(odd)} are in one of them only: "
            f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}"
        )
    gaps = np.array([means_b[key] - means_a[key] for key in sorted(means_a)])
    n, difference = len(gaps), float(gaps.mean())
    drawn = _resampled_means(gaps, resamples, seed)
    sides = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    least = 2.0 ** (1 - np.count_nonzero(gaps))
    p = float(min(1.0, max(2 * (sides + 1) / (resamples + 1), least)))
    if abs(difference) == 1 and _are_proportions([*values_a, *values_b]):
        low, high = _newcombe(difference, n)
        return Difference(difference, low, high, p, n, "Newcombe")
    if n == 1 and difference:
        note = "one prompt says nothing about others: its interval is infinite"
        return Difference(difference, -math.inf, math.inf, 1.0, n, "none", (note,))
    low, high = interval(drawn)
    return Difference(difference, low, high, p, n, "paired bootstrap over prompts", _notes(n))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that the chance of any false one is kept (Holm 1979), in
    the order given: the k-th smallest of m times (m - k + 1), never falling, at most 1."""
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must be from 0 to 1, got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for before, place in enumerate(order):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - before)))
        adjusted[place] = highest
    return adjusted


def wilson(successes: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927). successes may be fractional: ties as half, for which
    it is wider than need be."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n, n at least 1, got {successes} of {n}")
    z2 = quantile_of_normal(level) ** 2
    share = successes / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and n the bound is exact, and rounding must not push it inside.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return low, high


def auc(
    positive: Sequence[float],
    negative: Sequence[float],
    *,
    paired: bool = False,
    level: float = LEVEL,
) -> Estimate:
    """The chance that a positive scores above a negative, ties as half: area under the ROC curve.

    DeLong's variance (1988), the interval on the logit scale, at 0 and 1 Wilson's of the smaller number.
    paired: positive[i] and negative[i] belong together (one scene with two captions): each pair is a
    unit of the variance (Obuchowski 1997). n: pairs, or positives and negatives together.
    """
    above, below = _finite("positive", positive), _finite("negative", negative)
    if paired and len(above) != len(below):
        raise ValueError(
            f"pairs need as many positive as negative values, got {len(above)} and {len(below)}"
        )
    n = len(above) if paired else len(above) + len(below)
    of_positive = _share_below(above, below)
    of_negative = 1 - _share_below(below, above)
    area = float(of_positive.mean())
    fewest = min(len(above), len(below))
    if area in (0.0, 1.0) or fewest == 1:
        low, high = wilson(area * fewest, fewest, level)
        return Estimate(area, low, high, n, "Wilson")
    if paired:
        variance = (of_positive + of_negative).var(ddof=1) / len(above)
    else:
        variance = of_positive.var(ddof=1) / len(above) + of_negative.var(ddof=1) / len(below)
    logit = math.log(area / (1 - area))
    half = quantile_of_normal(level) * math.sqrt(variance) / (area * (1 - area))
    low, high = (
        1 / (1 + math.exp(-min(max(side, -700), 700))) for side in (logit - half, logit + half)
    )
    return Estimate(area, low, high, n, "DeLong")


def paired_accuracy(
    better: Sequence[float], worse: Sequence[float], *, level: float = LEVEL
) -> Estimate:
    """The share of pairs whose better one scores above the worse one, ties as half; Wilson."""
    above, below = _finite("better", better), _finite("worse", worse)
    if len(above) != len(below):
        raise ValueError(f"pairs need as many of both, got {len(above)} and {len(below)}")
    right = float(np.count_nonzero(above > below) + np.count_nonzero(above == below) / 2)
    low, high = wilson(right, len(above), level)
    return Estimate(right / len(above), low, high, len(above), "Wilson")


def is_inconclusive(a: float, b: float) -> bool:
    """Whether two FIDs are too close to say which is better: |a - b| below INCONCLUSIVE of their mean."""
    return abs(a - b) <= INCONCLUSIVE * abs(a + b) / 2


def _by_prompt(
    entries: "Sequence[Entry]", values: Sequence[float]
) -> tuple[dict[str, float], bool]:
    """The mean of each prompt by id, and whether all have one picture."""
    if len(entries) != len(values) or not len(values):
        raise ValueError(
            f"every entry must have a value, got {len(entries)} entries and {len(values)} values"
        )
    of_prompt: dict[str, list[float]] = {}
    keys = set()
    for entry, value in zip(entries, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"values must be finite, {entry.key} has {value}")
        if entry.key in keys:
            raise ValueError(f"keys must be unique, {entry.key} is there twice")
        keys.add(entry.key)
        of_prompt.setdefault(entry.prompt.id, []).append(float(value))
    means = {key: math.fsum(each) / len(each) for key, each in of_prompt.items()}
    return means, len(keys) == len(means)


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The same as multinomial weights times values, but summed in an order that no number of threads
    changes."""
    drawn = [values[chosen].mean(axis=1) for chosen in picks(len(values), resamples, seed)]
    return np.concatenate(drawn)


def _are_proportions(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _newcombe(difference: float, n: int) -> tuple[float, float]:
    """Of proportions 0 and 1 (or 1 and 0), whose correlation is not defined and taken as 0."""
    missing = 1 - wilson(n, n)[0]  # the same on both sides
    inner = 1 - math.hypot(missing, missing)
    return (inner, 1.0) if difference > 0 else (-1.0, -inner)


def _notes(n: int) -> tuple[str, ...]:
    return (f"of {n} prompts only: the interval is rather too narrow",) if n < FEW else ()


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers, at least one, got {len(array)} values")
    return array


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each value, the share of the others below it, equal ones as half."""
    others = np.sort(others)
    below = np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")
    return below / (2 * len(others))
