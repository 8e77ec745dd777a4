"""Measurements of runs: what a study writes, and what `fit` reads of it or of anybody's table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart.evaluation.prompt_sets.reading import read_json_object, table_rows
from pixart.files import listed, printable, read_json_lines, short

MAX_BYTES = 2**28
KEY = "measurements"


@dataclass(frozen=True)
class Measurement:
    """One checkpoint of one run, a line of "measurements" in a study's results.json.

    params: of the denoiser. compute: FLOP of training up to here, 3 x forward x images. images: seen up to
    here, repeats counted. scenes: different ones in the pool, None where it has no end. loss: on held-out
    scenes. accuracy: share of statements that pictures got right, by kind, empty where none were drawn.
    """

    run: str
    params: int
    compute: float
    images: int
    step: int
    loss: float
    scenes: int | None = None
    accuracy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """Values of a measurement by column, and where it stands, such as "runs.csv, line 3"."""

    place: str
    values: dict[str, Any]


def read_measurements(path: Path) -> list[Line]:
    """The lines of a .csv with a header, of a .jsonl, or of "measurements" in a .json. Objects in objects
    are columns with a dot: accuracy.colour. ValueError for other files and those without a line."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".json": _json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: must be {', '.join(readers)}, got {path.suffix or 'no ending'}")
    lines = list(reader(path))
    if not lines:
        raise ValueError(f"{path}: has no measurements")
    return lines


def columns_of(
    path: Path, lines: Sequence[Line], numbers: Sequence[str], run: str | None, any_sign: str = ""
) -> tuple[dict[str, list[float]], list[str], int]:
    """Columns of numbers, all positive, and the run of each line; how many lines were left out as they
    have nothing in one of them. run: the column, None where each line is a run of its own. any_sign: a column
    whose numbers may be 0 or negative. ValueError for a column that no line has, and for what is no such
    number, with its place."""
    known = list(dict.fromkeys(name for line in lines for name in line.values))
    for name in [*numbers, *([run] if run else [])]:
        if name not in known:
            raise ValueError(f"{path}: has no column {name!r}; it has {listed(known)}")
    wanted = [*numbers, *([run] if run else [])]
    full = [line for line in lines if all(_is_there(line.values.get(name)) for name in wanted)]
    if not full:
        raise ValueError(f"{path}: no line has a value in each of {', '.join(wanted)}")
    found = {
        name: [_number(line.values[name], name, line.place, name == any_sign) for line in full]
        for name in numbers
    }
    runs = [str(line.values[run]) if run else line.place for line in full]
    return found, runs, len(lines) - len(full)


def copies_in(lines: Sequence[Line], run: str | None) -> int:
    """How many lines have every value of a line before them, of another run. run: the column."""
    if run is None:  # where each line is a run
        return len(lines) - len({repr(line.values) for line in lines})
    runs: dict[str, set[Any]] = {}
    for line in lines:
        values = {name: value for name, value in line.values.items() if name != run}
        runs.setdefault(repr(values), set()).add(repr(line.values.get(run)))
    return sum(len(of) - 1 for of in runs.values())


def _csv(path: Path) -> Iterator[Line]:
    for place, row in table_rows(path, ()):
        yield Line(place, dict(row))


def _jsonl(path: Path) -> Iterator[Line]:
    for place, values in read_json_lines(path, MAX_BYTES):
        yield Line(place, _flat(values))


def _json(path: Path) -> Iterator[Line]:
    values = read_json_object(path).get(KEY)
    if not isinstance(values, list):
        raise ValueError(f"{path}: must have a list {KEY!r}, as a study's results.json has")
    for number, one in enumerate(values):
        place = f"{path}, {KEY}[{number}]"
        if not isinstance(one, dict):
            raise ValueError(f"{place}: must be an object, got {short(one)}")
        yield Line(place, _flat(one))


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def _is_there(value: Any) -> bool:
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def _number(value: Any, name: str, place: str, any_sign: bool) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and (any_sign or number > 0)):
        kind = "finite number" if any_sign else "positive number, as logs are fitted"
        raise ValueError(f"{printable(place)}: {name} must be a {kind}, got {short(value)}")
    return number
