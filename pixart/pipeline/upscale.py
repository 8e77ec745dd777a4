"""The size that --upscale asks for."""

import re

from pixart.pipeline.editing import canvas_size
from pixart.resolution import MAX_SIDE, RESOLUTIONS

UPSCALE_STRENGTH = 0.35


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
        raise ValueError(
            f"upscale must make the picture larger, which has {width}x{height}, got {shown}"
        )
    return rows, columns


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
