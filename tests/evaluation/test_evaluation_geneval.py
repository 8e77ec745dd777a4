"""Detections and GenEval: against the official scorer, and end to end with the exact checker as detector."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pixart.evaluation.detecting.detections import (
    Detection,
    Mask,
    Picture,
    checked_picture,
    read_detections,
    write_detections,
)
from pixart.evaluation.metric import Context
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.metrics.geneval import GenEval, clauses_hold, relative_position
from pixart.evaluation.needs import MissingError
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import read_json
from pixart.shapes.caption import describe, parse
from pixart.shapes.checker import check
from pixart.shapes.scene import Scene, Thing, draw, sample_scene

CPU = torch.device("cpu")
GOLDEN = read_json(Path(__file__).parent.parent / "golden" / "evaluation" / "geneval.json")
WHITE = Image.new("RGB", (512, 512), "white")


def opened(file: Path | None = None, judge: str | None = None) -> GenEval:
    files = {"detections": file} if file else {}
    metric = open_metric("geneval", Context(CPU, files=files, judge=judge))
    assert isinstance(metric, GenEval)
    return metric


def entry(prompt: str, sample: int = 0, **meta: Any) -> Entry:
    return Entry(Prompt(prompt, prompt, "geneval", meta=meta), sample, Path("none"))


def test_it_decides_as_the_official_scorer_on_400_detection_sets(tmp_path: Path) -> None:
    entries, pictures = [], []
    for number, one in enumerate(GOLDEN["sets"]):
        found = [
            Detection(name, score, tuple(box), colour)
            for name, score, box, colour in one["detections"]
        ]
        entries.append(entry(f"{number:05d}", **one["wanted"]))
        pictures.append((entries[-1].key, Picture(512, 512, tuple(found), "made-up")))
    file = tmp_path / "d.jsonl"
    write_detections(file, pictures)
    metric = opened(file)
    scores = metric.score(entries, [WHITE] * len(entries), None)
    expected = [one["correct"] for one in GOLDEN["sets"]]
    assert [bool(one.value) for one in scores] == expected
    found = metric.reduce(entries, scores)
    tags = [one["wanted"]["tag"] for one in GOLDEN["sets"]]
    means = {
        tag: np.mean([right for its, right in zip(tags, expected, strict=True) if its == tag])
        for tag in set(tags)
    }
    assert found["geneval"].value == pytest.approx(np.mean(list(means.values())))
    assert found["geneval/position"].value == pytest.approx(means["position"])
    assert found["geneval-pictures"].value == pytest.approx(np.mean(expected))
    assert found["geneval"].low < found["geneval"].value < found["geneval"].high
    assert any("not GenEval's own detector" in note for note in found["geneval"].notes)
    assert metric.protocol == "geneval/made-up"


def test_positions_are_the_official_ones() -> None:
    for box, other, expected in GOLDEN["positions"]:
        assert sorted(relative_position(box, other)) == expected
    assert relative_position((0, 0, 2, 2), (0, 0, 2, 2)) == set()


def held(detections: list[Detection], tag: str, *include: Mapping[str, Any]) -> Mapping[str, bool]:
    found = sorted(detections, key=lambda one: -one.score)
    return clauses_hold(
        Picture(9, 9, tuple(found)), {"tag": tag, "include": include, "exclude": ()}
    )


def test_only_the_likeliest_are_looked_at_and_16_at_most() -> None:
    box = (0.0, 0.0, 1.0, 1.0)
    red, blue = (Detection("dog", score, box, c) for score, c in ((0.9, "red"), (0.8, "blue")))
    assert held([red, blue], "colors", {"class": "dog", "count": 1, "color": "red"})["color"]
    assert not held([red, blue], "colors", {"class": "dog", "count": 1, "color": "blue"})["color"]
    many = [Detection("dog", 0.95, box)] * 20
    assert held(many, "counting", {"class": "dog", "count": 16})["count"]
    assert not held(many, "counting", {"class": "dog", "count": 17})["count"]
    assert held([red], "single_object", {"class": "dog", "count": 1})["count"]
    assert not held([red], "counting", {"class": "dog", "count": 1})["count"]  # 0.9 is not above


def test_prompts_of_which_any_picture_is_right_are_counted_too(tmp_path: Path) -> None:
    wanted = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    entries = [entry("x", k, **wanted) for k in range(4)]
    dog = Detection("dog", 0.5, (0, 0, 1, 1))
    pictures = [
        (one.key, Picture(512, 512, (dog,) if k == 2 else ())) for k, one in enumerate(entries)
    ]
    write_detections(tmp_path / "d.jsonl", pictures)
    metric = opened(tmp_path / "d.jsonl")
    found = metric.reduce(entries, metric.score(entries, [WHITE] * 4, None))
    assert found["geneval"].value == 0.25 and found["geneval-any-right"].value == 1.0
    assert metric.protocol == "geneval/unnamed"


LINE = {"key": "x/0000", "width": 4, "height": 3, "detections": []}
ONE = {"class": "dog", "score": 0.5, "box": [0, 0, 2, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": [0, 0, math.nan, 2]}, "box must be 4 finite numbers, got"),
        ({"box": [0, 0, 1e999, 2]}, "box must be 4 finite numbers, got"),
        ({"box": [0, 0, 2]}, "box must be 4 finite numbers, got"),
        ({"box": [2, 0, 1, 2]}, "box must be left, top, right, bottom"),
        ({"score": 1.5}, "score must be a number from 0 to 1, got 1.5"),
        ({"score": True}, "score must be a number from 0 to 1, got True"),
        ({"class": ""}, "class and color must be text"),
        ({"colour": "red"}, "detection must have .* only, got colour"),
        ({"mask": {"size": [4, 3], "counts": [12]}}, r"mask must have the picture's size \[3, 4\]"),
        ({"mask": {"size": [3, 4], "counts": [5, 6]}}, "must have 12 pixels, its counts have 11"),
        ({"mask": {"size": [3, 4], "counts": [13, -1]}}, "counts as a list of whole numbers"),
        ({"mask": "abc"}, "mask must have the picture's size"),
    ],
)
def test_wrong_detections_are_one_clear_error(
    tmp_path: Path, change: Mapping[str, Any], message: str
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(LINE | {"detections": [ONE | dict(change)]}))
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 1: .*{message}"):
        read_detections(file)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINE, LINE], "line 2: key must be there once, got 'x/0000' again"),
        ([LINE | {"width": 0}], "width and height must be pixels, got 0 and 3"),
        ([LINE | {"width": 10**9}], "width times height must be at most 268,435,456, got 3,000,000,000"),
        ([LINE | {"detections": None}], "detections must be a list, got None"),
        ([LINE | {"detections": ["dog"]}], "detection must be a JSON object, got 'dog'"),
        ([LINE | {"key": 3}], "key and detector must be text, got 3"),
        ([LINE | {"detector": "a"}, LINE | {"key": "y/0000", "detector": "b"}], "one detector, got a, b"),
        ([[1]], "must be a JSON object, got a list"),
    ],
)  # fmt: skip
def test_wrong_lines_are_one_clear_error(tmp_path: Path, lines: list[Any], message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        read_detections(file)


def test_a_picture_without_a_line_is_an_error_and_so_is_another_size(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(LINE))
    wanted = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    with pytest.raises(ValueError, match=r"must have a line for picture y/0000, it has none"):
        opened(file).score([entry("y", **wanted)], [WHITE], None)
    with pytest.raises(ValueError, match=r"x/0000 must be 512x512 as the picture, got 4x3"):
        opened(file).score([entry("x", **wanted)], [WHITE], None)
    metric = opened(tmp_path / "none")
    assert "--file detections=FILE" in str(metric.needs()[0])
    with pytest.raises(MissingError, match="detections needs"):
        metric.score([entry("x", **wanted)], [WHITE], None)
    assert "--file detections=FILE" in str(opened().needs()[0])


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"include": []}, "must have a task as meta.tag"),
        ({"tag": "colors"}, "must want something in meta.include"),
        ({"tag": "colors", "include": [{"class": "dog"}]}, "meta.include must be of class, count"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 0}]}, "meta.include must be of"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
         "a clause before"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["near", 0]}]},
         "meta.include must be of"),
    ],
)  # fmt: skip
def test_wrong_clauses_are_one_clear_error(
    tmp_path: Path, meta: Mapping[str, Any], message: str
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(LINE | {"width": 512, "height": 512}))
    with pytest.raises(ValueError, match=f"x/0000: prompt 'x': .*{message}"):
        opened(file).score([entry("x", **meta)], [WHITE], None)


def test_a_colour_that_nobody_looked_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="detections of 'dog' must have a color, which is asked"):
        held(
            [Detection("dog", 0.5, (0, 0, 1, 1))],
            "colors",
            {"class": "dog", "count": 1, "color": "red"},
        )


def test_masks_are_run_lengths_by_columns() -> None:
    pixels = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert Mask.of(pixels).counts == (2, 1, 1, 2)  # columns 00, 10, 11
    rng = np.random.default_rng(0)
    for _ in range(50):
        some = rng.random(rng.integers(1, 9, 2)) < rng.random()
        assert np.array_equal(Mask.of(some).pixels(), some)


def test_the_checker_finds_boxes_masks_and_names(tmp_path: Path) -> None:
    things = (
        Thing("square", "red", "large", 0.3, 0.5),
        Thing("circle", "blue", "small", 0.75, 0.5),
    )
    image = Image.fromarray(draw(Scene("pair", "white", things, "left of"), 200))
    picture = checked_picture(image)
    names = [one.name for one in picture.detections]
    assert names == ["square", "red square", "circle", "blue circle"]
    half = 0.85 * things[0].radius * 200
    box = picture.detections[0].box
    assert box == pytest.approx((60 - half, 100 - half, 60 + half, 100 + half), abs=1.5)
    mask = picture.detections[0].mask
    assert mask is not None and mask.pixels().sum() == pytest.approx((2 * half) ** 2, rel=0.05)
    write_detections(tmp_path / "d.jsonl", [("x/0000", picture)])
    assert read_detections(tmp_path / "d.jsonl") == {"x/0000": picture}


def test_geneval_of_the_embedded_world_is_what_its_clauses_state() -> None:
    """Right where class, count, colour and relation hold; GenEval asks for neither size nor place. Its
    positions are stricter or laxer than the checker's, so relations are compared where scenes are as
    captions have them, or of other shapes."""
    rng = random.Random(1)
    entries, images, expected = [], [], []
    for n in range(60):
        kind = rng.choice(("one", "pair", "group"))
        scene = sample_scene(rng, kind)
        caption = describe(scene, rng, omit=0.0)
        other = sample_scene(rng, kind) if n % 2 else scene
        entries.append(Entry(Prompt(f"{n:05d}", caption, "shapes", kind), 0, Path("none")))
        images.append(Image.fromarray(draw(other, 96)))
        asked = [s for s in parse(caption) if s.kind in ("shape", "colour", "relation")]
        asked += [s for s in parse(caption) if s.kind == "count" and kind != "pair"]
        right = check(np.asarray(images[-1]), asked)
        expected.append(bool(right) and all(right))
    metric = opened(judge="checker")
    scores = metric.score(entries, images, None)
    assert [bool(one.value) for one in scores] == expected
    assert 30 <= sum(expected) < 60 and metric.protocol == "geneval/checker-1"
    found = metric.reduce(entries, scores)
    assert {name for name in found if "/" in name} == {
        "geneval/colors", "geneval/counting", "geneval/position"
    }  # fmt: skip
