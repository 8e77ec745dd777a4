"""`python -m pixart.train plot RUN...`: loss and validation curves of runs, as a PNG."""

import math
from collections.abc import Sequence
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
    """Draw the training loss, smoothed, and the validation loss of each log against steps. Raises
    ValueError for what cannot be drawn or written."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plot needs matplotlib; pip install 'pixart-fast[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    curves = _read_curves(runs)
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    try:
        kinds = figure.canvas.get_supported_filetypes()
        kind = output.suffix[1:].lower() or "png"
        if kind not in kinds or output.is_dir():
            raise ValueError(f"--output must be a file ending in {', '.join(kinds)}, got {output}")
        for number, (name, trained, validated) in enumerate(curves):
            _draw_curves(axes, name, trained, validated, f"C{number % 10}")
        positive = all(value > 0 for _, *both in curves for points in both for _, value in points)
        axes.set(
            xlabel="step", ylabel="loss (○ validation)", yscale="log" if positive else "linear"
        )
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        with written_aside(output) as aside:
            figure.savefig(aside, dpi=120, format=kind)
    finally:
        pyplot.close(figure)


def _read_curves(runs: Sequence[Path]) -> list[tuple[str, Points, Points]]:
    """Name, training loss and validation loss of each log that has any."""
    curves = []
    for name, path in find_logs(runs):
        lines = [values for _, values in read_log(path)]
        both = read_curve(lines, "loss"), read_curve(lines, "validation/loss")
        if any(both):
            curves.append((name, *both))
    if not curves:
        raise ValueError(f"RUN must hold losses, got none in {LOG} of {', '.join(map(str, runs))}")
    return curves


def _draw_curves(axes: Any, name: str, trained: Points, validated: Points, colour: str) -> None:
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    axes.plot(steps, losses, alpha=0.25, color=colour)
    # With a mark where it begins: a line of one point has no length.
    axes.plot(steps, smooth(losses), marker="o", markevery=[0], label=name, color=colour)
    steps, losses = [step for step, _ in validated], [loss for _, loss in validated]
    axes.plot(steps, losses, "o--", color=colour, markerfacecolor="white")


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The running mean that the legend's line shows, without the bias of its first values."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(total / norm)
    return smoothed
