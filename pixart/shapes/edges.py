"""How clean the shapes of a picture are, beside the checker's yes or no.

Each thing that the checker finds is compared with the ideal shape of its kind that fits it best, in
place and size. Coverage counts in parts of a pixel, so that blur and fraying below a pixel show.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pixart.shapes import checker
from pixart.shapes.scene import outline

CLEAN = 0.93  # overlap with the ideal shape, from which an outline looks clean
STRAY = 0.001  # of a picture's pixels that are neither ground nor thing, below which none is seen
MARGIN = 0.05  # around a thing, in sides of the picture, that is looked at with it
FINEST = 0.125  # pixels of a picture of 128, to which place and radius are found
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Edges:
    """overlaps: of each thing, the soft intersection over union with its ideal shape. stray: share of
    the picture that is neither ground nor part of a thing."""

    overlaps: tuple[float, ...]
    stray: float

    @property
    def are_clean(self) -> bool:
        """Whether every outline is clean and nothing lies about."""
        return bool(self.overlaps) and min(self.overlaps) >= CLEAN and self.stray < STRAY


@dataclass(frozen=True)
class _Fit:
    """An ideal shape: its name, centre and radius in pixels."""

    shape: str
    x: float
    y: float
    radius: float

    def coverage(self, height: int, width: int) -> np.ndarray:
        """How much of each pixel it covers, (height, width) from 0 to 1."""
        canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
        corners = [
            ((self.x + self.radius * u) * SUPERSAMPLE, (self.y + self.radius * v) * SUPERSAMPLE)
            for u, v in outline(self.shape)
        ]
        ImageDraw.Draw(canvas).polygon(corners, fill=255)
        return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255


def measure(picture: np.ndarray) -> Edges:
    """The edges of a (height, width, 3) uint8 picture."""
    pixels = picture.astype(np.float32)
    ground = checker.ground_of(pixels)
    away = checker.distance(pixels, ground)
    regions = checker.things(away)
    known = np.zeros(away.shape, bool)
    overlaps = []
    for region in regions:
        overlap, fit = _fit_thing(pixels, region, ground, any_of(regions) & ~region)
        overlaps.append(overlap)
        # A frayed edge belongs to its thing; what is further away lies about.
        around = _Fit(fit.shape, fit.x, fit.y, fit.radius * 1.15 + 2 * _scale(away))
        known |= around.coverage(*away.shape) > 0
    return Edges(tuple(overlaps), float(((away > checker.FOREGROUND / 2) & ~known).mean()))


def any_of(regions: list[np.ndarray]) -> np.ndarray:
    """The union of masks."""
    return np.logical_or.reduce(regions)


def _scale(mask: np.ndarray) -> float:
    return min(mask.shape) / 128


def _fit_thing(
    pixels: np.ndarray, region: np.ndarray, ground: np.ndarray, others: np.ndarray
) -> tuple[float, _Fit]:
    """A thing's overlap with its ideal shape, and that shape in pixels of the picture."""
    rows, columns = np.nonzero(region)
    pad = round(MARGIN * min(region.shape))
    top, left = max(0, rows.min() - pad), max(0, columns.min() - pad)
    place = np.s_[top : rows.max() + pad + 1, left : columns.max() + pad + 1]
    inside = np.median(pixels[region], axis=0)
    line = inside - ground
    seen = np.clip((pixels[place] - ground) @ line / (line @ line), 0, 1)
    seen[others[place]] = 0
    shape = checker.nearest_shape(region)
    radius = float(np.sqrt(seen.sum() / checker.unit_area(shape)))
    start = _Fit(shape, columns.mean() + 0.5 - left, rows.mean() + 0.5 - top, radius)
    fit = _best(seen, start, _scale(region))
    ideal = fit.coverage(*seen.shape)
    overlap = np.minimum(seen, ideal).sum() / np.maximum(seen, ideal).sum()
    return float(overlap), _Fit(shape, fit.x + left, fit.y + top, fit.radius)


def _best(seen: np.ndarray, fit: _Fit, scale: float) -> _Fit:
    """The ideal shape that differs least from what is seen: one number at a time, in finer and finer
    steps, as long as it helps."""

    def cost(one: _Fit) -> float:
        return float(np.abs(seen - one.coverage(*seen.shape)).sum())

    least, step = cost(fit), 2.0
    while step >= FINEST:
        reach = step * scale
        moves = [(reach, 0, 0), (-reach, 0, 0), (0, reach, 0), (0, -reach, 0), (0, 0, reach)]
        better = True
        while better:
            better = False
            for dx, dy, dr in [*moves, (0, 0, -reach)]:
                moved = _Fit(fit.shape, fit.x + dx, fit.y + dy, max(fit.radius + dr, 0.5))
                if (found := cost(moved)) < least:
                    fit, least, better = moved, found, True
        step /= 2
    return fit
