"""Pictures of a plan beside those of the same scenes by default: what the plan says was measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pixart.calibration.run import relative_square
from pixart.calibration.studio import Scene, Settings, Studio
from pixart.evaluation.metrics.shapes import check_caption
from pixart.evaluation.statistics.intervals import wilson
from pixart.progress import Bar
from pixart.sampler.loop import Progress
from pixart.similarity import WINDOW, psnr, ssim

if TYPE_CHECKING:
    from pixart.calibration.journal import Journal

HIGHEST = 100.0  # dB, of pictures that are the same
NOT_A_CAPTION = -1.0


@dataclass(frozen=True)
class Row:
    """What pictures by some settings are like. cost: FLOPs, as a share of those by default. error: root of the
    mean squared relative error of the latents. seconds: of denoising a picture. right: captions that are all
    true, None where they say nothing that could be checked."""

    name: str
    cost: float
    seconds: float
    error: float
    psnr: float
    ssim: float
    right: int | None
    count: int

    def cells(self) -> list[str]:
        """For a table."""
        said = "-"
        if self.right is not None:
            low, high = wilson(self.right, self.count)
            said = f"{self.right} of {self.count} ({low:.1%} to {high:.1%})"
        return [
            self.name, f"{self.cost:.1%}", f"{self.seconds:.2f}", said, f"{self.error:.4f}",
            f"{self.psnr:.1f}", f"{self.ssim:.3f}",
        ]  # fmt: skip


HEADINGS = ("", "FLOPs", "seconds", "captions right", "error", "PSNR, dB", "SSIM")


def compare(
    studio: Studio, ways: Sequence[tuple[str, Settings]], scenes: Sequence[Scene], journal: "Journal",
    quiet: bool = False,
) -> list[Row]:  # fmt: skip
    """A row for each way to draw the scenes, beside the first one."""
    found: list[list[float]] = []
    with Bar("pictures", len(scenes), quiet=quiet) as bar:
        for scene in scenes:
            name = f"pictures/{scene}/{[str(settings) for _, settings in ways]}"
            found.append(journal.measured(name, _measuring(studio, ways, scene)))
            bar.advance()
    whole = studio.cost(ways[0][1], scenes[0])
    return [
        _row(
            name,
            studio.cost(settings, scenes[0]) / whole,
            [one[5 * n : 5 * n + 5] for one in found],
        )
        for n, (name, settings) in enumerate(ways)
    ]


def _measuring(
    studio: Studio, ways: Sequence[tuple[str, Settings]], scene: Scene
) -> Callable[[], list[float]]:
    """Of each way: squared error of the latents, PSNR, SSIM, seconds, and whether the caption is true."""

    def measure() -> list[float]:
        drawn = [_drawn(studio, settings, scene) for _, settings in ways]
        latents, picture, _ = drawn[0]
        numbers: list[float] = []
        for other, image, seconds in drawn:
            alike = ssim(image, picture) if min(image.shape[:2]) >= WINDOW else float("nan")
            numbers += [
                relative_square(other, latents), min(psnr(image, picture), HIGHEST), alike, seconds,
                is_right(image, scene.prompt),
            ]  # fmt: skip
        return numbers

    return measure


def _drawn(studio: Studio, settings: Settings, scene: Scene) -> tuple[Tensor, np.ndarray, float]:
    steps: list[Progress] = []

    def keep(progress: Progress) -> None:
        steps[:] = [progress]

    started = time.perf_counter()
    request = settings.request(scene, studio.height, studio.width)
    drawn = studio.pipe.draw(request, callback=keep)
    seconds = drawn.seconds.get("denoise", time.perf_counter() - started)
    return steps[-1].latents.cpu(), np.asarray(drawn.image), seconds


def is_right(picture: np.ndarray, caption: str) -> float:
    """1 where every statement of a caption holds, else 0; NOT_A_CAPTION if it is none of the embedded world."""
    try:
        return float(check_caption(picture, caption).is_right)
    except ValueError:
        return NOT_A_CAPTION


def _row(name: str, cost: float, found: Sequence[Sequence[float]]) -> Row:
    squares, decibels, alike, seconds, right = (list(one) for one in zip(*found, strict=True))
    checked = None if NOT_A_CAPTION in right else int(sum(right))
    mean: Any = np.mean
    return Row(
        name, cost, float(mean(seconds)), float(mean(squares)) ** 0.5, float(mean(decibels)),
        float(mean(alike)), checked, len(found),
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [list(HEADINGS), *(row.cells() for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
