"""Results as pictures, bench/plots/*.png: what each shows is written in it as a hash.

Pictures have a ground of their own, so that a light and a dark page show them alike. A panel is about
one machine.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.reporting import provenance, sections
from bench.workloads import sizes

Result = dict[str, Any]
Named = tuple[str, Result]
Points = dict[str, list[tuple[float, float]]]  # of each curve, by its name
Panels = dict[str, Points]  # by machine
Point = tuple[str, float, float]  # a curve's name, x and y
HASH = "Curves"  # of the PNG's texts: the SHA-256 of what is drawn and how
NAMES = {"dense": "ours, dense", "compressed": "ours, R = 2", "diffusers": "diffusers"}
ROOFLINE, COMPOSED = "roofline", ", composed of single blocks"  # in the names of curves
# Of commands that measured the same: bench.gpu times ours and the peers in turn.
PREFERRED = ("gpu", "saving", "cpu", "growth", "suite")
STEPS = {"ours": "dense", "ours compressed": "compressed", "diffusers": "diffusers"}


class Plot(NamedTuple):
    """points: of the curves that a row of a result says something of. Both axes are logarithmic."""

    file: str
    title: str
    x: str
    y: str
    points: Callable[[Result, Result], Iterator[Point]]

    def curves(self, results: Sequence[Named]) -> Panels:
        """A curve is of one file, for it would zigzag between two that measured the same sizes."""
        panels: Panels = {}
        sources: dict[tuple[str, str], int] = {}
        for index, result in sorted(
            enumerate(result for _, result in results),
            key=lambda one: PREFERRED.index(one[1]["kind"]),
        ):
            for run in result["runs"]:
                machine = provenance.machine_name(run["machine"])
                found = (point for row in run["rows"] for point in self.points(result, row))
                for curve, x, y in found:
                    if sources.setdefault((machine, curve), index) == index:
                        own = panels.setdefault(machine, {})
                        own[curve] = sorted([*own.get(curve, []), (x, y)])
        return panels


def drawable(results: Sequence[Named]) -> list[Plot]:
    """The pictures that there are results for."""
    return [plot for plot in PLOTS if plot.curves(results)]


def _steps(result: Result, row: Result) -> Iterator[Point]:
    """Seconds of a denoising step in bf16 against the side of the image in pixels; only of commands
    that time all three in turn, and of models of full depth."""
    if result["kind"] == "saving" and row["ratio"] == 2:
        suffix = "" if row["scope"] == "whole" else COMPOSED
        for name in (name for name in NAMES if name in row):  # older files have no diffusers
            yield NAMES[name] + suffix, _side(row["tokens"]), row[name]["median"]
    is_step = row.get("step") == "denoise" and row["variant"] in STEPS and "median" in row
    if is_step and not row["resolution"].endswith(sizes.SHALLOW):
        yield NAMES[STEPS[row["variant"]]], _side(row["shape"]["tokens"]), row["median"]


def _attention(result: Result, row: Result) -> Iterator[Point]:
    """TFLOP/s of self-attention, forward, against tokens, by implementation."""
    names = tuple(row.get(name) for name in ("operator", "kind", "direction"))
    is_timed = "median" in row and "flops_per_second" in row  # what tuning tried has no rate
    if is_timed and names == ("flash_attention", "self", "forward"):
        yield row["variant"], row["shape"]["tokens"], row["flops_per_second"] / 1e12


def _growth_memory(result: Result, row: Result) -> Iterator[Point]:
    if result["kind"] == "growth" and row.get("peak_bytes"):
        yield _growth_name(row), row["tokens"], row["peak_bytes"] / 2**20


def _growth_time(result: Result, row: Result) -> Iterator[Point]:
    """Measured, and at least: diffusers' dense block has the work of ours."""
    if result["kind"] != "growth":
        return
    if "median" in row:
        yield _growth_name(row), row["tokens"], row["median"]
    floor = sections.roofline(row, sections.ceiling(result))
    if row["variant"] != "diffusers" and floor is not None:
        yield f"{ROOFLINE} of {NAMES[row['variant']]}", row["tokens"], floor


def _growth_name(row: Result) -> str:
    return f"{NAMES[row['variant']]}, {row['dtype']}"


PLOTS = (
    Plot(
        "steps.png",
        "A denoising step of XL/2 in bf16, batch 1",
        "side of the image (px)",
        "seconds",
        _steps,
    ),
    Plot(
        "attention.png",
        "Self-attention of XL/2, forward, bf16",
        "image tokens",
        "TFLOP/s",
        _attention,
    ),
    Plot(
        "growth-time.png",
        "Time of a block against tokens",
        "image tokens",
        "seconds",
        _growth_time,
    ),
    Plot(
        "growth-memory.png",
        "Memory of a block at its peak against tokens",
        "image tokens",
        "MiB beyond weights and inputs",
        _growth_memory,
    ),
)


def draw(results: Sequence[Named], folder: Path) -> None:
    """Write the pictures; one without results is removed. Raises ValueError without matplotlib."""
    for plot in PLOTS:
        panels = plot.curves(results)
        path = folder / plot.file
        if not panels:
            path.unlink(missing_ok=True)
        elif _shown(path) != _hash(plot, panels):
            folder.mkdir(exist_ok=True)
            _draw(plot, panels, path)


def stale(results: Sequence[Named], folder: Path) -> list[str]:
    """The names of pictures that show something else than the results."""
    found = []
    for plot in PLOTS:
        panels = plot.curves(results)
        if _shown(folder / plot.file) != (_hash(plot, panels) if panels else None):
            found.append(plot.file)
    return found


def _hash(plot: Plot, panels: Panels) -> str:
    how = inspect.getsource(_draw)  # pictures of another style are stale as well
    content = json.dumps([plot.title, plot.x, plot.y, panels, how], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _shown(path: Path) -> str | None:
    """What a picture says that it shows."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(HASH, "")


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
    for axes, (machine, curves) in zip(rows[0], panels.items(), strict=True):
        colors: dict[str, str] = {}
        for name, points in curves.items():
            line = "--" if name.startswith(ROOFLINE) else "x" if name.endswith(COMPOSED) else "o-"
            color = colors.get(measured := name.removesuffix(COMPOSED))
            (drawn,) = axes.plot(
                *zip(*points, strict=True), line, color=color, label=name, markersize=5
            )
            colors[measured] = drawn.get_color()
        axes.set(xlabel=plot.x, ylabel=plot.y, xscale="log", yscale="log", title=machine)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params("y", labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(plot.title)
    figure.savefig(path, dpi=110, facecolor="white", metadata={HASH: _hash(plot, panels)})
    pyplot.close(figure)


def _side(tokens: int) -> int:
    return 16 * round(tokens**0.5)  # a token is 16 pixels wide
