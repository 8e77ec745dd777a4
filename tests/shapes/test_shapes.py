import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pixart.shapes.caption import Statement, describe, parse, unknown_words
from pixart.shapes.checker import check, read
from pixart.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    draw,
    sample_scene,
)

KINDS = ("one", "pair", "group")


def _scenes(kind: str, count: int, held_out: bool = False, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, kind, held_out) for _ in range(count)]


def _facts(scene: Scene) -> set[Statement]:
    """Everything that can be stated about a scene."""
    subjects = scene.things if scene.kind == "pair" else scene.things[:1]
    facts = {
        Statement("background", scene.background),
        Statement("count", str(len(scene.things))),
    }
    for subject, thing in enumerate(subjects):
        facts |= {Statement(k, getattr(thing, k), subject) for k in ("shape", "colour", "size")}
    if scene.kind != "group":
        facts.add(Statement("position" if scene.kind == "one" else "relation", scene.layout))
    return facts


@pytest.mark.parametrize("kind", KINDS)
def test_things_stay_inside_the_picture_and_apart(kind: str) -> None:
    for scene in _scenes(kind, 300):
        for thing in scene.things:
            assert thing.radius < thing.x < 1 - thing.radius
            assert thing.radius < thing.y < 1 - thing.radius
        for a, b in itertools.combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.95 * (a.radius + b.radius)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_combinations_are_drawn_only_when_asked(kind: str) -> None:
    for scene in _scenes(kind, 500):
        assert not any((t.shape, t.colour) in HELD_OUT for t in scene.things)
    for scene in _scenes(kind, 50, held_out=True):
        assert (scene.things[0].shape, scene.things[0].colour) in HELD_OUT


def test_an_unknown_kind_of_scene_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        sample_scene(random.Random(0), "crowd")


def test_the_same_seed_draws_the_same_scene_and_caption() -> None:
    first, second = (random.Random(7), random.Random(7))
    for kind in KINDS:
        a, b = sample_scene(first, kind), sample_scene(second, kind)
        assert a == b and describe(a, first) == describe(b, second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_caption_states_every_fact_and_nothing_else(kind: str) -> None:
    rng = random.Random(1)
    for scene in _scenes(kind, 300):
        assert set(parse(describe(scene, rng, omit=0.0))) == _facts(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_caption_states_nothing_false(kind: str) -> None:
    rng = random.Random(2)
    for scene in _scenes(kind, 300):
        text = describe(scene, rng, omit=0.5)
        assert set(parse(text)) <= _facts(scene), text
        assert not unknown_words(text)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("A RED circle, left of a blue square!", ["colour 0: red", "relation 0: left of"]),
        ("the grey background behind a small star", ["background 0: gray", "size 0: small"]),
        ("three little green crosses", ["count 0: 3", "shape 0: cross", "size 0: small"]),
        ("a cyan square in the lower right corner", ["position 0: bottom right"]),
    ],
)
def test_paraphrases_are_understood(text: str, stated: list[str]) -> None:
    assert set(stated) <= {str(statement) for statement in parse(text)}


def test_a_sentence_without_shapes_states_at_most_its_background() -> None:
    assert parse("a cat on a mat") == []
    assert parse("nothing on white") == [Statement("background", "white")]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a red кот", ["кот"]),
        ("猫 on white", ["猫"]),
        ("a red circle 🐈 and 🐈‍⬛🌵", ["🐈", "🐈‍⬛🌵"]),
        ("ein großer, naïve क्षेत्र", ["ein", "großer", "naïve", "क्षेत्र"]),
        ("εἷς κύκλος; دائرة 👍🏽", ["εἷς", "κύκλος", "دائرة", "👍🏽"]),
        ("a RED circle, left-of “a” — star!", []),
        ("ａ ｒｅｄ ｃｉｒｃｌｅ ｏｎ ｓａｎｄ", ["ｓａｎｄ"]),
        ("three crosses, no crosss", ["no", "crosss"]),
        ("2€ ½ x² \U000e0041\U0001fb00", ["2", "€", "½", "x²", "\U0001fb00"]),
    ],
)
def test_unknown_words_are_named_in_any_alphabet(text: str, words: list[str]) -> None:
    assert unknown_words(text) == words


def test_unknown_words_are_named_once_in_order() -> None:
    assert unknown_words("a photo of a teal circle and a teal dog") == ["photo", "teal", "dog"]


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_the_checker_finds_everything_right_on_drawn_scenes(kind: str, size: int) -> None:
    rng = random.Random(3)
    for scene in [*_scenes(kind, 40), *_scenes(kind, 10, held_out=True)]:
        text = describe(scene, rng, omit=0.0)
        assert all(check(draw(scene, size), parse(text))), text


