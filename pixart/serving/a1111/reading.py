"""From a body of A1111's clients to what is drawn."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pixart.files import near
from pixart.pictures import upright
from pixart.pipeline.metadata import SAMPLERS
from pixart.plans.plan import OFF
from pixart.serving.a1111.fields import MASK_BLUR, STRENGTH, Picture, Text, check_off, invalid
from pixart.serving.calls.schemas import order_of
from pixart.serving.calls.sent_pictures import picture_of_text
from pixart.serving.orders import MEDIA_TYPES, Format, Order
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

ENLARGERS = ("PixArt", "Latent")  # names of our one way; Latent is what clients begin with
VAES = ("Automatic", "None")
SCHEDULES = {"automatic": "Automatic", "karras": "Karras"}
_SUFFIXES = {"": "", "automatic": "", "karras": "-karras"}
_LORA = re.compile(r"<lora:([^:<>]*)(?::([^:<>]*))?>", re.IGNORECASE)
# Beginnings of A1111's names for what prepares control pictures.
MODULES = {
    "none": "none", "canny": "canny", "softedge_hed": "hed", "hed": "hed", "depth": "depth",
    "openpose": "pose", "pose": "pose",
}  # fmt: skip
_UNIT = {  # of ControlNet, at the values that ask for nothing that is not here
    "control_mode": (0, "Balanced", "balanced"),
    "resize_mode": (0, 1, "Just Resize", "Crop and Resize", "Inner Fit (Scale to Fit)"),
}
MOST_SCALE = 16
MOST_NUMBER = 1e9  # of a ControlNet unit, before the setting itself bounds it
PREVIEW_EVERY = 5  # steps, for those who ask for progress


def order_from(body: Text, service: Service) -> Order:
    """What a body orders. Opens its pictures: no work for an event loop. Refusal (400, 413) with the first
    field that cannot be."""
    check_off(body)
    prompt, loras = without_loras(body.prompt, service.offer.loras)
    settings: dict[str, Any] = {
        "prompt": prompt,
        "negative": body.negative_prompt,
        "seed": body.seed,
        "steps": body.steps,
        "guidance": body.cfg_scale,
        "scheduler": scheduler_of(body.sampler_name or body.sampler_index, body.scheduler),
        "width": body.width or None,
        "height": body.height or None,
    }
    if isinstance(body, Picture):
        settings |= _from_picture(body, service)
    if body.enable_hr:
        settings |= _larger(body)
    units = [*_units(body)]
    if units:
        settings |= _controlled(units, body)
    override = dict(body.override_settings or {})
    fast = override.pop("fast", None)
    if fast not in (None, "", OFF):
        raise invalid("fast", f"must be {OFF} or left out", fast)
    return order_of(
        settings,
        service,
        loras=() if body.disable_extra_networks else loras,
        controls=tuple(_control_name(unit, service) for unit in units),
        n=_count(body, service.limits.images),
        preview_every=PREVIEW_EVERY,
        format=_format(override, service),
        fast=fast != OFF,
    )


def scheduler_of(sampler: str | None, schedule: str | None) -> str | None:
    """Ours, from A1111's names or our own; None for the model's. Refusal (400) with the nearest name."""
    suffix = _SUFFIXES.get((schedule or "").strip().lower())
    if suffix is None:
        raise invalid("scheduler", f"must be one of {', '.join(SCHEDULES.values())}", schedule)
    if not sampler:
        if suffix:
            raise invalid("scheduler", "must go with a sampler_name", schedule)
        return None
    known = {theirs.lower(): ours for ours, theirs in SAMPLERS.items()} | {s: s for s in SAMPLERS}
    ours = known.get(sampler.strip().lower())
    if ours is None:
        meant = near(sampler, SAMPLERS.values(), 0)
        must = f"must be one of /sdapi/v1/samplers, such as {meant}"
        raise invalid("sampler_name", must, sampler)
    if suffix and not ours.endswith(suffix):
        ours += suffix
    if ours not in SAMPLERS:
        raise invalid("scheduler", f"must be Automatic with {sampler}", schedule)
    return ours


def without_loras(prompt: str, known: tuple[str, ...]) -> tuple[str, tuple[tuple[str, float], ...]]:
    """A prompt without its <lora:NAME:WEIGHT>, and those; the weight is 1 unless given."""
    found = []
    for match in _LORA.finditer(prompt):
        name, weight = match[1].strip(), match[2]
        if name not in known:
            meant = near(name, known, 0)
            must = f"such as {meant}" if meant else "of which there are none here"
            raise invalid("prompt", f"must name LoRAs of /sdapi/v1/loras, {must}", match[0])
        try:
            found.append((name, float(weight) if weight else 1.0))
        except ValueError as error:
            raise invalid("prompt", "must have a number as a LoRA's weight", match[0]) from error
    return (_LORA.sub("", prompt).strip() if found else prompt), tuple(found)


def is_model(name: object, service: Service) -> bool:
    """Whether a checkpoint's name or title is that of the model that is served."""
    return _without_hash(str(name)).removesuffix(".safetensors") == service.offer.model


