"""Settings out of a picture's file: ours, and what A1111 and its kin write into theirs."""

import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from pixart.pipeline.metadata import SAMPLERS, Metadata, NewerVersionError
from pixart.pipeline.pictures import read_texts
from pixart.pipeline.request import checked
from pixart.serving.a1111.infotext import parse_parameters as parse_infotext
from pixart.serving.page.form import Read, values_of
from pixart.serving.service import Offer

HEAD = 2**20  # bytes of a PNG or JPEG in which its texts are; WebP has them at its end
_NOTHING = "the picture carries no settings that can be read: it was drawn elsewhere, or saved anew"


def metadata_of(content: bytes) -> Metadata:
    """What a file of ours carries, from its first bytes. ValueError for any other."""
    return Metadata.from_text(read_texts(content, "the file")[0])


def read_settings(content: bytes, offer: Offer) -> Read:
    """For the fields of the page. content: a file's first HEAD bytes, or all of it. ValueError, one line, for
    a file that carries none."""
    ours, parameters = read_texts(content, "the file")
    try:
        return _of_metadata(Metadata.from_text(ours), offer)
    except NewerVersionError as error:
        raise ValueError(f"the picture {error}") from error
    except ValueError:
        return parse_parameters(parameters)


def _of_metadata(metadata: Metadata, offer: Offer) -> Read:
    """As it was asked for where the same model draws here, so that the file comes out the same to the byte;
    of another's, everything that was chosen for it."""
    drawn_here = _name(str(metadata.model["model"])) == _name(offer.model)
    request = metadata.asked if drawn_here else metadata.request
    values, left = values_of(request), []
    pictures = [name for name in ("image", "mask", "control_image") if getattr(request, name)]
    if pictures:
        left.append(
            "The picture that it began with or went by is not in the file: choose it again."
        )
    _add_loras(metadata, offer, values, left)
    controls = [_name(one) for one in metadata.model["control"]]
    if offered := [one for one in offer.controls if _name(one) in controls]:
        values |= _control_of(request, offered[0])
    if len(controls) > len(offered[:1]):
        left.append(f"Controls left out: {', '.join(controls[len(offered[:1]) :])}.")
    if not drawn_here:
        left.append(f"It was drawn by {_name(str(metadata.model['model']))}, another model.")
    return Read(values, left)


def _add_loras(metadata: Metadata, offer: Offer, values: dict[str, Any], left: list[str]) -> None:
    names, weights = [], []
    for one in metadata.model["lora"]:
        match = re.fullmatch(r"(.*?)(?::([-+.\de]+))?", one, re.DOTALL)
        place, weight = (match[1], match[2]) if match else (one, None)
        found = [name for name in offer.loras if name == place or _name(name) == _name(place)]
        if found:
            names.append(found[0])
            weights.append(weight or "1")
        else:
            left.append(f"The LoRA {_name(place)} is not among those that can be chosen here.")
    values |= {"loras": names, "weights": ", ".join(weights)}


def _control_of(request: Any, control: str) -> dict[str, Any]:
    def first(values: tuple[Any, ...] | None) -> Any:
        return values[0] if values else None

    start, end = first(request.control_interval) or (None, None)
    scale = first(request.control_scale)
    numbers = {"control_scale": scale, "control_start": start, "control_end": end}
    return {
        "control": control, "control_preprocessor": first(request.control_preprocessor) or "",
        **{name: "" if one is None else repr(one) for name, one in numbers.items()},
    }  # fmt: skip


def _name(place: str) -> str:
    name = PurePath(place).name
    return PurePath(name).stem if name.endswith((".safetensors", ".pth")) else name


_SCHEDULERS = {name.lower(): scheduler for scheduler, name in SAMPLERS.items()}
# Of A1111's names: the setting, and what is made of the text.
_KNOWN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int), "CFG scale": ("guidance", float), "Seed": ("seed", int), "Size": ("size", str),
    "Denoising strength": ("strength", float), "Mask blur": ("mask_blur", int),
}  # fmt: skip


def parse_parameters(text: str) -> Read:
    """Of the lines that A1111 and tools like it write: a prompt, a negative one, and a line of settings.
    ValueError where there is none."""
    settings = parse_infotext(text)
    if not settings.get("Steps", "").isdecimal():
        raise ValueError(_NOTHING)
    values: dict[str, Any] = {
        "prompt": settings["Prompt"],
        "negative": settings["Negative prompt"],
    }
    left = []
    for name, (setting, kind) in _KNOWN.items():
        if name in settings:
            try:
                values[setting] = str(checked(setting, kind(settings[name])))
            except ValueError:
                left.append(f"{name} was {settings[name][:40]}, which cannot be drawn with here.")
    values.update(_scheduler(settings, left))
    if "strength" in values or "mask_blur" in values:
        left.append("The picture that it began with is not in the file: choose it again.")
    return Read(values, left)


def _scheduler(settings: dict[str, str], left: list[str]) -> dict[str, str]:
    """Newer versions of A1111 tell the spacing of noise levels apart from the sampler."""
    sampler = settings.get("Sampler", "")
    spacing = settings.get("Schedule type", "")
    for name in (f"{sampler} {spacing}", sampler):
        if scheduler := _SCHEDULERS.get(name.strip().lower()):
            return {"scheduler": scheduler}
    if sampler:
        left.append(f"The sampler {sampler} is not there: the model's own is taken.")
    return {}
