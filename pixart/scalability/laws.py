"""Scaling laws fitted to runs, with intervals; what the runs do not tell is called not identified.

Checkpoints of one run are one cluster: they share its seed, its data and its size. Intervals come from a
bootstrap over runs, whatever the number of checkpoints.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.resampling import counts
from pixart.scalability.forms import (
    FORMS,
    Form,
    as_printed,
    log_values,
    solve,
)
from pixart.scalability.identification import after_fit, before_fit
from pixart.scalability.intervals import (
    clusters,
    estimate_as_json,
    finite,
    interval_of_runs,
    positive,
)
from pixart.scalability.pareto import lower_hull

RESAMPLES = 1000
_NOTHING = (np.zeros(0), np.zeros((0, 0)))
MOST_NUMBERS = 2**28  # resamples x measurements: 2 GiB
FEW_RUNS = 30  # up to which each is left out once, too
HELD_OUT = 2.0  # what lies within this factor of the largest x is predicted from the rest


@dataclass(frozen=True)
class HeldOut:
    """How well the law of the smaller measurements predicts the largest ones. points: how many were left
    out. beyond: where they begin, in x, or N·D. error: root mean square of predicted / measured - 1.
    bias: its mean."""

    points: int
    beyond: float
    error: float
    bias: float


@dataclass(frozen=True)
class Law:
    """A fitted law. form: as written. parameters: by name, with 95 % intervals; empty where there was too
    little to fit. covariance: of the bootstrap, (k, k), of `covariance_of`. r2: of log y. points and runs:
    those that were fitted, after the front was taken. held_out: None where the rest is too little.
    reasons: why it is not identified, a sentence each."""

    form: str
    parameters: dict[str, Estimate]
    covariance_of: tuple[str, ...]
    covariance: np.ndarray = field(repr=False)
    r2: float | None
    points: int
    runs: int
    held_out: HeldOut | None
    reasons: tuple[str, ...]
    chosen: np.ndarray = field(repr=False)  # places of the points that were fitted
    fitted: np.ndarray = field(repr=False)  # (k,), as covariance_of names it
    drawn: np.ndarray = field(repr=False)  # the same of each resample: (resamples, k)

    @property
    def identified(self) -> bool:
        return not self.reasons

    def predict(self, x: Any) -> np.ndarray:
        """y at each x, (n,); of chinchilla at a pair (N, D) of lists. ValueError where nothing was fitted."""
        self._check_fitted()
        form = FORMS[self.form]
        return np.exp(log_values(form, self.fitted[None], _logs(form, x))[0])

    def interval(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """The 95 % interval of the law at each x, by the bootstrap; no measurement's noise is in it."""
        self._check_fitted()
        form = FORMS[self.form]
        usable = self.drawn[~np.isnan(self.drawn).any(axis=1)]
        values = np.exp(log_values(form, usable, _logs(form, x)))
        ends = [interval_of_runs(column, self.runs) for column in values.T]
        return np.array([low for low, _ in ends]), np.array([high for _, high in ends])

    def as_json(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "identified": self.identified,
            "reasons": list(self.reasons),
            "parameters": {name: estimate_as_json(one) for name, one in self.parameters.items()},
            "covariance_of": list(self.covariance_of),
            "covariance": [[finite(value) for value in row] for row in self.covariance.tolist()],
            "r2": finite(self.r2),
            "points": self.points,
            "runs": self.runs,
            "held_out": self.held_out and asdict(self.held_out),
        }

    def _check_fitted(self) -> None:
        if not len(self.fitted):
            raise ValueError(f"nothing was fitted: {'; '.join(self.reasons)}")


