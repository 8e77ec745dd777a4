"""pixart.pictures: which files Pillow may open, what damage becomes, and colours by ICC profiles."""

import io
import os
import socket
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from pictures import encoded
from PIL import Image, ImageCms

from pixart.pictures import (
    FORMATS,
    PictureError,
    head_of,
    open_picture,
    profile_fault,
    readable_suffixes,
    to_srgb,
    unread,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOUR = (60, 200, 120)


def test_every_format_that_is_named_is_read() -> None:
    for format in FORMATS:
        content = encoded(Image.new("RGB", (5, 3), COLOUR), format)
        for source in (content, io.BytesIO(content)):
            assert open_picture(source, "x").size == (5, 3), format
    assert {".jpg", ".jfif", ".jpe", ".avif"} <= readable_suffixes()


# An EPS starts Ghostscript; the others are formats of Pillow's that nobody trains on.
@pytest.mark.parametrize("format", ["EPS", "DDS", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "SGI"])
def test_formats_that_are_not_named_are_refused_whatever_their_suffix(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pictures.write(tmp_path / "x.png", encoded(Image.new("RGB", (16, 16)), format))
    monkeypatch.setattr(Image.Image, "load", None)
    for read in (open_picture, head_of):
        with pytest.raises(PictureError, match=r"^shown: is not a picture, .* PNG, JPEG"):
            read(file, "shown")


ERRORS = [
    OSError(""), RuntimeError("r"), NotImplementedError("n"), SyntaxError("s"), ValueError("v"),
    KeyError("k"), IndexError("i"), TypeError("t"), OverflowError("o"), ZeroDivisionError("z"),
    MemoryError(), RecursionError("deep"), EOFError("e"), AttributeError("a"), AssertionError(),
    Image.DecompressionBombError("bomb"), Image.DecompressionBombWarning("w"),
    UnicodeDecodeError("utf-8", b"", 0, 1, "u"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_is_one_line_with_the_name(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(PictureError, match=r"^a picture: cannot be read \(.+\)$"):
        open_picture(b"", "a picture")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket.png"))  # its name must be short
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(2**40)  # of which the disk stores nothing
    for path in (*sorted(tmp_path.iterdir()), tmp_path / "absent.png"):
        with pytest.raises(PictureError, match=rf"^{path.name}: cannot be read \("):
            open_picture(path, path.name)


def wide(*levels: int) -> list[int]:
    """What levels of the wide profile are in sRGB, by the formula."""
    linear = (np.array(levels) / 255) ** pictures.WIDE_GAMMA
    return pictures.srgb_of_xyz(linear @ pictures.WIDE)


def shown(image: Image.Image, format: str = "PNG", **options: Any) -> Any:
    """The first pixel of a picture after a way through a file."""
    return to_srgb(open_picture(encoded(image, format, **options), "x")).getpixel((0, 0))


def test_colours_are_converted_by_the_profile_in_the_file() -> None:
    image, profile = Image.new("RGB", (8, 8), COLOUR), pictures.wide_profile()
    assert wide(*COLOUR)[0] == 0  # far from what the file says
    options: dict[str, dict[str, Any]] = {
        "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100},
        "AVIF": {"quality": 100},
    }  # fmt: skip
    for format, more in options.items():
        found = shown(image, format, icc_profile=profile, **more)
        # Two levels of rounding in the file's own colours become a few where the curve is steep.
        assert np.abs(np.subtract(found, wide(*COLOUR))).max() <= 4, (format, found)
    assert np.abs(np.subtract(shown(image, icc_profile=profile), wide(*COLOUR))).max() <= 1


def test_alpha_stays_and_palettes_are_converted() -> None:
    profile = pictures.wide_profile()
    found = shown(Image.new("RGBA", (2, 2), (*COLOUR, 77)), icc_profile=profile)
    assert found[3] == 77 and np.abs(np.subtract(found[:3], wide(*COLOUR))).max() <= 1
    palette = Image.new("RGB", (2, 2), COLOUR).quantize(2)
    assert np.abs(np.subtract(shown(palette, icc_profile=profile), wide(*COLOUR))).max() <= 1
    see_through = shown(palette, icc_profile=profile, transparency=0)
    assert len(see_through) == 4 and see_through[3] == 0


def test_grey_is_converted_by_profiles_of_grey_and_of_colour() -> None:
    linear = pictures.grey_profile(1.0)
    expected = pictures.srgb_of_xyz(np.array(pictures.D50) * 100 / 255)
    assert expected[0] > 160
    for image in (Image.new("L", (2, 2), 100), Image.new("LA", (2, 2), (100, 9))):
        found = shown(image, icc_profile=linear)
        assert np.abs(np.subtract(found[:3], expected)).max() <= 1
        assert found[3:] == ((9,) if image.mode == "LA" else ())
    deep = Image.fromarray(np.full((2, 2), 100 * 257, dtype=np.uint16))
    assert np.abs(np.subtract(shown(deep, icc_profile=linear), expected)).max() <= 1
    found = shown(Image.new("L", (2, 2), 100), icc_profile=pictures.wide_profile())
    assert np.abs(np.subtract(found, wide(100, 100, 100))).max() <= 1


def test_inks_and_lab_are_converted_by_their_tables() -> None:
    seen = (62, 30, 10)
    profile = pictures.ink_profile({(1, 0, 0, 0): seen})  # this ink is no cyan
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for image, format, icc in (
        (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF", profile),
        (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", profile),
        (Image.new("LAB", (8, 8), (158, 128 + 30, 128 + 10)), "TIFF", lab),  # 158 / 255 is 62 %
    ):
        found = shown(image, format, icc_profile=icc)
        assert np.abs(np.subtract(found, pictures.srgb_of_lab(*seen))).max() <= 2


def test_a_profile_that_is_srgb_by_any_name_changes_no_bit() -> None:
    image = open_picture(pictures.png(), "x")
    again = open_picture(encoded(image, icc_profile=SRGB), "x")
    assert to_srgb(again).tobytes() == image.tobytes() and profile_fault(again) == ""


def _unknown_space() -> bytes:
    return pictures.wide_profile().replace(b"mntrRGB ", b"mntrYCbr")


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile"),
        ("RGB", b"\0" * 200),
        ("RGB", pictures.wide_profile()[:140]),
        ("RGB", _unknown_space()),
        ("RGB", pictures.grey_profile(1.0)),
        ("RGB", pictures.ink_profile({})),
        ("CMYK", pictures.wide_profile()),
    ],
)
def test_a_profile_that_cannot_be_used_is_told_and_colours_stay(mode: str, profile: bytes) -> None:
    image = Image.new(mode, (8, 8), (10, 20, 30, 40)[: len(mode)])
    content = encoded(image, "TIFF", icc_profile=profile)
    opened = open_picture(content, "x")
    assert profile_fault(opened).startswith("colours are taken as sRGB, the embedded profile")
    assert to_srgb(opened).tobytes() == image.convert("RGB").tobytes()
    head = head_of(content, "x")
    assert head.has_profile and head.profile_fault == profile_fault(opened)


def with_chunk(content: bytes) -> bytes:
    """A PNG with what should be a profile in it."""
    chunk = b"iCCP" + content
    made = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png = encoded(Image.new("RGB", (8, 8), COLOUR))
    return png[:33] + made + png[33:]  # behind the first chunk


HUGE = struct.pack(">I", 3 << 20) + pictures.wide_profile()[4:]


# No name; an unknown way to compress; cut off within; nothing compressed; more than Pillow unpacks.
@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"x\0\5y", b"x\0\0" + zlib.compress(SRGB)[:-30], b"x\0\0junk",
     b"x\0\0" + zlib.compress(HUGE.ljust(3 << 20, b"\0"))],
)  # fmt: skip
def test_a_png_is_read_whatever_its_chunk_of_a_profile_holds(content: bytes) -> None:
    opened = open_picture(with_chunk(content), "x")
    assert to_srgb(opened).getpixel((0, 0)) == COLOUR
    assert "the embedded profile cannot be used" in profile_fault(opened)
    assert head_of(with_chunk(content), "x").profile_fault == profile_fault(opened)
    with pytest.raises(PictureError):
        open_picture(with_chunk(content)[:-40], "x")


@pytest.mark.skipif(find_spec("pillow_heif") is None, reason="needs pip install pillow-heif")
def test_heic_is_read_where_pillow_heif_is_installed() -> None:
    import pillow_heif

    assert {".heic", ".heif"} <= readable_suffixes() and unread(".heic") == ""
    content = io.BytesIO()
    image = Image.new("RGB", (64, 64), COLOUR)
    pillow_heif.from_pillow(image).save(content, quality=100, icc_profile=pictures.wide_profile())
    opened = open_picture(content.getvalue(), "x")
    found = to_srgb(opened).getpixel((0, 0))
    assert opened.size == (64, 64) and np.abs(np.subtract(found, wide(*COLOUR))).max() <= 4
    for damaged in (content.getvalue()[:-100], content.getvalue()[:24] + bytes(200)):
        with pytest.raises(PictureError, match="^x: "):
            open_picture(damaged, "x")


@pytest.mark.parametrize("mode", ["La", "LA", "RGBa", "RGBA", "PA"])
def test_alpha_is_read_whichever_way_it_is_stored(mode: str) -> None:
    grey = Image.merge("LA", [Image.new("L", (4, 3), 200), Image.new("L", (4, 3), 128)])
    found = to_srgb((grey if mode == "La" else grey.convert("RGBA")).convert(mode))
    assert found.mode == "RGBA"
    np.testing.assert_allclose(np.asarray(found)[0, 0], (200, 200, 200, 128), atol=1)