def _without_hash(title: str) -> str:
    """A name as A1111 writes it in its lists: `name [hash]`."""
    name, bracket, hash = title.rpartition("[")
    return name.rstrip() if bracket and re.fullmatch(r"[0-9a-f]*\]", hash) else title


def check_options(values: Mapping[str, Any], service: Service) -> None:
    """Refusal (400) for the first option that would change how pictures are drawn."""
    for name, value in values.items():
        if name == "sd_model_checkpoint" and value:
            if not is_model(value, service):
                raise invalid(name, f"must be {service.offer.model}, which is served", value)
        elif name == "CLIP_stop_at_last_layers":
            if value not in (None, 0, 1):
                raise invalid(name, "must be 1, T5 has no layers to skip", value)
        elif name == "sd_vae":
            if value and value not in VAES:
                raise invalid(name, f"must be {' or '.join(VAES)}", value)
        elif name == "samples_format":
            if _formats().get(str(value).lower()) is None:
                raise invalid(name, f"must be one of {', '.join(MEDIA_TYPES)}", value)
        elif value not in (None, "", False, []):
            raise invalid(name, "must be left out, there is no such option here", value)


def _formats() -> dict[str, Format]:
    return {**{name: name for name in MEDIA_TYPES}, "jpeg": "jpg"}


def _format(values: Mapping[str, Any], service: Service) -> Format:
    check_options(values, service)
    return _formats()[str(values.get("samples_format", "png")).lower()]


def _count(body: Text, most: int) -> int:
    size, times = (1 if one is None else one for one in (body.batch_size, body.n_iter))
    if min(size, times) < 1 or size * times > most:
        raise invalid(
            "batch_size", f"times n_iter must be from 1 to {most}", f"{size} times {times}"
        )
    return size * times


def _from_picture(body: Picture, service: Service) -> dict[str, Any]:
    """A picture of the very size that is asked for stays as it is, another is cut to it."""
    if len(body.init_images) != 1:
        raise invalid("init_images", "must be one picture", len(body.init_images))
    image = picture_of_text(body.init_images[0], "init_images", service.limits)
    has_size = bool(body.width or body.height)
    is_own = upright(image).size == (body.width, body.height)
    settings: dict[str, Any] = {
        "image": image,
        "strength": STRENGTH if body.denoising_strength is None else body.denoising_strength,
        "fit": "exact" if is_own else "crop" if has_size else None,
    }
    if is_own:
        settings |= {"width": None, "height": None}
    if not body.mask:
        return settings
    blurs = {MASK_BLUR if body.mask_blur is None else body.mask_blur}
    sides = {one for one in (body.mask_blur_x, body.mask_blur_y) if one is not None}
    if len(sides or blurs) > 1:
        raise invalid("mask_blur_x", "must be the same as mask_blur_y", body.mask_blur_x)
    return settings | {
        "mask": picture_of_text(body.mask, "mask", service.limits),
        "mask_blur": max(sides or blurs),
        "invert_mask": bool(body.inpainting_mask_invert),
    }


