"""Forms of scaling laws, and their fits: one for each of many weightings of the same measurements at once.

All forms are sums of power laws, with or without a floor, and are fitted to log y:

    log y = log(exp(e) + Σ_j exp(a_j - s_j · log x_j))

with one or two x. Weightings are resamples of a bootstrap, so that a thousand fits are a few operations on
arrays: exponents are tried on a grid, where the rest is linear, and what is best there is refined by
Levenberg and Marquardt's method.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

STEEPEST, FLATTEST = 10.0, 1e-3  # exponents of laws with a floor
_GRID = {1: 64, 2: 20}  # exponents tried, by the number of x: 64, or 20 x 20 pairs
_COARSE_GRID = {1: 16, 2: 7}  # beside a start that is given
_GRID_ENDS = (0.02, 4.0)
_LOWEST = 16.0  # a floor this far below the smallest y, in log, is none
_STEPS, _FEW_STEPS = 120, 40
_REFINED = 8  # of the grid's best
_NUMBERS = 2**22  # in an array at a time
_STILL, _NEARLY_STILL = 1e-9, 1e-5  # relative falls of the loss that end a search


@dataclass(frozen=True)
class Form:
    """What a law looks like. text: as users write it. names: of its parameters in the order printed.
    inner: of what is fitted, which the covariance is of. inputs: how many x. huber: where the loss of a
    residual of log y turns from a square to a straight line, inf for least squares."""

    text: str
    names: tuple[str, ...]
    inner: tuple[str, ...]
    inputs: int
    has_floor: bool
    huber: float = math.inf


POWER = Form("a*x^b", ("a", "b"), ("ln a", "b"), 1, False)
FLOORED = Form("a*x^-b+c", ("a", "b", "c"), ("ln c", "ln a", "b"), 1, True)
CHINCHILLA = Form(
    "chinchilla",
    ("E", "A", "B", "alpha", "beta"),
    ("ln E", "ln A", "ln B", "alpha", "beta"),
    2,
    True,
    huber=1e-3,  # of Hoffmann et al. 2022 (arXiv 2203.15556), appendix D.3
)
FORMS = {form.text: form for form in (POWER, FLOORED, CHINCHILLA)}


def solve(
    form: Form,
    logs: np.ndarray,
    log_y: np.ndarray,
    weights: np.ndarray,
    near: np.ndarray | None = None,
) -> np.ndarray:
    """Fit the form once for each row of weights.

    logs: log x, (inputs, points); log_y: (points,); weights: (fits, points), at least 0. near: a fit to
    begin from where a coarse grid has no better one, (parameters,), which makes many fits quick and ends
    them well below their noise. Returns what is fitted, (fits, parameters), as `form.inner` names it
    (ln c = -inf: no floor). A row is NaN where its weights leave too few different x.
    """
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    if not form.has_floor:
        return plane(logs, log_y, weights)
    # About their means: amplitudes and exponents would hide each other.
    middle = logs.mean(axis=1, keepdims=True)
    centred = logs - middle
    found = np.full((len(weights), 1 + 2 * form.inputs), np.nan)
    rows = np.flatnonzero(_are_told_apart(centred, weights))
    amplitudes = slice(1, 1 + form.inputs)
    if near is not None:
        near = near.copy()
        near[0] = max(near[0], log_y.min() - _LOWEST)
        near[amplitudes] -= near[1 + form.inputs :] * middle[:, 0]
    size = max(1, _NUMBERS // (20 * log_y.size))
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        found[chunk] = _search(form, centred, log_y, weights[chunk], near)
    found[:, amplitudes] += found[:, 1 + form.inputs :] * middle[:, 0]
    floor = found[:, 0]
    floor[floor <= log_y.min() - _LOWEST + 1] = -np.inf
    return found


def log_values(form: Form, fitted: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """log y of each fit at each x: fitted (fits, parameters), logs (inputs, points) -> (fits, points)."""
    if not form.has_floor:
        return fitted[:, :1] + fitted[:, 1:] * logs
    terms = _terms(fitted, logs)
    top = terms.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(terms - top).sum(axis=1))


def slopes(form: Form, fitted: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """How log y changes with what is fitted: fitted (parameters,) -> (parameters, points)."""
    if not form.has_floor:
        return np.concatenate([np.ones_like(logs), logs])
    return _shares(fitted[None], logs)[1][0]


def as_printed(form: Form, fitted: np.ndarray) -> np.ndarray:
    """Parameters in the order of `form.names`: (fits, parameters) -> (fits, parameters)."""
    with np.errstate(over="ignore"):
        if form is FLOORED:
            floor, amplitude, exponent = fitted.T
            return np.stack([np.exp(amplitude), exponent, np.exp(floor)], axis=1)
        count = len(form.names) - form.inputs
        return np.concatenate([np.exp(fitted[:, :count]), fitted[:, count:]], axis=1)


def plane(logs: np.ndarray, log_y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log y as a straight line of each log x, by least squares, once for each row of weights: (fits,
    1 + inputs), the height at log x = 0 and the slopes. NaN where x do not vary, or go together."""
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    centre, scale = logs.mean(axis=1), np.maximum(logs.std(axis=1), 1e-300)
    unit = (logs - centre[:, None]) / scale[:, None]
    middle, height = weights @ unit.T, weights @ log_y
    spread = np.einsum("bn,in,jn->bij", weights, unit, unit, optimize=True)
    spread -= middle[:, :, None] * middle[:, None, :]
    tilt = weights @ (unit * log_y).T - middle * height[:, None]
    alike = np.linalg.eigvalsh(spread)[:, 0] < 1e-9
    spread[alike] = np.eye(len(logs))
    slope = np.linalg.solve(spread, tilt[:, :, None])[:, :, 0]
    slope[alike] = np.nan
    height = height - (slope * middle).sum(axis=1)
    slope = slope / scale
    return np.concatenate([(height - slope @ centre)[:, None], slope], axis=1)


