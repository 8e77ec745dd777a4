"""What results.json and protocol.json look like, checked where they are opened: whoever reads them need not
ask again."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pixart.files import CheckpointError, printable

Kind = Callable[
    [str, Any], None
]  # the place, and what stands there; ValueError if it is another kind
MOST_NAME = 200  # bytes of a metric's, with its version
MOST = 2**53  # of a whole number: beyond, JSON's readers round


def check_results(file: str, values: Mapping[str, Any]) -> None:
    """ValueError in one line, with the file, the field and the way out, for what no evaluation writes."""
    _check(_RESULTS, file, values, "score it again")


def check_record(file: str, values: Mapping[str, Any]) -> None:
    """The same of protocol.json."""
    _check(_RECORD, file, values, "name another --output, and draw again")


def _check(kind: Kind, file: str, values: Mapping[str, Any], way_out: str) -> None:
    try:
        kind("", values)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; {way_out}") from None


def _refused(place: str, wanted: str, value: object) -> ValueError:
    return ValueError(f"{_start(place)}must be {wanted}, got {printable(repr(value), 80)}")


def _start(place: str) -> str:
    return f"{place} " if place else ""


def _text(place: str, value: Any) -> None:
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _refused(place, "text", value)


def _truth(place: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refused(place, "true or false", value)


def _number(place: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise _refused(place, "a finite number", value)


def _count(place: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < MOST:
        raise _refused(place, "a whole number from 0 up", value)


def _anything(place: str, value: Any) -> None:
    """Settings, of any shape; JSON has no infinity and no half letters."""
    if isinstance(value, dict):
        _every(_anything)(place, value)
    elif isinstance(value, list):
        _list(_anything)(place, value)
    elif isinstance(value, str):
        _text(place, value)
    elif value is not None and not isinstance(value, bool):
        _number(place, value)


def _settings(place: str, value: Any) -> None:
    _every(_anything)(place, value)


def _or_null(kind: Kind) -> Kind:
    return lambda place, value: None if value is None else kind(place, value)


def _list(kind: Kind) -> Kind:
    def check(place: str, value: Any) -> None:
        if not isinstance(value, list):
            raise _refused(place, "a list", value)
        for number, one in enumerate(value):
            kind(f"{place}[{number}]", one)

    return check


def _every(kind: Kind) -> Kind:
    """A mapping of any names to one kind."""

    def check(place: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _refused(place, "a JSON object", value)
        for name, one in value.items():
            _text(f"a name in {place}", name)
            kind(f"{place}.{name}" if place else name, one)

    return check


def _fields(must: Mapping[str, Kind], may: Mapping[str, Kind] | None = None) -> Kind:
    """A mapping with fields of their own kinds. Others are of no concern, but are JSON."""
    known = {**must, **(may or {})}

    def check(place: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _refused(place, "a JSON object", value)
        if lacking := [name for name in must if name not in value]:
            names = f"{', '.join([*must][:-1])} and {[*must][-1]}" if len(must) > 1 else [*must][0]
            raise ValueError(f"{_start(place)}must have {names}, it has no {lacking[0]}")
        for name, one in value.items():
            _text(f"a name in {place}", name)
            known.get(name, _anything)(f"{place}.{name}" if place else name, one)

    return check


def _ends(kind: Kind) -> Kind:
    """Of an interval whose value lies between its ends, where all are there."""

    def check(place: str, value: Any) -> None:
        kind(place, value)
        told = {"low": -math.inf, "high": math.inf}
        low, high = (end if (end := value[name]) is not None else told[name] for name in told)
        if low > high:
            raise ValueError(
                f"{place} must have numbers, low up to high, got {printable(repr(value), 200)}"
            )

    return check


_TEXTS = _list(_text)
_END = _or_null(_number)  # null: nobody can tell it
_NUMBER = _ends(
    _fields(
        {"value": _END, "low": _END, "high": _END, "n": _count}, {"method": _text, "notes": _TEXTS}
    )
)
_PAPER = _fields(
    {"value": _number}, {"source": _text, "same_protocol": _truth, "because": _or_null(_TEXTS)}
)
_METRIC = _fields(
    {"values": _every(_NUMBER)},
    {
        "version": _text, "unit": _text, "source": _text, "higher_is_better": _truth,
        "per_picture": _truth, "constants": _settings,
        "categories": _or_null(_every(_every(_NUMBER))), "paper": _or_null(_every(_PAPER)),
    },
)  # fmt: skip


def _metrics(place: str, value: Any) -> None:
    """Their scores lie in folders of their names: what is too long for one is nobody's."""
    _every(_METRIC)(place, value)
    for name, one in value.items():
        if len(f"{name}{one.get('version', '')}".encode()) > MOST_NAME:
            raise ValueError(
                f"{place} must have names and versions of at most {MOST_NAME} bytes, got "
                f"{printable(name, 80)}"
            )


_COLUMN = _fields(
    {
        "name": _text, "ours": _or_null(_NUMBER), "paper": _END, "higher_is_better": _truth,
        "unconfirmed": _truth, "same_protocol": _truth, "because": _TEXTS, "verdict": _or_null(_text),
    }
)  # fmt: skip
_ROW = _fields({"name": _text, "values": _every(_END), "unconfirmed": _TEXTS})
_TABLE = _fields(
    {
        "source": _text, "title": _text, "row": _text, "model": _text, "columns": _list(_COLUMN),
        "rows": _list(_ROW),
    }
)  # fmt: skip
_PROTOCOL = _fields(
    {}, {"id": _text, "name": _text, "prompts": _count, "images_per_prompt": _count}
)
_RESULTS = _fields(
    {"metrics": _metrics, "protocol": _PROTOCOL},
    {
        "model": _or_null(_text), "weights": _or_null(_settings), "pictures": _count, "errors": _count,
        "paper": _or_null(_TABLE),
    },
)  # fmt: skip
_RECORD = _fields(
    {},
    {
        "id": _text, "name": _text, "prompts": _count, "prompts_sha256": _text, "changes": _TEXTS,
        "model": _or_null(_text), "weights": _or_null(_settings), "reference_digest": _or_null(_text),
        "resolved": _or_null(_fields({}, {"size": _or_null(_text)})),
        "model_options": _or_null(_settings),
    },
)  # fmt: skip
