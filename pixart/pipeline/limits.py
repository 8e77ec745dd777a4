"""What the settings of a request may be: ranges, and which go without which others.

Only what no model and no file decides; `Pipeline.resolve` refuses the rest. Imports no torch, and not the
request, which imports this.
"""

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pixart.config import numbers_of
from pixart.few_step import check_timesteps, spelt
from pixart.files import check_text
from pixart.plans.reuse import BlockReuse
from pixart.plans.schedule import KVSchedule
from pixart.preprocess import PREPROCESSORS

EXACT_SIZE = ("size", "height", "width")
BUCKET = ("aspect", "resolution")
STEPS = ("steps", "timesteps")  # either says how many there are
MAX_SIDE = 8192  # pixels, as pixart.resolution has it, which imports torch
MIN_TILE = 16  # pixels
MAX_BLUR = 1024  # pixels
PICTURES = ("image", "mask", "control_image")  # settings that name files of pictures
ALPHA = "alpha"  # as a mask, no file: where the picture itself is transparent
FITS = ("crop", "exact")
MAX_CONTROLS = 16
_LONGEST_LIST = 1000  # characters of numbers of blocks

# None of these is left to the model: without one, nothing of its kind is done.
OFF_WHEN_NONE = (
    "image", "mask", "outpaint", "upscale", "tiles", "guidance_rescale", "apg", "pag", "control_image",
    "kv_schedule", "reuse_blocks",
)  # fmt: skip
# A setting that does nothing without one of these.
_NEEDS = {
    "strength": ("image",),
    "fit": ("image",),
    "mask": ("image",),
    "outpaint": ("image",),
    "invert_mask": ("mask",),
    "mask_blur": ("mask", "outpaint"),
    "upscale_strength": ("upscale",),
    "upscale_guidance": ("upscale",),
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
    for name in _CHECKS:
        if (value := getattr(request, name)) is not None:
            check_value(name, value)
    _check_steps_beside(request)
    _check_sizes(request)
    _check_needs(request)
    _check_control(request)


def check_value(name: str, value: Any) -> None:
    """ValueError for a value, in the form in which a request keeps it, that goes with no others."""
    if name in _CHECKS:
        _CHECKS[name](name, value)


def is_off(request: Any, name: str) -> bool:
    """Whether a setting is none because nothing was asked for that it is a part of: no model fills it in."""
    if getattr(request, name) is not None:
        return False
    needed = _NEEDS.get(name)
    if needed is None:
        return name in OFF_WHEN_NONE
    return not any(getattr(request, other) for other in needed)


def idle(request: Any) -> Iterator[tuple[str, str]]:
    """What is set, and what it needs that is turned off, as `apg_eta` of a sweep in which `apg` is false."""
    for name, others in _NEEDS.items():
        value = getattr(request, name)
        is_set = value is not None and value is not False
        if is_set and not any(getattr(request, other) for other in others):
            yield name, others[0]


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
    if len(text) > _LONGEST_LIST:
        raise ValueError(
            f"pag_blocks must be {_LONGEST_LIST} characters at most, got {len(text):,}"
        )
    for part in text.split(","):
        if not (span := numbers_of(part)):
            raise ValueError(f"pag_blocks must be blocks such as 14 or 12-14,20, got {text!r}")
        numbers.update(span)
    return tuple(sorted(numbers))


def _check_seed(name: str, seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} must be an integer from 0 to 2**64 - 1, got {seed}")


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{name} must be an integer from 1 up, got {steps}")


def _check_scale(name: str, number: float) -> None:
    if not 0 <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number from 0 up, got {number}")


def _check_signed_share(name: str, number: float) -> None:
    if not -1 <= number <= 1:
        raise ValueError(f"{name} must be from -1 to 1, got {number}")


def _check_share(name: str, number: float) -> None:
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {number}")


def _check_strength(name: str, number: float) -> None:
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {number}")


def _check_interval(name: str, interval: tuple[float, float]) -> None:
    start, end = interval
    if not 0 <= start <= end <= 1:
        raise ValueError(f"{name} must be 0 <= start <= end <= 1, got {start}, {end}")


def _check_side(name: str, side: int) -> None:
    if not 1 <= side <= MAX_SIDE:
        raise ValueError(f"{name} must be 1 to {MAX_SIDE} pixels, got {side}")


def _check_tile(name: str, side: int | bool) -> None:
    if isinstance(side, bool):
        return
    if side < MIN_TILE:
        choices = "True, False, None or at least" if name == "tile" else "at least"
        hint = "" if name == "tile" else " (64 with most models)"
        raise ValueError(f"{name} must be {choices} {MIN_TILE} pixels{hint}, got {side}")
    if side > MAX_SIDE:
        raise ValueError(f"{name} must be at most {MAX_SIDE} pixels, got {side}")


def _check_fit(name: str, fit: str) -> None:
    if fit not in FITS:
        raise ValueError(f"{name} must be {' or '.join(FITS)}, got {fit!r}")


def _check_blur(name: str, pixels: int) -> None:
    if not 0 <= pixels <= MAX_BLUR:
        raise ValueError(f"{name} must be 0 to {MAX_BLUR} pixels, got {pixels}")


def _check_pictures(name: str, pictures: tuple[str, ...]) -> None:
    if not 1 <= len(pictures) <= MAX_CONTROLS:
        raise ValueError(f"{name} must be 1 to {MAX_CONTROLS} pictures, got {len(pictures)}")
    for one in pictures:
        _check_picture(name, one)


def _check_picture(name: str, picture: str) -> None:
    check_text(name, picture)
    if not picture:
        raise ValueError(f"{name} must name a file, got ''")


def _check_preprocessor(name: str, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        if kind not in PREPROCESSORS:
            raise ValueError(f"{name} must be one of {', '.join(PREPROCESSORS)}, got {kind!r}")


def _check_scales(name: str, scales: tuple[float, ...]) -> None:
    for scale in scales:
        if not abs(scale) <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number, got {scale}")


def _check_intervals(name: str, intervals: tuple[tuple[float, float], ...]) -> None:
    for interval in intervals:
        _check_interval(name, interval)


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "prompt": check_text, "negative": check_text, "seed": _check_seed, "steps": _check_steps,
    "timesteps": check_timesteps,
    "guidance": _check_scale, "guidance_interval": _check_interval, "height": _check_side,
    "width": _check_side, "image": _check_picture, "strength": _check_strength, "fit": _check_fit,
    "mask": _check_picture, "mask_blur": _check_blur, "outpaint": lambda _, text: parse_border(text),
    "upscale_strength": _check_strength, "upscale_guidance": _check_scale, "tiles": _check_tile,
    "guidance_rescale": _check_share, "apg_eta": _check_signed_share, "apg_momentum": _check_signed_share,
    "apg_norm": _check_scale, "pag": _check_scale, "pag_blocks": lambda _, text: parse_blocks(text),
    "kv_schedule": lambda _, text: KVSchedule.parse(text), "control_image": _check_pictures,
    "reuse_blocks": lambda _, text: BlockReuse.parse(text),
    "control_preprocessor": _check_preprocessor, "control_scale": _check_scales,
    "control_interval": _check_intervals, "tile": _check_tile,
}  # fmt: skip


def _check_steps_beside(request: Any) -> None:
    steps, timesteps = request.steps, request.timesteps
    if steps is not None and timesteps is not None and steps != len(timesteps):
        raise ValueError(
            f"timesteps must be as many as steps where both are given, got {spelt(timesteps):.80} beside "
            f"{steps} steps; leave steps out"
        )


def _check_sizes(request: Any) -> None:
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
        is_on = value is not None and value is not False
        if is_on and all(getattr(request, other) is None for other in others):
            raise ValueError(
                f"{name} must be given with {' or '.join(others)}, got {value!r} alone"
            )
    for name in ("mask", "outpaint"):
        if request.upscale is not None and getattr(request, name) is not None:
            raise ValueError(
                f"upscale must be given without {name}, which keeps pixels as they are; upscale the "
                "picture that is made"
            )

    if request.only_enlarges and request.upscale_guidance is not None:
        raise ValueError(
            "upscale_guidance must be left out where upscale begins with the picture itself; guidance is "
            f"that of all that is drawn, got {request.upscale_guidance:g}"
        )


def _check_control(request: Any) -> None:
    for name in ("control_preprocessor", "control_scale", "control_interval"):
        values, count = getattr(request, name), len(request.control_image or ())
        if values is not None and len(values) not in (1, count):
            raise ValueError(
                f"{name} must be one or as many as control_image, {count}, got {len(values)}"
            )
