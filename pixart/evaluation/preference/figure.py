"""The figure of a study, as PixArt-Σ's figure 9: how often the first model is preferred to each other one,
bars of people and of judges, by quality and by alignment, with 95 % intervals."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.files import written_aside

if TYPE_CHECKING:
    from pixart.evaluation.preference.games import Rate
    from pixart.evaluation.preference.outcome import Results

COLOURS = ("#1f5fbf", "#8ab4f8", "#b45309", "#f2b56b", "#3f7d4e", "#9fd3ab", "#6b4fa0", "#c3b1e1")
WIDTH = 0.8  # of the bars of one opponent together


def check_matplotlib() -> None:
    """ValueError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the figure needs matplotlib; pip install 'pixart-fast[train]', or give --no-figure"
        ) from error


def draw_figure(results: "Results", folder: Path) -> None:
    """Write preference.svg and preference.png into the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same study, the same file: ids are random otherwise, and there is a date.
    with matplotlib.rc_context({"svg.hashsalt": "pixart", "font.size": 11}):
        opponents = results.key.models[1:]
        figure, axes = pyplot.subplots(
            figsize=(max(6.4, 1.6 + 1.5 * len(opponents)), 4.2), layout="constrained"
        )
        try:
            _draw(axes, results)
            for kind in ("svg", "png"):
                with written_aside(folder / f"preference.{kind}") as aside:
                    metadata = {"Date": None} if kind == "svg" else {"Software": None}
                    figure.savefig(aside, format=kind, dpi=150, metadata=metadata)
        finally:
            pyplot.close(figure)


def _draw(axes: Any, results: "Results") -> None:
    first, *opponents = results.key.models
    width = WIDTH / max(1, len(results.sides))
    for number, side in enumerate(results.sides):
        rates = [against(side.fitted.rates, first, other) for other in opponents]
        there = [(place, rate) for place, rate in enumerate(rates) if rate is not None]
        if not there:
            continue
        values = [100 * rate[0] for _, rate in there]
        below = [100 * (rate[0] - rate[1]) for _, rate in there]
        above = [100 * (rate[2] - rate[0]) for _, rate in there]
        label = f"{side.by}, {side.question}{'' if side.is_usable else ' (unusable)'}"
        axes.bar(
            [place + (number + 0.5) * width - WIDTH / 2 for place, _ in there], values, width * 0.94,
            yerr=[below, above], capsize=3, label=label, color=COLOURS[number % len(COLOURS)],
            alpha=1.0 if side.is_usable else 0.35, hatch=None if side.is_usable else "//",
            edgecolor="white", error_kw={"elinewidth": 1.2, "ecolor": "#333333"},
        )  # fmt: skip
    axes.axhline(50, color="#333333", linewidth=1, linestyle="--")
    axes.set(ylim=(0, 100), ylabel=f"{first} preferred, %")
    axes.set_xticks(range(len(opponents)), [f"vs {name}" for name in opponents])
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=9)


def against(rates: "tuple[Rate, ...]", a: str, b: str) -> tuple[float, float, float] | None:
    """(rate, low, high) of a over b, whichever way it is kept; None where they have not met."""
    for rate in rates:
        value, low, high = rate.rate.value, rate.rate.low, rate.rate.high
        if (rate.a, rate.b) == (a, b):
            return value, low, high
        if (rate.a, rate.b) == (b, a):
            return 1 - value, 1 - high, 1 - low
    return None
