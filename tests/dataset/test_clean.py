"""Cleaning: planted faults are counted exactly, row by row, and nothing of a picture breaks it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from pictures import encoded, write
from PIL import Image, ImageFilter
from scenery import cut, scenery

from pixart import data
from pixart.dataset import cleaning
from pixart.dataset.funnel import kept
from pixart.dataset.samples import Rejected, Sample
from pixart.dataset.sources import open_source

KEEP = "min(width, height) >= 96 and words >= 2 and sharpness >= 20 and nsfw < .5 and not duplicate"


def put(folder: Path, name: str, image: Image.Image, caption: str | None, **saved: Any) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **saved)
    if caption is not None:
        write(file.with_suffix(".txt"), caption)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """10 good pictures, and of each fault as many as the funnel must say."""
    root = tmp_path / "source"
    for n in range(10):
        put(root, f"good/{n}.png", scenery(n), "two words")
    put(root, "again/resized.png", scenery(0).resize((160, 120)), "a small one")
    put(root, "again/saved.jpg", scenery(1), "a saved one", quality=40)
    for n, sides in enumerate([(0.02, 0.02, 0, 0), (0, 0, 0.02, 0.02), (0.02,) * 4], 2):
        put(root, f"again/cut{n}.png", cut(scenery(n), *sides), "cut at its sides")
    put(root, "blurred/a.png", scenery(20).filter(ImageFilter.GaussianBlur(4)), "all a blur")
    put(root, "blurred/b.png", scenery(21).filter(ImageFilter.GaussianBlur(6)), "all a blur")
    for n in range(3):
        put(root, f"tiny/{n}.png", scenery(30 + n, 95, 200), "a tiny one")
    put(root, "bare/none.png", scenery(40), None)
    put(root, "bare/spaces.png", scenery(41), "  \n\t ")
    put(root, "bare/one.png", scenery(42), "word")
    for n in range(2):
        put(root, f"nsfw/{n}.png", Image.merge("RGB", [*scenery(50 + n).split()[:2], red()]), "a b")
    write(root / "broken" / "cut off.png", pictures.corrupt_png())
    write(root / "broken" / "empty.jpg", b"")
    write(root / "no picture.txt", "a caption alone")
    write(
        tmp_path / "judges_of_clean.py",
        "def nsfw(image):\n    return image.getpixel((5, 5))[2] == 255\n"
        "def agrees(image, caption):\n    return len(caption)\n"
        "def fails(image):\n    return {}['x']\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    return root


def red() -> Image.Image:
    """A channel that is full everywhere."""
    return Image.new("L", (256, 192), 255)


def run(*arguments: object) -> int:
    return data.main([str(argument) for argument in arguments])


def lines_of(file: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["path"]: line for line in lines}


def rows(printed: str) -> list[tuple[str, int, int, int]]:
    """(rule, in, out, left) of a funnel."""
    found = re.findall(r"^\| (.+?) +\| +([\d,]+) \| +([\d,]+) \| +([\d,]+) \|", printed, re.M)
    return [(rule, *(int(n.replace(",", "")) for n in counts)) for rule, *counts in found]  # type: ignore[misc]


def test_planted_faults_are_counted_exactly(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clean.jsonl"
    command = ("clean", source, "--output", output, "--scorer", "judges_of_clean:nsfw")
    assert run(*command, "--keep", KEEP) == 0
    said = capsys.readouterr().out
    assert rows(said) == [
        ("can be read", 28, 3, 25),
        ("min(width, height) >= 96", 25, 3, 22),
        ("words >= 2", 22, 3, 19),
        ("sharpness >= 20", 19, 2, 17),
        ("nsfw < 0.5", 17, 2, 15),
        ("not duplicate", 15, 5, 10),
    ]
    assert "25 pictures measured, 3 rejected, 5 duplicates" in said
    lines = lines_of(output)
    assert {p for p, line in lines.items() if line.get("duplicate")} == {
        "again/resized.png", "again/saved.jpg", "again/cut2.png", "again/cut3.png", "again/cut4.png",
    }  # fmt: skip
    assert lines["again/cut3.png"]["duplicate_of"] == "good/3.png"
    assert lines["again/saved.jpg"]["jpeg_quality"] == 40 and lines["good/0.png"]["format"] == "PNG"
    broken = {
        Path(path).name: line["unreadable"] for path, line in lines.items() if "unreadable" in line
    }
    assert "image" in broken["cut off.png"] and "no picture format" in broken["empty.jpg"]
    assert broken["no picture.txt"] == "missing file: no picture for this caption"
    folder = tmp_path / "clean"
    page = (folder / "README.md").read_text()
    assert rows(page)[:6] == rows(said) and "| sharpness |" in page
    sheets = sorted(file.name for file in folder.glob("*.jpg"))
    assert sheets == ["rejects-1-height-width.jpg", "rejects-2-words.jpg", "rejects-3-sharpness.jpg",
                      "rejects-4-nsfw.jpg", "rejects-5-duplicate.jpg"]  # fmt: skip
    assert all(name in page for name in sheets)

    # Another threshold needs no second pass; what is gone or new is seen; prepare keeps the same.
    (source / "good" / "9.png").unlink()
    put(source, "good/10.png", scenery(60), "two words")
    assert run(*command, "--keep", "width > 200") == 0
    assert "1 pictures measured, 24 before, 4 rejected" in capsys.readouterr().out
    assert [file.name for file in folder.glob("*.jpg")] == ["rejects-1-width.jpg"]


def test_prepare_keeps_what_the_funnel_keeps(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "clean.jsonl"
    assert run("clean", source, "--output", output, "--scorer", "judges_of_clean:nsfw") == 0
    put(source, "good/new.png", scenery(70), "came later")
    items = list(kept(open_source(source), KEEP, output))
    good = {item.key for item in items if isinstance(item, Sample)}
    assert good == {f"good/{n}.png" for n in range(10)}
    reasons = {Path(item.path).name: item.reason for item in items if isinstance(item, Rejected)}
    assert reasons["resized.png"] == "not duplicate does not hold"
    assert reasons["a.png"] == "sharpness >= 20 does not hold"
    assert reasons["new.png"] == "no measurements in clean.jsonl; run `pixart data clean` again"
    # What cannot be read keeps the reason that it was measured to have.
    lines = lines_of(output)
    assert reasons["empty.jpg"] == lines["broken/empty.jpg"]["unreadable"]
    assert reasons["cut off.png"] == lines["broken/cut off.png"]["unreadable"]


def test_prepare_and_verify_take_an_expression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the embedded model's own VAE and text encoder."""
    source = pictures.folder(tmp_path / "source", 2)
    pictures.folder(source / "small", 1, width=70)
    output, out = tmp_path / "clean.jsonl", tmp_path / "out"
    assert run("clean", source, "--output", output) == 0
    prepare = ("prepare", source, out, "--resolution", 64, "--device", "cpu")
    assert run(*prepare, "--keep", "width >= 75", "--measurements", output) == 0
    assert "2 samples prepared, 1 rejected" in capsys.readouterr().out
    shard = next((out / "features").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    assert run("verify", out) == 0
    assert "1 made again" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    scorer = ("--scorer", "judges_of_clean:nsfw")
    assert run("clean", source, "--output", whole, *scorer) == 0
    add, calls = cleaning.Measured.add, [0]

    def stops(self: Any, *values: Any) -> None:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        add(self, *values)

    monkeypatch.setattr(cleaning.Measured, "add", stops)
    assert run("clean", source, "--output", parts, *scorer) == 130
    assert not parts.exists()
    # What a machine that lost its power leaves: half a line, half a thumbnail.
    for name in ("measured.jsonl", "thumbnails.u8"):
        with (tmp_path / "parts" / name).open("ab") as file:
            file.write(b'{"id": 1')
    assert run("clean", source, "--output", parts, *scorer) == 0
    assert calls[0] == 9 + 25 - 8 and parts.read_bytes() == whole.read_bytes()
    assert run("clean", source, "--output", parts, *scorer) == 0 and calls[0] == 34 - 8
    assert (tmp_path / "parts" / "README.md").read_bytes() == (
        tmp_path / "whole" / "README.md"
    ).read_bytes()


def test_a_further_scorer_scores_what_is_measured_and_gets_the_caption(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clean.jsonl"
    assert run("clean", source, "--output", output) == 0
    scorers = ("--scorer", "judges_of_clean:agrees", "--scorer", "bad=judges_of_clean:fails")
    assert run("clean", source, "--output", output, *scorers) == 0
    assert "25 could not be scored" in capsys.readouterr().out
    lines = lines_of(output)
    assert (
        lines["good/0.png"]["agrees"] == len("two words") and lines["bare/none.png"]["agrees"] == 0
    )
    assert lines["good/0.png"]["bad"] is None
    assert "bad raises KeyError: 'x'" in (tmp_path / "clean" / "README.md").read_text()
    # What was not measured is not kept, and said.
    assert run("clean", source, "--output", output, *scorers, "--keep", "bad < 1 or width > 1") == 0
    said = capsys.readouterr().out
    assert rows(said)[1] == ("bad < 1 or width > 1", 25, 25, 0)


def test_scores_of_earlier_runs_stay_and_can_be_kept_by(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clean.jsonl"
    clean = ("clean", source, "--output", output)
    assert run(*clean, "--scorer", "judges_of_clean:nsfw") == 0
    assert "25 pictures measured, 3 rejected" in capsys.readouterr().out
    assert run(*clean, "--scorer", "judges_of_clean:agrees") == 0
    assert (
        "0 pictures measured, 25 before (25 given to scorers now), 3 rejected"
        in capsys.readouterr().out
    )
    both = lines_of(output)["nsfw/0.png"]
    assert both["nsfw"] == 1 and both["agrees"] == len("a b")
    assert run(*clean) == 0 and lines_of(output)["nsfw/0.png"] == both
    capsys.readouterr()
    assert run(*clean, "--keep", "nsfw < .5 and agrees > 3") == 0
    assert rows(capsys.readouterr().out)[1] == ("nsfw < 0.5", 25, 2, 23)
    # What was scored before its caption changed is no score of this source.
    bare = tmp_path / "bare.jsonl"
    one = tmp_path / "one"
    put(one, "scored.png", scenery(90), "a picture")
    alone = ("clean", one, "--output", bare)
    assert run(*alone, "--scorer", "judges_of_clean:nsfw") == 0
    (one / "scored.txt").write_text("another caption")
    assert run(*alone, "--keep", "nsfw < .5") == 2
    assert "there is no nsfw" in capsys.readouterr().err
    # A name of which one part is by another function says nothing.
    measured = tmp_path / "clean" / "measured.jsonl"
    *before, last = measured.read_text().splitlines()
    measured.write_text("\n".join([*before, last.replace("clean:nsfw", "clean:other")]) + "\n")
    written = output.read_bytes()
    assert run(*clean) == 2 and output.read_bytes() == written
    assert "nsfw must be by one function" in capsys.readouterr().err
    assert run(*clean, "--scorer", "judges_of_clean:nsfw") == 0 and output.read_bytes() == written


def odd_pictures() -> dict[str, bytes]:
    photo = scenery(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = photo.copy()
    alpha.putalpha(128)
    frames = [scenery(n, 32, 32) for n in range(3)]
    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    return {
        "turned.jpg": encoded(photo, "JPEG", exif=turned.tobytes()),
        "deep.png": encoded(deep),
        "palette.png": encoded(photo.quantize(16)),
        "inks.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(photo.convert("L"), "JPEG"),
        "alpha.png": encoded(alpha),
        "bits.png": encoded(photo.convert("1")),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "dot.png": encoded(Image.new("RGB", (1, 1))),
        "thread.png": encoded(Image.new("RGB", (1, 5000))),
        "f\u00fcr \u732b\u2028.png": encoded(photo),
    }


def test_odd_pictures_are_measured_or_named(tmp_path: Path) -> None:
    root = tmp_path / "source"
    for name, content in odd_pictures().items():
        write(root / name, content)
    write(root / "bomb.png", bomb())
    write(root / "zero.png", b"")
    write(root / "is a.png" / "folder.txt", "of a picture's name")
    write(root / "float.tif", encoded(Image.new("F", (8, 8)), "TIFF"))
    (root / "around").symlink_to(root)
    (root / "loop.png").symlink_to(root / "loop.png")
    output = tmp_path / "clean.jsonl"
    assert run("clean", root, "--output", output) == 0
    lines = lines_of(output)
    read = {path: line for path, line in lines.items() if "unreadable" not in line}
    assert set(read) == set(odd_pictures())
    assert (read["turned.jpg"]["width"], read["turned.jpg"]["height"]) == (192, 256)
    assert (read["thread.png"]["border"], read["thread.png"]["sharpness"]) == (1, 0)
    assert read["dot.png"]["entropy"] == 0
    unread = {
        Path(path).name: line["unreadable"] for path, line in lines.items() if path not in read
    }
    assert set(unread) == {"bomb.png", "zero.png", "folder.txt", "float.tif", "loop.png"}
    assert "pixels" in unread["bomb.png"] and "floating point" in unread["float.tif"]


def bomb() -> bytes:
    """A small file whose head says 60,000 x 60,000."""
    content = bytearray(encoded(Image.new("L", (8, 8))))
    head = content.index(b"IHDR")
    content[head + 4 : head + 12] = (60_000).to_bytes(4, "big") * 2
    import zlib

    content[head + 17 : head + 21] = zlib.crc32(content[head : head + 17]).to_bytes(4, "big")
    return bytes(content)
