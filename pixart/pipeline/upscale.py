"""The size that --upscale asks for."""

import math
import re

from pixart.pipeline.editing import canvas_size
from pixart.resolution import MAX_SIDE, RESOLUTIONS

UPSCALE_STRENGTH = 0.35
# None: guiding helps at middling noise (arXiv:2404.07724), where this does not come by.
UPSCALE_GUIDANCE = 1.0
MOST_AT_ONCE = 2  # times the sides
# Latents a side of the cells whose means a larger picture keeps: all that the smaller one shows.
COARSE = 2


def upscaled_size(text: str, height: int, width: int, multiple: int) -> tuple[int, int]:
    """Height and width that a picture of so many pixels is made larger to.

    text: "2k", "4k" or pixels of the square of the same area, a factor such as "2x", each with the
    picture's aspect as near as multiples can have it; or "WIDTHxHEIGHT". ValueError for what is none of
    these, for less than the picture has and for more than MAX_SIDE.
    """
    rows, columns = _sides(text.strip().lower(), text, height, width, multiple)
    shown = f"{columns}x{rows}" + ("" if f"{columns}x{rows}" == text else f" for {text}")
    if max(rows, columns) > MAX_SIDE:
        raise ValueError(f"upscale must have up to {MAX_SIDE} px a side, got {shown}")
    if rows < height or columns < width:
        way_out = f"; {text}x is a factor" if text.isdigit() and 1 < int(text) <= 16 else ""
        raise ValueError(
            f"upscale must make the picture larger, which has {width}x{height}, got {shown}{way_out}"
        )
    return rows, columns


def sizes_between(
    smaller: tuple[int, int], larger: tuple[int, int], multiple: int
) -> list[tuple[int, int]]:
    """The sizes, high and wide, that lead to the larger one, which is the last, by at most MOST_AT_ONCE
    times the sides each: what is drawn at one is what the next has to keep."""
    factor = max(large / small for small, large in zip(smaller, larger, strict=True))
    count = max(math.ceil(math.log(factor, MOST_AT_ONCE) - 1e-9), 1)
    sizes = []
    for number in range(1, count):
        sides = [
            small * (large / small) ** (number / count)
            for small, large in zip(smaller, larger, strict=True)
        ]
        rows, columns = (round(side / multiple) * multiple for side in sides)
        sizes.append((rows, columns))
    return [*sizes, larger]


def _sides(text: str, asked: str, height: int, width: int, multiple: int) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", text):
        columns, rows = int(match[1]), int(match[2])
        if rows % multiple or columns % multiple or not rows or not columns:
            below, right = canvas_size(rows, columns, multiple)
            raise ValueError(
                f"upscale must be a multiple of {multiple} on both sides, got {asked}; try {right}x{below}"
            )
        return rows, columns
    if match := re.fullmatch(r"(\d{1,5}(?:\.\d{1,6})?)\s*[x×]", text):
        factor = float(match[1])
    elif text in RESOLUTIONS or re.fullmatch(r"\d{1,5}", text):
        factor = RESOLUTIONS.get(text, int(text) if text.isdigit() else 0) / (height * width) ** 0.5
    else:
        raise ValueError(
            f"upscale must be {', '.join(RESOLUTIONS)}, pixels, a factor such as 2x or WIDTHxHEIGHT, "
            f"got {asked!r}"
        )
    # Halves go up, as in resolution.py.
    sides = [int(side * factor / multiple + 0.5) * multiple for side in (height, width)]
    return sides[0], sides[1]
