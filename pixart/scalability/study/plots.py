"""The plots of the study's report."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pixart.files import written_aside
from pixart.scalability.study import fits
from pixart.scalability.study.plan import BASE, DATA, SIZES, UNETS
from pixart.scalability.study.verdicts import Results, shares_of


def draw_all(results: Results, folder: Path) -> None:
    """FOLDER/loss.png, accuracy.png, sizes.png and data.png; the same results give the same pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in _PLOTS.items():
        _draw(folder / f"{name}.png", partial(draw, results=results))


def _draw(path: Path, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.8), layout="constrained")
    try:
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25, which="both")
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})
    finally:
        pyplot.close(figure)


def _loss(axes: Any, results: Results) -> None:
    for run in (*SIZES, UNETS[0]):
        if run.name in results:
            marks = results.runs[run.name]["marks"]
            line = "--" if run.denoiser == "unet" else "-"
            curve = [one["tflop"] for one in marks], [one["loss"] for one in marks]
            axes.plot(*curve, line, marker=".", linewidth=1, label=run.name)
    axes.set(xscale="log", yscale="log", xlabel="compute, TFLOP", ylabel="loss on held-out scenes")
    law = fits.loss_law(results)
    if law is not None and law.identified:
        points = [one for one in results.told["measurements"] if one["run"] in _size_names()]
        compute = np.array([one["compute"] for one in points]) / fits.TERA
        loss = np.array([one["loss"] for one in points])
        grid = np.geomspace(compute.min(), compute.max(), 100)
        axes.plot(grid, law.predict(grid), "k-", linewidth=1.5, label="the front's law")
        axes.fill_between(grid, *law.interval(grid), color="k", alpha=0.12, linewidth=0)
        front = law.chosen
        axes.plot(compute[front], loss[front], "ko", fillstyle="none", label="front")


def _size_names() -> set[str]:
    return {run.name for run in SIZES}


def _accuracy(axes: Any, results: Results) -> None:
    for run in (*SIZES, UNETS[0]):
        if run.name in results:
            found = results.runs[run.name]
            compute = [results.mark(found, one["step"])["tflop"] for one in found["accuracy"]]
            held = [100 * fmean(shares_of(found, place)) for place in range(len(compute))]
            axes.plot(compute, held, ".-", linewidth=1, label=run.name)
    axes.set(xscale="log", xlabel="compute, TFLOP", ylabel="statements that hold, %", ylim=(0, 100))


def _sizes(axes: Any, results: Results) -> None:
    for level in results.told["scale"]["levels"]:
        points = []
        for run in SIZES:
            found = results.runs.get(run.name)
            if found and f"{level:g}" in found["levels"]:
                mark = results.mark(found, found["levels"][f"{level:g}"])
                points.append((found["parameters"] / 1e6, mark["loss"]))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", linewidth=1, label=f"{level:g} TFLOP")
    axes.set(
        xscale="log", yscale="log", xlabel="parameters, millions", ylabel="loss on held-out scenes"
    )


def _data(axes: Any, results: Results) -> None:
    pool = results.told["scale"]["pool"]
    runs = [results.runs[name] for name in (*(run.name for run in DATA), BASE) if name in results]
    if runs:
        scenes = [run["scenes"] or pool for run in runs]
        for name, label in (("loss", "on held-out scenes"), ("own_loss", "on its own scenes")):
            axes.plot(scenes, [run["marks"][-1][name] for run in runs], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="scenes", ylabel="loss at the end")


_PLOTS: dict[str, Callable[..., None]] = {
    "loss": _loss,
    "accuracy": _accuracy,
    "sizes": _sizes,
    "data": _data,
}
