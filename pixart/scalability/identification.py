"""What measurements do not tell: reasons to call a law not identified, before it is fitted and after."""

import numpy as np

from pixart.evaluation.statistics.student import student_quantile
from pixart.scalability.forms import (
    FLATTEST,
    POWER,
    STEEPEST,
    Form,
    as_printed,
    log_values,
    plane,
    slopes,
)
from pixart.scalability.intervals import LEAST_RUNS, MOST_UNDEFINED, interval_of_runs

LEAST_DECADES = 1.0
MOST_ALIKE = 0.98  # correlation of log N and log D
SMALLEST_FLOOR = 0.01  # of the smallest y: what is below is none
CURVED = 0.01  # how seldom a law that is true is called curved
VISIBLE = 0.02  # of the spread of log y: a misfit that is smaller does no harm


def before_fit(form: Form, logs: np.ndarray, log_y: np.ndarray, runs: int) -> tuple[str, ...]:
    """Why nothing need be fitted: too few runs, too narrow a range, N and D that go together.

    logs: log x, (inputs, points); log_y: (points,)."""
    reasons = []
    if runs < LEAST_RUNS:
        what = "run is" if runs == 1 else "runs are"
        reasons.append(f"{runs} {what} too few, {LEAST_RUNS} are needed")
    names = ("x",) if form.inputs == 1 else ("N", "D")
    for name, one in zip(names, logs, strict=True):
        if (decades := np.ptp(one) / np.log(10)) < LEAST_DECADES - 1e-9:
            reasons.append(f"{name} spans {decades:.2f} decades, {LEAST_DECADES:g} is needed")
    different, least = len(np.unique(logs, axis=1).T), len(form.names) + 2
    if different < least:
        of = names[0] if form.inputs == 1 else "pairs of N and D"
        reasons.append(
            f"{different} different {of} are too few for {len(form.names)} parameters, "
            f"{least} are needed"
        )
    if form.inputs == 2 and not reasons:
        alike = float(np.corrcoef(logs)[0, 1])
        if abs(alike) > MOST_ALIKE:
            reasons.append(
                f"N and D go together (correlation of their logs {alike:.3f}): which of them did it "
                "cannot be told; vary one while the other stays"
            )
    if np.ptp(log_y) < 1e-12:
        reasons.append("y is the same everywhere: there is nothing to explain")
    return tuple(reasons)


def after_fit(
    form: Form,
    fitted: np.ndarray,
    drawn: np.ndarray,
    logs: np.ndarray,
    log_y: np.ndarray,
    weight: np.ndarray,
    weights: np.ndarray,
    without: np.ndarray | None,
    run: np.ndarray,
) -> tuple[str, ...]:
    """Why the fit is not a law: no trend, exponents or a floor that the runs leave open, a misfit.

    fitted: (k,); drawn: those of resamples, (resamples, k); weight: (points,), 0 for what was not fitted;
    weights: of resamples, (resamples, points); without: the same with each run left out once, (runs, points),
    None where runs are many; run: of each point, its number."""
    count = int(run.max()) + 1
    defined = ~np.isnan(drawn).any(axis=1)
    if np.isnan(fitted).any() or defined.mean() < 1 - MOST_UNDEFINED:
        return (
            f"only {defined.sum()} of {len(drawn)} resamples of the runs could be fitted: too much rests "
            "on single runs",
        )
    reasons = _no_trend(form, logs, log_y, weight, weights, without, count)
    if not reasons:
        reasons += _open_exponents(form, drawn, count)
    if form.has_floor and not reasons:
        place = form.names.index("E" if form.inputs == 2 else "c")
        low = interval_of_runs(as_printed(form, drawn)[:, place], count)[0]
        if low < SMALLEST_FLOOR * np.exp(log_y[weight > 0].min()):
            reasons.append(
                f"the floor {form.names[place]} is not told from 0: its interval begins at {low:#.3g}; "
                "longer or larger runs would show it"
                + ("" if form.inputs == 2 else f", and {POWER.text} needs none")
            )
    here = weight > 0
    if misfit := _curved(form, fitted, logs[:, here], log_y[here], weight[here], run[here]):
        reasons.append(misfit)
    return tuple(reasons)


