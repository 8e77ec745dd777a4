"""Whether one side of the study lies above another: by 2 standard errors, or not decided.

The error has two parts: the scenes or captions that both sides were measured on, paired, and how much a
run differs from the same run with another seed, which runs that were repeated tell.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

from pixart.scalability.study.plan import REPEATS

AGREES, DISAGREES, UNDECIDED = "Agrees", "Does not agree", "Not decided here"
DECIDES = 2.0  # standard errors


@dataclass(frozen=True)
class Difference:
    """value: how much the first side is above the second. error: its standard error, None where nothing
    tells how much runs differ."""

    value: float
    error: float | None

    @property
    def verdict(self) -> str:
        if self.error is None or abs(self.value) <= DECIDES * self.error:
            return UNDECIDED
        return AGREES if self.value > 0 else DISAGREES


@dataclass(frozen=True)
class Spread:
    """How much a run differs from itself with another seed: a standard deviation, and the degrees of
    freedom that it was pooled from."""

    deviation: float
    freedom: int


class Results:
    """results.json, run by run."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.told = results
        self.runs: dict[str, dict[str, Any]] = {run["name"]: run for run in results["runs"]}

    def __contains__(self, name: str) -> bool:
        return name in self.runs

    def seeds(self, name: str) -> list[dict[str, Any]]:
        """The finished runs that differ from this one in the seed alone, itself first."""
        group = next((names for names in REPEATS if names[0] == name), (name,))
        return [self.runs[one] for one in group if one in self.runs]

    def step_of(self, run: dict[str, Any], level: float | None) -> int:
        """The step of a level in TFLOP; None: the last one."""
        return run["steps"] if level is None else run["levels"][f"{level:g}"]

    def mark(self, run: dict[str, Any], step: int) -> dict[str, Any]:
        return next(mark for mark in run["marks"] if mark["step"] == step)

    def loss_spread(self, level: float | None = None, step: int | None = None) -> Spread | None:
        """Of the logarithm of the loss there, pooled over all runs that were repeated."""
        groups = [
            [
                math.log(self.mark(run, step or self.step_of(run, level))["loss"])
                for run in self.seeds(names[0])
            ]
            for names in REPEATS
        ]
        return _pooled(groups)

    def accuracy_spread(self) -> Spread | None:
        """Of the mean share of statements that hold at the end."""
        return _pooled(
            [[fmean(shares_of(run)) for run in self.seeds(names[0])] for names in REPEATS]
        )

    def loss_difference(
        self, high: str, low: str, level: float | None = None, step: int | None = None
    ) -> Difference:
        """The loss of `high` less that of `low` at a level, a step, or the end of each. Positive: `low` is
        better."""
        spread = self.loss_spread(level, step)
        sides = [
            [
                numbers(self.mark(run, step or self.step_of(run, level))["losses"])
                for run in self.seeds(name)
            ]
            for name in (high, low)
        ]
        return _difference(sides, spread, is_relative=True)

    def accuracy_difference(self, high: str, low: str) -> Difference:
        """The share of statements that hold at the end: of `high` less that of `low`."""
        sides = [[shares_of(run) for run in self.seeds(name)] for name in (high, low)]
        return _difference(sides, self.accuracy_spread(), is_relative=False)


def numbers(text: str) -> list[float]:
    """The numbers of a line of results.json."""
    return [float(word) for word in text.split()]


def shares_of(run: dict[str, Any], place: int = -1) -> list[float]:
    """Of each caption, the share of its statements that hold; at the end, or at another measurement."""
    return numbers(run["accuracy"][place]["shares"])


def _pooled(groups: Sequence[Sequence[float]]) -> Spread | None:
    usable = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in usable)
    if not freedom:
        return None
    squares = sum(variance(group) * (len(group) - 1) for group in usable)
    return Spread(math.sqrt(squares / freedom), freedom)


def _difference(
    sides: Sequence[Sequence[Sequence[float]]], spread: Spread | None, is_relative: bool
) -> Difference:
    """sides: two, of runs, of units. spread: of a run; is_relative: as a share of its mean."""
    first, second = ([fmean(unit) for unit in zip(*side, strict=True)] for side in sides)
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    value = fmean(gaps)
    if spread is None or len(gaps) < 2:
        return Difference(value, None)
    of_units = stdev(gaps) ** 2 / len(gaps)
    of_runs = sum(
        (spread.deviation * (fmean(units) if is_relative else 1.0)) ** 2 / len(side)
        for side, units in zip(sides, (first, second), strict=True)
    )
    return Difference(value, math.sqrt(of_units + of_runs))
