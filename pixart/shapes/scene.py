"""The world of the embedded model: coloured shapes on a plain ground, and how they are drawn.

A scene is resolution-free: centres and radii are fractions of the side of a square picture,
x to the right, y downwards. Placement is nearly decided by what a caption says (small jitter
only), because a small model learns to follow captions much sooner when little is left to chance.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 40, 45),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 50),
    "green": (35, 150, 65),
    "cyan": (50, 205, 220),
    "blue": (40, 75, 215),
    "purple": (140, 45, 175),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (128, 128, 128), "black": (18, 18, 22)}
RADII = {"small": 0.14, "large": 0.21}
POSITIONS = {
    "top left": (0.25, 0.25), "top": (0.5, 0.25), "top right": (0.75, 0.25),
    "left": (0.25, 0.5), "center": (0.5, 0.5), "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75), "bottom": (0.5, 0.75), "bottom right": (0.75, 0.75),
}  # fmt: skip
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

# Never drawn in training, so that accuracy on them measures composition and not memory.
HELD_OUT = frozenset(
    {("star", "purple"), ("circle", "green"), ("square", "orange"), ("triangle", "cyan")}
)

SCENES = ("one", "pair", "beside", "group")  # what sample_scene knows
JITTER = 0.015  # along the direction that a caption states
DRIFT = 0.03  # across it
OFFSET = 0.235  # of each of two related things from the middle
SUPERSAMPLE = 4
LINE = 0.03  # width of a drawn outline


@dataclass(frozen=True)
class Thing:
    """One shape. x, y: its centre and radius: of the circle around it, as fractions of the side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        return RADII[self.size]


@dataclass(frozen=True)
class Scene:
    """kind: "one" (a thing at a named position), "pair" (two things in a relation) or "group"
    (two or three alike). `layout` is the position or relation name, empty for a group."""

    kind: str
    background: str
    things: tuple[Thing, ...]
    layout: str = ""


def sample_scene(rng: random.Random, kind: str, held_out: bool = False) -> Scene:
    """Draw a scene of the given kind; `held_out` says whether its (first) thing is one of the
    combinations of shape and colour that training never shows. kind may also be "beside": a pair
    with one thing left or right of the other."""
    background = rng.choice(list(BACKGROUNDS))
    first = _sample_thing(rng, held_out)
    if kind == "one":
        layout = rng.choice(list(POSITIONS))
        return Scene(
            kind, background, (_placed(first, POSITIONS[layout], rng, JITTER, JITTER),), layout
        )
    if kind in ("pair", "beside"):
        layout = rng.choice([name for name, (x, _) in RELATIONS.items() if x or kind == "pair"])
        second = _sample_thing(rng, False)
        while (second.shape, second.colour) == (first.shape, first.colour):
            second = _sample_thing(rng, False)
        return Scene("pair", background, _related(first, second, layout, rng), layout)
    if kind == "group":
        spots = rng.choice((((0.27, 0.5), (0.73, 0.5)), ((0.5, 0.27), (0.27, 0.73), (0.73, 0.73))))
        things = tuple(_placed(first, spot, rng, JITTER, JITTER) for spot in spots)
        return Scene(kind, background, things)
    raise ValueError(f"kind must be one of {', '.join(SCENES)}, got {kind!r}")


def _sample_thing(rng: random.Random, held_out: bool) -> Thing:
    size = rng.choice(list(RADII))
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if ((shape, colour) in HELD_OUT) == held_out:
            return Thing(shape, colour, size, 0.5, 0.5)


def _placed(
    thing: Thing, at: tuple[float, float], rng: random.Random, dx: float, dy: float
) -> Thing:
    return replace(thing, x=at[0] + rng.uniform(-dx, dx), y=at[1] + rng.uniform(-dy, dy))


def _related(first: Thing, second: Thing, relation: str, rng: random.Random) -> tuple[Thing, Thing]:
    ux, uy = RELATIONS[relation]
    dx, dy = (JITTER, DRIFT) if ux else (DRIFT, JITTER)
    return (
        _placed(first, (0.5 + OFFSET * ux, 0.5 + OFFSET * uy), rng, dx, dy),
        _placed(second, (0.5 - OFFSET * ux, 0.5 - OFFSET * uy), rng, dx, dy),
    )


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around the origin (a circle as a 64-gon)."""
    if shape == "circle":
        return _regular(64, 1.0)
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return _regular(3, 1.0)
    if shape == "star":
        return [
            p for pair in zip(_regular(5, 1.0), _regular(5, 0.45, 0.5), strict=True) for p in pair
        ]
    if shape == "cross":
        a, b = 0.33, 0.95
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]  # fmt: skip
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")


def _regular(corners: int, radius: float, shift: float = 0.0) -> list[tuple[float, float]]:
    """A regular polygon with its first corner at the top, turned by `shift` corners."""
    angles = [2 * math.pi * (i + shift) / corners for i in range(corners)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def draw(
    scene: Scene,
    size: int,
    palette: dict[str, tuple[int, int, int]] | None = None,
    supersample: int = SUPERSAMPLE,
) -> np.ndarray:
    """Draw a scene as (size, size, 3) uint8, anti-aliased. `palette` replaces named colours."""
    colours = {**COLOURS, **BACKGROUNDS, **(palette or {})}
    side = size * supersample
    canvas = Image.new("RGB", (side, side), colours[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        pen.polygon(_corners(thing, side), fill=colours[thing.colour])
    return np.asarray(canvas.reduce(supersample) if supersample > 1 else canvas)


def draw_outlines(
    scene: Scene, size: int, line: float = LINE, supersample: int = SUPERSAMPLE
) -> np.ndarray:
    """The outlines of a scene's things as (size, size, 3) uint8: white on black, anti-aliased, without what
    is said of colours. line: width of a line, as a fraction of the side."""
    side = size * supersample
    canvas = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        corners = _corners(thing, side)
        width = max(1, round(line * side))
        # Beyond where it began, for a joint there too.
        pen.line([*corners, *corners[:2]], fill=(255, 255, 255), width=width, joint="curve")
    return np.asarray(canvas.reduce(supersample) if supersample > 1 else canvas)


def _corners(thing: Thing, side: int) -> list[tuple[float, float]]:
    """Of a thing in a square picture of so many pixels."""
    scale = thing.radius * side
    return [
        (thing.x * side + scale * u, thing.y * side + scale * v) for u, v in outline(thing.shape)
    ]
