"""YAML files as plain values, bounded: whatever a file holds, it is read or refused within a second.

Values are those of YAML 1.2: 1e-4 is a number, 14:2 and 2026-01-01 are text. YAML 1.1 takes them for a
text, for 842 and for a date. Built from the events of PyYAML's parser and not by its constructors, which
nest as deep as the file, expand anchors without end and let a key stand twice.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pixart.files import read_bounded

MAX_BYTES = 2**18
MAX_VALUES = 4_000  # aliases count as often as they are named
MAX_DEPTH = 32
MAX_DIGITS = 64
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_WORDS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}


def read_yaml(path: Path) -> Any:
    """The values of a file: mappings, lists, texts, numbers, booleans and None. Raises ValueError in one
    line that names the file, and the line and the field in it; OSError for what cannot be read."""
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text ({error.reason} at {error.start})") from None
    try:
        return _Document(text).value()
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    # Escapes and directives with absurd numbers are no YAMLError to PyYAML.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ValueError(f"{path}: is not YAML ({reason})") from error


class _Refused(ValueError):
    """YAML, and none that is read."""

    def __init__(self, event: Any, place: str, rule: str) -> None:
        super().__init__(f"line {event.start_mark.line + 1}: {_short(place)} {rule}")


def _short(place: str) -> str:
    return f"{place[:40]}…" if len(place) > 41 else place or "the document"


class _Parser(yaml.SafeLoader):
    """Events, and the tag of a word that has none."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if not pair[0].endswith((":int", ":float", ":timestamp"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for kind, pattern in (
    ("int", r"[-+]?(0|[1-9][0-9_]*)$"),
    ("float", r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"),
    ("float", r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
):
    _Parser.add_implicit_resolver(f"{_TAG}{kind}", re.compile(pattern), "-+0123456789.")


class _Document:
    def __init__(self, text: str) -> None:
        self._parser = _Parser(text)
        self._left = MAX_VALUES
        self._anchors: dict[str, tuple[Any, int, int]] = {}  # value, how many values, how deep

    def value(self) -> Any:
        """The one document of the text; None where there is none."""
        events = self._parser
        events.get_event()
        if events.check_event(yaml.StreamEndEvent):
            return None
        events.get_event()
        found = self._node(events.get_event(), "", 0)[0]
        events.get_event()
        if not events.check_event(yaml.StreamEndEvent):
            raise _Refused(events.get_event(), "", "must be the only one of its file")
        return found

    def _node(self, event: Any, place: str, depth: int) -> tuple[Any, int]:
        """A value, and how many levels it has."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, place, depth)
        self._spend(1, event, place)
        self._check_depth(depth, event, place)
        before = self._left
        if isinstance(event, yaml.ScalarEvent):
            value, levels = self._scalar(event, place), 0
        else:
            read = self._mapping if isinstance(event, yaml.MappingStartEvent) else self._list
            value, levels = read(event, place, depth)
        if event.anchor:
            self._anchors[event.anchor] = value, 1 + before - self._left, levels
        return value, levels

    def _alias(self, event: yaml.AliasEvent, place: str, depth: int) -> tuple[Any, int]:
        if event.anchor not in self._anchors:  # nor is one that is still being read
            raise _Refused(event, place, f"must name what stands above it, got *{event.anchor}")
        value, count, levels = self._anchors[event.anchor]
        self._spend(count, event, place)
        self._check_depth(depth + levels, event, place)
        return value, levels

    def _spend(self, count: int, event: yaml.Event, place: str) -> None:
        self._left -= count
        if self._left < 0:
            raise _Refused(event, place, f"is beyond the {MAX_VALUES} values that a file may have")

    def _check_depth(self, depth: int, event: yaml.Event, place: str) -> None:
        if depth > MAX_DEPTH:
            raise _Refused(event, place, f"must nest at most {MAX_DEPTH} levels deep")

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := self._parser.get_event(), end):
            yield event

    def _list(self, event: yaml.Event, place: str, depth: int) -> tuple[Any, int]:
        _check_tag(event, "seq", place)
        values: list[Any] = []
        levels = 0
        for item in self._until(yaml.SequenceEndEvent):
            value, below = self._node(item, f"{place}[{len(values)}]", depth + 1)
            values.append(value)
            levels = max(levels, below + 1)
        return values, levels

    def _mapping(self, event: yaml.Event, place: str, depth: int) -> tuple[Any, int]:
        _check_tag(event, "map", place)
        values: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        levels = 0
        for key in self._until(yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise _Refused(key, place, "must have names that are text")
            inside = f"{place}.{key.value}".strip(".")
            item = self._parser.get_event()
            value, below = self._node(item, inside, depth + 1)
            levels = max(levels, below + 1)
            if self._tag_of(key) == _MERGE:
                for one in self._mappings(value, item, inside):
                    merged = {**one, **merged}
                continue
            name = self._scalar(key, inside)
            if name in values:
                raise _Refused(key, inside, "stands there twice")
            values[name] = value
        return {**merged, **values}, levels

    def _mappings(self, value: Any, event: yaml.Event, place: str) -> list[dict[Any, Any]]:
        """What a key << takes over: the fields of one mapping or of several."""
        several = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in several):
            raise _Refused(event, place, "must be a mapping, or a list of mappings")
        self._spend(sum(map(len, several)), event, place)
        return several

    def _tag_of(self, event: yaml.ScalarEvent) -> str:
        if event.tag is None or event.tag == "!":
            return self._parser.resolve(yaml.ScalarNode, event.value, event.implicit)  # type: ignore[no-any-return]
        return str(event.tag)

    def _scalar(self, event: yaml.ScalarEvent, place: str) -> Any:
        tag = self._tag_of(event)
        make = _SCALARS.get(tag)
        if make is None:
            raise _Refused(event, place, f"must be a plain value, got {tag.replace(_TAG, '!!')}")
        try:
            return make(event.value)
        except (ValueError, KeyError):
            shown = event.value if len(event.value) < 60 else f"{event.value[:60]}…"
            what = tag.removeprefix(_TAG)
            raise _Refused(event, place, f"must be readable as {what}, got {shown!r}") from None


def _check_tag(event: Any, kind: str, place: str) -> None:
    if event.tag not in (None, "!", f"{_TAG}{kind}"):
        tag = event.tag.replace(_TAG, "!!")
        raise _Refused(event, place, f"must be a plain value, got {tag}")


def _text(word: str) -> str:
    word.encode()  # lone surrogates, which escapes can make
    if "\0" in word:
        raise ValueError("no path or prompt has NUL")
    return word


def _integer(word: str) -> int:
    if len(word) > MAX_DIGITS:
        raise ValueError("no setting is that large")
    return int(word.replace("_", ""))


def _float(word: str) -> float:
    word = word.replace("_", "").lower()
    return float(word.replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}str": _text,
    f"{_TAG}value": _text,  # =
    f"{_TAG}int": _integer,
    f"{_TAG}float": _float,
    f"{_TAG}bool": lambda word: _WORDS[word.lower()],
    f"{_TAG}null": lambda word: None,
}
