"""`fit`: laws of a file of measurements, in words or as JSON, and the paper's own beside them."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pixart.evaluation.statistics.estimate import Estimate
from pixart.files import check_writable
from pixart.scalability import law_figure, published
from pixart.scalability.forms import CHINCHILLA, FORMS
from pixart.scalability.laws import Law, fit_power_law
from pixart.scalability.measurements import columns_of, copies_in, read_measurements
from pixart.scalability.options import Fit
from pixart.scalability.pareto import Optimum, compute_optimal


@dataclass(frozen=True)
class Fitted:
    """What a file's columns are, and what was fitted to them."""

    columns: dict[str, list[float]]
    runs: list[str]
    left_out: int
    copies: int  # measurements with all values of another run's
    y: list[float]  # what was fitted: the column, or what it lacks to the maximum
    laws: tuple[Law, ...]
    optima: tuple[Optimum, ...]


def fit(options: Fit) -> str:
    """Returns what was found in words or as JSON; writes the figure that was asked for. ValueError for bad
    options and files."""
    _check(options)
    if options.file is None:
        return json.dumps(published.as_json(), indent=2) if options.json else published.describe()
    fitted = _fit(options, options.file)
    if options.plot is not None:
        law_figure.draw(
            options.plot, options.x, _y_name(options), fitted.columns.get(options.x, []), fitted.y,
            fitted.runs, fitted.laws,
        )  # fmt: skip
    if options.json:
        return json.dumps(_as_json(options, fitted), indent=2, allow_nan=False)
    told = _describe(options, fitted)
    return f"{told}\n\n{published.describe()}" if options.published else told


def _check(options: Fit) -> None:
    if options.file is None and not options.published:
        raise ValueError("FILE must be given, or --published for the paper's laws alone")
    if unknown := [form for form in options.form if form not in FORMS]:
        raise ValueError(f"--form must be one of {', '.join(FORMS)}, got {unknown[0]!r}")
    if options.file is None:
        if unused := _changed(options, *(set(_names()) - {"published", "json"})):
            raise ValueError(f"{unused[0]} needs a FILE of measurements")
        return
    if not options.form:
        raise ValueError(f"--form must be one or more of {', '.join(FORMS)}, got none")
    if options.maximum is not None and not np.isfinite(options.maximum):
        raise ValueError(f"--maximum must be finite, got {options.maximum}")
    if options.higher_is_better and options.maximum is not None:
        raise ValueError(
            "--higher-is-better must be left out with --maximum, which fits what is missing and falls"
        )
    if options.higher_is_better and not (options.pareto or options.optimal_at):
        raise ValueError(
            "--higher-is-better must come with --pareto or --optimal-at; a law of all measurements is the "
            "same without"
        )
    of_one_x = bool(set(options.form) - {CHINCHILLA.text} or options.optimal_at)
    if not of_one_x and (unused := _changed(options, "x")):
        raise ValueError(f"{unused[0]} is not of chinchilla, whose columns are --n and --d")
    of_chinchilla = ["d"] if options.optimal_at else ["n", "d"]
    if CHINCHILLA.text not in options.form and (unused := _changed(options, *of_chinchilla)):
        raise ValueError(f"{unused[0]} is of --form chinchilla (and --n of --optimal-at); add it")
    if options.pareto and CHINCHILLA.text in options.form:
        raise ValueError("--pareto is of one x; chinchilla is fitted to all measurements")
    if options.plot is not None:
        if set(options.form) == {CHINCHILLA.text}:
            raise ValueError("--plot draws laws of one x; add --form 'a*x^-b+c'")
        law_figure.check(options.plot)
        check_writable(options.plot)


def _names() -> list[str]:
    return [field.name for field in fields(Fit) if field.name != "file"]


def _changed(options: Fit, *names: str) -> list[str]:
    """Those of the options that are not as they are by default, as they are spelt, in their order."""
    default = Fit()
    return [
        f"--{name.replace('_', '-')}"
        for name in _names()
        if name in names and getattr(options, name) != getattr(default, name)
    ]


def _fit(options: Fit, file: Path) -> Fitted:
    lines = read_measurements(file)
    one_x = set(options.form) - {CHINCHILLA.text}
    numbers = [options.y]
    numbers += [options.x] if one_x or options.optimal_at else []
    numbers += [options.n] if options.optimal_at or CHINCHILLA.text in options.form else []
    numbers += [options.d] if CHINCHILLA.text in options.form else []
    numbers += [options.se] if options.se else []
    columns, runs, left_out = columns_of(
        file, lines, list(dict.fromkeys(numbers)), options.run or None,
        any_sign="" if options.maximum is None else options.y,
    )  # fmt: skip
    y = _gap(options, columns[options.y])
    se = columns[options.se] if options.se else None
    front: Literal["lower", "upper"] | None = None
    if options.pareto:
        front = "upper" if options.higher_is_better else "lower"
    laws = []
    for form in dict.fromkeys(options.form):
        chinchilla = form == CHINCHILLA.text
        x: Any = (columns[options.n], columns[options.d]) if chinchilla else columns[options.x]
        laws.append(
            fit_power_law(
                x, y, form, se, runs, front=front, resamples=options.resamples, seed=options.seed
            )
        )
    # Of a score the best is the highest: the lowest of its inverse.
    loss = [1 / value for value in y] if options.higher_is_better else y
    optima = [
        compute_optimal(
            columns[options.n], columns[options.x], loss, runs, at,
            resamples=options.resamples, seed=options.seed,
        )
        for at in options.optimal_at
    ]  # fmt: skip
    copies = copies_in(lines, options.run or None)
    return Fitted(columns, runs, left_out, copies, y, tuple(laws), tuple(optima))


