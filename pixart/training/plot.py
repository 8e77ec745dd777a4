"""`python -m pixart.train plot RUN...`: loss and validation curves of runs, as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixart.files import parse_json, written_aside
from pixart.training.progress import LOG


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(parse_json(line, str(path)))
        except ValueError:
            continue
    return lines


def find_logs(runs: Sequence[Path]) -> list[tuple[str, Path]]:
    """The logs of runs or of single stages, named. Raises ValueError for a place without one."""
    found = []
    for run in runs:
        logs = [run / LOG] if (run / LOG).exists() else sorted(run.glob(f"*/{LOG}"))
        if not logs:
            raise ValueError(f"RUN must hold {LOG} or stages that do, got {run}")
        logs.sort(key=lambda path: path.stat().st_mtime)
        found += [(f"{path.parent.parent.name}/{path.parent.name}", path) for path in logs]
    return found


def plot(runs: Sequence[Path], output: Path) -> None:
    """Draw the training loss, smoothed, and the validation loss of each log against steps."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plot needs matplotlib; pip install 'pixart-fast[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for name, path in find_logs(runs):
        lines = read_log(path)
        steps = [line["step"] for line in lines if "loss" in line]
        losses = [line["loss"] for line in lines if "loss" in line]
        axes.plot(steps, losses, alpha=0.25, color=(colour := f"C{len(axes.lines) // 3 % 10}"))
        axes.plot(steps, smooth(losses), label=name, color=colour)
        validated = [(x["step"], x["validation/loss"]) for x in lines if "validation/loss" in x]
        axes.plot(*zip(*validated, strict=True) if validated else ([], []), "o--", color=colour)
    axes.set(xlabel="step", ylabel="loss (○ validation)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(output) as aside:
        figure.savefig(aside, dpi=120, format=output.suffix[1:] or "png")
    pyplot.close(figure)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The running mean that the legend's line shows, without the bias of its first values."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(total / norm)
    return smoothed
