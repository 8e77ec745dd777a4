"""Reads a picture back and says which statements hold: an exact judge that needs no weights.

Background from the border; things as connected regions that differ from it; colour by the nearest
name; shape by overlap with its template; size from the area that a shape of that radius would
have; position and relation from centroids. What is not clearly one of the names is called None,
so that a muddy or misshapen thing is wrong and not luckily right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from pixart.shapes.caption import Statement
from pixart.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    outline,
)

COLOUR_TOLERANCE = 80.0  # Euclidean distance in 8-bit RGB beyond which a colour has no name
FOREGROUND = 60.0  # the same, from the background
OVERLAP = 0.75  # intersection over union with the template, below which a shape has no name
SPECK = 0.003  # regions below this share of the picture are noise, not things
REACH = 0.125  # how far a centroid may be from a named position
APART = 0.15  # how far related things must be apart along the stated direction
GRID = 128  # regions are found on about this many cells a side
TEMPLATE = 48


@dataclass(frozen=True)
class Found:
    """A thing that was read from a picture; a name is None when none fits."""

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    background: str | None
    things: tuple[Found, ...]


def read(picture: np.ndarray) -> Reading:
    """Read a (height, width, 3) uint8 picture."""
    pixels = picture.astype(np.float32)
    ground = ground_of(pixels)
    found = (_read_thing(pixels, region, ground) for region in things(distance(pixels, ground)))
    return Reading(_nearest(ground, BACKGROUNDS), tuple(found))


def ground_of(pixels: np.ndarray) -> np.ndarray:
    """The colour (3,) of the background."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    # The median: a thing that reaches the border must not shift it.
    return np.median(border, axis=0)


def things(away: np.ndarray) -> list[np.ndarray]:
    """Masks of the things of a picture, the largest first. away: how far each pixel is from the ground."""
    regions = [region for region in _regions(away > FOREGROUND) if region.mean() >= SPECK]
    return sorted(regions, key=lambda region: -region.sum())


def check(picture: np.ndarray, statements: list[Statement]) -> list[bool]:
    """Which statements hold, in their order. Things are matched to the sentence's in the way that
    lets most statements hold; every thing of a group must be as stated."""
    best: list[bool] = []
    for holds in _ways(read(picture), statements):
        told = list(holds)
        if not best or sum(told) > sum(best):
            best = told
    return best


def is_true(reading: Reading, statements: list[Statement]) -> bool:
    """Whether all statements hold, as `check` has it, of what was read."""
    return any(all(holds) for holds in _ways(reading, statements))


def reading_of(scene: Scene) -> Reading:
    """What `read` finds in a picture of the scene, without drawing it."""
    things = (Found(one.shape, one.colour, one.size, one.x, one.y) for one in scene.things)
    return Reading(scene.background, tuple(things))


def _ways(reading: Reading, statements: list[Statement]) -> Iterator[Iterator[bool]]:
    """Of each way to match things to the sentence's, which statements hold."""
    count = next((int(s.value) for s in statements if s.kind == "count"), 0)
    subjects = 1 + max((s.subject for s in statements), default=0)
    alike = subjects == 1 < count  # "three red circles": one subject, three things
    # Four at most, as orders grow with the factorial.
    for order in permutations(
        reading.things[:4], min(len(reading.things[:4]), max(count, subjects))
    ):
        groups = [order] if alike else [order[i : i + 1] for i in range(subjects)]
        yield (_holds(s, reading, groups, count) for s in statements)


def _holds(
    statement: Statement, reading: Reading, groups: list[tuple[Found, ...]], count: int
) -> bool:
    if statement.kind == "background":
        return reading.background == statement.value
    if statement.kind == "count":
        return len(reading.things) == count
    if statement.kind == "relation":
        ux, uy = RELATIONS[statement.value]
        if len(groups) < 2 or not groups[0] or not groups[1]:
            return False
        first, second = groups[0][0], groups[1][0]
        dx, dy = first.x - second.x, first.y - second.y
        along = dx * ux + dy * uy
        return along > APART and along > abs(dx * uy + dy * ux)
    things = groups[statement.subject] if statement.subject < len(groups) else ()
    if statement.kind == "position":
        x, y = POSITIONS[statement.value]
        return bool(things) and abs(things[0].x - x) < REACH and abs(things[0].y - y) < REACH
    return bool(things) and all(getattr(t, statement.kind) == statement.value for t in things)