def _larger(body: Text) -> dict[str, Any]:
    if body.hr_upscaler and body.hr_upscaler not in ENLARGERS:
        raise invalid("hr_upscaler", f"must be {' or '.join(ENLARGERS)}", body.hr_upscaler)
    if body.hr_resize_x or body.hr_resize_y:
        upscale = f"{body.hr_resize_x or 0}x{body.hr_resize_y or 0}"
    else:
        scale = 2.0 if body.hr_scale is None else body.hr_scale
        if not 1 <= scale <= MOST_SCALE:
            raise invalid("hr_scale", f"must be from 1 to {MOST_SCALE}", scale)
        upscale = f"{scale:.6g}x"
    strength = None if isinstance(body, Picture) else body.denoising_strength
    return {"upscale": upscale, "upscale_strength": strength, "upscale_guidance": body.hr_cfg}


def _units(body: Text) -> Iterator[Mapping[str, Any]]:
    """ControlNet's units that are switched on. Refusal (400) for another script that is."""
    for name, script in (body.alwayson_scripts or {}).items():
        args = script.get("args", []) if isinstance(script, dict) else script
        if not isinstance(args, list):
            raise invalid("alwayson_scripts", "must have lists of args", name)
        if name.lower() != "controlnet":
            if args and args[0] not in (False, None):
                raise invalid("alwayson_scripts", "must be of ControlNet, or off", name)
            continue
        for unit in args:
            if isinstance(unit, dict):
                if unit.get("enabled", True):
                    yield unit
            elif unit:
                raise invalid("alwayson_scripts", "must have units that are objects", name)


def _controlled(units: list[Mapping[str, Any]], body: Text) -> dict[str, Any]:
    spans = [
        (_number(one, "guidance_start", 0.0), _number(one, "guidance_end", 1.0)) for one in units
    ]
    return {
        "control_image": [_unit_picture(one, body) for one in units],
        "control_preprocessor": [_module(one) for one in units],
        "control_scale": [_number(one, "weight", 1.0) for one in units],
        "control_interval": spans,
    }


def _unit_picture(unit: Mapping[str, Any], body: Text) -> str:
    """Its own, else that of img2img."""
    found = unit.get("image") or unit.get("input_image")
    if isinstance(found, dict):
        found = found.get("image")
    if not found and isinstance(body, Picture):
        found = body.init_images[0]
    if not isinstance(found, str) or not found:
        raise Refusal(
            400, "image of a ControlNet unit must be given as base64", field="alwayson_scripts"
        )
    for name, taken in _UNIT.items():
        if (value := unit.get(name)) is not None and value not in taken:
            raise invalid(f"{name} of a ControlNet unit", f"must be {taken[1]}", value)
    return found


def _module(unit: Mapping[str, Any]) -> str:
    name = str(unit.get("module") or "none")
    for start, ours in MODULES.items():
        if name.lower().startswith(start):
            return ours
    raise invalid(
        "module of a ControlNet unit",
        "must be one of none, canny, softedge_hed, depth, openpose",
        name,
    )


def _control_name(unit: Mapping[str, Any], service: Service) -> str:
    """Of the service's list; A1111 writes a hash behind it."""
    text = str(unit.get("model") or "")
    name = _without_hash(text)
    if name in service.offer.controls:
        return name
    meant = near(name, service.offer.controls, 0)
    must = (
        f"must be one of /controlnet/model_list, such as {meant}"
        if meant
        else "must be off: none is here"
    )
    raise invalid("model of a ControlNet unit", must, text)


def _number(unit: Mapping[str, Any], name: str, default: float) -> float:
    value = unit.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MOST_NUMBER:
        raise invalid(f"{name} of a ControlNet unit", "must be a number", value)
    return float(value)
