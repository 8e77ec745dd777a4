"""Results as pictures, bench/plots/*.png: what each shows is written in it as a hash.

Pictures have a ground of their own, so that a light and a dark page show them alike. A panel is about
one machine.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.measure import machine
from bench.measure.results import Content, Row
from bench.reporting import comparisons, scaling
from bench.workloads import sizes
from pixart.files import written_aside
from pixart.pictures import open_picture

Named = tuple[str, Content]  # a file of bench/results by its name without suffix, and what it holds
Points = dict[str, list[tuple[float, float]]]  # of each curve, by its name
Panels = dict[str, Points]  # by machine
Point = tuple[str, float, float]  # a curve's name, x and y
HASH = "Curves"  # of the PNG's texts: the SHA-256 of what is drawn and how
NAMES = {"ours": "ours, dense", "ours compressed": "ours, R = 2", "diffusers": "diffusers"}
ROOFLINE, COMPOSED = "roofline of ", ", composed of single blocks"  # in the names of curves
# Of commands that measured the same: bench.gpu times ours and the peers in turn.
PREFERRED = (
    "gpu",
    "saving",
    "cpu",
    "growth",
    "suite",
)


class Plot(NamedTuple):
    """points: of the curves that a row of a result says something of. Both axes are logarithmic."""

    file: str
    title: str
    x: str
    y: str
    points: Callable[[Content, Row], Iterator[Point]]

    def curves(self, results: Sequence[Named]) -> Panels:
        """A curve is of one file, for it would zigzag between two that measured the same sizes."""
        panels: Panels = {}
        sources: dict[tuple[str, str], str] = {}
        for file, result in sorted(results, key=_preference):
            for run in result["runs"]:
                name = machine.name(run["machine"])
                for curve, x, y in (
                    point for row in run["rows"] for point in self.points(result, row)
                ):
                    if sources.setdefault((name, curve), file) == file:
                        own = panels.setdefault(name, {})
                        own[curve] = sorted([*own.get(curve, []), (x, y)])
        return panels


def _preference(result: Named) -> int:
    kind = result[1]["kind"]
    return PREFERRED.index(kind) if kind in PREFERRED else len(PREFERRED)


def drawable(results: Sequence[Named]) -> list[Plot]:
    """The pictures that there are results for."""
    return [plot for plot in PLOTS if plot.curves(results)]


def _steps(result: Content, row: Row) -> Iterator[Point]:
    """Seconds of a denoising step in bf16 against the side of the image in pixels, of models of full
    depth."""
    is_step = row["what"] == "denoising step" and row["variant"] in NAMES and row.get("seconds")
    if is_step and not row["shape"]["size"].endswith(sizes.SHALLOW):
        suffix = COMPOSED if row.get("scope") == "block" else ""
        side = sizes.PATCH_PIXELS * round(comparisons.tokens(row) ** 0.5)
        yield NAMES[row["variant"]] + suffix, side, scaling.seconds(row)


def _attention(result: Content, row: Row) -> Iterator[Point]:
    """TFLOP/s of self-attention, forward, against tokens, by implementation."""
    is_timed = row["part"] == "operators" and row.get("seconds")
    if is_timed and row["what"] == "flash_attention self forward" and row["dtype"] == "bfloat16":
        yield row["variant"], comparisons.tokens(row), row["flops"] / scaling.seconds(row) / 1e12


def _growth_memory(result: Content, row: Row) -> Iterator[Point]:
    if result["kind"] == "growth" and scaling.peak_bytes(row):
        yield _growth_name(row), comparisons.tokens(row), scaling.peak_bytes(row) / 2**20


def _growth_time(result: Content, row: Row) -> Iterator[Point]:
    """Measured, and at least: diffusers' dense block has the work of ours."""
    if result["kind"] != "growth":
        return
    if row.get("seconds"):
        yield _growth_name(row), comparisons.tokens(row), scaling.seconds(row)
    floor = scaling.roofline(row, scaling.ceiling(result))
    if row["variant"] != "diffusers" and floor is not None:
        yield ROOFLINE + _growth_name(row), comparisons.tokens(row), floor


def _growth_name(row: Row) -> str:
    return f"{NAMES[row['variant']]}, {row['dtype']}"


_TOKENS = "image tokens"
PLOTS = (
    Plot(
        "steps.png",
        "A denoising step of XL/2 in bf16, batch 1",
        "side of the image (px)",
        "seconds",
        _steps,
    ),
    Plot("attention.png", "Self-attention of XL/2, forward, bf16", _TOKENS, "TFLOP/s", _attention),
    Plot("growth-time.png", "Time of a block against tokens", _TOKENS, "seconds", _growth_time),
    Plot(
        "growth-memory.png",
        "Memory of a block at its peak against tokens",
        _TOKENS,
        "MiB beyond weights and inputs",
        _growth_memory,
    ),
)


def draw(results: Sequence[Named], folder: Path) -> None:
    """Write the pictures that are stale, remove those that nothing stands for. Raises ValueError
    without matplotlib."""
    plots = {folder / plot.file: plot for plot in drawable(results)}
    for path in stale(results, folder):
        if path in plots:
            folder.mkdir(exist_ok=True)
            _draw(plots[path], plots[path].curves(results), path)
        else:
            path.unlink()


def stale(results: Sequence[Named], folder: Path) -> list[Path]:
    """The pictures that show something else than the results, or should not be there."""
    wanted = {folder / plot.file: _hash(plot, plot.curves(results)) for plot in drawable(results)}
    wrong = [path for path, shown in wanted.items() if _shown(path) != shown]
    return wrong + [path for path in folder.glob("*.png") if path not in wanted]


def _hash(plot: Plot, panels: Panels) -> str:
    how = inspect.getsource(_draw)  # pictures of another style are stale as well
    content = json.dumps([plot.title, plot.x, plot.y, panels, how], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _shown(path: Path) -> str | None:
    """What a picture says that it shows."""
    if not path.exists():
        return None
    return open_picture(path, str(path)).info.get(HASH, "")


def _draw(plot: Plot, panels: Panels, path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'pixart-fast[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, rows = pyplot.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for axes, (name, curves) in zip(rows[0], panels.items(), strict=True):
        colors: dict[str, str] = {}
        for curve, points in sorted(curves.items(), key=lambda item: item[0].startswith(ROOFLINE)):
            line = "--" if curve.startswith(ROOFLINE) else "x" if curve.endswith(COMPOSED) else "o-"
            whole = curve.removesuffix(COMPOSED).removeprefix(ROOFLINE)
            (drawn,) = axes.plot(
                *zip(*points, strict=True), line, color=colors.get(whole), label=curve, markersize=5
            )
            colors[whole] = drawn.get_color()
        axes.set(xlabel=plot.x, ylabel=plot.y, xscale="log", yscale="log", title=name)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params("y", labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(plot.title)
    with written_aside(path) as aside:
        figure.savefig(
            aside, format="png", dpi=110, facecolor="white", metadata={HASH: _hash(plot, panels)}
        )
    pyplot.close(figure)
