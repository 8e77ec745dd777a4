"""What is asked for: captions, masks and borders of case NUMBER, the same whatever else is asked for."""

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from pixart.shapes.caption import describe
from pixart.shapes.scene import COLOURS, HELD_OUT, POSITIONS, RELATIONS, Scene, Thing, sample_scene

SIDE = 128  # pixels, the embedded model's native side
MIRRORED = {
    "left": "right",
    "top": "bottom",
    "top left": "bottom right",
    "top right": "bottom left",
}
MIRRORED |= {there: here for here, there in MIRRORED.items()}
SIDES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
MARGIN = 0.045  # around a thing that is masked, in sides of the picture
WIDE, NARROW = 64, 32  # pixels that are added on one side, and on each of two


@dataclass(frozen=True)
class Move:
    """A thing at one place, and the same one at the opposite place."""

    caption: str
    place: str
    moved: str


@dataclass(frozen=True)
class Addition:
    """A thing in one half of a picture, and another that the other half, `side`, is to have. subject: of the
    one that is there already, in the caption `both`."""

    caption: str
    both: str
    side: str
    subject: int = 0

    @property
    def mask(self) -> Image.Image:
        """White in the half that is free."""
        return _box_mask(_half(self.side))


@dataclass(frozen=True)
class Recolouring:
    """A pair, and the same with another colour of thing `subject`, which lies in `box`: left, top, right and
    bottom as parts of the side."""

    caption: str
    recoloured: str
    subject: int
    box: tuple[float, float, float, float]

    @property
    def mask(self) -> Image.Image:
        """White in the box."""
        return _box_mask(self.box)


@dataclass(frozen=True)
class Extension:
    """A picture of one thing in the middle, and the caption that holds when `border` is added to it."""

    caption: str
    extended: str
    sides: tuple[str, ...]

    @property
    def border(self) -> str:
        """LEFT,TOP,RIGHT,BOTTOM in pixels."""
        width = WIDE if len(self.sides) == 1 else NARROW
        return ",".join(
            str(width if side in self.sides else 0) for side in ("left", "top", "right", "bottom")
        )


def move(number: int) -> Move:
    rng = random.Random(f"move/{number}")
    scene = sample_scene(rng, "one")
    while scene.layout == "center":
        scene = sample_scene(rng, "one")
    moved = replace(scene, layout=MIRRORED[scene.layout])
    words = f"move/{number}/words"  # the same wording of both but for the place
    here, there = (describe(one, random.Random(words), omit=0.0) for one in (scene, moved))
    return Move(here, scene.layout, there)


def addition(number: int) -> Addition:
    rng = random.Random(f"inpaint/{number}")
    pair = sample_scene(rng, "pair")
    here, there = SIDES[pair.layout]
    alone = Scene("one", pair.background, pair.things[:1], here)
    return Addition(describe(alone, rng, omit=0.0), describe(pair, rng, omit=0.0, apart=1.0), there)


def recolouring(number: int) -> Recolouring:
    rng = random.Random(f"recolour/{number}")
    pair = sample_scene(rng, "pair")
    subject = rng.randrange(2)
    things = list(pair.things)
    things[subject] = _recoloured(things[subject], things[1 - subject], rng)
    words = f"recolour/{number}/words"
    before, after = (
        describe(one, random.Random(words), omit=0.0, apart=0.0)
        for one in (pair, replace(pair, things=tuple(things)))
    )
    side = SIDES[pair.layout][subject]
    return Recolouring(before, after, subject, _box_around(pair, subject, side))


def extension(number: int, count: int) -> Extension:
    """count: of the sides that are added to, 1 or 2 opposite ones."""
    rng = random.Random(f"outpaint/{number}")
    scene = replace(sample_scene(rng, "one"), layout="center")
    side = rng.choice(list(_opposites()))
    sides = (side,) if count == 1 else (side, MIRRORED[side])
    words = f"outpaint/{number}/words"
    layout = MIRRORED[side] if count == 1 else "center"
    before, after = (
        describe(one, random.Random(words), omit=0.0)
        for one in (scene, replace(scene, layout=layout))
    )
    return Extension(before, after, sides)


def caption(kind: str, number: int) -> str:
    """A full caption of a scene."""
    rng = random.Random(f"caption/{kind}/{number}")
    return describe(sample_scene(rng, kind), rng, omit=0.0, apart=0.0)


def _opposites() -> tuple[str, ...]:
    return tuple(place for place in MIRRORED if " " not in place)


def _recoloured(thing: Thing, other: Thing, rng: random.Random) -> Thing:
    """Another colour, of the combinations that training showed, and not like the other thing."""
    taken = {thing.colour} | ({other.colour} if other.shape == thing.shape else set())
    free = [one for one in COLOURS if one not in taken and (thing.shape, one) not in HELD_OUT]
    return replace(thing, colour=rng.choice(free))


def _half(side: str) -> tuple[float, float, float, float]:
    halves = {
        "left": (0.0, 0.0, 0.5, 1.0),
        "right": (0.5, 0.0, 1.0, 1.0),
        "top": (0.0, 0.0, 1.0, 0.5),
        "bottom": (0.0, 0.5, 1.0, 1.0),
    }
    return halves[side]


def _box_around(scene: Scene, subject: int, side: str) -> tuple[float, float, float, float]:
    """Around where the thing is drawn by its caption, and within its half of the picture."""
    thing, (left, top, right, bottom) = scene.things[subject], _half(side)
    reach = thing.radius + MARGIN
    return (
        max(left, thing.x - reach),
        max(top, thing.y - reach),
        min(right, thing.x + reach),
        min(bottom, thing.y + reach),
    )


def _box_mask(box: tuple[float, float, float, float]) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    left, top, right, bottom = (round(SIDE * part) for part in box)
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


assert set(SIDES) == set(RELATIONS) and set(MIRRORED) == set(POSITIONS) - {"center"}
