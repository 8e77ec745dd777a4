"""The study of pictures from pictures: its judges tell right from wrong, its record goes on where it ended."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.reporting import editing, pages
from bench.studies.editing import cases, experiments, judging
from bench.studies.editing.__main__ import main as command
from bench.studies.editing.record import Record, row
from pixart.checkpoint.save_control import save_control
from pixart.pipeline.text_to_image import Pipeline
from pixart.shapes.caption import parse
from pixart.shapes.checker import check
from pixart.shapes.scene import POSITIONS, Scene, Thing, draw

NUMBERS = range(60)
STAR, CIRCLE = Thing("star", "red", "large", 0.25, 0.5), Thing("circle", "blue", "small", 0.75, 0.5)
PAIR = "a large red star on the left and a small blue circle on the right on white"


def picture(*things: Thing, ground: str = "white", size: int = 128) -> np.ndarray:
    return draw(Scene("", ground, things), size).copy()


def noisy(*things: Thing, size: int = 128, levels: int = 2, ground: str = "gray") -> np.ndarray:
    """As a VAE decodes a ground."""
    noise = np.random.default_rng(0).integers(-levels, levels + 1, (size, size, 3))
    return np.clip(picture(*things, ground=ground, size=size) + noise, 0, 255).astype(np.uint8)


def test_a_moved_thing_must_be_at_the_new_place_and_not_at_the_old_one() -> None:
    caption = "a large red star on the right on white"
    moved = replace(STAR, x=0.75)
    assert judging.is_right(picture(moved), caption)
    assert not judging.is_right(picture(STAR), caption)
    assert not judging.is_right(picture(moved, STAR), caption), "one thing, not two"
    assert not judging.is_right(picture(replace(moved, colour="cyan")), caption)
    assert judging.is_taken(picture(STAR), "left") and not judging.is_taken(picture(moved), "left")
    assert judging.is_taken(picture(replace(STAR, shape="cross", colour="green")), "left")


def test_the_new_thing_is_judged_without_the_looks_of_the_one_that_was_there() -> None:
    assert judging.is_right_but_for(picture(STAR, CIRCLE), PAIR, 0)
    assert judging.is_right_but_for(picture(replace(STAR, shape="cross"), CIRCLE), PAIR, 0)
    for wrong in (
        picture(STAR),
        picture(STAR, replace(CIRCLE, colour="green")),
        picture(STAR, replace(CIRCLE, shape="square")),
        picture(STAR, replace(CIRCLE, size="large")),
        picture(STAR, CIRCLE, replace(CIRCLE, x=0.5, y=0.85)),
        picture(STAR, CIRCLE, ground="gray"),
    ):
        assert not judging.is_right_but_for(wrong, PAIR, 0)
    assert judging.of_thing(picture(STAR, CIRCLE), PAIR, 0) == [True] * 3
    assert (
        judging.of_thing(picture(replace(STAR, colour="cyan"), CIRCLE), PAIR, 0).count(False) == 1
    )


def test_one_pixel_of_one_level_outside_of_the_mask_counts_as_changed() -> None:
    base = Image.fromarray(noisy(STAR))
    mask = cases.addition(0).mask
    edited, outside = np.asarray(base).copy(), np.argwhere(np.asarray(mask) == 0)
    edited[np.asarray(mask) > 0] ^= 255
    assert experiments.is_kept(base, edited, mask)
    for y, x in (outside[0], outside[-1]):
        touched = edited.copy()
        touched[y, x, 2] ^= 1
        assert not experiments.is_kept(base, touched, mask)
    assert not experiments.is_kept(base, edited[:, :-1], mask)


def extended(own: np.ndarray, levels: float = 0.0, fade: int = 0) -> np.ndarray:
    """The picture, and 64 columns more of its ground that is off by so many levels."""
    noise = np.random.default_rng(1).integers(-2, 3, (len(own), 64, 3))
    new = noise + 128 + levels * np.minimum(1, (np.arange(64) + 1) / max(1, fade))[:, None]
    return np.hstack([own, np.clip(new, 0, 255).astype(np.uint8)])


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_a_line_at_the_border_of_an_outpainted_picture_is_seen(side: str) -> None:
    own = noisy(STAR)
    turned = judging.turned(own, side)
    assert np.array_equal(judging.turned(judging.turned(own, side), side), own) or side == "top"
    for levels, is_within in ((0, True), (6, False), (-6, False), (90, False)):
        line = judging.border_of(extended(turned, levels), 128)
        assert line is not None and (not line.is_seen) is is_within, levels
    faint = judging.border_of(extended(turned, 0.4), 128)
    assert faint is not None and not faint.is_seen
    soft = judging.border_of(extended(turned, 12, fade=4), 128)
    assert soft is not None and soft.is_seen, "an edge over four columns"


def test_a_thing_that_is_cut_off_at_the_border_is_a_line_and_one_that_goes_on_is_none() -> None:
    across = replace(STAR, x=1.0)
    own = noisy(across)
    grown = np.hstack([own, own[:, :63:-1]])
    line = judging.border_of(grown, 128)
    assert line is not None and not line.is_seen, "rows with a thing at the border do not count"
    empty = noisy()
    cut = judging.border_of(np.hstack([empty, own[:, :63:-1]]), 128)
    assert cut is not None and cut.is_seen
    assert judging.border_of(np.full((128, 192, 3), 9, np.uint8), 128) is not None


def test_a_line_below_one_level_is_not_seen_where_the_ground_is_flatter_than_that() -> None:
    own = picture(STAR, ground="gray")
    new = np.full((128, 64, 3), own[0, 0], np.uint8)
    new[::2] += 1
    line = judging.border_of(np.hstack([own, new]), 128)
    assert line is not None and line.step == 0.5 and not line.is_within and not line.is_seen


def test_a_seam_between_windows_is_seen() -> None:
    borders = [128, 256, 384]
    whole = noisy(STAR, size=512)
    smooth = judging.seams_of(whole, borders)
    assert smooth is not None and smooth.step < 1.2 * smooth.usual
    stepped = whole.copy()
    stepped[:, 256:] += 5
    seam = judging.seams_of(stepped, borders)
    assert seam is not None and seam.is_seen
    elsewhere = whole.copy()
    elsewhere[:, 300:] += 5
    line = judging.seams_of(elsewhere, borders)
    assert line is not None and not line.is_seen, "a step that the picture has elsewhere"


def test_cases_are_the_same_for_the_same_number_and_say_what_they_are() -> None:
    for number in NUMBERS:
        one = cases.move(number)
        assert one == cases.move(number) and one.moved != one.caption
        stated = {s.kind: s.value for s in parse(one.caption)}
        after = {s.kind: s.value for s in parse(one.moved)}
        assert stated.pop("position") == one.place
        assert after.pop("position") == cases.MIRRORED[one.place] and stated == after
    assert len({cases.move(number).caption for number in NUMBERS}) > 50
    assert {cases.move(number).place for number in NUMBERS} == set(POSITIONS) - {"center"}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_mask_frees_the_half_and_the_box_that_the_captions_speak_of(number: int) -> None:
    one = cases.addition(number)
    mask = np.asarray(one.mask) > 0
    assert mask.mean() == 0.5
    y, x = (round(128 * part) for part in reversed(POSITIONS[one.side]))
    assert mask[y, x] and not mask[127 - y, 127 - x]
    kinds = [s.kind for s in parse(one.both)]
    assert kinds.count("shape") == 2 and kinds.count("relation") == 1
    again = cases.recolouring(number)
    before, after = parse(again.caption), parse(again.recoloured)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [(a.kind, a.subject) for a, _ in changed] == [("colour", again.subject)]


def test_the_box_of_a_recolouring_holds_the_thing_and_not_the_other() -> None:
    for number in NUMBERS:
        one = cases.recolouring(number)
        rng = random.Random(f"recolour/{number}")
        pair = cases.sample_scene(rng, "pair")
        both = draw(pair, 128)
        assert all(check(both, parse(one.caption)))
        inside = np.asarray(one.mask) > 0
        things = [np.abs(draw(replace(pair, things=(thing,)), 128).astype(int)
                         - both[0, 0]).max(-1) > 90 for thing in pair.things]  # fmt: skip
        assert not (things[one.subject] & ~inside).any()
        assert not (things[1 - one.subject] & inside).any()


def test_a_border_is_added_on_the_sides_that_the_caption_speaks_of() -> None:
    for number in NUMBERS:
        one, two = cases.extension(number, 1), cases.extension(number, 2)
        places = [s.value for s in parse(one.extended) if s.kind == "position"]
        assert places == [cases.MIRRORED[one.sides[0]]]
        assert sorted(map(int, one.border.split(","))) == [0, 0, 0, 64]
        assert sorted(map(int, two.border.split(","))) == [0, 0, 32, 32]


def test_a_record_goes_on_where_it_ended_and_refuses_other_steps(tmp_path: Path) -> None:
    record = Record.open(tmp_path, "move", 20, {"command": "first", "seconds": 0.0})
    assert record.count("0.6") == 0
    found = [{"holds": np.True_, "step": 0.123456}, {"holds": False, "step": None}]
    record.add("0.6", found, 2.0)
    again = Record.open(tmp_path, "move", 20, {"command": "second", "seconds": 0.0})
    assert again.run == {"command": "second", "seconds": 2.0}
    assert again.count("0.6") == 2 and again.count("0.8") == 0
    assert again.verdicts["0.6"] == {"holds": [True, False], "step": [0.1235, None]}
    with pytest.raises(ValueError, match="--steps must be 20, as .*move.json was drawn, got 12"):
        Record.open(tmp_path, "move", 12, {})
    figures = row("move", "0.6", again.verdicts["0.6"], 128)["figures"]
    assert figures["holds"] == {"true": 1, "of": 2} and figures["step"]["of"] == 1


def test_a_target_that_is_missed_is_called_missed() -> None:
    def told(right: int) -> dict[str, Any]:
        columns = {editing.HOLDS: [True] * right + [False] * (300 - right)}
        return row("move", "0.6", columns, 128)

    text = editing.targets([told(270)])
    assert "| ≥ 90 % | 90.0 % (86.1 to 92.9) of 300 | reached |" in text
    assert "| 89.7 % (85.7 to 92.6) of 300 | **missed** |" in editing.targets([told(269)])
    assert text.count("not measured") == len(editing.TARGETS)
    known = {(one.part, setting) for one in editing.TARGETS for setting in [one.variant]}
    assert known <= {(n, s) for n, e in experiments.EXPERIMENTS.items() for s in e.settings}


def test_guidance_that_is_projected_is_held_to_guidance_that_is_not() -> None:
    def told(name: str, right: int) -> dict[str, Any]:
        return row("guidance", name, {editing.HOLDS: [True] * right + [False] * (10 - right)}, 128)

    for right, verdict in ((8, "**missed**"), (9, "reached")):
        text = editing.targets([told("APG 8", right), told("CFG 4.5", 9)])
        assert f"| ≥ 90.0 % | {10 * right}.0 % (" in text and f"of 10 | {verdict} |" in text


def test_a_page_is_made_of_a_result() -> None:
    columns = {editing.HOLDS: [True, False], "step there": [1.0, 2.0]}
    run: Any = {"command": "c", "date": "2031-02-03T04:05:06Z", "complete": True, "dry_run": False}
    run |= {
        "machine": None,
        "peaks": None,
        "unfinished": [],
        "rows": [row("move", "0.6", columns, 128)],
    }
    run |= {"source": json.loads('{"commit": "c0", "modified": false, "kernels_sha256": ""}')}
    page = pages.page({"kind": editing.KIND, "runs": [run]})
    assert "| 0.6 | 2 | 50.0 % (9.5 to 90.5) of 2 | 1.5 / 1.5 / 1.95 / 2 | 1 |" in page


def study(folder: Path, *arguments: str, steps: int = 2) -> dict[str, dict[str, Any]]:
    """Verdicts by part and setting."""
    assert command(["--out", str(folder), "--steps", str(steps), *arguments]) == 0
    return {file.stem: json.loads(file.read_text())["verdicts"] for file in folder.glob("*.json")}


def test_the_command_edits_pictures_and_goes_on_with_what_is_there(tmp_path: Path) -> None:
    found = study(tmp_path, "--count", "1", "--only", "inpaint,outpaint", "--batch", "2")
    assert {name: set(one) for name, one in found.items()} == {
        name: set(experiments.EXPERIMENTS[name].settings) for name in ("inpaint", "outpaint")
    }
    kept = experiments.OWN_KEPT
    assert all(one[kept] == [True] for part in found.values() for one in part.values())
    drawn = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    again = study(tmp_path, "--count", "2", "--only", "inpaint", "--settings", "0")
    assert again["inpaint"]["0"][kept] == [True] * 2 and again["outpaint"] == found["outpaint"]
    assert len(again["inpaint"]["8"][kept]) == 1
    assert all(file.stat().st_mtime_ns == written for file, written in drawn.items())
    with pytest.raises(ValueError, match="--settings of inpaint must be of 0, 8, got '9'"):
        study(tmp_path, "--only", "inpaint", "--settings", "9")
    with pytest.raises(ValueError, match="--only must be of move, inpaint, .*, got 'zoom'"):
        study(tmp_path, "--only", "zoom")


@pytest.mark.slow
def test_the_command_upscales_and_guides(tmp_path: Path) -> None:
    found = study(tmp_path, "--count", "1", "--only", "move,recolour,upscale,guidance", steps=4)
    assert all(
        len(column) == 1
        for part in found.values()
        for one in part.values()
        for column in one.values()
    )
    assert found["upscale"]["512 px, tiles"]["difference from whole"][0] > 0
    assert experiments.window_borders() == [128, 256, 384]


def test_the_command_takes_a_control_and_refuses_to_go_without(tmp_path: Path) -> None:
    model = Pipeline.from_pretrained("shapes", device="cpu", cache_dir=None).transformer
    save_control(model.new_control(2), tmp_path / "new.safetensors")
    chosen = ("--count", "1", "--only", "control", "--settings", "outline;none;scale 0")
    found = study(tmp_path / "out", *chosen, "--control", str(tmp_path / "new.safetensors"))
    verdicts = found["control"]
    assert verdicts["scale 0"] == {"the base's to the bit": [True]}
    assert verdicts["outline"] == verdicts["none"], "a control that was not trained does nothing"
    with pytest.raises(ValueError, match="--control must be given for control, got none"):
        study(tmp_path, *chosen)
