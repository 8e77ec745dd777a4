"""Pictures that clients send: opened within bounds, and never anything but what was sent."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from pixart.serving.calls.sent_pictures import bytes_of_text, picture_of_bytes, picture_of_text
from pixart.serving.limits import Limits
from pixart.serving.refusal import Refusal

LIMITS = Limits(picture_pixels=10_000)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encoded(
    format: str, size: tuple[int, int] = (12, 8), mode: str = "RGB", **options: Any
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, format, **options)
    return out.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, in a few hundred bytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def refused(work: Callable[[], Any], status: int, reason: str) -> None:
    with pytest.raises(Refusal, match=reason) as found:
        work()
    assert found.value.status == status and found.value.field == "image"
    assert found.value.reason.startswith("image ") and "\n" not in found.value.reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_what_browsers_write_is_opened_whole(format: str) -> None:
    image = picture_of_bytes(encoded(format), "image", LIMITS)
    assert image.size == (12, 8) and image.getpixel((0, 0)) is not None


@pytest.mark.parametrize(
    "before", ["", "data:image/png;base64,", "DATA:;base64,", "data:image/png;name=a.png;base64,"]
)
def test_a_text_is_base64_or_a_data_url(before: str) -> None:
    text = base64.b64encode(encoded("PNG")).decode()
    assert picture_of_text(before + text, "image", LIMITS).size == (12, 8)
    lines = "\r\n".join(text[place : place + 60] for place in range(0, len(text), 60))
    assert picture_of_text(f" {before}{lines.rstrip('=')}\n", "image", LIMITS).size == (12, 8)


@pytest.mark.parametrize(
    "text",
    ["", "x", "/etc/passwd", "../../etc/passwd", "C:\\windows\\win.ini", "file:///etc/passwd",
     "http://169.254.169.254/latest/meta-data/", "https://evil.example/a.png", "//evil.example/a.png",
     "ftp://evil.example/a.png", "picture.png", "~/picture.png", "data:image/png,%89PNG", "data:text/html;base64,",
     "data:image/svg+xml;base64,PHN2Zy8+", "\\\\evil.example\\share\\a.png", "gradio_api/file=/etc/passwd",
     "\x00", "é", "iVBORw0KGgo\u200b", "AAAA", "data:" + "a;" * 5000, "=" * 1000],
)  # fmt: skip
def test_a_path_or_a_url_is_no_picture(text: str) -> None:
    refused(lambda: picture_of_text(text, "image", LIMITS), 400, "must be the picture itself")


def test_no_file_and_no_address_is_opened_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import socket

    def no(*_: object, **__: object) -> Any:
        raise AssertionError("opened")

    monkeypatch.setattr(builtins, "open", no)
    monkeypatch.setattr(socket, "create_connection", no)
    for text in ("/etc/passwd", "http://127.0.0.1/a.png", "file:///etc/hostname"):
        with pytest.raises(Refusal):
            bytes_of_text(text, "image")


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def no(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", no)
    content = encoded("PNG", (101, 100))
    refused(lambda: picture_of_bytes(content, "image", LIMITS), 413, "10,000 pixels .* got 101x100")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (12_000, 9_000), (100_000, 1), (1, 100_000)])
def test_a_bomb_is_too_large_by_its_head(size: tuple[int, int]) -> None:
    refused(lambda: picture_of_bytes(bomb(*size), "image", Limits()), 413, "got ")


@pytest.mark.parametrize("size", [(40_000, 40_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_beyond_pillows_own_bound_is_refused(size: tuple[int, int]) -> None:
    refused(lambda: picture_of_bytes(bomb(*size), "image", Limits()), 400, "cannot be read")


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    out = io.BytesIO()
    frames[0].save(out, format, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_film_is_no_picture(format: str) -> None:
    content = animated(format)
    refused(lambda: picture_of_bytes(content, "image", LIMITS), 400, "one picture, it has 3 frames")


def test_a_jpeg_with_a_second_picture_is_its_first() -> None:
    """As phones write them."""
    assert picture_of_bytes(animated("MPO"), "image", LIMITS).size == (8, 8)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM", "ICO", "PDF", "TGA", "EPS"])
def test_other_formats_are_refused_by_their_first_bytes(format: str) -> None:
    content = encoded(format, mode="RGB", size=(16, 16))
    refused(
        lambda: picture_of_bytes(content, "image", LIMITS), 400, "must be a PNG, JPEG or WebP file"
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", b"%!PS-Adobe",
     b"GIF89a", b"II*\0", b"\0\0\0\x20ftypheic", b"\0\0\0\x20ftypavif", b"RIFF\0\0\0\0WAVE", b"PK\3\4"],
)  # fmt: skip
def test_what_is_no_picture_is_refused_without_a_decoder(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    refused(
        lambda: picture_of_bytes(content, "image", LIMITS), 400, "must be a PNG, JPEG or WebP file"
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_that_breaks_off_is_refused(format: str) -> None:
    out = io.BytesIO()
    Image.effect_noise((90, 90), 80).convert("RGB").save(out, format)
    for share in (0.2, 0.5, 0.9):
        content = out.getvalue()[: int(len(out.getvalue()) * share)]
        refused(
            lambda content=content: picture_of_bytes(content, "image", LIMITS),
            400,
            "cannot be read|must be",
        )


@pytest.mark.parametrize(
    "format, head", [("PNG", SIGNATURE), ("JPEG", b"\xff\xd8\xff"), ("WEBP", b"RIFF\x20\0\0\0WEBP")]
)
def test_the_first_bytes_alone_are_no_picture(format: str, head: bytes) -> None:
    refused(
        lambda: picture_of_bytes(head + b"\0" * 64, "image", LIMITS), 400, "image (cannot|must)"
    )


def test_a_text_that_unpacks_to_megabytes_is_refused() -> None:
    head = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    content = SIGNATURE + chunk(b"IHDR", head) + text + chunk(b"IEND", b"")
    refused(lambda: picture_of_bytes(content, "image", LIMITS), 400, "cannot be read")


def test_texts_are_not_kept_and_what_the_pipeline_looks_at_is() -> None:
    from PIL.PngImagePlugin import PngInfo

    texts, exif = PngInfo(), Image.Exif()
    texts.add_text("parameters", "a" * 100_000)
    exif[0x0112] = 6
    image: Any = picture_of_bytes(encoded("PNG", pnginfo=texts, exif=exif), "image", LIMITS)
    assert "a" * 1000 not in str(image.info) and not image.text
    assert image.getexif()[0x0112] == 6


def test_an_exif_that_lies_about_the_size_changes_nothing() -> None:
    exif = Image.Exif()
    exif[0x0100], exif[0x0101], exif[0x0112] = 100_000, 100_000, 99
    assert picture_of_bytes(encoded("JPEG", exif=exif), "image", LIMITS).size == (12, 8)


def test_a_broken_exif_is_no_fault_of_ours() -> None:
    content = encoded("JPEG")
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f"
    content = content[:2] + b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken + content[2:]
    try:
        assert picture_of_bytes(content, "image", LIMITS).size == (12, 8)
    except Refusal as refusal:
        assert refusal.status == 400
