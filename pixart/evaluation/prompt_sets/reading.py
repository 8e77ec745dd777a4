"""Files of strangers, read into prompts: bounded, and one line for whatever is wrong."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pixart.evaluation.prompt_sets.files import check_id
from pixart.evaluation.store.entries import Prompt
from pixart.files import listed, parse_json, printable, read_bounded, short

MAX_BYTES = 2**28  # COCO's captions have 32 MB, MJHQ-30K's and TIFA's files 10
MAX_PROMPT = 20_000  # characters; the longest of the published sets have some 2,000
MAX_PROMPTS = 1_000_000


@dataclass
class Read:
    """Prompts of a file, and what a reader must know of them, a sentence each."""

    prompts: list[Prompt]
    notes: list[str] = field(default_factory=list)


def read_text(path: Path) -> str:
    """UTF-8 text, with or without a byte order mark. ValueError for any other."""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text ({error.reason} at {error.start})") from None


def read_json_list(path: Path) -> list[Any]:
    """A file that holds a JSON list."""
    values = parse_json(read_bounded(path, MAX_BYTES), str(path), MAX_BYTES)
    if not isinstance(values, list):
        raise ValueError(f"{path}: must hold a JSON list, got a {type(values).__name__}")
    return values


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object, no key twice."""
    values = parse_json(read_bounded(path, MAX_BYTES), str(path), MAX_BYTES, unique=True)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got a {type(values).__name__}")
    return values


def text_lines(path: Path) -> list[str]:
    """Lines that are not empty."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def table_rows(
    path: Path, columns: Sequence[str], delimiter: str = ",", *, quoted: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table with a header, as {column: text}, each with its place. ValueError for a column that is
    not there, and for a row of another length."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(
        io.StringIO(read_text(path), newline=""), delimiter=delimiter, quoting=quoting
    )
    try:
        header = [name.strip() for name in next(rows, [])]
        if missing := [name for name in columns if name not in header]:
            raise ValueError(
                f"{path}: must have the columns {', '.join(columns)}, it lacks {', '.join(missing)}"
            )
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise ValueError(
                f"{path}: must have each column once, {twice[0]!r} is there several times"
            )
        for row in rows:
            if not any(row):
                continue
            place = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise ValueError(f"{place}: must have {len(header)} columns, got {len(row)}")
            yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: is no table ({error})") from None


def as_object(values: Any, place: str) -> dict[str, Any]:
    """ValueError for what is no JSON object."""
    if not isinstance(values, dict):
        raise ValueError(f"{place}: must be a JSON object, got a {type(values).__name__}")
    return values


def text_of(values: Mapping[str, Any], name: str, place: str) -> str:
    """A field that is text. ValueError where it is not."""
    if not isinstance(values.get(name), str):
        found = f"got {short(values[name])}" if name in values else f"it has {listed(values)}"
        raise ValueError(f"{place}: must have {name} as text, {found}")
    return str(values[name])


def number_of(values: Mapping[str, Any], name: str, place: str) -> int:
    """A field that is a whole number from 0 up."""
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        found = f"got {short(value)}" if name in values else f"it has {listed(values)}"
        raise ValueError(f"{place}: must have {name} as a whole number, {found}")
    return value


def texts_of(values: Mapping[str, Any], name: str, place: str) -> list[str]:
    """A field that is a list of texts."""
    found = values.get(name)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{place}: must have {name} as a list of texts, got {short(found)}")
    return found


def list_of(values: Mapping[str, Any], name: str, place: str) -> list[Any]:
    """A field that is a list."""
    found = values.get(name)
    if not isinstance(found, list):
        raise ValueError(f"{place}: must have {name} as a list, got {short(found)}")
    return found


def prompt_of(text: Any, place: str) -> str:
    """A prompt's text, without blanks around it and in one line. ValueError for what nobody could draw."""
    if not isinstance(text, str):
        raise ValueError(f"{place}: must be a prompt, got {short(text)}")
    text = re.sub(r"[\t\n\v\f\r]+", " ", text).strip()
    if not text or len(text) > MAX_PROMPT:
        raise ValueError(
            f"{place}: a prompt must have from 1 to {MAX_PROMPT:,} characters, got {len(text):,}"
        )
    return text


def checked(prompts: Sequence[Prompt], path: Path) -> None:
    """ValueError for no prompts, too many, an id that is no name for a folder, and an id twice."""
    if not prompts:
        raise ValueError(f"{path}: must hold prompts, it holds none")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{path}: must hold at most {MAX_PROMPTS:,} prompts, got {len(prompts):,}")
    seen: set[str] = set()
    for one in prompts:
        check_id(str(path), one.id)
        if one.id.casefold() in seen:  # one folder to some disks
            raise ValueError(f"{path}: ids must be unique, got {printable(one.id, 80)!r} twice")
        seen.add(one.id.casefold())
