"""The figure of `fit`: measurements by run in log-log, and each law with its 95 % band."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart.files import written_aside
from pixart.scalability.forms import FORMS
from pixart.scalability.laws import Law

ENDINGS = (".svg", ".png")
COLOURS = ("#1f5fbf", "#b45309")
MOST_NAMED = 12  # runs in the legend


def check(path: Path) -> None:
    """ValueError for another kind of file, and where matplotlib is not installed."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--plot must be {' or '.join(ENDINGS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install 'pixart-fast[train]'") from error


def draw(
    path: Path,
    x_name: str,
    y_name: str,
    x: Sequence[float],
    y: Sequence[float],
    runs: Sequence[str],
    laws: Sequence[Law],
) -> None:
    """Write the figure; the same numbers give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "pixart", "font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.8), layout="constrained")
        try:
            _draw(axes, np.asarray(x), np.asarray(y), runs, laws)
            axes.set(xscale="log", yscale="log", xlabel=x_name, ylabel=y_name)
            axes.legend(frameon=False, fontsize=8)
            kind = path.suffix.lower()[1:]
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            with written_aside(path) as aside:
                figure.savefig(aside, format=kind, dpi=150, metadata=metadata)
        finally:
            pyplot.close(figure)


def _draw(
    axes: Any, x: np.ndarray, y: np.ndarray, runs: Sequence[str], laws: Sequence[Law]
) -> None:
    names = list(dict.fromkeys(runs))
    for name in names:
        own = [place for place, run in enumerate(runs) if run == name]
        own.sort(key=lambda place: float(x[place]))
        label = name if len(names) <= MOST_NAMED else None
        axes.plot(x[own], y[own], ".-", linewidth=0.8, alpha=0.6, label=label)
    one_x = [law for law in laws if FORMS[law.form].inputs == 1 and len(law.fitted)]
    grid = np.geomspace(x.min(), x.max(), 100)
    for law, colour in zip(one_x, COLOURS, strict=False):
        label = law.form if law.identified else f"{law.form}, not identified"
        style = "-" if law.identified else ":"
        axes.plot(grid, law.predict(grid), style, color=colour, linewidth=2, label=label)
        axes.fill_between(grid, *law.interval(grid), color=colour, alpha=0.15, linewidth=0)
    if one_x and one_x[0].points < len(x):
        front = one_x[0].chosen
        axes.plot(x[front], y[front], "o", mfc="none", color="#333333", label="fitted front")
