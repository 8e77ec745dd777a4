"""Cleaning what nobody foresaw: pictures named twice, films, numbers past all bounds, other versions."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import write
from PIL import Image, ImageDraw
from scenery import cut, scenery

from pixart import data
from pixart.dataset.duplicates import find_groups, represented, same, thumbnail
from pixart.dataset.expression import parse_rules
from pixart.dataset.funnel import kept
from pixart.dataset.samples import Sample


@pytest.fixture
def pictures_of(tmp_path: Path) -> Path:
    """Three pictures that differ."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        scenery(n, 96, 96).save(folder / f"{n}.png")
    return folder


def run(*arguments: object) -> int:
    return data.main([str(argument) for argument in arguments])


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_picture_that_an_index_names_twice_is_measured_once(
    pictures_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = [{"path": "pictures/0.png", "prompt": "a"}] * 2
    write(tmp_path / "index.json", json.dumps(index))
    output = tmp_path / "clean.jsonl"
    assert run("clean", tmp_path / "index.json", "--output", output, "--keep", "width > 500") == 0
    assert "1 pictures measured, 1 before, 0 rejected, 1 duplicates" in capsys.readouterr().out


def test_scores_past_all_bounds_are_told_of(
    pictures_of: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(
        tmp_path / "scorers_of_hostile_clean.py",
        "def far(image):\n    return 1e308 if image.getpixel((0, 0))[0] > 150 else -1e308\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "clean.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = ("--scorer", "scorers_of_hostile_clean:far")
        assert run("clean", pictures_of, "--output", output, *asked) == 0
    assert "| far | 3 | -1e+308 |" in (tmp_path / "clean" / "README.md").read_text()


@pytest.mark.parametrize("name", ["True", "if", "lambda", "\ufb01"])
def test_a_scorer_whose_name_no_rule_can_ask_for_is_refused(
    name: str, pictures_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--output", tmp_path / "clean.jsonl", "--scorer", f"{name}=math:floor")
    assert run("clean", pictures_of, *asked) == 2
    assert "is no name" in capsys.readouterr().err


def test_lines_of_another_version_are_measured_again(
    pictures_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clean.jsonl"
    assert run("clean", pictures_of, "--output", output) == 0
    before = output.read_bytes()
    file = tmp_path / "clean" / "measured.jsonl"
    lines = lines_of(file)
    del lines[0]["width"]
    lines[1]["at"], lines[2]["phash"] = -1, 5
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert run("clean", pictures_of, "--output", output) == 0
    assert "3 pictures measured, 0 rejected" in capsys.readouterr().out
    assert output.read_bytes() == before


def test_thumbnails_that_were_lost_are_never_taken_for_those_of_others(
    pictures_of: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The place of one that was lost is given to a new picture: its old line must not come back."""
    output, folder = tmp_path / "clean.jsonl", tmp_path / "clean"
    assert run("clean", pictures_of, "--output", output) == 0
    (folder / "thumbnails.u8").unlink()
    one = tmp_path / "one"
    one.mkdir()
    scenery(7, 96, 96).save(one / "other.png")
    for source in (one, pictures_of):
        capsys.readouterr()
        assert run("clean", source, "--output", output) == 0
    assert "3 pictures measured, 0 rejected, 0 duplicates" in capsys.readouterr().out


def test_a_folder_with_nothing_but_a_lock_is_free(pictures_of: Path, tmp_path: Path) -> None:
    write(tmp_path / "clean" / ".lock", "")
    assert run("clean", pictures_of, "--output", tmp_path / "clean.jsonl") == 0


def test_what_is_a_duplicate_shows_the_same_as_the_picture_that_it_is_one_of() -> None:
    """A film that turns: each picture is like the next, and the first is unlike the last."""
    whole = scenery(3, 400, 300)
    film = [whole.crop((3 * n, 0, 3 * n + 300, 300)) for n in range(20)]
    table = np.stack([thumbnail(image) for image in film])
    groups = find_groups(table)
    assert set(groups) == {0} and not same(table[:1], table[-1:])[0]
    order = np.arange(20)[::-1]
    found = represented(table, groups, order)
    copies = np.flatnonzero(found != np.arange(20))
    assert found[19] == 19 and 0 < len(copies) < 19
    assert same(table[copies], table[found[copies]]).all()
    assert set(found[copies]) <= set(range(20)) - set(copies)
    kept_ones = sorted(set(found))
    ones, others = np.triu_indices(len(kept_ones), 1)
    assert not same(table[np.array(kept_ones)[ones]], table[np.array(kept_ones)[others]]).any()


def test_drawings_that_are_cropped_at_all_sides_are_found() -> None:
    """Their colours change at edges, which a crop moves."""
    images = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        image = Image.new("RGB", (256, 256), tuple(rng.integers(0, 255, 3).tolist()))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y, wide = rng.integers(0, 256), rng.integers(0, 256), rng.integers(10, 90)
            draw.ellipse((x, y, x + wide, y + wide), tuple(rng.integers(0, 255, 3).tolist()))
        images.append(image)
    images += [cut(image, 0.02, 0.02, 0.02, 0.02) for image in images]
    found = find_groups(np.stack([thumbnail(image) for image in images]))
    assert found.tolist() == [*range(12), *range(12)]


def test_a_thing_of_another_colour_is_another_picture() -> None:
    images = []
    for colour in ("#c04040", "#40a040", "#4060c0", "#b07020"):
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).rectangle((40, 50, 70, 80), colour)
        images.append(image)
    table = np.stack([thumbnail(image) for image in images])
    assert find_groups(table).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("expression", ["width > 0x" + "F" * 4000, "width > \udcff"])
def test_expressions_that_python_itself_cannot_write_are_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="--keep") as caught:
        parse_rules(expression)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_what_is_no_number_was_not_measured(number: str, tmp_path: Path) -> None:
    """Not less than 5, NaN would else be kept by `not score < 5`."""
    lines = '{"path": "a", "score": 6}\n{"path": "b", "score": ' + number + "}\n"
    file = write(tmp_path / "clean.jsonl", lines)
    items = [Sample(key, key, "", bytes, {"prompt": "x"}) for key in "ab"]
    left = list(kept(items, "not score < 5", file))
    assert left[0] is items[0]
    assert getattr(left[1], "reason", "") == "no score was measured, for not score < 5"


def test_a_measurement_that_is_a_number_here_and_a_text_there_is_refused(tmp_path: Path) -> None:
    lines = [{"path": "a", "score": 6}, {"path": "b", "score": "high"}]
    file = write(tmp_path / "clean.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="score must be a number, as of the pictures before, got"):
        kept([], "score > 5", file)


def test_a_pipe_is_no_file_of_measurements(tmp_path: Path) -> None:
    """`--measurements <(zcat clean.jsonl.gz)` gives its lines once: the second reading would find none of them."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for place in (tmp_path / "pipe.jsonl", tmp_path):
        with pytest.raises(ValueError, match="must be a file, got a folder, a pipe or a device"):
            kept([], "width > 1", place)
