"""Picture files to pixels: what is read, what is refused, where the crop lies."""

import numpy as np
import pictures
import pytest
import torch
from pictures import encoded
from PIL import Image

from pixart.dataset.images import ImageError, cover, decode, head_of


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "unreadable image: no picture format"),
        (b"<html>not found</html>", "unreadable image: no picture format"),
        (pictures.corrupt_png(), "unreadable image"),
        (pictures.png()[:-200], "truncated image"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:-100], "truncated image"),
    ],
    ids=["empty", "html", "corrupt", "cut-png", "cut-jpeg"],
)
def test_damaged_files_are_refused_with_their_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(content)


def test_a_picture_too_large_to_be_true_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (decode, head_of):
        with pytest.raises(ImageError, match="exceeds limit"):
            read(pictures.png())


def test_pictures_are_turned_upright_and_measured_so() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    content = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    head = head_of(content)
    assert (head.height, head.width) == (40, 20)
    assert decode(content).size == (20, 40)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_is_turned_as_its_head_says(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (40, 20)), format, exif=exif)
    head = head_of(content)
    assert (head.width, head.height) == decode(content).size == (20, 40)


def test_transparency_lies_over_white() -> None:
    image = decode(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0))))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def test_deep_grey_keeps_its_levels() -> None:
    levels = np.array([[0, 65535 // 2, 65535]], dtype=np.uint16)
    image = decode(encoded(Image.fromarray(levels)))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    format = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(encoded(Image.new(mode, (3, 2)), format)).mode == "RGB"


@pytest.mark.parametrize("size", [(100, 300), (300, 100), (33, 47), (64, 32), (1000, 999)])
def test_cover_scales_to_the_bucket_and_crops_its_middle(size: tuple[int, int]) -> None:
    """Against the definition: scale until both sides reach, cut off the rest evenly."""
    height, width = size
    image = decode(pictures.png(height, width))
    pixels = cover(image, (64, 32), 512)
    scale = max(64 / height, 32 / width)
    scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 32) // 2, (scaled.height - 64) // 2
    expected = np.array(scaled.crop((left, top, left + 32, top + 64)))
    assert pixels.shape == (3, 64, 32) and pixels.dtype == torch.float32
    difference = (pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected.astype(np.float32)
    assert (
        np.abs(difference).mean() < 8
    )  # levels: half a pixel; a crop at the corner differs by dozens


def test_pixels_span_minus_one_to_one() -> None:
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    assert cover(black, (8, 8), 512).eq(-1).all() and cover(white, (8, 8), 512).eq(1).all()


def test_lanczos_serves_from_2048_up() -> None:
    image = decode(pictures.png(50, 50))
    wide = image.resize((64, 64), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(wide)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(cover(image, (64, 64), 2048), expected)
    assert not torch.equal(cover(image, (64, 64), 1024), expected)
