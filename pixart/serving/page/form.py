"""What stands in the page's fields, and the settings of a request: each turned into the other.

A field is named as the setting of `Request` that it gives. Further ones: "begin" (a picture and a mask, as
the editor keeps them), "guidance_start" and "guidance_end", "apg", ... An empty field leaves a setting to the
model. Importing this imports no Gradio.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pixart.files import parse_json
from pixart.pipeline.request import PER_CONTROL, SETTINGS, Request
from pixart.serving.orders import Format
from pixart.serving.refusal import Refusal

TEXTS = (
    "prompt", "negative", "aspect", "resolution", "size", "scheduler", "fit", "outpaint", "upscale", "pag_blocks",
    "timesteps",
)  # fmt: skip
WHOLE = ("steps", "mask_blur", "tiles", "count")
NUMBERS = (
    "guidance", "strength", "upscale_strength", "upscale_guidance", "guidance_rescale", "apg_eta",
    "apg_momentum", "apg_norm", "pag", "guidance_start", "guidance_end", "control_scale", "control_start",
    "control_end",
)  # fmt: skip
FLAGS = ("apg", "invert_mask")
_SETTINGS = tuple(
    name for name in SETTINGS if name in (*TEXTS, *WHOLE, *NUMBERS) and name not in PER_CONTROL
)


@dataclass(frozen=True)
class Asked:
    """What `schemas.order_of` is given."""

    settings: Mapping[str, Any]
    loras: tuple[tuple[str, float], ...] = ()
    controls: tuple[str, ...] = ()
    count: int = 1
    format: Format = "png"
    fast: bool = True


@dataclass(frozen=True)
class Read:
    """Settings for the fields, by their names, and what could not be taken, a sentence each."""

    values: Mapping[str, Any]
    left: list[str] = field(default_factory=list)


def asked_of(values: Mapping[str, Any]) -> Asked:
    """Of the fields that are there. Refusal names the field of which nothing can be made."""
    given = {name: value for name, value in values.items() if value not in (None, "", [])}
    given |= {name: _number(name, given[name]) for name in (*WHOLE, *NUMBERS) if name in given}
    settings = {name: given[name] for name in _SETTINGS if name in given}
    if "size" in settings:  # exact: the shape and the resolution that stand beside it do not count
        settings = {
            name: one for name, one in settings.items() if name not in ("aspect", "resolution")
        }
    settings |= {name: True for name in FLAGS if given.get(name)}
    settings["prompt"] = given.get("prompt", "")
    settings["seed"] = _seed(given.get("seed"))
    if (interval := _interval(given, "guidance_start", "guidance_end")) is not None:
        settings["guidance_interval"] = interval
    picture, mask = pictures_of(given.get("begin", ""))
    settings |= {name: one for name, one in (("image", picture), ("mask", mask)) if one}
    controls = _add_control(settings, given)
    loras = _loras(given.get("loras", ()), str(given.get("weights", "")))
    form = cast(Format, given.get("format", "png"))
    fast = not given.get("without_plan")
    return Asked(settings, loras, controls, given.get("count", 1), form, fast)


def _number(name: str, text: Any) -> float:
    """As `Request` takes it, which checks its range."""
    kind, what = (int, "a whole number") if name in WHOLE else (float, "a number")
    try:
        return kind(str(text).strip().replace(",", "."))  # as some keyboards write it
    except ValueError:
        raise Refusal(400, f"{name} must be {what}, got {str(text)[:40]!r}", field=name) from None


def _seed(text: Any) -> int | None:
    """None is one by lot."""
    text = str("" if text is None else text).strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{1,20}", text):
        raise Refusal(
            400,
            f"seed must be a whole number, or empty for one by lot, got {text[:40]!r}",
            field="seed",
        )
    return int(text)


def _interval(given: Mapping[str, Any], start: str, end: str) -> tuple[float, float] | None:
    if start not in given and end not in given:
        return None
    return given.get(start, 0.0), given.get(end, 1.0)


def pictures_of(text: str) -> tuple[str | None, str | None]:
    """The picture and the mask in what an editor keeps, as data URLs."""
    try:
        kept = parse_json(text or "{}", "image")
        found = tuple(kept.get(name) for name in ("image", "mask"))
    except (ValueError, TypeError, AttributeError):
        found = (0, 0)
    if not all(one is None or isinstance(one, str) for one in found):
        raise Refusal(400, "image must be a picture; choose it again", field="image")
    return cast(tuple[str | None, str | None], found)


def _add_control(settings: dict[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    if "control" not in given:
        return ()
    picture, _ = pictures_of(given.get("control_picture", ""))
    if not picture:
        raise Refusal(
            400, "control_image must be given: choose the picture that the control goes by",
            field="control_image",
        )  # fmt: skip
    settings["control_image"] = [picture]
    for name in ("control_preprocessor", "control_scale"):
        if name in given:
            settings[name] = [given[name]]
    if (interval := _interval(given, "control_start", "control_end")) is not None:
        settings["control_interval"] = [interval]
    return (given["control"],)


def _loras(names: Any, weights: str) -> tuple[tuple[str, float], ...]:
    if not isinstance(names, list | tuple):
        raise Refusal(400, "loras must be a list of names", field="loras")
    try:
        numbers = [float(one) for one in weights.split(",")] if weights.strip() else [1.0]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= len(names)
    if names and len(numbers) != len(names):
        raise Refusal(
            400, f"weights of LoRAs must be one number, or {len(names)} with commas, got {weights[:40]!r}",
            field="loras",
        )  # fmt: skip
    return tuple(zip(names, numbers, strict=True)) if names else ()


def values_of(request: Request) -> dict[str, Any]:
    """Every field but those for pictures, LoRAs and controls, as a request has it; empty where it leaves a
    setting open."""
    values: dict[str, Any] = {name: getattr(request, name) for name in _SETTINGS}
    if request.height is not None and request.width is not None:
        values |= {"size": f"{request.width}x{request.height}", "aspect": None, "resolution": None}
    start, end = request.guidance_interval or (None, None)
    values |= {"seed": request.seed, "guidance_start": start, "guidance_end": end}
    texts = {name: "" if value is None else _shown(value) for name, value in values.items()}
    return texts | {name: bool(getattr(request, name)) for name in FLAGS} | {"count": "1"}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)
