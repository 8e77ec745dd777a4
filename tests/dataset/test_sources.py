"""Raw samples: where pictures and captions are found, and how missing ones are reported."""

import inspect
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pictures
import pytest
from pictures import write

from pixart import pictures as opening
from pixart.dataset.samples import Item, Rejected, Sample
from pixart.dataset.sources import open_source


def captions(items: list[Item]) -> dict[str, dict[str, str]]:
    return {item.key: dict(item.captions) for item in items if isinstance(item, Sample)}


def rejected(items: list[Item]) -> dict[str, str]:
    return {Path(i.path).name: i.reason for i in items if isinstance(i, Rejected)}


def read(source: Path) -> list[Item]:
    return list(open_source(source))


def test_a_folder_gives_pictures_with_all_the_captions_beside_them(tmp_path: Path) -> None:
    pictures.folder(tmp_path, 1)
    write(tmp_path / "0.long.txt", " A longer caption.\n")
    write(tmp_path / "0.synthetic.2.txt", "another")
    write(tmp_path / "sub" / "my.photo.PNG", pictures.png())
    write(tmp_path / "sub" / "my.photo.txt", "\ufeffa photo")
    found = captions(read(tmp_path))
    assert found == {
        "0.png": {
            "prompt": "caption of picture 0",
            "long": "A longer caption.",
            "synthetic.2": "another",
        },
        "sub/my.photo.PNG": {"prompt": "a photo"},
    }


def test_a_sample_reads_its_picture_and_notices_another_one(tmp_path: Path) -> None:
    (before,) = read(pictures.folder(tmp_path, 1))
    assert isinstance(before, Sample) and before.read() == pictures.png(seed=0)
    write(tmp_path / "0.png", pictures.png(61, seed=1))
    (after,) = read(tmp_path)
    assert isinstance(after, Sample) and after.version != before.version


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    write(tmp_path / "alone.txt", "no picture")
    write(tmp_path / "bare.png", pictures.png())
    write(tmp_path / "blank.png", pictures.png())
    write(tmp_path / "blank.txt", "  \n")
    write(tmp_path / "latin.png", pictures.png())
    write(tmp_path / "latin.txt", b"caf\xe9")
    items = read(tmp_path)
    reasons = rejected(items)
    assert reasons["alone.txt"].startswith("missing file")
    assert "UTF-8" in reasons["latin.png"]
    lacking = {item.key: item.uncaptioned for item in items if isinstance(item, Sample)}
    assert lacking["bare.png"].startswith("missing file: no caption bare.txt")
    assert lacking["blank.png"] == "empty caption"


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "elsewhere", 1)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "s")
    assert list(captions(read(tmp_path / "s"))) == ["link/0.png"]


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept = (opening._formats, opening.readable_suffixes, opening.picture_suffixes)
    monkeypatch.setattr(opening, "find_spec", lambda _: None)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.usefixtures("without_heif")