def fit_power_law(
    x: Any,
    y: Sequence[float],
    form: str = "a*x^-b+c",
    se: Sequence[float] | None = None,
    runs: Sequence[Hashable] | None = None,
    *,
    front: Literal["lower", "upper"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Law:
    """Fit a scaling law to measurements y > 0 at x > 0.

    form: "a*x^b", least squares of log y; "a*x^-b+c", the same with c >= 0; "chinchilla", E + A/N^alpha +
    B/D^beta with x a pair (N, D), Huber's loss of log y at 1e-3 (Hoffmann et al. 2022). se: standard error
    of each y, its weight. runs: which run each is of; without, each is one. front: fit only the hull of
    the measurements ("lower": of a loss, "upper": of a score), which every resample finds anew. Everything
    is decided by the seed. ValueError for numbers that are not positive and finite, lengths that differ,
    and an unknown form; what the measurements cannot tell is in `reasons`.
    """
    if form not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}, got {form!r}")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {resamples}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    asked = FORMS[form]
    logs, log_y = _logs(asked, x), np.log(positive("y", y))
    _check_lengths(logs, log_y, se, runs)
    if resamples * len(log_y) > MOST_NUMBERS:
        raise ValueError(
            f"resamples must be at most {MOST_NUMBERS // len(log_y):,} for {len(log_y):,} measurements, "
            f"got {resamples:,}"
        )
    if front and asked.inputs > 1:
        raise ValueError(f"{form} is fitted to all measurements, not to a front")
    if front not in (None, "lower", "upper"):
        raise ValueError(f"front must be lower or upper, got {front!r}")
    run = clusters(runs if runs is not None else range(len(log_y)))
    weight = np.ones(len(log_y)) if se is None else (np.exp(log_y) / positive("se", se)) ** 2
    side = -log_y if front == "upper" else log_y
    points = np.ones(len(log_y), dtype=bool) if front is None else _on_front(logs[0], side)
    count = int(run.max()) + 1

    def weights_of(times: np.ndarray) -> np.ndarray:
        """(k, points), of how often each run is there: (k, runs)."""
        if front is None:
            return times[:, run] * weight
        return np.stack([_on_front(logs[0], side, one[run] > 0) for one in times]) * weight

    weights = weights_of(np.concatenate(list(counts(count, resamples, seed))))
    reasons = before_fit(asked, logs[:, points], log_y[points], count)
    fitted, drawn = _NOTHING if reasons else _fit(asked, logs, log_y, weight * points, weights)
    if not reasons:
        without = weights_of(1 - np.eye(count)) if count <= FEW_RUNS else None
        given = logs, log_y, weight * points, weights, without, run
        reasons = after_fit(asked, fitted, drawn, *given)
    found = fitted, drawn
    return _law(asked, logs, log_y, weight * points, run, count, found, reasons)


def _law(
    form: Form,
    logs: np.ndarray,
    log_y: np.ndarray,
    weight: np.ndarray,
    run: np.ndarray,
    count: int,
    found: tuple[np.ndarray, np.ndarray],
    reasons: tuple[str, ...],
) -> Law:
    fitted, drawn = found
    parameters = _parameters(form, fitted, drawn, count) if len(fitted) else {}
    residual = log_y - log_values(form, fitted[None], logs)[0] if len(fitted) else None
    return Law(
        form.text,
        parameters,
        form.inner,
        _covariance(drawn) if len(fitted) else np.full((len(form.inner),) * 2, np.nan),
        None if residual is None else _r2(log_y, residual, weight),
        int((weight > 0).sum()),
        count,
        _hold_out(form, logs, log_y, weight) if len(fitted) else None,
        reasons,
        np.flatnonzero(weight > 0),
        fitted,
        drawn,
    )


def _fit(
    form: Form,
    logs: np.ndarray,
    log_y: np.ndarray,
    weight: np.ndarray,
    weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The fit to all, (k,), and those to resamples, (resamples, k)."""
    fitted = solve(form, logs, log_y, weight[None])[0]
    return fitted, solve(form, logs, log_y, weights, near=fitted)


def _parameters(
    form: Form, fitted: np.ndarray, drawn: np.ndarray, count: int
) -> dict[str, Estimate]:
    values, columns = as_printed(form, fitted[None])[0], as_printed(form, drawn).T
    return {
        name: Estimate(float(value), *interval_of_runs(column, count), count, "bootstrap over runs")
        for name, value, column in zip(form.names, values, columns, strict=True)
    }


def _covariance(drawn: np.ndarray) -> np.ndarray:
    """Of the resamples in which everything is finite: a floor of 0 has no logarithm."""
    usable = drawn[np.isfinite(drawn).all(axis=1)]
    if len(usable) < 2:
        return np.full((drawn.shape[1],) * 2, np.nan)
    return np.cov(usable, rowvar=False)


def _r2(log_y: np.ndarray, residual: np.ndarray, weight: np.ndarray) -> float | None:
    spread = weight @ (log_y - weight @ log_y / weight.sum()) ** 2
    return float(1 - weight @ residual**2 / spread) if spread > 0 else None


def _hold_out(
    form: Form, logs: np.ndarray, log_y: np.ndarray, weight: np.ndarray
) -> HeldOut | None:
    """Fit what is not within HELD_OUT of the largest x, and predict the rest."""
    size = logs.sum(axis=0)
    there = weight > 0
    edge = float(size[there].max()) - math.log(HELD_OUT)
    largest = there & (size > edge)
    rest = weight * ~largest
    different = len(np.unique(logs[:, rest > 0], axis=1).T)
    if different < len(form.names):
        return None
    fitted = solve(form, logs, log_y, rest[None])
    if np.isnan(fitted).any():
        return None
    predicted = log_values(form, fitted, logs[:, largest])[0]
    off = np.expm1(predicted - log_y[largest])
    return HeldOut(
        int(largest.sum()), math.exp(edge), float(np.sqrt((off**2).mean())), float(off.mean())
    )


def _on_front(
    log_x: np.ndarray, log_y: np.ndarray, present: np.ndarray | None = None
) -> np.ndarray:
    """Which of the points that are present are corners of their hull: (points,)."""
    places = np.arange(len(log_x)) if present is None else np.flatnonzero(present)
    found = np.zeros(len(log_x), dtype=bool)
    found[places[lower_hull(log_x[places], log_y[places])]] = True
    return found


def _logs(form: Form, x: Any) -> np.ndarray:
    """(inputs, points)."""
    if form.inputs == 1:
        return np.log(positive("x", x))[None]
    if len(x) != form.inputs:
        raise ValueError(f"x of {form.text} must be a pair of lists, N and D, got {len(x)}")
    sides = [np.log(positive(name, side)) for name, side in zip("ND", x, strict=True)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"N and D must be as long, got {len(sides[0])} and {len(sides[1])} numbers"
        )
    return np.stack(sides)


def _check_lengths(
    logs: np.ndarray,
    log_y: np.ndarray,
    se: Sequence[float] | None,
    runs: Sequence[Hashable] | None,
) -> None:
    for name, length in (
        ("x", logs.shape[1]),
        ("se", None if se is None else len(se)),
        ("runs", None if runs is None else len(runs)),
    ):
        if length not in (None, len(log_y)):
            raise ValueError(f"{name} must be as long as y, got {length} and {len(log_y)}")
