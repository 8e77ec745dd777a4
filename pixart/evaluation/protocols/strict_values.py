"""Nested plain values, as YAML and JSON have them, into frozen dataclasses: strictly, in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")

_WORDS = {
    str: "text; put it in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def build(kind: type[Made], values: object, place: str = "") -> Made:
    """A dataclass of a mapping: every field of the kind that is annotated, no other, no kind turned into
    another but a whole number into a float. ValueError in one line that begins with the field's place."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{place or 'it'} must be a mapping of fields, got {_short(values)}")
    known = _hints(kind)  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"{_inside(place, key)} is unknown; {_nearest(key, known)}")
    for one in fields(kind):  # type: ignore[arg-type]
        if one.default is MISSING and one.default_factory is MISSING and one.name not in values:
            raise ValueError(f"{_inside(place, one.name)} must be given")
    given = {key: _value(known[key], value, _inside(place, key)) for key, value in values.items()}
    try:
        return kind(**given)
    except ValueError as error:  # of __post_init__, which names the field
        raise ValueError(_inside(place, str(error))) from None


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind) if one.init}


def _nearest(key: object, known: Mapping[str, Any]) -> str:
    near = get_close_matches(str(key), known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _inside(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _value(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _value(next(one for one in arguments if one is not NoneType), value, place)
    if is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, place)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{place} must be a list, got {_short(value)}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{place} must have {len(arguments)} items, got {_short(value)}")
        return tuple(_value(arguments[0], one, f"{place}[{k}]") for k, one in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{place} must be a mapping, got {_short(value)}")
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{place} must have names that are text, got {_short(key)}")
        return {key: _value(arguments[1], one, _inside(place, key)) for key, one in value.items()}
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{place} must be {_WORDS[kind]}, got {_short(value)}")
    return value