def test_the_folder_of_a_phone_is_read_or_told(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.jpe", "c.HEIC", "d.cr2", "e.svg", "f.mp4", "._a.jfif", ".DS_Store"):
        write(tmp_path / name, pictures.png())
        write(tmp_path / Path(name).with_suffix(".txt"), "a photo")
    items = read(tmp_path)
    assert sorted(captions(items)) == ["a.jfif", "b.jpe"]
    found = rejected(items)
    assert sorted(found) == ["c.HEIC", "d.cr2", "e.svg", "f.txt"]
    assert "pictures in .heic are not read; pip install pillow-heif or" in found["c.HEIC"]
    assert "pictures in .svg are not read; convert" in found["e.svg"]


def test_an_index_of_macos_is_no_second_one(tmp_path: Path) -> None:
    write(tmp_path / "a.png", pictures.png())
    write(tmp_path / "index.jsonl", '{"path": "a.png", "prompt": "a"}')
    write(tmp_path / "._index.jsonl", b"\0")
    assert captions(read(tmp_path)) == {"a.png": {"prompt": "a"}}


def test_only_files_are_read(tmp_path: Path) -> None:
    """A pipe has no end, or no beginning: to read one would hang."""
    for name in ("a.png", "b.txt"):
        os.mkfifo(tmp_path / name)
    for name in ("a.txt", "c.txt", "d.txt", "e.txt"):
        write(tmp_path / name, "text")
    write(tmp_path / "b.png", pictures.png())
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to("d.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "e.png"))  # its name must be short
    items = read(tmp_path)
    assert not captions(items)
    found = rejected(items)
    for name in ("a.png", "c.png", "e.png"):
        assert found[name] == "missing file: it is a folder, a pipe or a device"
    assert found["b.png"].startswith("unreadable caption") and "a pipe" in found["b.png"]
    assert found["d.png"].startswith("unreadable file: Too many levels")


def test_files_and_reasons_beyond_all_measure_are_cut_short(tmp_path: Path) -> None:
    pictures.folder(tmp_path, 1)
    write(tmp_path / "0.txt", b"a" * (2**20 + 1))
    assert rejected(read(tmp_path))["0.png"].endswith(
        "must be at most 1,048,576 bytes, got 1,048,577"
    )
    assert len(Rejected("a", "b" * 10**6).reason) < 1100
    (tmp_path / "0.txt").write_text("a")
    with (tmp_path / "0.png").open("r+b") as file:
        file.truncate(2**31)  # of which the disk stores nothing
    assert rejected(read(tmp_path))["0.png"].startswith("must be at most 1,073,741,824 bytes")


def test_folders_may_lie_deeper_than_functions_may_call(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "/".join("d" * 200), 1)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        items = read(tmp_path)
    finally:
        sys.setrecursionlimit(before)
    assert [item.key for item in items if isinstance(item, Sample)] == ["d/" * 200 + "0.png"]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_text_that_utf8_cannot_write_costs_its_sample(tmp_path: Path, kind: str) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.png", pictures.png())
    lines = [
        '{"path": "a.png", "prompt": "a face \\ud83d"}',
        '{"path": "b.png", "captions": {"\\udc00": "b"}}',
        '{"path": "\\udfff.png", "prompt": "no"}',
        '{"path": "c.png", "prompt": "c \\ud83d\\ude00"}',
    ]
    content = "\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]"
    items = read(write(tmp_path / f"index.{kind}", content))
    assert captions(items) == {"c.png": {"prompt": "c 😀"}}
    found = rejected(items)
    assert sorted(found) == ["\\udfff.png", "a.png", "b.png"]
    assert "caption prompt must be UTF-8" in found["a.png"]
    json.dumps(found, ensure_ascii=False).encode()


def test_bytes_that_are_no_utf8_cost_their_line(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.png", pictures.png())
    lines = b'{"path": "a.png", "prompt": "caf\xe9"}\n{"path": "b.png", "prompt": "b"}\n'
    items = read(write(tmp_path / "index.jsonl", lines))
    assert captions(items) == {"b.png": {"prompt": "b"}}
    assert rejected(items)["a.png"].startswith("caption prompt must be UTF-8")


def test_a_file_name_that_is_no_utf8_costs_its_sample(tmp_path: Path) -> None:
    pictures.folder(tmp_path, 1)
    for suffix, content in ((b".png", pictures.png()), (b".txt", b"a dog")):
        (tmp_path / os.fsdecode(b"caf\xe9" + suffix)).write_bytes(content)
    items = read(tmp_path)
    assert list(captions(items)) == ["0.png"]
    assert rejected(items) == {"caf\\xe9.png": r"file name must be UTF-8 text, got 'caf\udce9.png'"}


def test_a_deep_line_costs_itself(tmp_path: Path) -> None:
    write(tmp_path / "a.png", pictures.png())
    deep = '{"path": "a.png", "prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    lines = deep + '\n{"path": "a.png", "prompt": "a"}\n'
    items = read(write(tmp_path / "index.jsonl", lines))
    assert captions(items) == {"a.png": {"prompt": "a"}}
    assert rejected(items)["index.jsonl:1"].startswith("must be nested at most")


OBJECTS = [
    {"path": "a.png", "prompt": "raw", "sharegpt4v": "long", "width": 80, "height": 60},
    {"file_name": "b.png", "text": "raw b", "captions": {"synthetic": ["one", "", "three"]}},
    {"image": "a.png", "caption": "", "sharegpt4v": ""},
    {"path": "gone.png", "prompt": "x"},
    {"path": "zero\0.png", "prompt": "x"},
    {"prompt": "no path"},
    {"path": "b.png", "prompt": 5},
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_an_index_gives_its_objects(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.png", pictures.png())
    lines = "\n".join(map(json.dumps, OBJECTS)) + "\n\nnot json\n"
    index = write(tmp_path / f"index.{kind}", OBJECTS if kind == "json" else lines)
    for source in (index, tmp_path):  # a folder with one index is that index
        items = read(source)
        samples = [item for item in items if isinstance(item, Sample)]
        assert [(s.key, dict(s.captions)) for s in samples] == [
            ("a.png", {"prompt": "raw", "sharegpt4v": "long"}),
            ("b.png", {"prompt": "raw b", "synthetic.1": "one", "synthetic.3": "three"}),
            ("a.png", {}),
        ]
        reasons = rejected(items)
        assert reasons["gone.png"] == "missing file"
        assert reasons["b.png"] == "caption prompt must be text, got 5"
        assert any("must have a path" in reason for reason in reasons.values())
        if kind == "jsonl":
            assert reasons["index.jsonl:9"] == "must be a JSON object"


def test_a_mapping_from_paths_to_captions_is_an_index_too(tmp_path: Path) -> None:
    write(tmp_path / "a.png", pictures.png())
    write(tmp_path / "captions.json", {"a.png": "a picture"})
    assert captions(read(tmp_path)) == {"a.png": {"prompt": "a picture"}}


@pytest.mark.parametrize("place", ["", "InternData", "InternData/data_info.json"])
def test_the_official_layout_is_read_as_it_is(tmp_path: Path, place: str) -> None:
    """Its paths are relative to InternImgs, beside the InternData that holds the index."""
    write(tmp_path / "InternImgs" / "x" / "0.png", pictures.png())
    objects = [
        {"path": "x/0.png", "width": 80, "height": 60, "ratio": 0.75, "prompt": "raw",
         "sharegpt4v": ""},
    ]  # fmt: skip
    write(tmp_path / "InternData" / "data_info.json", objects)
    (sample,) = read(tmp_path / place)
    assert isinstance(sample, Sample) and dict(sample.captions) == {"prompt": "raw"}
    assert sample.read() == pictures.png()


def test_metadata_beside_a_picture_is_no_index(tmp_path: Path) -> None:
    pictures.folder(tmp_path, 1)
    write(tmp_path / "0.json", {"url": "somewhere"})
    assert captions(read(tmp_path)) == {"0.png": {"prompt": "caption of picture 0"}}


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [])
    write(tmp_path / "b.jsonl", "")
    with pytest.raises(ValueError, match=r"one index at most, got a.json, b.jsonl"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="source must be a folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not JSON"):
        read(write(tmp_path / "bad.json", "{"))
    with pytest.raises(ValueError, match="list of objects, got int"):
        read(write(tmp_path / "bad.json", "5"))