def _gap(options: Fit, values: list[float]) -> list[float]:
    if options.maximum is None:
        return values
    highest = max(values)
    if highest >= options.maximum:
        raise ValueError(
            f"--maximum must be above every {options.y}, got {options.maximum:g} and {highest:g}"
        )
    return [options.maximum - value for value in values]


def _y_name(options: Fit) -> str:
    return options.y if options.maximum is None else f"{options.maximum:g} - {options.y}"


def _describe(options: Fit, fitted: Fitted) -> str:
    runs = len(dict.fromkeys(fitted.runs))
    head = f"{options.file}: {_many(len(fitted.y), 'measurement')} of {_many(runs, 'run')}"
    spans = [name for name in (options.x, options.n, options.d) if name in fitted.columns]
    for name in dict.fromkeys(spans):
        low, high = min(fitted.columns[name]), max(fitted.columns[name])
        head += f"; {name} {low:.3g} to {high:.3g} ({np.log10(high / low):.1f} decades)"
    lines = [head]
    if fitted.left_out:
        lines.append(f"left out, as a column is empty: {_many(fitted.left_out, 'line')}")
    if fitted.copies:
        many = _many(fitted.copies, "measurement")
        lines.append(
            f"{many} with all values of another run's: of copies, intervals come out too narrow"
        )
    for law in fitted.laws:
        lines += ["", *_law_lines(options, law)]
    if fitted.optima:
        lines += [
            "",
            f"best {options.n} at equal {options.x}, a parabola of log {_y_name(options)}:",
        ]
        lines += [_optimum_line(options, one) for one in fitted.optima]
    return "\n".join(lines)


def _law_lines(options: Fit, law: Law) -> list[str]:
    head = f"{_named(options, law.form)}: "
    head += "identified" if law.identified else f"not identified: {'; '.join(law.reasons)}"
    if not law.parameters:
        return [head]
    width = max(map(len, law.parameters))
    lines = [head]
    for name, one in law.parameters.items():
        lines.append(f"  {name:<{width}}  {three_digits(one.value)} {_interval(one)}")
    r2 = "-" if law.r2 is None else f"{law.r2:.4f}"
    lines.append(f"  R² of the logs {r2}; {_many(law.points, 'point')} fitted; {_held_out(law)}")
    names = ", ".join(law.covariance_of)
    rows = "; ".join(" ".join(f"{value:.3g}" for value in row) for row in law.covariance)
    lines.append(f"  covariance of {names}: [{rows}]")
    return lines


def _named(options: Fit, form: str) -> str:
    if form == CHINCHILLA.text:
        law = f"E + A/{options.n}^alpha + B/{options.d}^beta"
    else:
        law = form.replace("x", options.x).replace("*", " ").replace("+", " + ")
    return f"{_y_name(options)} = {law}"


def _held_out(law: Law) -> str:
    if law.held_out is None:
        return "too few to leave the largest out"
    held = law.held_out
    return (
        f"the largest ({_many(held.points, 'point')}, the last factor of 2), left out, predicted with an error of "
        f"{held.error:.2%} (mean {held.bias:+.2%})"
    )


def _optimum_line(options: Fit, one: Optimum) -> str:
    line = f"  {options.x} {one.compute:.3g}: "
    if one.size is not None:
        line += f"{options.n} {three_digits(one.size.value)} {_interval(one.size)}, "
        line += f"{one.sizes} sizes, "
    return line + ("identified" if one.identified else f"not identified: {'; '.join(one.reasons)}")


def three_digits(value: float) -> str:
    """Three significant digits, trailing zeros kept: 0.0470, 8.50, 125, 2.45e+10."""
    return f"{value:#.3g}".rstrip(".").replace(".e", "e")


def _interval(one: Estimate) -> str:
    return f"[{three_digits(one.low)}, {three_digits(one.high)}]"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _as_json(options: Fit, fitted: Fitted) -> dict[str, Any]:
    found: dict[str, Any] = {
        "file": str(options.file),
        "x": options.x,
        "y": _y_name(options),
        "measurements": len(fitted.y),
        "runs": len(dict.fromkeys(fitted.runs)),
        "left_out": fitted.left_out,
        "copies": fitted.copies,
        "pareto": options.pareto,
        "resamples": options.resamples,
        "seed": options.seed,
        "laws": [law.as_json() for law in fitted.laws],
        "optima": [one.as_json() for one in fitted.optima],
    }
    return found | ({"published": published.as_json()} if options.published else {})
