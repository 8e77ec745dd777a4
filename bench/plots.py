"""Results as pictures, bench/plots/*.png: what each shows is written in it as a hash.

Pictures have a ground of their own, so that a light and a dark page show them alike. A panel is about
one machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import provenance, sections

Result = dict[str, Any]
Named = tuple[str, Result]
Points = dict[str, list[tuple[float, float]]]  # of each curve, by its name
Panels = dict[str, Points]  # by machine
HASH = "Curves"  # of the PNG's texts: the SHA-256 of what is drawn
NAMES = {"dense": "ours, dense", "compressed": "ours, R = 2", "diffusers": "diffusers"}
ROOFLINE = "roofline"
STEPS = {"ours": "ours, dense", "ours compressed": "ours, R = 2", "diffusers": "diffusers"}


class Plot(NamedTuple):
    """curves: what results say, empty panels left out. Both axes are logarithmic."""

    file: str
    title: str
    x: str
    y: str
    curves: Callable[[Sequence[Named]], Panels]


def drawable(results: Sequence[Named]) -> list[Plot]:
    """The pictures that there are results for."""
    return [plot for plot in PLOTS if plot.curves(results)]


def _steps(results: Sequence[Named]) -> Panels:
    """Seconds of a denoising step in bf16 against the side of the image in pixels."""
    panels: Panels = {}
    for kind, machine, row in _rows(results):
        own = panels.setdefault(machine, {})
        if kind == "saving" and row["ratio"] == 2:
            for name in ("dense", "compressed"):
                _add(own, NAMES[name], _side(row["tokens"]), row[name]["median"])
        elif kind == "cpu" and (row["dtype"], row["variant"]) == ("bfloat16", "diffusers"):
            _add(own, "diffusers", _side(row["tokens"]), row["median"])
        elif kind == "gpu" and (curve := _step(row)) is not None:
            _add(own, curve, _side(row["shape"]["tokens"]), row["median"])
    return _filled(panels)


def _step(row: Result) -> str | None:
    """The curve that a row of bench.gpu belongs to."""
    is_timed = row.get("step") == "denoise" and "median" in row
    return STEPS.get(row["variant"]) if is_timed else None


def _attention(results: Sequence[Named]) -> Panels:
    """TFLOP/s of self-attention, forward, against tokens, by implementation."""
    panels: Panels = {}
    wanted = ("flash_attention", "self", "forward")
    for kind, machine, row in _rows(results):
        names = tuple(row.get(name) for name in ("operator", "kind", "direction"))
        if kind in ("gpu", "suite") and names == wanted and "flops_per_second" in row:
            rate = row["flops_per_second"] / 1e12
            _add(panels.setdefault(machine, {}), row["variant"], row["shape"]["tokens"], rate)
    return _filled(panels)


def _growth(field: str, scale: float) -> Callable[[Sequence[Named]], Panels]:
    def curves(results: Sequence[Named]) -> Panels:
        panels: Panels = {}
        for kind, machine, row in _rows(results):
            if kind == "growth" and row.get(field):
                name = f"{NAMES[row['variant']]}, {row['dtype']}"
                _add(panels.setdefault(machine, {}), name, row["tokens"], scale * row[field])
        return panels

    return curves


def _growth_time(results: Sequence[Named]) -> Panels:
    """Measured, and at least: diffusers' dense block has the work of ours."""
    panels = _growth("median", 1)(results)
    for _, result in results:
        peaks = sections.ceiling(result) if result["kind"] == "growth" else (0.0, 0.0)
        for kind, machine, row in _rows([("", result)]):
            if kind != "growth" or row["variant"] == "diffusers":
                continue
            if (floor := sections.roofline(row, peaks)) is not None:
                name = f"{ROOFLINE} of {NAMES[row['variant']]}"
                _add(panels.setdefault(machine, {}), name, row["tokens"], floor)
    return panels


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
        _growth("peak_bytes", 2**-20),
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
    content = json.dumps([plot.title, plot.x, plot.y, panels], sort_keys=True)
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
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for axes, (machine, curves) in zip(rows[0], panels.items(), strict=True):
        for name, points in curves.items():
            line = "--" if name.startswith(ROOFLINE) else "o-"
            axes.plot(*zip(*points, strict=True), line, label=name, markersize=4)
        axes.set(xlabel=plot.x, ylabel=plot.y, xscale="log", yscale="log", title=machine)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(plot.title)
    figure.savefig(path, dpi=110, facecolor="white", metadata={HASH: _hash(plot, panels)})
    pyplot.close(figure)


def _rows(results: Sequence[Named]) -> Iterable[tuple[str, str, Result]]:
    """Kind of file, machine and row."""
    for _, result in results:
        for run in result["runs"]:
            name = provenance.machine_name(run["machine"])
            for row in run["rows"]:
                yield result["kind"], name, row


def _side(tokens: int) -> int:
    return 16 * round(tokens**0.5)  # a token is 16 pixels wide


def _add(curves: Points, name: str, x: float, y: float) -> None:
    curves[name] = sorted([*curves.get(name, []), (x, y)])


def _filled(panels: Panels) -> Panels:
    return {machine: curves for machine, curves in panels.items() if curves}
