"""What clients ask for: the settings of a request as JSON and forms have them, and the order that they
come to.

Every setting of `Request` may be sent, under its own name. Three of them are files on the command line and
pictures here: a client sends what is in them and never names one. `tile` and `tiles` are bounded by
pixart.serving.limits, since they decide how much memory a picture takes.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from pixart.files import printable
from pixart.pipeline.limits import ALPHA, FITS, MAX_BLUR, MAX_CONTROLS, MAX_SIDE, MIN_TILE, PICTURES
from pixart.pipeline.request import OF_DIFFUSERS, SETTINGS, Request, check_keys, checked, kinds_of
from pixart.serving.limits import MAX_WEIGHT, check_asked
from pixart.serving.orders import Format, Job, Order
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

if TYPE_CHECKING:
    from PIL.Image import Image

# A picture as it is sent: a file's bytes, base64 or a data URL of them, or one that is open already.
Sent: TypeAlias = "Image | bytes | str"
SEEDS = 2**32  # of which one is drawn where none is given: every client can hold such a number
RANDOM = -1  # as a seed, the same as none
# Names of other programs for settings of ours; a generator is no number, and a mask_image no picture alone.
OTHER_NAMES = {theirs: ours for theirs, ours in OF_DIFFUSERS.items() if theirs != "generator"}

_share = {"ge": 0, "le": 1}
# What of pixart.pipeline.limits can be told in a document.
RANGES: dict[str, dict[str, Any]] = {
    "seed": {"ge": RANDOM, "le": 2**64 - 1}, "height": {"ge": 1, "le": MAX_SIDE},
    "width": {"ge": 1, "le": MAX_SIDE}, "steps": {"ge": 1}, "guidance": {"ge": 0},
    "strength": {"gt": 0, "le": 1}, "mask_blur": {"ge": 0, "le": MAX_BLUR},
    "upscale_strength": {"gt": 0, "le": 1}, "upscale_guidance": {"ge": 0},
    "tiles": {"ge": MIN_TILE, "le": MAX_SIDE}, "guidance_rescale": _share,
    "apg_eta": {"ge": -1, "le": 1}, "apg_momentum": {"ge": -1, "le": 1}, "apg_norm": {"ge": 0},
    "pag": {"ge": 0},
}  # fmt: skip
# Which of them may be written in another way, as `Request` takes them.
_MORE_KINDS: dict[str, Any] = {
    "size": int, "timesteps": str, "upscale": int, "pag_blocks": int | list[int], "outpaint": list[int],
    "control_preprocessor": str, "control_scale": float, "control_interval": tuple[float, float],
}  # fmt: skip
_PICTURE = "base64 of a picture's file, or a data URL of it; in a form, the file"
_HELPS = {
    "prompt": "What to draw.",
    "seed": "Of the first picture; the next ones have the numbers after it. Left out, null or -1: by chance.",
    "image": f"A picture to begin with: {_PICTURE}. With upscale alone it is the one that is made larger.",
    "mask": f"What of image to draw anew, white in a picture of the same size: {_PICTURE}. alpha: where image "
    "is transparent.",
    "control_image": f"What controls go by, a picture for each: {_PICTURE}.",
}


class Sendable(BaseModel):
    """The fields of a body. Values are checked by `Request` itself, which takes no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"type": "object"})


def settings_model(name: str, **more: Any) -> type[Sendable]:
    """A model of all settings. more: further fields, or others for those of that name, each a type and a
    FieldInfo; see pydantic.create_model."""
    made = {one.name: (_kind(one.name), _field(one.name)) for one in fields(Request)}
    return create_model(name, __base__=Sendable, **(made | more))


def other_names() -> dict[str, Any]:
    """The names of other programs, as `more` of `settings_model`."""
    return {
        theirs: (
            _kind(ours),
            Field(None, description=f"Another name of {ours}.", **RANGES.get(ours, {})),
        )
        for theirs, ours in OTHER_NAMES.items()
        if ours not in PICTURES
    }


def sent_picture(help: str, *, several: bool = False, required: bool = False) -> Any:
    """A field that is a picture, or several. help: what it is."""
    kind: Any = str
    if several:
        kind = kind | Annotated[list[str], Field(min_length=1, max_length=MAX_CONTROLS)]
    kind = kind if required else kind | None
    default = ... if required else None
    help = f"{help} {_PICTURE[0].upper()}{_PICTURE[1:]}."
    return Annotated[kind, BeforeValidator(_checked_picture)], Field(default, description=help)


def ordering() -> dict[str, Any]:
    """What an order has beside the settings of its pictures, as `more` of `settings_model`."""
    return {
        "n": (
            int | None,
            Field(None, ge=1, description="Pictures, each with the next seed. Default 1."),
        ),
        "loras": (
            dict[str, float] | None,
            Field(None, description='Names of /v1/models with weights, such as {"sketch": 0.8}.'),
        ),
        "controls": (
            list[str] | str | None,
            Field(None, description="Names of /v1/models, one for each control_image."),
        ),
        "fast": (
            Literal["off"] | None,
            Field(None, description="off: without the plan of /v1/models. Default: by it, if any."),
        ),
    }


