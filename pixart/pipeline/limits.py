"""What the settings of a request may be: ranges, and which go without which others.

Only what no model and no file decides; `Pipeline.resolve` refuses the rest. Imports no torch, and not the
request, which imports this.
"""

import math
import re
import sys
from typing import Any

from pixart.files import check_text

EXACT_SIZE = ("size", "height", "width")
BUCKET = ("aspect", "resolution")
MAX_SIDE = 8192  # pixels, as pixart.resolution has it, which imports torch
MIN_TILE = 16  # pixels
MAX_BLUR = 1024  # pixels
FITS = ("crop", "exact")
PREPROCESSORS = ("none", "canny", "hed", "depth", "pose")
MAX_CONTROLS = 16

# A setting that does nothing without one of these.
_NEEDS = {
    "strength": ("image",),
    "fit": ("image",),
    "mask": ("image",),
    "outpaint": ("image",),
    "invert_mask": ("mask",),
    "mask_blur": ("mask", "outpaint"),
    "upscale_strength": ("upscale",),
    "tiles": ("image", "upscale"),
    "apg_eta": ("apg",),
    "apg_momentum": ("apg",),
    "apg_norm": ("apg",),
    "pag_blocks": ("pag",),
    "control_preprocessor": ("control_image",),
    "control_scale": ("control_image",),
    "control_interval": ("control_image",),
}


def check_values(request: Any) -> None:
    """ValueError for the first value that no model could draw with."""
    for name in ("prompt", "negative", "image", "mask"):
        if (text := getattr(request, name)) is not None:
            check_text(name, text)
    _check_numbers(request)
    _check_sizes(request)
    _check_needs(request)
    _check_editing(request)
    _check_control(request)


def parse_border(text: str) -> tuple[int, int, int, int]:
    """LEFT, TOP, RIGHT, BOTTOM of an outpaint, in pixels; at least one is above 0."""
    match = re.fullmatch(r"\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*", text)
    sides = tuple(map(int, match.groups())) if match else ()
    if len(sides) != 4 or max(sides) > MAX_SIDE:
        raise ValueError(
            f"outpaint must be LEFT,TOP,RIGHT,BOTTOM in pixels up to {MAX_SIDE}, got {text!r}"
        )
    if not any(sides):
        raise ValueError(f"outpaint must add pixels on one side at least, got {text!r}")
    return sides


def parse_blocks(text: str) -> tuple[int, ...]:
    """Numbers of blocks, in order, from "14" or "12-14,20"."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"pag_blocks must be blocks such as 14 or 12-14,20, got {text!r}")
        numbers |= {*range(first, last + 1)}
    return tuple(sorted(numbers))


def _check_numbers(request: Any) -> None:
    if not 0 <= request.seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {request.seed}")
    if request.steps is not None and request.steps < 1:
        raise ValueError(f"steps must be an integer from 1 up, got {request.steps}")
    for name in ("guidance", "pag", "apg_norm"):
        number = getattr(request, name)
        if number is not None and not 0 <= number <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number from 0 up, got {number}")
    for name in ("apg_eta", "apg_momentum"):
        number = getattr(request, name)
        if number is not None and not -1 <= number <= 1:
            raise ValueError(f"{name} must be from -1 to 1, got {number}")
    for name in ("strength", "upscale_strength"):
        number = getattr(request, name)
        if number is not None and not 0 < number <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {number}")
    if request.guidance_rescale is not None and not 0 <= request.guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be from 0 to 1, got {request.guidance_rescale}")
    _check_interval("guidance_interval", request.guidance_interval or (0.0, 1.0))
    for name in ("tile", "tiles"):
        side = getattr(request, name)
        if type(side) is int and side < MIN_TILE:
            choices = "True, False, None or at least" if name == "tile" else "at least"
            raise ValueError(f"{name} must be {choices} {MIN_TILE} pixels, got {side}")
        if type(side) is int and side > MAX_SIDE:
            raise ValueError(f"{name} must be at most {MAX_SIDE} pixels, got {side}")


def _check_interval(name: str, interval: tuple[float, float]) -> None:
    start, end = interval
    if not 0 <= start <= end <= 1:
        raise ValueError(f"{name} must be 0 <= start <= end <= 1, got {start}, {end}")


def _check_sizes(request: Any) -> None:
    for name in ("height", "width"):
        if (side := getattr(request, name)) is not None and not 1 <= side <= MAX_SIDE:
            raise ValueError(f"{name} must be 1 to {MAX_SIDE} pixels, got {side}")
    buckets = [name for name in BUCKET if getattr(request, name) is not None]
    if request.size is not None and buckets:
        raise ValueError(
            f"size must be given without aspect and resolution, got {request.size} and "
            f"{' and '.join(f'{name} {getattr(request, name)}' for name in buckets)}"
        )
    sides = [name for name in ("height", "width") if getattr(request, name) is not None]
    others = [name for name in ("size", *BUCKET) if getattr(request, name) is not None]
    if sides and others:
        raise ValueError(
            f"{others[0]} must be given without {' and '.join(sides)}, got both; give one of them"
        )


def _check_needs(request: Any) -> None:
    for name, others in _NEEDS.items():
        value = getattr(request, name)
        if value is None or value is False:
            continue
        if all(getattr(request, other) in (None, False) for other in others):
            raise ValueError(
                f"{name} must be given with {' or '.join(others)}, got {value!r} alone"
            )


def _check_editing(request: Any) -> None:
    if request.fit is not None and request.fit not in FITS:
        raise ValueError(f"fit must be {' or '.join(FITS)}, got {request.fit!r}")
    if request.mask_blur is not None and not 0 <= request.mask_blur <= MAX_BLUR:
        raise ValueError(f"mask_blur must be 0 to {MAX_BLUR} pixels, got {request.mask_blur}")
    if request.outpaint is not None:
        parse_border(request.outpaint)
    if request.pag_blocks is not None:
        parse_blocks(request.pag_blocks)
    for name in ("mask", "outpaint"):
        if request.upscale is not None and getattr(request, name) is not None:
            raise ValueError(
                f"upscale must be given without {name}, which keeps pixels as they are; upscale the "
                "picture that is made"
            )


def _check_control(request: Any) -> None:
    images = request.control_image
    if images is None:
        return
    if not 1 <= len(images) <= MAX_CONTROLS:
        raise ValueError(f"control_image must be 1 to {MAX_CONTROLS} pictures, got {len(images)}")
    for image in images:
        check_text("control_image", image)
    for name in ("control_preprocessor", "control_scale", "control_interval"):
        values = getattr(request, name)
        if values is not None and len(values) not in (1, len(images)):
            raise ValueError(
                f"{name} must be one or as many as control_image, {len(images)}, got {len(values)}"
            )
    for kind in request.control_preprocessor or ():
        if kind not in PREPROCESSORS:
            known = ", ".join(PREPROCESSORS)
            raise ValueError(f"control_preprocessor must be one of {known}, got {kind!r}")
    for scale in request.control_scale or ():
        if not math.isfinite(scale):
            raise ValueError(f"control_scale must be a finite number, got {scale}")
    for interval in request.control_interval or ():
        _check_interval("control_interval", interval)
