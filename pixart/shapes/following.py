"""Whether a picture follows an outline: shapes and places that no caption told.

`sample_outlined` draws what is asked for, a scene's outlines and a caption that tells neither; `follow`
reads a picture back, as `checker` does, and compares it with the scene thing by thing.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import permutations

import numpy as np

from pixart.shapes.caption import describe
from pixart.shapes.checker import REACH, Found, read
from pixart.shapes.scene import LINE, Scene, Thing, draw_outlines, sample_scene

KINDS = {"one": 0.5, "pair": 0.5}  # of scenes, by weight
MOST = 4  # things that are matched: orders grow with the factorial


@dataclass(frozen=True)
class Outlined:
    """outline: (size, size, 3) uint8, white lines on black. caption: colours, sizes and ground alone."""

    scene: Scene
    caption: str
    outline: np.ndarray


@dataclass(frozen=True)
class Followed:
    """What of an outline a picture has: as many things, and of each its shape, its place and its size."""

    count: bool
    shapes: bool
    places: bool
    sizes: bool

    @property
    def is_followed(self) -> bool:
        """Whether count, shapes and places are the outline's."""
        return self.count and self.shapes and self.places


def sample_outlined(
    count: int,
    seed: int,
    size: int,
    kinds: Mapping[str, float] = KINDS,
    line: float = LINE,
) -> Iterator[Outlined]:
    """`count` of them, the same for the same seed. Captions leave out nothing that they may tell."""
    for number in range(count):
        rng = random.Random(f"outline/{seed}/{number}")
        scene = sample_scene(rng, rng.choices(list(kinds), list(kinds.values()))[0])
        caption = describe(scene, rng, omit=0.0, is_nameless=True)
        yield Outlined(scene, caption, draw_outlines(scene, size, line))


def follow(picture: np.ndarray, scene: Scene) -> Followed:
    """Compare a (height, width, 3) uint8 picture with the scene that its outline was drawn from: its things
    in the order in which most agrees."""
    found = read(picture).things[:MOST]
    has_count = len(found) == len(scene.things)
    ways = permutations(found, min(len(found), len(scene.things)))
    followed = [_compare(order, scene.things, has_count) for order in ways]
    return max(followed, key=lambda one: sum(astuple(one)))


def _compare(found: tuple[Found, ...], things: tuple[Thing, ...], has_count: bool) -> Followed:
    if len(found) < len(things):
        return Followed(False, False, False, False)
    pairs = list(zip(found, things, strict=True))
    return Followed(
        has_count,
        all(one.shape == thing.shape for one, thing in pairs),
        all(abs(one.x - thing.x) < REACH and abs(one.y - thing.y) < REACH for one, thing in pairs),
        all(one.size == thing.size for one, thing in pairs),
    )