def _read_thing(pixels: np.ndarray, region: np.ndarray, ground: np.ndarray) -> Found:
    colour = np.median(pixels[region], axis=0)
    # The edge of a thing is where its own colour takes over from the ground.
    solid = region & (distance(pixels, colour) < distance(pixels, ground))
    if not solid.any():
        solid = region
    rows, cols = np.nonzero(solid)
    height, width = solid.shape
    shape = _name_shape(solid)
    size = None
    if shape is not None:
        radius = np.sqrt(solid.sum() / unit_area(shape)) / min(height, width)
        size = _name_size(float(radius))
    x, y = (cols.mean() + 0.5) / width, (rows.mean() + 0.5) / height
    return Found(shape, _nearest(colour, COLOURS), size, float(x), float(y))


def _name_size(radius: float) -> str | None:
    small, large = RADII["small"], RADII["large"]
    if not 0.6 * small < radius < 1.4 * large:
        return None
    return "small" if radius < (small * large) ** 0.5 else "large"


def _name_shape(mask: np.ndarray) -> str | None:
    best = nearest_shape(mask)
    return best if _overlaps(mask)[best] >= OVERLAP else None


def nearest_shape(mask: np.ndarray) -> str:
    """The shape that a region is most like, however little."""
    overlaps = _overlaps(mask)
    return max(overlaps, key=lambda shape: overlaps[shape])


def _overlaps(mask: np.ndarray) -> dict[str, float]:
    rows, cols = np.nonzero(mask)
    seen = _normalised(mask[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1])
    return {s: (seen & _template(s)).sum() / (seen | _template(s)).sum() for s in SHAPES}


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A cropped mask scaled by its longer side into the middle of a TEMPLATE × TEMPLATE grid."""
    scale = TEMPLATE / max(mask.shape)
    height, width = (max(1, round(side * scale)) for side in mask.shape)
    scaled = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    grid = np.zeros((TEMPLATE, TEMPLATE), bool)
    top, left = (TEMPLATE - height) // 2, (TEMPLATE - width) // 2
    grid[top : top + height, left : left + width] = np.asarray(scaled) > 127
    return grid


@cache
def _template(shape: str) -> np.ndarray:
    canvas = Image.new("L", (400, 400))
    ImageDraw.Draw(canvas).polygon(
        [(200 + 180 * u, 200 + 180 * v) for u, v in outline(shape)], fill=1
    )
    mask = np.asarray(canvas).astype(bool)
    rows, cols = np.nonzero(mask)
    return _normalised(mask[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1])


@cache
def unit_area(shape: str) -> float:
    """The area of a shape of radius 1 (shoelace formula)."""
    corners = np.array(outline(shape))
    following = np.roll(corners, -1, axis=0)
    return float(abs((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum()) / 2)


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {
        name: float(np.linalg.norm(colour - np.array(value))) for name, value in names.items()
    }
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= COLOUR_TOLERANCE else None


def distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.linalg.norm(pixels - colour, axis=-1)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """The connected regions of a mask, each as a mask, found on a grid of about GRID a side."""
    step = max(1, round(min(mask.shape) / GRID))
    labels = _labels(mask[::step, ::step])
    full = np.repeat(np.repeat(labels, step, 0), step, 1)[: mask.shape[0], : mask.shape[1]]
    return [(full == label) & mask for label in np.unique(labels) if label]


def _labels(mask: np.ndarray) -> np.ndarray:
    """Number the 4-connected regions: each cell takes its neighbourhood's largest number, until
    nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.maximum.reduce(
            [
                padded[1:-1, 1:-1],
                padded[:-2, 1:-1],
                padded[2:, 1:-1],
                padded[1:-1, :-2],
                padded[1:-1, 2:],
            ]
        )
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            return labels
        labels = spread
