"""Which picture belongs to which prompt, in folders as people have them; and files of prompts."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from shapes_pictures import write_lines

from pixart.evaluation.prompt_sets.files import as_lines, read_prompts, write_prompts
from pixart.evaluation.store.entries import Prompt
from pixart.evaluation.store.folders import (
    Found,
    MissingPictures,
    find_pictures,
    reference_pictures,
)

PROMPTS = [Prompt("00002", "two"), Prompt("00001", "one"), Prompt("cat_1", "a cat")]


def _picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def _keys(found: Found) -> list[str]:
    return [entry.key for entry in found.entries]


@pytest.mark.parametrize(
    "names",
    [
        ["00001/0000.png", "00001/0001.png", "00002/0000.png", "00002/0001.png"],
        ["00001/samples/00000.png", "00001/samples/00001.png", "00002/samples/00000.jpg"],
        ["00001.png", "00001_1.png", "00002_0.png", "00002_1.webp"],
        ["00001_0.png", "00001_0001.png", "00002.png"],
    ],
)
def test_pictures_are_found_in_every_layout(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        _picture(tmp_path / name)
    found = find_pictures(tmp_path, PROMPTS[:2])
    assert found.samples == 2 and not found.extra
    assert _keys(found) == ["00001/0000", "00001/0001", "00002/0000", "00002/0001"]
    there = {entry.path for entry in found.entries if entry.key not in found.missing}
    assert there == {tmp_path / name for name in names}
    assert len(found.missing) == 4 - len(names)


def test_an_id_that_ends_like_a_number_is_not_cut(tmp_path: Path) -> None:
    for name in ("cat_1.png", "cat_1_1.png"):
        _picture(tmp_path / name)
    found = find_pictures(tmp_path, PROMPTS[2:])
    assert _keys(found) == ["cat_1/0000", "cat_1/0001"] and not found.missing


def test_what_is_missing_is_named_and_what_is_over_too(tmp_path: Path) -> None:
    _picture(tmp_path / "00001.png")
    _picture(tmp_path / "holiday.jpg")
    _picture(tmp_path / ".hidden" / "00002.png")
    found = find_pictures(tmp_path, PROMPTS)
    assert found.missing == {"00002/0000", "cat_1/0000"} and found.extra == ("holiday.jpg",)
    complaint = found.complaint(tmp_path)
    assert "2 of 3 pictures are missing (00002/0000, cat_1/0000)" in complaint


def test_more_samples_than_are_asked_for_are_left_aside(tmp_path: Path) -> None:
    for name in ("00001/0000.png", "00001/0001.png"):
        _picture(tmp_path / name)
    found = find_pictures(tmp_path, PROMPTS[1:2], samples=1)
    assert _keys(found) == ["00001/0000"] and found.extra == ("00001/0001.png",)


@pytest.mark.parametrize("samples", [0, -1, 10_001, 10**9])
def test_absurd_numbers_of_samples_are_refused_at_once(tmp_path: Path, samples: int) -> None:
    _picture(tmp_path / "00001.png")
    with pytest.raises(ValueError, match="--samples must be from 1 to 10,000, got"):
        find_pictures(tmp_path, PROMPTS, samples)


def test_one_odd_file_makes_no_millions_of_missing_pictures(tmp_path: Path) -> None:
    _picture(tmp_path / "00001_9999.png")
    prompts = [Prompt(f"{number:05d}", "one") for number in range(1_500)]
    with pytest.raises(ValueError, match="1,500 prompts with 10,000 each .as 00001_9999.png of"):
        find_pictures(tmp_path, prompts)


def test_samples_of_pictures_that_say_their_prompts_can_be_asked_for(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("pixart", json.dumps({"request": {"prompt": "a cat"}}))
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png", pnginfo=info)
    assert find_pictures(tmp_path, None, 2).extra == ("2.png",)
    assert len(find_pictures(tmp_path, None, 4).missing) == 1


def test_two_files_of_one_picture_are_refused(tmp_path: Path) -> None:
    for name in ("00001.png", "00001_0.png"):
        _picture(tmp_path / name)
    with pytest.raises(ValueError, match=r"is there twice, as 00001\.png and 00001_0\.png"):
        find_pictures(tmp_path, PROMPTS)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder of pictures"):
        find_pictures(tmp_path / "absent", PROMPTS)
    with pytest.raises(ValueError, match="must hold pictures, it holds none"):
        find_pictures(tmp_path, PROMPTS)
    _picture(tmp_path / "holiday.png")
    with pytest.raises(ValueError, match=r"no picture is named by an id .* 00002/0000\.png"):
        find_pictures(tmp_path, PROMPTS)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    _picture(tmp_path / "elsewhere" / "0000.png")
    images = tmp_path / "images"
    images.mkdir()
    (images / "00001").symlink_to(tmp_path / "elsewhere")
    (images / "again").symlink_to(images)
    found = find_pictures(images, PROMPTS[1:2])
    assert _keys(found) == ["00001/0000"] and not found.extra and not found.missing


def test_a_reference_set_is_every_picture_below_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a/x.jpg", "a/x.png"):
        _picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert _keys(reference_pictures(tmp_path)) == ["a/x.jpg/0000", "a/x.png/0000", "b.png/0000"]
    assert _keys(reference_pictures(tmp_path, ["b.png", "b.png"])) == ["b.png/0000"]
    with pytest.raises(MissingPictures, match=r"1 of 2 reference pictures are missing \(c\.png\)"):
        reference_pictures(tmp_path, ["b.png", "c.png"])


def test_pictures_that_we_drew_say_their_prompts(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    for name, prompt in (("x-0", "a star"), ("x-1", "a star"), ("y", "a circle")):
        info = PngInfo()
        info.add_itxt("pixart", json.dumps({"version": 6, "request": {"prompt": prompt}}))
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=info)
    found = find_pictures(tmp_path, None)
    assert [(one.id, one.prompt) for one in found.prompts] == [("x-0", "a star"), ("y", "a circle")]
    assert _keys(found) == ["x-0/0000", "x-0/0001", "y/0000", "y/0001"]
    assert found.missing == {"y/0001"}
    _picture(tmp_path / "z.png")
    with pytest.raises(ValueError, match=r"z\.png: holds no prompt, .* give --prompts FILE"):
        find_pictures(tmp_path, None, unread=True)  # some say one: then all must


def test_pictures_of_other_tools_need_no_prompts_where_nobody_reads_them(tmp_path: Path) -> None:
    for name in ("cat.png", "dog (2).jpg", "more/cat.png"):
        _picture(tmp_path / name)
    found = find_pictures(tmp_path, None, unread=True)
    assert _keys(found) == ["cat/0000", "dog (2)/0000", "more-cat/0000"] and not found.missing
    assert {one.prompt for one in found.prompts} == {""}
    with pytest.raises(ValueError, match=r'cat\.png: holds no prompt, .*"id": "cat"'):
        find_pictures(tmp_path, None)
    _picture(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="differ in more than their suffix"):
        find_pictures(tmp_path, None, unread=True)


def test_the_refusal_of_names_says_how_lines_are_counted(tmp_path: Path) -> None:
    _picture(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"lines of a \.txt are 00000, 00001 .* it has 0\.png"):
        find_pictures(tmp_path, PROMPTS)


def test_prompts_are_read_as_they_were_written(tmp_path: Path) -> None:
    prompts = [
        Prompt("a", "x\n“y”", "coco", "pair", "val/1.jpg", {"q": [1, 2.5]}, "64x32"),
        Prompt("b", ""),
    ]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    assert (tmp_path / "p.jsonl").read_bytes() == as_lines(prompts)


def test_lines_of_text_are_prompts_too(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa star\n\n# no\n a circle \n", encoding="utf-8")
    read = read_prompts(tmp_path / "p.txt")
    assert read == [Prompt("00000", "a star"), Prompt("00001", "a circle")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"id": "../x", "prompt": "p"}, "id must be a word for a folder's name"),
        ({"id": "a/b", "prompt": "p"}, "id must be a word for a folder's name"),
        ({"id": "", "prompt": "p"}, "id must be a word for a folder's name"),
        ({"id": "x" * 300, "prompt": "p"}, "of at most 200 bytes"),
        ({"id": "a\x00b", "prompt": "p"}, "id must be a word for a folder's name"),
        ({"id": "a"}, "must have prompt, it has id"),
        ({"id": "a", "prompt": 3}, "prompt must be text, got 3"),
        ({"id": "a", "prompt": "p", "meta": {"x": float("nan")}}, "finite numbers"),
        ({"id": "a", "prompt": "p", "size": "64"}, "size must be WIDTHxHEIGHT"),
        ({"id": "a", "prompt": "p", "size": "0x64"}, "size must be WIDTHxHEIGHT"),
        ({"id": "a", "prompt": "p", "reference": "/etc/passwd"}, "below the reference folder"),
        ({"id": "a", "prompt": "p", "reference": "../x.png"}, "below the reference folder"),
        ({"id": "a", "prompt": "p", "seed": 1}, "knows id, prompt, .* got 'seed'"),
        ({"id": "a", "prompt": "x" * 2**21}, "must be at most 1,048,576 bytes"),
        ([1], "must be a JSON object, got a list"),
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path: Path, line: Any, reason: str) -> None:
    write_lines(tmp_path / "p.jsonl", [{"id": "fine", "prompt": "p"}, line])
    with pytest.raises(ValueError, match=rf"p\.jsonl line 2: .*{reason}") as raised:
        read_prompts(tmp_path / "p.jsonl")
    assert len(str(raised.value)) < 2_100 and "\n" not in str(raised.value)


def test_an_id_is_there_once(tmp_path: Path) -> None:
    """Also where a disk does not tell A from a."""
    write_lines(tmp_path / "p.jsonl", [{"id": "A", "prompt": "p"}, {"id": "a", "prompt": "q"}])
    with pytest.raises(ValueError, match="ids must be unique, prompts 1 and 2 both have 'a'"):
        read_prompts(tmp_path / "p.jsonl")


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="must hold prompts, it holds none"):
        read_prompts(tmp_path / "p.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="must be a file, got a folder, a pipe or a device"):
        read_prompts(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "absent.jsonl")
