"""`python -m pixart.train plot RUN...`: loss and validation curves of runs, as a PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart.files import written_aside
from pixart.training.progress import LOG, read_log

Points = list[tuple[float, float]]


def read_curve(lines: Sequence[dict[str, Any]], name: str) -> Points:
    """The steps of a log that have a value of this name, and the value."""
    points = [(line["step"], line.get(name)) for line in lines]
    return [
        (step, float(value))
        for step, value in points
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def read_metrics(lines: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, ...]]]:
    """By metric of the validation: step, value and the ends of its interval, which are the value where the
    log has none. What a metric says of parts is left out."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for name in dict.fromkeys(key for line in lines for key in line if key.endswith("/low")):
        metric = name.removeprefix("validation/").removesuffix("/low")
        if "/" in metric:
            continue
        key = f"validation/{metric}"
        bounds = [dict(read_curve(lines, f"{key}/{end}")) for end in ("low", "high")]
        found[metric] = [
            (step, value, *(bound.get(step, value) for bound in bounds))
            for step, value in read_curve(lines, key)
        ]
    return {metric: points for metric, points in found.items() if points}


def find_logs(runs: Sequence[Path]) -> list[tuple[str, Path]]:
    """The logs of runs or of single stages, named. Raises ValueError for a place without one."""
    found = []
    for run in runs:
        logs = [run / LOG] if (run / LOG).is_file() else sorted(run.glob(f"*/{LOG}"))
        if not logs:
            raise ValueError(f"RUN must hold {LOG} or stages that do, got {run}")
        logs.sort(key=lambda path: path.stat().st_mtime)
        found += [(f"{path.parent.parent.name}/{path.parent.name}", path) for path in logs]
    return found


def plot(runs: Sequence[Path], output: Path) -> None:
    """Draw the training loss, smoothed, and the validation loss of each log against steps, and below them
    each metric of the validation with its interval. Raises ValueError for what cannot be drawn or
    written."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plot needs matplotlib; pip install 'pixart-fast[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = _read_curves(runs)
    metrics = list(dict.fromkeys(name for curve in curves for name in curve.metrics))
    figure, rows = pyplot.subplots(
        1 + len(metrics),
        figsize=(9, 5 + 2.5 * len(metrics)),
        height_ratios=[2] + [1] * len(metrics),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    try:
        kinds = figure.canvas.get_supported_filetypes()
        kind = output.suffix[1:].lower() or "png"
        if kind not in kinds or output.is_dir():
            raise ValueError(f"--output must be a file ending in {', '.join(kinds)}, got {output}")
        _draw_losses(rows[0, 0], curves)
        for axes, name in zip(rows[1:, 0], metrics, strict=True):
            _draw_metric(axes, name, [curve.metrics.get(name, []) for curve in curves])
        rows[-1, 0].set(xlabel="step")
        with written_aside(output) as aside:
            figure.savefig(aside, dpi=120, format=kind)
    finally:
        pyplot.close(figure)


@dataclass(frozen=True)
class Curves:
    """What a log has: training and validation loss, and of each metric what `read_metrics` says."""

    name: str
    trained: Points
    validated: Points
    metrics: dict[str, list[tuple[float, ...]]]


def _read_curves(runs: Sequence[Path]) -> list[Curves]:
    """Of each log that has any."""
    curves = []
    for name, path in find_logs(runs):
        lines = [values for _, values in read_log(path)]
        both = read_curve(lines, "loss"), read_curve(lines, "validation/loss")
        if any(both):
            curves.append(Curves(name, *both, read_metrics(lines)))
    if not curves:
        raise ValueError(f"RUN must hold losses, got none in {LOG} of {', '.join(map(str, runs))}")
    return curves


def _draw_losses(axes: Any, curves: Sequence[Curves]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, curve in enumerate(curves):
        _draw_curves(axes, curve.name, curve.trained, curve.validated, f"C{number % 10}")
    losses = [points for curve in curves for points in (curve.trained, curve.validated)]
    positive = all(value > 0 for points in losses for _, value in points)
    axes.set(ylabel="loss (○ validation)", yscale="log" if positive else "linear")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_curves(axes: Any, name: str, trained: Points, validated: Points, colour: str) -> None:
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    axes.plot(steps, losses, alpha=0.25, color=colour)
    # With a mark where it begins: a line of one point has no length.
    axes.plot(steps, smooth(losses), marker="o", markevery=[0], label=name, color=colour)
    steps, losses = [step for step, _ in validated], [loss for _, loss in validated]
    axes.plot(steps, losses, "o--", color=colour, markerfacecolor="white")


def _draw_metric(axes: Any, name: str, runs: Sequence[Sequence[tuple[float, ...]]]) -> None:
    for number, points in enumerate(runs):
        if points:
            steps, values, lows, highs = zip(*points, strict=True)
            colour = f"C{number % 10}"
            axes.plot(steps, values, "o-", color=colour, markerfacecolor="white")
            axes.fill_between(steps, lows, highs, alpha=0.15, color=colour)
    axes.set(ylabel=f"{name} (95 %)")
    axes.grid(alpha=0.3)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The running mean that the legend's line shows, without the bias of its first values."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(total / norm)
    return smoothed