def _are_told_apart(logs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Whether the points that have a weight have enough different x, for each row of weights: (fits,)."""
    enough = np.ones(len(weights), dtype=bool)
    for one in logs:
        places = np.unique(one, return_inverse=True)[1]
        present = np.zeros((len(weights), places.max() + 1))
        np.add.at(present.T, places, weights.T)
        enough &= (present > 0).sum(axis=1) >= 3
    return enough


def _search(
    form: Form,
    logs: np.ndarray,
    log_y: np.ndarray,
    weights: np.ndarray,
    near: np.ndarray | None,
) -> np.ndarray:
    """Fits, (fits, parameters): of several starts each where there is none near, of one else."""
    if near is not None:
        (start,) = _starts(logs, log_y, weights, _COARSE_GRID[len(logs)], 1)
        others = np.broadcast_to(near, start.shape)
        losses = [
            _loss(_shares(one, logs)[0], log_y, weights, form.huber) for one in (start, others)
        ]
        start = np.where((losses[0] < losses[1])[:, None], start, others)
        return _refine(start, logs, log_y, weights, form.huber, _NEARLY_STILL)[0]
    starts = _starts(logs, log_y, weights, _GRID[len(logs)], _REFINED)
    ends = [_refine(one, logs, log_y, weights, form.huber, _STILL) for one in starts]
    best = np.argmin([loss for _, loss in ends], axis=0)
    return np.stack([fitted for fitted, _ in ends])[best, np.arange(len(weights))]


def _starts(
    logs: np.ndarray, log_y: np.ndarray, weights: np.ndarray, fineness: int, count: int
) -> Iterator[np.ndarray]:
    """The best exponents of a grid, with the amplitudes that fit y best, no amplitude negative: variable
    projection on relative errors, (y' - y) / y. Yields `count` arrays (fits, parameters)."""
    inputs = len(logs)
    # In units of y's own size, so that amplitudes are of the order of 1.
    unit = float(np.mean(log_y))
    inverse = np.exp(unit - log_y)
    grid = np.geomspace(*_GRID_ENDS, fineness)
    powers = np.exp(np.clip(-grid[:, None] * logs[:, None, :], -300, 300)) * inverse
    places = np.array(list(product(range(len(grid)), repeat=inputs)))
    rows, terms = len(weights), inputs + 1
    gram = np.empty((rows, len(places), terms, terms))
    target = np.empty((rows, len(places), terms))
    columns = [inverse[None]] + [powers[j] for j in range(inputs)]
    index = [np.zeros(len(places), dtype=int)] + [places[:, j] for j in range(inputs)]
    for i in range(terms):
        target[:, :, i] = (weights @ columns[i].T)[:, index[i]]
        for j in range(i, terms):
            pairs = np.einsum("bn,in,jn->bij", weights, columns[i], columns[j], optimize=True)
            gram[:, :, i, j] = gram[:, :, j, i] = pairs[:, index[i], index[j]]
    amplitudes, loss = _not_negative(gram, target)
    order = np.argsort(loss, axis=1)
    floor = float(log_y.min()) - _LOWEST
    for rank in range(count):
        chosen = order[:, rank]
        found = amplitudes[np.arange(rows), chosen]
        with np.errstate(divide="ignore"):
            logged = np.maximum(np.log(found) + unit, floor)
        yield np.concatenate([logged, grid[places[chosen]]], axis=1)


def _not_negative(gram: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with amplitudes of at least 0, by trying which are 0: (..., terms) and the loss."""
    terms = target.shape[-1]
    best = np.zeros_like(target)
    loss = np.zeros(target.shape[:-1])
    for size in range(1, terms + 1):
        for kept in combinations(range(terms), size):
            part = gram[..., kept, :][..., kept]
            # Columns of unit length, and a ridge of rounding's size: steep powers are nearly 0.
            length = np.sqrt(np.maximum(np.diagonal(part, axis1=-2, axis2=-1), 1e-300))
            scaled = part / (length[..., :, None] * length[..., None, :]) + 1e-12 * np.eye(size)
            wanted = target[..., kept]
            solved = np.linalg.solve(scaled, (wanted / length)[..., None])[..., 0] / length
            fall = -(solved * wanted).sum(axis=-1)
            better = (solved >= 0).all(axis=-1) & (fall < loss)
            loss = np.where(better, fall, loss)
            for place, term in enumerate(kept):
                best[..., term] = np.where(better, solved[..., place], best[..., term])
            for term in set(range(terms)) - set(kept):
                best[..., term] = np.where(better, 0.0, best[..., term])
    return best, loss


def _refine(
    fitted: np.ndarray,
    logs: np.ndarray,
    log_y: np.ndarray,
    weights: np.ndarray,
    huber: float,
    still: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg and Marquardt's method, each row on its own, residuals weighted as Huber's loss wants."""
    inputs = len(logs)
    lowest = np.array([log_y.min() - _LOWEST] * (1 + inputs) + [FLATTEST] * inputs)
    highest = np.array([np.inf] * (1 + inputs) + [STEEPEST] * inputs)
    fitted, damping = fitted.copy(), np.full(len(fitted), 1e-2)
    loss = _loss(_shares(fitted, logs)[0], log_y, weights, huber)
    active = np.arange(len(fitted))
    for _ in range(_STEPS if still == _STILL else _FEW_STEPS):
        if not len(active):
            break
        now = fitted[active]
        value, jacobian = _shares(now, logs)
        residual = log_y - value
        with np.errstate(divide="ignore", invalid="ignore"):
            flat = np.where(np.abs(residual) > huber, huber / np.abs(residual), 1.0)
        weighted = jacobian * (weights[active] * flat)[:, None]
        normal = weighted @ jacobian.transpose(0, 2, 1)
        gradient = (weighted @ residual[:, :, None])[:, :, 0]
        diagonal = np.diagonal(normal, axis1=1, axis2=2)
        extra = damping[active, None] * diagonal + 1e-15
        step = np.linalg.solve(
            normal + extra[:, :, None] * np.eye(normal.shape[1]), gradient[..., None]
        )
        trial = np.clip(now + np.clip(step[..., 0], -2, 2), lowest, highest)
        reached = _loss(_shares(trial, logs)[0], log_y, weights[active], huber)
        better = reached < loss[active]
        ended = better & (loss[active] - reached <= still * loss[active])
        fitted[active[better]], loss[active[better]] = trial[better], reached[better]
        damping[active] *= np.where(better, 0.2, 8.0)
        active = active[~(ended | (damping[active] > 1e8))]
        damping = np.maximum(damping, 1e-9)
    return fitted, loss


def _loss(value: np.ndarray, log_y: np.ndarray, weights: np.ndarray, huber: float) -> np.ndarray:
    off = np.abs(log_y - value)
    if huber == math.inf:
        return (weights * off**2).sum(axis=1) / 2
    return (weights * np.where(off <= huber, off**2 / 2, huber * (off - huber / 2))).sum(axis=1)


def _terms(fitted: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Logs of the summands: (fits, 1 + inputs, points)."""
    inputs = len(logs)
    amplitudes, exponents = fitted[:, 1 : 1 + inputs, None], fitted[:, 1 + inputs :, None]
    floor = np.broadcast_to(fitted[:, :1, None], (len(fitted), 1, logs.shape[1]))
    return np.concatenate([floor, amplitudes - exponents * logs], axis=1)


def _shares(fitted: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log y, (fits, points), and how it changes with what is fitted, (fits, parameters, points)."""
    terms = _terms(fitted, logs)
    top = terms.max(axis=1, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(axis=1, keepdims=True)
    shares = parts / total
    value = (top + np.log(total))[:, 0]
    return value, np.concatenate([shares, -shares[:, 1:] * logs], axis=1)
