"""What an evaluated folder holds, read back: results, prompts, scores, errors, and who made it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from pixart.evaluation.entries import Entry, Prompt
from pixart.evaluation.metric import Estimate, Score
from pixart.files import parse_json, read_bounded, read_json

RESULTS = "results.json"
VERSION = 1  # of results.json
MAX_LINES = 2**30  # bytes of a file of lines


@dataclass(frozen=True)
class Paper:
    """A published number. because: why it was not made in the same way, or what says that it was."""

    value: float
    source: str
    same_protocol: bool
    because: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A metric of results.json. values: by name, the metric's own under its name. categories: by
    category, then by name. paper: by name."""

    name: str
    version: str
    unit: str
    higher_is_better: bool
    per_picture: bool
    constants: Mapping[str, Any]
    source: str
    values: Mapping[str, Estimate]
    categories: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    paper: Mapping[str, Paper] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The number that stands for the metric."""
        return self.name if self.name in self.values else next(iter(self.values))


@dataclass(frozen=True)
class Evaluated:
    """A folder that `run` or `score` has filled. name: what its column is called."""

    path: Path
    results: Mapping[str, Any]
    metrics: Mapping[str, Judged]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def model(self) -> str:
        return str(self.results.get("model") or "pictures of others")

    @property
    def protocol(self) -> Mapping[str, Any]:
        return self.results["protocol"]

    @cached_property
    def made(self) -> Mapping[str, Any]:
        """run.json, empty where there is none."""
        path = self.path / "run.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def prompts(self) -> Mapping[str, Prompt]:
        """By id, in the order of the file. ValueError for lines that are no prompts."""
        found: dict[str, Prompt] = {}
        for place, line in _lines(self.path / "prompts.jsonl"):
            if not isinstance(line.get("id"), str) or not isinstance(line.get("prompt"), str):
                raise ValueError(f"{place}: must have the texts id and prompt, got {sorted(line)}")
            known = {name: line[name] for name in Prompt.__dataclass_fields__ if name in line}
            found[line["id"]] = Prompt(**known)
        return found

    @cached_property
    def errors(self) -> Sequence[Mapping[str, Any]]:
        """The lines of errors.jsonl: what is missing or cannot be scored."""
        path = self.path / "errors.jsonl"
        return [line for _, line in _lines(path)] if path.is_file() else []

    def scores(self, metric: str) -> Mapping[str, Score]:
        """What a metric says of each picture, by key in order. Empty if the metric looks at whole sets.
        ValueError for scores that are not finite numbers or of pictures that no prompt has."""
        folder = self.path / "scores" / f"{metric}-{self.metrics[metric].version}"
        found: dict[str, Score] = {}
        for path in sorted(folder.glob("part-*.jsonl")):
            for place, line in _lines(path):
                key, value = line.get("key"), line.get("value")
                if not isinstance(key, str) or key.rpartition("/")[0] not in self.prompts:
                    raise ValueError(f"{place}: key must be of a prompt, got {key!r}")
                if "error" in line:  # it stands in errors.jsonl
                    continue
                if not _is_finite(value):
                    raise ValueError(f"{place}: value must be a finite number, got {value!r}")
                found[key] = Score(float(value), line.get("parts") or {})
        return {key: found[key] for key in sorted(found)}

    def entry(self, key: str) -> Entry:
        """The picture of a key. Its file may be gone."""
        prompt, _, sample = key.rpartition("/")
        return Entry(self.prompts[prompt], int(sample), self.path / "images" / f"{key}.png")


def open_evaluated(path: Path) -> Evaluated:
    """Read a folder's results. ValueError, with the way out, for anything that is none: FileNotFoundError
    where there is no results.json."""
    file = path / RESULTS
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there; `python -m pixart.evaluate run` or `score` makes it"
        )
    results = read_json(file)
    if results.get("version") != VERSION:
        raise ValueError(f"{file}: version must be {VERSION}, got {results.get('version')!r}")
    for name in ("protocol", "metrics"):
        if not isinstance(results.get(name), dict):
            raise ValueError(f"{file}: {name} must be an object, got {results.get(name)!r}")
    metrics = {name: _judged(file, name, one) for name, one in results["metrics"].items()}
    return Evaluated(path, results, metrics)


def _judged(file: Path, name: str, stored: Mapping[str, Any]) -> Judged:
    where = f"{file}: metrics.{name}"
    values = _estimates(f"{where}.values", stored.get("values") or {})
    if not values:
        raise ValueError(f"{where}.values must have a number, got none")
    categories = {
        category: _estimates(f"{where}.categories.{category}", one)
        for category, one in (stored.get("categories") or {}).items()
    }
    paper = {
        number: Paper(
            one["value"],
            str(one.get("source", "")),
            bool(one.get("same_protocol")),
            tuple(one.get("because") or ()),
        )
        for number, one in (stored.get("paper") or {}).items()
    }
    return Judged(
        name,
        str(stored.get("version", "1")),
        str(stored.get("unit", "")),
        bool(stored.get("higher_is_better", True)),
        bool(stored.get("per_picture", False)),
        stored.get("constants") or {},
        str(stored.get("source", "")),
        values,
        categories,
        paper,
    )


def _estimates(where: str, stored: Mapping[str, Any]) -> dict[str, Estimate]:
    """A number without an interval is refused: nothing here prints one. null is an interval's end that
    nobody can tell, as of a single prompt."""
    found = {}
    for name, one in stored.items():
        if not _is_finite(one.get("value")) or not {"low", "high", "n"} <= one.keys():
            raise ValueError(f"{where}.{name} must have value, low, high and n, got {one!r}")
        low = -math.inf if one["low"] is None else one["low"]
        high = math.inf if one["high"] is None else one["high"]
        if not (isinstance(low, int | float) and isinstance(high, int | float) and low <= high):
            raise ValueError(f"{where}.{name} must have low up to high, got {one!r}")
        notes = tuple(map(str, one.get("notes") or ()))
        found[name] = Estimate(
            float(one["value"]),
            float(low),
            float(high),
            int(one["n"]),
            str(one.get("method", "")),
            notes,
        )
    return found


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each line of JSON, with its place for messages. Raises ValueError for lines that are no objects."""
    text = read_bounded(path, MAX_LINES).decode("utf-8")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            values = parse_json(line, place)
            if not isinstance(values, dict):
                raise ValueError(f"{place}: must be a JSON object, got {line[:80]!r}")
            yield place, values


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