def _other(value: str, names: object) -> str:
    return next(name for name in names if name != value)  # type: ignore[attr-defined]


def _changed(scene: Scene, kind: str) -> Scene:
    """The scene with one fact of the given kind made wrong."""
    first = scene.things[0]
    if kind == "background":
        return replace(scene, background=_other(scene.background, BACKGROUNDS))
    if kind == "count":
        corner = Thing("circle", "red", "small", 0.14, 0.14)
        return replace(scene, things=(*scene.things, corner))
    if kind == "position":
        x, y = next((x, y) for x, y in POSITIONS.values() if abs(x - first.x) > 0.4)
        return replace(scene, things=(replace(first, x=x, y=y),))
    if kind == "relation":
        a, b = scene.things
        return replace(scene, things=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))
    names = {"shape": SHAPES, "colour": COLOURS, "size": ("small", "large")}[kind]
    thing = replace(first, **{kind: _other(getattr(first, kind), names)})
    return replace(scene, things=(thing, *scene.things[1:]))


@pytest.mark.parametrize(
    "kind", ["background", "count", "shape", "colour", "size", "position", "relation"]
)
def test_the_checker_sees_the_one_statement_that_is_wrong(kind: str) -> None:
    rng = random.Random(4)
    scenes = _scenes("pair" if kind == "relation" else "one", 60, seed=5)
    if kind == "position":
        scenes = [s for s in scenes if s.layout in ("left", "right", "top left", "bottom right")]
    if kind == "count":
        scenes = [s for s in scenes if s.layout in ("right", "bottom", "bottom right")]
    if kind == "relation":  # swapping two of one look would change nothing
        scenes = [s for s in scenes if len({(t.shape, t.colour) for t in s.things}) == 2]
    assert scenes
    for scene in scenes:
        statements = parse(describe(scene, rng, omit=0.0))
        holds = check(draw(_changed(scene, kind), 256), statements)
        wrong = {s.kind for s, held in zip(statements, holds, strict=True) if not held}
        if kind == "relation":  # things are matched as well as can be: either reading may win
            assert wrong
        else:
            assert wrong == {kind}, (scene, wrong)


def test_noise_blank_and_muddy_pictures_do_not_pass() -> None:
    statements = parse("a large red circle in the center on a gray background")
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    blank = np.full((128, 128, 3), 128, np.uint8)
    scene = Scene("one", "gray", (Thing("circle", "red", "large", 0.5, 0.5),), "center")
    muddy = draw(scene, 128, {"red": (170, 120, 190)})
    for picture in (noise, blank, muddy):
        assert not all(check(picture, statements) or [False])


def test_things_that_run_into_each_other_count_as_one() -> None:
    things = (Thing("circle", "red", "large", 0.4, 0.5), Thing("square", "blue", "large", 0.6, 0.5))
    scene = Scene("pair", "white", things, "left of")
    statements = parse("a large red circle left of a large blue square on white")
    holds = dict(
        zip((s.kind for s in statements), check(draw(scene, 256), statements), strict=True)
    )
    assert not holds["count"]


def test_the_checker_forgives_a_little_blur() -> None:
    rng = random.Random(6)
    for kind in KINDS:
        for scene in _scenes(kind, 10, seed=8):
            picture = Image.fromarray(draw(scene, 256)).filter(ImageFilter.GaussianBlur(1.5))
            assert all(check(np.asarray(picture), parse(describe(scene, rng, omit=0.0))))


def test_a_reading_names_only_what_is_clear() -> None:
    reading = read(draw(Scene("one", "white", (Thing("star", "blue", "small", 0.25, 0.75),)), 256))
    assert reading.background == "white"
    (thing,) = reading.things
    assert (thing.shape, thing.colour, thing.size) == ("star", "blue", "small")
    assert abs(thing.x - 0.25) < 0.01 and abs(thing.y - 0.75) < 0.02


def test_every_relation_is_read_in_its_own_direction() -> None:
    for relation, (ux, uy) in RELATIONS.items():
        first = Thing("circle", "red", "small", 0.5 + 0.2 * ux, 0.5 + 0.2 * uy)
        second = Thing("square", "blue", "small", 0.5 - 0.2 * ux, 0.5 - 0.2 * uy)
        picture = draw(Scene("pair", "white", (first, second), relation), 128)
        for words in RELATIONS:
            statements = parse(f"a red circle {words} a blue square")
            assert all(check(picture, statements)) == (words == relation)
