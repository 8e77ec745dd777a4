"""What the body of a request says: JSON, or a form with files, as one and the same values."""

import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pixart.files import parse_json, printable
from pixart.serving.calls.schemas import parsed
from pixart.serving.refusal import Refusal

FORM = "multipart/form-data"
MOST_FIELDS, MOST_FILES = 200, 20
_INSIDE = re.compile(r"(\w+)\[(\w[\w. -]*)?\]", re.ASCII)  # image[], loras[name]


async def values_of(request: Request, model: type[BaseModel], most: int) -> dict[str, Any]:
    """The values of a body, checked by the model. Files of a form are bytes. most: bytes of it. Refusal
    (400) for what is no JSON and no form, and for the first value that the model does not take."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FORM:
        return parsed(model, _json(await request.body(), "body", most))
    try:
        form = await request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=most)
    except HTTPException as error:
        raise Refusal(400, f"body is no form: {error.detail}", code="invalid_form") from error
    try:
        return parsed(model, await _values(form, model, most))
    finally:
        await form.close()


def body_of(
    model: type[BaseModel], example: Mapping[str, Any], *, form: bool = False
) -> dict[str, Any]:
    """What a document says of a body, for `openapi_extra`. form: whether it may be a form too."""
    schema = model.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if form:
        content[FORM] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}


async def _values(form: FormData, model: type[BaseModel], most: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, sent in form.multi_items():
        inside = _INSIDE.fullmatch(key)
        name, part = (inside[1], inside[2]) if inside else (key, None)
        value = (
            await sent.read() if isinstance(sent, UploadFile) else _typed(name, sent, model, most)
        )
        if part is not None:
            _keep_part(found, name, part, value)
        elif name in found or inside:
            before = found.get(name, [])
            found[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            found[name] = value
    return found


def _keep_part(found: dict[str, Any], name: str, part: str, value: Any) -> None:
    parts = found.setdefault(name, {})
    if not isinstance(parts, dict):
        raise Refusal(400, f"{name} must be given in one way, got {name} and {name}[]", field=name)
    # What stands in brackets is always a number here: the weights of LoRAs.
    parts[part] = _number(value)


def _typed(name: str, text: str, model: type[BaseModel], most: int) -> Any:
    """A text as it is where the field takes texts, else what it says as JSON: 20, true, [0, 1]. An empty
    one is a field that was left empty."""
    if name not in model.model_fields or _takes_text(model.model_fields[name].annotation):
        return text
    if not text.strip():
        return None
    try:
        return parse_json(text, name, most)
    except ValueError:
        return text  # which the field refuses by its own words


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _takes_text(kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        return _takes_text(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return any(map(_takes_text, get_args(kind)))
    is_word = any(isinstance(one, str) for one in get_args(kind))  # of a Literal
    return kind is str or is_word


def _json(content: bytes, name: str, most: int) -> Mapping[str, Any]:
    try:
        values = parse_json(content, name, most, unique=True)
    except ValueError as error:
        raise Refusal(400, printable(str(error)), code="invalid_json") from error
    return values  # type: ignore[no-any-return]  # `parsed` tells what it is