def parsed(model: type[BaseModel], values: object) -> dict[str, Any]:
    """The values as they were sent, all of them known and in range. Refusal (400) with the first that is
    not, and for an unknown field the near one."""
    if not isinstance(values, dict):
        raise Refusal(
            400, f"body must be an object, got {type(values).__name__}", code="invalid_json"
        )
    try:
        check_keys(values, model.model_fields)
        model.model_validate(values)
    except ValidationError as error:
        raise _refusal_of_first(error) from error
    except ValueError as error:
        key = next((str(key) for key in values if key not in model.model_fields), None)
        raise Refusal(400, printable(str(error)), code="unknown_parameter", field=key) from error
    return values


def ours(values: Mapping[str, Any]) -> dict[str, Any]:
    """With names of other programs turned into ours. Refusal (400) for a setting that is given twice."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        own = OTHER_NAMES.get(name, name)
        if own in found:
            raise Refusal(400, f"{own} must be given once, got it as {name} too", field=name)
        found[own] = value
    return found


def settings_of(request: Request) -> dict[str, Any]:
    """What draws a request again when it is sent, with the pictures that it was drawn from."""
    named = {name for name in PICTURES if getattr(request, name) != ALPHA}
    return {
        name: value
        for name, value in request.to_dict().items()
        if value is not None and name not in {"version", *named}
    }


def refusal_of(error: ValueError) -> Refusal:
    """What a client is told of a setting that no model, or not this one, draws with."""
    reason = printable(str(error))
    word = re.match(r"\w+", reason)
    name = word[0] if word else ""
    field = "control_image" if re.match(r"control-\d", reason) else name
    return Refusal(400, reason, code="invalid_value", field=field if field in SETTINGS else None)


def order_of(
    settings: Mapping[str, Any],
    service: Service,
    *,
    loras: Iterable[tuple[str, float]] = (),
    controls: Iterable[str] = (),
    n: int = 1,
    preview_every: int = 0,
    format: Format = "png",
    quality: int | None = None,
    fast: bool = True,
) -> Order:
    """The order of a client: n pictures, with the seeds from the one given, or from one by chance.

    settings: by the names of `Request`; image, mask and control_image hold what is `Sent`, the last one or
    several. loras, controls: by the names of the service's offer. The rest is as `Order` has it. Opens the
    pictures: no work for an event loop. Refusal (400, 413) that names the field.
    """
    _check_number("n", n, 1, service.limits.images)
    _check_number("preview_every", preview_every, 0, service.limits.steps)
    if quality is not None:
        _check_number("quality", quality, 1, 100)
        if format == "png":
            raise Refusal(
                400, "quality must be left out for png, which loses nothing", field="quality"
            )
    loras, controls = tuple(loras), tuple(controls)
    _check_names("loras", [name for name, _ in loras], service.offer.loras)
    _check_names("controls", controls, service.offer.controls)
    for name, weight in loras:
        _check_weight(name, weight)
    values = {name: value for name, value in settings.items() if value is not None}
    _check_known(values)
    pictures = _open_pictures(values, service)
    _check_controls(controls, values, service)
    requests = _requests(values, n)
    check_asked(requests, service.limits)
    return Order(requests, pictures, loras, controls, preview_every, format, quality, fast)


def submit(values: Mapping[str, Any], service: Service, owner: str, **how: Any) -> Job:
    """Order what a body says that has the fields of `ordering` beside settings. how: the rest of
    `order_of`. Refusal as there, and as `JobQueue.submit`."""
    values = dict(values)
    controls = values.pop("controls", None) or ()
    order = order_of(
        values,
        service,
        n=values.pop("n", None) or 1,
        loras=(values.pop("loras", None) or {}).items(),
        controls=(controls,) if isinstance(controls, str) else controls,
        fast=values.pop("fast", None) is None,
        **how,
    )
    try:
        return service.queue.submit(order, owner)
    except ValueError as error:
        raise refusal_of(error) from error


def _requests(values: dict[str, Any], n: int) -> tuple[Request, ...]:
    if values.get("seed", RANDOM) == RANDOM:
        values["seed"] = secrets.randbelow(SEEDS - n)
    try:
        first = Request(**values)
        return tuple(replace(first, seed=first.seed + number) for number in range(n))
    except ValueError as error:
        raise refusal_of(error) from error


def _check_known(values: Mapping[str, Any]) -> None:
    try:
        check_keys(values, SETTINGS)
    except ValueError as error:
        raise Refusal(400, printable(str(error)), code="unknown_parameter") from error
    for name in ("prompt", "negative"):
        if "\0" in str(values.get(name, "")):
            raise Refusal(400, f"{name} must be text without NUL", code="invalid_value", field=name)
    if "prompt" not in values:
        raise Refusal(400, "prompt must be given", code="missing_parameter", field="prompt")


def _open_pictures(values: dict[str, Any], service: Service) -> "dict[str, Image]":
    """The pictures of the settings, which name them from here on."""
    pictures: dict[str, Image] = {}

    def take(field: str, name: str, sent: Any) -> str:
        pictures[name] = open_sent(field, sent, service)
        _check_together(field, pictures.values(), service)
        return name

    for field in ("image", "mask"):
        if field in values and not (field == "mask" and values[field] == ALPHA):
            values[field] = take(field, field, values[field])
    sent = values.get("control_image")
    if sent is not None:
        several = list(sent) if isinstance(sent, list | tuple) else [sent]
        _check_number("control_image", len(several), 1, MAX_CONTROLS)
        values["control_image"] = tuple(
            take("control_image", f"control-{number}", one) for number, one in enumerate(several, 1)
        )
    return pictures


def _check_together(field: str, pictures: "Iterable[Image]", service: Service) -> None:
    """They wait in memory, decoded."""
    pixels, most = sum(one.width * one.height for one in pictures), service.limits.picture_pixels
    if pixels > most:
        reason = (
            f"{field} brings the pictures of this order to {pixels:,} pixels, at most are {most:,}"
        )
        raise Refusal(413, reason, code="over_limit", field=field)


def open_sent(field: str, sent: Any, service: Service) -> "Image":
    """A picture that is `Sent`. Refusal (400, 413) that names the field."""
    from PIL.Image import Image

    from pixart.serving.calls.sent_pictures import picture_of_bytes, picture_of_text

    if isinstance(sent, Image):
        return sent
    if isinstance(sent, bytes):
        return picture_of_bytes(sent, field, service.limits)
    if isinstance(sent, str):
        return picture_of_text(sent, field, service.limits)
    raise Refusal(400, f"{field} must be {_PICTURE}", code="invalid_value", field=field)


def _check_controls(controls: Sequence[str], values: Mapping[str, Any], service: Service) -> None:
    count = len(values.get("control_image", ()))
    if len(controls) != count:
        known = ", ".join(service.offer.controls) or "none here"
        raise Refusal(
            400,
            f"controls must name one for each control_image, got {len(controls)} for {count}; known: {known}",
            code="invalid_value",
            field="controls",
        )


def _check_names(field: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            shown = ", ".join(known) or "none here"
            reason = printable(
                f"{field} must be names of this service, got {name!r}; known: {shown}"
            )
            raise Refusal(400, reason, code="invalid_value", field=field)
    if len({*names}) < len(names) and field == "loras":
        raise Refusal(400, f"{field} must have each once", code="invalid_value", field=field)


def _check_weight(name: str, weight: object) -> None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not abs(weight) <= MAX_WEIGHT:  # type: ignore[arg-type]
        reason = (
            f"loras must have weights from -{MAX_WEIGHT} to {MAX_WEIGHT}, got {weight!r} for {name}"
        )
        raise Refusal(400, printable(reason), code="invalid_value", field="loras")


def _check_number(field: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        reason = f"{field} must be a whole number from {least} to {most}, got {value!r}"
        raise Refusal(400, printable(reason), code="invalid_value", field=field)


def _kind(name: str) -> Any:
    """The type of a field as a document has it, with the check of a request before it."""
    kinds = kinds_of(name)
    if name in PICTURES:
        return sent_picture("", several=name == "control_image")[0]
    kind = kinds[0]
    for more in (*kinds[1:], *filter(None, [_MORE_KINDS.get(name)])):
        kind = kind | more
    if name != "prompt":
        kind = kind | None
    return Annotated[kind, BeforeValidator(lambda value: _checked(name, value))]


def _checked_picture(value: Any) -> Any:
    """A picture, or what one may be; those of forms are bytes, which no document knows."""
    several = value if isinstance(value, list) and value else [value]
    if value is not None and not all(isinstance(one, str | bytes) for one in several):
        raise ValueError(f"must be {_PICTURE}")
    return None if value is None else "sent"


def _checked(name: str, value: Any) -> Any:
    if name == "seed" and (value is None or value == RANDOM):
        return RANDOM
    return None if value is None and name != "prompt" else checked(name, value)


def _field(name: str) -> Any:
    helps = {one.name: one.metadata.get("help", "") for one in fields(Request)}
    more: dict[str, Any] = dict(RANGES.get(name, {}))
    if name == "fit":
        more["json_schema_extra"] = {"enum": [*FITS, None]}
    text = _HELPS.get(name) or _without_dashes(helps[name])
    return Field(... if name == "prompt" else None, description=text, **more)


def _without_dashes(text: str) -> str:
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)


def _refusal_of_first(error: ValidationError) -> Refusal:
    """In our words where the check is ours, else in pydantic's."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return Refusal(400, f"{field} must be given", code="missing_parameter", field=field)
    cause = first.get("ctx", {}).get("error")
    reason = str(cause) if isinstance(cause, ValueError) else first["msg"].removeprefix("Input ")
    if not reason.startswith(tuple(SETTINGS)):
        place = ".".join(map(str, first["loc"][:2]))
        reason = f"{place} {reason}"
    return Refusal(400, printable(reason), code="invalid_value", field=field)
