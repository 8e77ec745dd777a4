"""Files of prompts: .txt with one a line, .jsonl with an object a line."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pixart.files import parse_json
from pixart.pipeline.limits import ALPHA, PICTURES
from pixart.pipeline.request import SETTINGS, check_keys, checked

MAX_BYTES = 2**28  # of a list that is held whole: a million long prompts; devices never end
MAX_LINE = 2**24  # bytes


@dataclass(frozen=True)
class Line:
    """Settings of a picture and, under "name", of its file. place: file and line, for messages."""

    values: dict[str, Any]
    place: str = ""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Begin what a ValueError says with the place that it came from."""
    try:
        yield
    except ValueError as error:
        if not place or str(error).startswith(place) or hasattr(error, "exit_code"):
            raise
        raise ValueError(f"{place}: {error}") from error


def read_prompts(path: Path) -> list[Line]:
    """The lines of a .txt or .jsonl file. Empty lines are passed over, and in .txt those that begin with
    `#`; a prompt that does is written `\\#`. Pictures that a line names lie beside the file, unless their
    path begins at the root. ValueError names the file, and the line."""
    lines = [line for _, _, line in scan(io.BytesIO(_read(path)), path)]
    if not lines:
        raise ValueError(f"{path}: holds no prompt")
    return lines


def scan(stream: BinaryIO, path: Path, number: int = 1) -> Iterator[tuple[int, int, Line]]:
    """What `read_prompts` says of the lines from here on, one after another, each with the byte and the
    number in the file at which it begins. number: of the first."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise ValueError(f"{path}: must be text, a prompt a line, or .jsonl, an object a line")
    is_text, folder, offset = suffix != ".jsonl", path.parent, stream.tell()
    # Not splitlines, which also cuts where JSON allows it, at U+2028.
    while content := stream.readline(MAX_LINE + 1):
        place = f"{path}, line {number}"
        if len(content) > MAX_LINE:
            raise ValueError(f"{place}: must be at most {MAX_LINE:,} bytes, it is longer")
        try:
            # Windows editors begin with a mark.
            line = content.decode("utf-8-sig" if offset == 0 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: is not UTF-8 text ({error.reason})") from error
        if is_text and line and line[0] != "#":
            yield (
                offset,
                number,
                Line({"prompt": line[1:] if line.startswith("\\#") else line}, place),
            )
        elif line and not is_text:
            yield offset, number, Line(_read_line(line, place, folder), place)
        offset, number = offset + len(content), number + 1


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{path}: must be at most {MAX_BYTES:,} bytes, it is longer; tars take any length "
            "(--output tars/{shard:05d}.tar)"
        )
    return content


def located(settings: Mapping[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """The settings, with the files of pictures as paths from the root: a picture that is drawn from them
    may be drawn again elsewhere. folder: in which relative ones lie."""

    def path_of(text: str) -> str:
        return text and os.path.abspath(os.path.join(folder, os.path.expanduser(text)))

    found = dict(settings)
    for name in PICTURES:
        value = found.get(name)
        if isinstance(value, tuple):
            found[name] = tuple(map(path_of, value))
        elif value is not None and (name, value) != ("mask", ALPHA):
            found[name] = path_of(value)
    return found


def _read_line(line: str, place: str, folder: Path) -> dict[str, Any]:
    """With the settings of the line alone: what goes with what is known when options are added."""
    values = parse_json(line, place, unique=True)
    if not isinstance(values, dict) or not (values.get("prompt") or values.get("image")):
        raise ValueError(f'{place}: must be an object with a "prompt"')
    with naming(place):
        check_keys(values, ("name", "version", *SETTINGS))  # from_dict checks the version
        if not isinstance(values.get("name", ""), str):
            raise ValueError(f"name must be text, got {values['name']!r}")
        for name in PICTURES:
            if values.get(name) is not None:
                values[name] = checked(name, values[name])
    return {"prompt": "", **located(values, folder)}
