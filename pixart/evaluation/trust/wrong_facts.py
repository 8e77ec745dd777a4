"""Scenes of the embedded world with one wrong fact: in the caption, or in the picture.

Of each kind of statement there are pairs of scenes that differ in it and in nothing else, and their captions,
which differ in its words alone. The exact checker agrees with all of them, or they are not made.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pixart.shapes.caption import describe, parse
from pixart.shapes.checker import check
from pixart.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    POSITIONS,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    draw,
    sample_scene,
)

if TYPE_CHECKING:
    import numpy as np

SIDE = 128  # pixels, of all pictures
One = TypeVar("One")


@dataclass(frozen=True)
class Pair:
    """caption is true of scene, and false of other, for one fact of this kind. other_caption: the other way
    round."""

    kind: str
    number: int
    scene: Scene
    other: Scene
    caption: str
    other_caption: str

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.number:05d}"

    @property
    def picture(self) -> "np.ndarray":
        """(SIDE, SIDE, 3) uint8, of scene."""
        return draw(self.scene, SIDE)

    @property
    def other_picture(self) -> "np.ndarray":
        return draw(self.other, SIDE)


def pairs(kind: str, count: int, seed: int = 0) -> list[Pair]:
    """So many pairs of a kind; the same for the same seed, and the first ones the same for any count.
    ValueError for a kind that is none."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return [
        _pair(kind, number, random.Random(f"{seed}/{kind}/{number}")) for number in range(count)
    ]


def _pair(kind: str, number: int, rng: random.Random) -> Pair:
    scenes, change = KINDS[kind]
    while True:
        scene = sample_scene(rng, rng.choice(scenes))
        other = change(scene, rng)
        if other is None or any((one.shape, one.colour) in HELD_OUT for one in other.things):
            continue  # what training never showed would be a second thing to fail at
        words = rng.getrandbits(63)
        texts = [describe(one, _Even(words), omit=0.0, apart=0.0) for one in (scene, other)]
        return Pair(kind, number, scene, other, texts[0], texts[1])


class _Even(random.Random):
    """Draws one number for a choice, whatever is chosen from: so two scenes are told in the same words."""

    def choice(self, seq: Sequence[One]) -> One:  # type: ignore[override]
        return seq[int(self.random() * len(seq))]


def holds(picture: "np.ndarray", caption: str) -> bool:
    """What the exact checker says."""
    told = check(picture, parse(caption))
    return bool(told) and all(told)


# One fact of a scene, changed. None where the scene does not allow it.


def _background(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, background=_another(scene.background, BACKGROUNDS, rng))


def _of_a_thing(field: str, names: Sequence[str]) -> Callable[[Scene, random.Random], Scene | None]:
    def change(scene: Scene, rng: random.Random) -> Scene | None:
        chosen = rng.randrange(len(scene.things))
        value = _another(getattr(scene.things[chosen], field), names, rng)
        changed: dict[str, Any] = {field: value}
        things = [
            replace(one, **changed) if scene.kind == "group" or place == chosen else one
            for place, one in enumerate(scene.things)
        ]
        # Two alike could be told apart by their size alone.
        alike = scene.kind == "pair" and _noun(things[0]) == _noun(things[1])
        return None if alike else replace(scene, things=tuple(things))

    return change


def _noun(thing: Thing) -> tuple[str, str]:
    return thing.shape, thing.colour


def _position(scene: Scene, rng: random.Random) -> Scene:
    layout = _another(scene.layout, POSITIONS, rng)
    (thing,) = scene.things
    (x, y), (to_x, to_y) = POSITIONS[scene.layout], POSITIONS[layout]
    moved = replace(thing, x=thing.x - x + to_x, y=thing.y - y + to_y)
    return replace(scene, things=(moved,), layout=layout)


def _relation(scene: Scene, rng: random.Random) -> Scene:
    """Turned around the middle by a quarter, a half or three quarters."""
    layout = _another(scene.layout, RELATIONS, rng)
    (ux, uy), (vx, vy) = RELATIONS[scene.layout], RELATIONS[layout]
    cosine, sine = ux * vx + uy * vy, ux * vy - uy * vx
    things = [
        replace(
            one,
            x=0.5 + cosine * (one.x - 0.5) - sine * (one.y - 0.5),
            y=0.5 + sine * (one.x - 0.5) + cosine * (one.y - 0.5),
        )
        for one in scene.things
    ]
    return replace(scene, things=tuple(things), layout=layout)


def _swap(scene: Scene, rng: random.Random) -> Scene | None:
    first, second = scene.things
    if first.colour == second.colour or first.shape == second.shape:
        return None
    swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
    return replace(scene, things=swapped)


def _count(scene: Scene, rng: random.Random) -> Scene:
    other = scene
    while len(other.things) == len(scene.things):
        other = sample_scene(rng, "group")
    like = scene.things[0]
    return replace(scene, things=tuple(replace(like, x=one.x, y=one.y) for one in other.things))


def _another(value: str, names: Iterable[str], rng: random.Random) -> str:
    return rng.choice([name for name in names if name != value])


_ANY = ("one", "pair", "group")
KINDS: dict[str, tuple[tuple[str, ...], Callable[[Scene, random.Random], Scene | None]]] = {
    "background": (_ANY, _background),
    "colour": (_ANY, _of_a_thing("colour", tuple(COLOURS))),
    "shape": (_ANY, _of_a_thing("shape", SHAPES)),
    "size": (_ANY, _of_a_thing("size", tuple(RADII))),
    "count": (("group",), _count),
    "position": (("one",), _position),
    "relation": (("pair",), _relation),
    "swap": (("pair",), _swap),
}