def _no_trend(
    form: Form,
    logs: np.ndarray,
    log_y: np.ndarray,
    weight: np.ndarray,
    weights: np.ndarray,
    without: np.ndarray | None,
    count: int,
) -> list[str]:
    """Whether the straight line in log-log that is fitted to every resample rises or falls at all.

    No bootstrap of few runs reaches beyond the steepest of them, and one in eight of 4 that have no trend all
    lean to the same side. So the interval is also that of the jackknife, with Student's t.
    """
    lines = plane(logs, log_y, weights)[:, 1:]
    whole = plane(logs, log_y, weight[None])[0, 1:]
    margins = np.zeros(len(whole))
    if without is not None:
        left = plane(logs, log_y, without)[:, 1:]
        spread = (count - 1) / count * ((left - left.mean(axis=0)) ** 2).sum(axis=0)
        margins = student_quantile(0.975, count - 1) * np.sqrt(np.nan_to_num(spread))
    names = ("x",) if form.inputs == 1 else ("N", "D")
    reasons = []
    for name, line, value, margin in zip(names, lines.T, whole, margins, strict=True):
        low, high = interval_of_runs(line, count)
        low, high = min(low, value - margin), max(high, value + margin)
        if low <= 0 <= high:
            reasons.append(
                f"no trend: the exponent's interval over {name} includes 0 [{low:+.3g}, {high:+.3g}]"
            )
        elif form.has_floor and low > 0:
            reasons.append(
                f"y rises with {name}, and this form falls; fit {POWER.text}, or what is missing to the "
                "best score there can be"
            )
    return reasons


def _open_exponents(form: Form, drawn: np.ndarray, count: int) -> list[str]:
    if not form.has_floor:
        return []
    reasons = []
    names = ("b",) if form.inputs == 1 else form.names[-2:]
    for name, column in zip(names, drawn[:, -form.inputs :].T, strict=True):
        low, high = interval_of_runs(column, count)
        if low <= 2 * FLATTEST:
            reasons.append(f"the interval of the exponent {name} reaches down to 0")
        if high >= 0.99 * STEEPEST:
            reasons.append(
                f"the interval of the exponent {name} reaches {STEEPEST:g}, the steepest that is tried"
            )
    return reasons


def _curved(
    form: Form,
    fitted: np.ndarray,
    logs: np.ndarray,
    log_y: np.ndarray,
    weight: np.ndarray,
    run: np.ndarray,
) -> str:
    """Whether squares and cubes of log x explain what the law leaves: t tests at CURVED in all, with
    variances of clusters (CR1), of terms beside the law's own directions. "" where not, or where the runs
    are too few to tell."""
    unit = (logs - logs.mean(axis=1, keepdims=True)) / logs.std(axis=1, keepdims=True)
    if form.inputs == 1:
        terms = np.stack([unit[0] ** 2, unit[0] ** 3])
    else:
        terms = np.stack([unit[0] ** 2, unit[1] ** 2, unit[0] * unit[1]])
    own = slopes(form, fitted, logs)
    own = own[np.abs(own).max(axis=1) > 1e-6]
    residual = log_y - log_values(form, fitted[None], logs)[0]
    degrees = min(int(len(np.unique(run))), len(log_y) - len(own)) - 1
    if degrees < 1:
        return ""
    critical = student_quantile(1 - CURVED / (2 * len(terms)), degrees)
    spread = float(
        np.sqrt(np.average((log_y - np.average(log_y, weights=weight)) ** 2, weights=weight))
    )
    for term in terms:
        ratio, size = _beside(term, own, residual, weight, run)
        if abs(ratio) > critical and size > VISIBLE * spread:
            return (
                f"lack of fit: what it leaves over is curved (t = {abs(ratio):.1f}, above {critical:.1f}), "
                f"by {size:.2g} in log y"
            )
    return ""


def _beside(
    term: np.ndarray, own: np.ndarray, residual: np.ndarray, weight: np.ndarray, run: np.ndarray
) -> tuple[float, float]:
    """t of a term that is added to directions which are fitted already, and how large it is: root mean
    square of what it adds to log y."""
    root = np.sqrt(weight / weight.mean())
    columns, wanted = (own * root).T, residual * root
    base = np.linalg.qr(columns)[0]
    free = term * root - base @ (base.T @ (term * root))
    if (length := float(free @ free)) < 1e-9 * float((term * root) @ (term * root)):
        return 0.0, 0.0
    left = wanted - base @ (base.T @ wanted)
    factor = float(free @ left) / length
    left = left - factor * free
    groups, places = np.unique(run, return_inverse=True)
    scores = np.bincount(places, weights=free * left)
    n, many = len(residual), len(groups)
    correction = many / (many - 1) * (n - 1) / max(1, n - len(own) - 1)
    error = float(np.sqrt(correction * (scores**2).sum())) / length
    return factor / max(error, 1e-300), abs(factor) * float(np.sqrt(length / n))
