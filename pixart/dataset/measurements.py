"""What `clean` measures of a picture and of its caption, without judging it.

Of the picture, decoded as `prepare` decodes it: its size, the entropy of its brightness, the variance of its
Laplacian (Pech-Pacheco 2000: little where it is blurred), how much of it is uniform edges, the quality
that its JPEG was saved with, a perceptual hash. Of its caption: words, the share of letters, and whether
there are addresses, HTML, or words that stand on pages rather than tell what is seen.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart.dataset.expression import NUMBER, TEXT, TRUTH, is_of
from pixart.dataset.images import refusals
from pixart.dataset.samples import PROMPT
from pixart.pictures import decoding, open_picture, over, to_srgb, upright

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = {
    "width": NUMBER, "height": NUMBER, "megapixels": NUMBER, "aspect": NUMBER, "bytes": NUMBER,
    "format": TEXT, "entropy": NUMBER, "sharpness": NUMBER, "border": NUMBER,
    "jpeg_quality": NUMBER, "captions": NUMBER, "words": NUMBER, "letters": NUMBER,
    "url": TRUTH, "html": TRUTH, "boilerplate": TRUTH,
}  # fmt: skip
_OF_SOME = ("jpeg_quality",)
_STRIP = 256  # rows at a time: a picture of 100 megapixels would take gigabytes as floats
_REDUCED = 256  # pixels of the longer side, for the edges
_EVEN = 10  # levels by which an even edge may differ from itself
# ITU T.81, table K.1: of libjpeg's luminance at quality 50, in the order of rows.
_LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
])  # fmt: skip
_URL = re.compile(r"https?://|www\.|\b[\w-]+\.(?:com|org|net|de|co\.uk|io|ru|cn)\b", re.I)
_HTML = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d{1,6});", re.I)
_BOILERPLATE = re.compile(
    r"click (?:here|to)|stock (?:photo|image|vector|illustration)|royalty[- ]free|image may contain|"
    r"all rights reserved|copyright|\u00a9|photo (?:by|credit)|getty images|shutterstock|alamy|"
    r"free (?:download|shipping)|buy now|add to cart|subscribe|no description|untitled|thumbnail|"
    r"\b(?:img|dsc|dscn|dscf|pict?|image|photo|screenshot)[_-]?\d{2,}|\.(?:jpe?g|png|webp|gif)\b",
    re.I,
)
# Scripts without spaces between words: each character counts.
_SOLID = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SOLID}]|[^\W_{_SOLID}]+(?:['\u2019-]\w+)*")


def open_measured(content: bytes) -> "tuple[Image, dict[str, Any]]":
    """The picture as `images.decode` gives it, and what the file says of it. Raises ImageError."""
    with refusals(), decoding("picture"):
        stored = open_picture(content, "picture")
        tables = getattr(stored, "quantization", None) or {}
        format = stored.format or ""
        image = over(to_srgb(upright(stored)), "white")
    said = {"bytes": len(content), "format": format, "jpeg_quality": jpeg_quality(tables)}
    return image, said


def measure(image: "Image") -> dict[str, Any]:
    """The measurements of an upright RGB picture."""
    width, height = image.size
    levels, sharpness = _texture(image)
    return {
        "width": width,
        "height": height,
        "megapixels": round(width * height / 1e6, 4),
        "aspect": round(width / height, 4),
        "entropy": round(_entropy(levels), 3),
        "sharpness": round(sharpness, 2),
        "border": round(border(image), 3),
    }


def measure_captions(captions: Mapping[str, str]) -> dict[str, Any]:
    """The measurements of the caption called "prompt", or of the first where none is, and how many there
    are. Without one there are no words."""
    text = main_caption(captions)
    solid = [c for c in text if not c.isspace()]
    letters = sum(c.isalpha() for c in solid) / len(solid) if solid else 0.0
    return {
        "captions": len(captions),
        "words": len(_WORD.findall(text)),
        "letters": round(letters, 3),
        "url": bool(_URL.search(text)),
        "html": bool(_HTML.search(text)),
        "boilerplate": bool(_BOILERPLATE.search(text)),
    }


def is_whole(line: Mapping[str, Any]) -> bool:
    """Whether a line has all of KINDS and a hash, each as what it is; only some files have a JPEG's quality."""
    return isinstance(line.get("phash"), str) and all(
        is_of(kind, line.get(name)) or (name in _OF_SOME and line.get(name, "") is None)
        for name, kind in KINDS.items()
    )


def main_caption(captions: Mapping[str, str]) -> str:
    """The caption "prompt", else the first by name, else ""."""
    return (
        captions[PROMPT]
        if PROMPT in captions
        else next(iter(sorted(captions.items())), ("", ""))[1]
    )


def _texture(image: "Image") -> "tuple[np.ndarray, float]":
    """How many pixels have each of 256 levels of brightness, and the variance of the Laplacian (of four
    neighbours, inside the picture; 0 where there is no inside)."""
    width, height = image.size
    counts = np.zeros(256, np.int64)
    inside, total, squares = 0, 0.0, 0.0
    for top in range(0, height, _STRIP):
        bottom = min(height, top + _STRIP)
        rows = image.crop((0, max(0, top - 1), width, min(height, bottom + 1))).convert("L")
        light = np.asarray(rows).astype(np.int32)
        own = light[top - max(0, top - 1) :][: bottom - top]
        counts += np.bincount(own.ravel(), minlength=256)
        if min(light.shape) < 3:
            continue
        middle = light[1:-1, 1:-1]
        edges = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * middle
        inside += edges.size
        total += float(edges.sum())
        squares += float(np.square(edges).sum(dtype=np.float64))
    return counts, squares / inside - (total / inside) ** 2 if inside else 0.0


def _entropy(counts: "np.ndarray") -> float:
    """Bits a pixel, 0 to 8."""
    share = counts[counts > 0] / counts.sum()
    return abs(float(-(share * np.log2(share)).sum()))


def border(image: "Image") -> float:
    """The share of a picture that lies in even edges: rows and columns of one colour, as of bars beside a
    film or of white paper around a product; 1 for a picture of one colour."""
    from PIL.Image import Resampling

    scale = max(1.0, max(image.size) / _REDUCED)
    size = tuple(max(1, round(side / scale)) for side in image.size)
    pixels = np.asarray(image.resize(size, Resampling.BOX)).astype(np.int16)  # type: ignore[arg-type]
    rows = _even(pixels)
    columns = _even(pixels.transpose(1, 0, 2))
    height, width = pixels.shape[:2]
    if sum(rows) >= height or sum(columns) >= width:
        return 1.0
    return 1 - (height - sum(rows)) / height * (width - sum(columns)) / width


def _even(pixels: "np.ndarray") -> tuple[int, int]:
    """How many rows from the top, and from the bottom, have the colour of the first one."""

    def count(lines: "np.ndarray") -> int:
        colour = np.median(lines[0], axis=0)
        even = np.abs(lines - colour).max(axis=(1, 2)) <= _EVEN
        return len(even) if even.all() else int(even.argmin())

    return count(pixels), count(pixels[::-1])


def jpeg_quality(tables: Mapping[int, Any]) -> int | None:
    """The quality, 1 to 100, that libjpeg writes the most similar luminance table at; None without."""
    if len(tables.get(0, ())) != 64:
        return None
    table = np.array(tables[0], dtype=float)
    best = [float(np.abs(_table_at(quality) - table).sum()) for quality in range(1, 101)]
    return 1 + int(np.argmin(best))


def _table_at(quality: int) -> "np.ndarray":
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((_LUMINANCE * scale + 50) // 100).clip(1, 255).astype(float)
