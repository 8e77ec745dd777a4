"""Outlines, captions that tell neither shapes nor places, and whether pictures follow them."""

import random
from dataclasses import replace

import numpy as np
import pytest

from pixart.shapes.caption import describe, parse, unknown_words
from pixart.shapes.checker import check
from pixart.shapes.following import Followed, follow, sample_outlined
from pixart.shapes.scene import SHAPES, draw, draw_outlines, sample_scene


def test_captions_tell_colours_sizes_and_ground_alone_in_words_that_the_model_knows() -> None:
    for one in sample_outlined(40, 0, 64, {"one": 1, "pair": 1, "group": 1}):
        assert not unknown_words(one.caption)
        stated = parse(one.caption)
        assert not {s.kind for s in stated} & {"shape", "position", "relation"}
        if one.scene.kind != "group":
            colours = [s.value for s in stated if s.kind == "colour"]
            assert colours == [thing.colour for thing in one.scene.things]
        assert all(check(draw(one.scene, 128), stated))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red one on white", "background 0: white, count 0: 1, colour 0: red"),
        ("a small one", "count 0: 1, size 0: small"),
        ("one red circle", "count 0: 1, shape 0: circle, colour 0: red"),
        ("a red one left of a blue one",
         "count 0: 2, colour 0: red, colour 1: blue, relation 0: left of"),
        ("one", ""),
    ],
)  # fmt: skip
def test_one_stands_for_a_shape_behind_a_colour_or_a_size(text: str, expected: str) -> None:
    assert ", ".join(map(str, parse(text))) == expected


def test_the_same_seed_draws_the_same_outlines() -> None:
    one, same, other = (
        [(o.scene, o.caption) for o in sample_outlined(5, seed, 32)] for seed in (1, 1, 2)
    )
    assert one == same != other


def test_the_scene_itself_follows_its_outline_and_the_outline_does_not() -> None:
    for one in sample_outlined(20, 3, 128):
        assert follow(draw(one.scene, 128), one.scene) == Followed(True, True, True, True)
        assert not follow(one.outline, one.scene).shapes


def test_what_differs_from_an_outline_is_told() -> None:
    scene = sample_scene(random.Random(0), "pair")
    first, second = scene.things
    other = next(s for s in SHAPES if s not in (first.shape, second.shape))
    size = {"small": "large", "large": "small"}[first.size]

    def told(*things: object) -> Followed:
        return follow(draw(replace(scene, things=things), 128), scene)  # type: ignore[arg-type]

    assert told(second, first).is_followed
    assert told(replace(first, shape=other), second) == Followed(True, False, True, True)
    assert not told(first).count and not told(first).is_followed
    assert not told(replace(first, x=1 - first.x, y=1 - first.y + 0.3), second).places
    assert not told(replace(first, size=size), second).sizes
    blank = np.full((128, 128, 3), 250, np.uint8)
    assert follow(blank, scene) == Followed(False, False, False, False)


def test_outlines_are_white_lines_on_black_around_what_is_drawn() -> None:
    scene = sample_scene(random.Random(1), "one")
    outlines = draw_outlines(scene, 128)
    assert outlines.shape == (128, 128, 3) and outlines.dtype == np.uint8
    assert (outlines[..., 0] == outlines[..., 2]).all() and outlines.max() > 250
    x, y = (int(128 * c) for c in (scene.things[0].x, scene.things[0].y))
    assert not outlines[y, x].any() and not outlines[0].any()
    wide = draw_outlines(scene, 128, line=0.06)
    assert wide.mean() > 1.5 * outlines.mean()


def test_captions_that_name_things_are_what_they_were() -> None:
    scene = sample_scene(random.Random(2), "pair")
    assert describe(scene, random.Random(0)) == describe(scene, random.Random(0), is_nameless=False)
