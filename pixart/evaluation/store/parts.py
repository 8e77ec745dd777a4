"""What was computed of pictures, kept in parts of PART pictures: features and scores.

A part is written aside and renamed, and claimed by a lock that ends with its process: any number of
processes, started at any time, share the work. Within a part the work is done in batches at fixed
places, and a batch counts as done if each of its pictures is the one it was: so that every number has the
same bits whatever was stopped, resumed or shared.
"""

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.evaluation.metric import Score
from pixart.files import parse_json, printable, read_bounded, write_bytes
from pixart.locks import claimed
from pixart.progress import Bar, say

if TYPE_CHECKING:
    import numpy as np

    from pixart.evaluation.store.entries import Entry

PART = 512  # pictures
SAVED = 60.0  # seconds of work that are lost at most, unless a batch takes longer
MAX_PART = 2**32  # bytes
_HEAD = 2**16  # bytes of a picture that tell it from others, with its size


@dataclass(frozen=True)
class Row:
    """What is kept of a picture. picture: its identity. value: a Score, or features; None where there is an
    error: why there is no value."""

    key: str
    picture: str
    value: Any
    error: str = ""


def identity_of(path: Path) -> str | None:
    """SHA-1 of the first 64 KiB, and the size: of another picture, another. None if it cannot be read,
    or is no file: a named pipe might never end."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(_HEAD)
            size = file.seek(0, 2)
    except OSError:
        return None
    return f"{hashlib.sha1(head, usedforsecurity=False).hexdigest()}-{size}"


class Store:
    """A folder of parts. suffix: of their files."""

    suffix: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}{self.suffix}"

    def read(self, number: int) -> list[Row]:
        """The rows of a part, none if it is not there. ValueError if it is damaged."""
        path = self.path(number)
        if not path.is_file():
            return []
        return self._parse(path)

    def rows_of(self, number: int) -> dict[str, Row]:
        """The rows of a part by key; of a damaged one none, and a line says so."""
        try:
            return {row.key: row for row in self.read(number)}
        except (ValueError, OSError, TypeError, KeyError) as error:
            say(f"{self.path(number)}: is damaged and made again ({printable(str(error), 200)})")
            return {}

    def write(self, number: int, rows: Sequence[Row]) -> None:
        write_bytes(self.path(number), self._content(rows), durable=False)

    def remove_from(self, number: int) -> None:
        """Take away the parts of this number and above, which belong to pictures that are no more."""
        for path in self.folder.glob(f"part-*{self.suffix}"):
            digits = path.name.removeprefix("part-").removesuffix(self.suffix)
            if digits.isdigit() and int(digits) >= number:
                with suppress(OSError):
                    path.unlink()

    def _parse(self, path: Path) -> list[Row]:
        raise NotImplementedError

    def _content(self, rows: Sequence[Row]) -> bytes:
        raise NotImplementedError


class ScoreStore(Store):
    """Lines {"key", "value", "parts", "picture", "crc"}, or with an "error" in the place of a value."""

    suffix = ".jsonl"

    def _parse(self, path: Path) -> list[Row]:
        lines = read_bounded(path, MAX_PART).splitlines()
        return [_score_row(line, f"line {number}") for number, line in enumerate(lines, start=1)]

    def _content(self, rows: Sequence[Row]) -> bytes:
        return "".join(map(_score_line, rows)).encode()


def _score_line(row: Row) -> str:
    values: dict[str, Any] = {"key": row.key}
    if row.error:
        values["error"] = row.error
    else:
        values |= {"value": float(row.value.value)}
        values["parts"] = {name: float(part) for name, part in row.value.parts.items()}
    values["picture"] = row.picture
    text = json.dumps(values, allow_nan=False)
    return json.dumps({**values, "crc": zlib.crc32(text.encode())}) + "\n"


def _score_row(line: bytes, name: str) -> Row:
    values = parse_json(line, name)
    told = values.pop("crc")
    if zlib.crc32(json.dumps(values).encode()) != told:
        raise ValueError(f"{name}: is not what was written")
    if "error" in values:
        return Row(values["key"], values["picture"], None, values["error"])
    return Row(values["key"], values["picture"], Score(values["value"], values["parts"]))


class FeatureStore(Store):
    """A tensor `features`, fp32, of a row a picture; keys, identities and errors in the metadata."""

    suffix = ".safetensors"

    def _parse(self, path: Path) -> list[Row]:
        from pixart.tensors import read_safetensors

        tensors, told = read_safetensors(path)
        values = tensors["features"].numpy()
        rows = [Row(*one) for one in parse_json(told["errors"], "errors")]
        keys = parse_json(told["rows"], "rows")
        if len(keys) != len(values) or _digest(values) != told["digest"]:
            raise ValueError("features are not what was written")
        return rows + [
            Row(key, picture, value) for (key, picture), value in zip(keys, values, strict=True)
        ]

    def _content(self, rows: Sequence[Row]) -> bytes:
        import numpy as np
        from safetensors.numpy import save

        good = [row for row in rows if not row.error]
        values = np.stack([row.value for row in good]) if good else np.zeros((0, 0), np.float32)
        values = np.ascontiguousarray(values, np.float32)
        errors = [[row.key, row.picture, None, row.error] for row in rows if row.error]
        told = {
            "rows": json.dumps([[row.key, row.picture] for row in good]),
            "errors": json.dumps(errors),
            "digest": _digest(values),
        }
        return bytes(save({"features": values}, told))


def _digest(values: "np.ndarray") -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


Compute = Callable[[Iterator[list["Entry"]]], Iterator[list[Any]]]
"""Batches of entries -> for each entry a value, or an Exception that says why there is none."""


class Filling:
    """Fills a store for `entries`, in order of their keys. identities: of those that are there.

    batch: entries that are computed together, at fixed places.
    """

    def __init__(
        self,
        store: Store,
        entries: "Sequence[Entry]",
        identities: Mapping[str, str],
        batch: int,
    ) -> None:
        self.store, self.identities, self.batch = store, identities, batch
        self.parts = [entries[start : start + PART] for start in range(0, len(entries), PART)]

    def run(self, compute: Compute, what: str) -> None:
        """Compute what is not there, beside others that do the same, and wait for what they do."""
        total = sum(len(self._present(part)) for part in self.parts)
        with Bar(what, total) as bar:
            waiting = [number for number in range(len(self.parts)) if not self._is_done(number)]
            done = [n for n in range(len(self.parts)) if n not in set(waiting)]
            bar.reach(sum(len(self._present(self.parts[number])) for number in done))
            for wait in (False, True):
                for number in list(waiting):
                    lock = self.store.folder / ".locks" / f"part-{number:05d}.lock"
                    with claimed(lock, wait=wait) as is_ours:
                        if is_ours:
                            self._fill(number, compute, bar)
                            waiting.remove(number)
        self.store.remove_from(len(self.parts))

    def rows(self) -> Iterator[Row]:
        """All rows in order of their keys. ValueError if one is not there."""
        for number, part in enumerate(self.parts):
            rows = self.store.rows_of(number)
            for entry in self._present(part):
                row = rows.get(entry.key)
                if row is None or row.picture != self.identities[entry.key]:
                    raise ValueError(
                        f"{self.store.path(number)}: lacks {entry.key}, which somebody changed or took "
                        "away meanwhile; the same command makes it again"
                    )
                yield row

    def _present(self, entries: "Sequence[Entry]") -> "list[Entry]":
        return [entry for entry in entries if entry.key in self.identities]

    def _batches(self, number: int) -> "list[list[Entry]]":
        part = self.parts[number]
        starts = range(0, len(part), self.batch)
        found = [self._present(part[start : start + self.batch]) for start in starts]
        return [batch for batch in found if batch]

    def _is_done(self, number: int) -> bool:
        rows = self.store.rows_of(number)
        return all(self._has(rows, batch) for batch in self._batches(number))

    def _has(self, rows: Mapping[str, Row], batch: "Sequence[Entry]") -> bool:
        return all(
            entry.key in rows and rows[entry.key].picture == self.identities[entry.key]
            for entry in batch
        )

    def _fill(self, number: int, compute: Compute, bar: Bar) -> None:
        """Whole batches alone are kept, also of what is stopped."""
        rows = self.store.rows_of(number)
        batches = self._batches(number)
        done = {k: [rows[e.key] for e in b] for k, b in enumerate(batches) if self._has(rows, b)}
        wanted = [k for k in range(len(batches)) if k not in done]
        bar.advance(sum(len(batches[k]) for k in done))
        saved = time.monotonic()
        results = compute(iter([batches[k] for k in wanted]))
        try:
            for k, values in zip(wanted, results, strict=True):
                pairs = zip(batches[k], values, strict=True)
                done[k] = [self._row(entry, value) for entry, value in pairs]
                bar.advance(len(batches[k]))
                if time.monotonic() - saved > SAVED:
                    self._write(number, done)
                    saved = time.monotonic()
        except BaseException:
            if done:
                with suppress(OSError):
                    self._write(number, done)
            raise
        if wanted:
            self._write(number, done)

    def _write(self, number: int, done: Mapping[int, list[Row]]) -> None:
        self.store.write(number, [row for k in sorted(done) for row in done[k]])

    def _row(self, entry: "Entry", value: Any) -> Row:
        picture = self.identities[entry.key]
        if isinstance(value, Exception):
            return Row(entry.key, picture, None, printable(str(value), 500) or type(value).__name__)
        if isinstance(value, Score) and not _is_finite(value):
            return Row(entry.key, picture, None, f"the score must be finite, got {value.value}")
        return Row(entry.key, picture, value)


def _is_finite(score: Score) -> bool:
    return all(map(math.isfinite, (score.value, *score.parts.values())))
