"""What `clean` has measured so far, in a folder beside its output: so that it goes on where it was stopped.

    measured.jsonl     a line a picture, as they come; a later line of the same picture counts
    thumbnails.u8      of line "at" n, bytes n·THUMBNAIL to (n + 1)·THUMBNAIL

A picture is known by its path, the version of its file and its captions: a changed one is measured again.
In memory there are 16 bytes and a place in a table for each.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset.samples import Sample
from pixart.files import parse_json, written_aside
from pixart.locks import claimed

if TYPE_CHECKING:
    import numpy as np

LINES, THUMBNAILS, LOCK = "measured.jsonl", "thumbnails.u8", ".lock"
# Whether a line has all that is measured: those of another version have not.
IsWhole = Callable[[Mapping[str, Any]], bool]


def identity(*parts: object) -> int:
    """64 bits that tell values apart."""
    content = json.dumps(parts, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def identity_of(sample: Sample) -> int:
    """Of a picture, as it is now and with its captions."""
    return identity(sample.key, sample.version, dict(sample.captions))


class Measured:
    """The lines and thumbnails in a folder; opened by `opened`."""

    def __init__(self, folder: Path, thumbnail: int, is_whole: IsWhole) -> None:
        self.folder, self.thumbnail, self.is_whole = folder, thumbnail, is_whole
        self.lines = (folder / LINES).open("a+b")
        self.thumbnails = (folder / THUMBNAILS).open("a+b")
        self.count = self.thumbnails.seek(0, os.SEEK_END) // thumbnail
        self.thumbnails.truncate(self.count * thumbnail)  # one that broke off
        self.places: dict[int, int] = {}
        if not self._read():
            self._clear()
            self._read()

    def _read(self) -> bool:
        """Whether all lines can be used, but for one that broke off, which is cut away."""
        end, all_usable = 0, True
        self.places.clear()
        self.lines.seek(0)
        for content in self.lines:
            if not content.endswith(b"\n"):
                break
            line = self._usable(content)
            if line is None:
                all_usable = False
            else:
                self.places[line["id"]] = end
            end += len(content)
        self.lines.truncate(end)
        return all_usable

    def _usable(self, content: bytes) -> dict[str, Any] | None:
        line = _parsed(content)
        is_usable = line is not None and 0 <= line["at"] < self.count and self.is_whole(line)
        return line if is_usable else None

    def _clear(self) -> None:
        """Leave out for good what cannot be used: the place of a thumbnail that was lost will be that of
        another picture's."""
        path = self.folder / LINES
        with written_aside(path) as aside, aside.open("wb") as file:
            self.lines.seek(0)
            file.writelines(content for content in self.lines if self._usable(content))
        self.lines.close()
        self.lines = path.open("a+b")

    def add(self, values: dict[str, Any], thumbnail: bytes | None) -> None:
        """Write a picture's line. thumbnail: None where the line has "at" of one that is there."""
        if thumbnail is not None:
            self.thumbnails.write(thumbnail)
            self.thumbnails.flush()
            values = {**values, "at": self.count}
            self.count += 1
        place = self.lines.seek(0, os.SEEK_END)
        # In ASCII: a path that is no UTF-8 holds lone surrogates, which have no encoding.
        self.lines.write(json.dumps(values).encode() + b"\n")
        self.lines.flush()
        self.places[values["id"]] = place

    def get(self, of: int) -> dict[str, Any] | None:
        """The line of an identity."""
        return self.at(self.places[of]) if of in self.places else None

    def at(self, place: int) -> dict[str, Any]:
        """The line that begins at a byte."""
        self.lines.seek(place)
        line = _parsed(self.lines.readline())
        if line is None:
            raise RuntimeError(f"{self.folder / LINES} was damaged meanwhile; delete it")
        return line

    def view(self) -> "np.ndarray":
        """(lines, THUMBNAIL), in the file."""
        import numpy as np

        if not self.count:
            return np.zeros((0, self.thumbnail), np.uint8)
        shape = (self.count, self.thumbnail)
        return np.memmap(self.folder / THUMBNAILS, np.uint8, "r", shape=shape)

    def close(self) -> None:
        self.lines.close()
        self.thumbnails.close()


@contextmanager
def opened(folder: Path, thumbnail: int, is_whole: IsWhole) -> Iterator[Measured]:
    """What a folder holds. ValueError while another process writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder / LOCK, wait=False) as mine:
        if not mine:
            raise ValueError(f"output must be free, another process writes {folder}")
        measured = Measured(folder, thumbnail, is_whole)
        try:
            yield measured
        finally:
            measured.close()


def known_in(
    folder: Path, thumbnail: int, is_whole: IsWhole, scorers: Sequence[tuple[str, str]]
) -> set[int]:
    """Identities of what a folder has in full, as `opened` would find it; nothing is written."""
    try:
        count = (folder / THUMBNAILS).stat().st_size // thumbnail
        lines = (folder / LINES).open("rb")
    except FileNotFoundError:
        return set()
    known: set[int] = set()
    with lines:
        for content in lines:
            line = _parsed(content) if content.endswith(b"\n") else None
            if line is None or not 0 <= line["at"] < count or not is_whole(line):
                continue
            (known.discard if lacks(line, scorers) else known.add)(line["id"])
    return known


def scores_in(folder: Path) -> set[str]:
    """The names of scores that lines of a folder have."""
    found: set[str] = set()
    try:
        with (folder / LINES).open("rb") as lines:
            for content in lines:
                # Most have none, and there are many.
                line = _parsed(content) if b'"scored"' in content else None
                found.update(line.get("scored", ()) if line else ())
    except FileNotFoundError:
        pass
    return found


def lacks(line: dict[str, Any], scorers: Sequence[tuple[str, str]]) -> list[str]:
    """The names of scorers, (name, MODULE:FUNCTION), that a line has no score by."""
    by = line.get("scored", {})
    return [name for name, place in scorers if by.get(name) != place or line.get(name) is None]


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        line = parse_json(content, "line")
    except ValueError:
        return None
    is_line = isinstance(line, dict) and all(type(line.get(key)) is int for key in ("id", "at"))
    if is_line and not isinstance(line.get("scored", {}), dict):
        return None
    return line if is_line and isinstance(line.get("path"), str) else None
