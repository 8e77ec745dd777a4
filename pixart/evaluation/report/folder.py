"""What an evaluated folder holds, read back: results, prompts, scores, errors, and who made it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from pixart.evaluation.metric import Estimate, Score
from pixart.evaluation.prompt_sets.files import read_prompts
from pixart.evaluation.running.results import ERRORS, IMAGES, PROMPTS, RESULTS, Folder, open_folder
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import read_json_lines

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
    category, then by name. paper: by name. opposite: names of numbers that are better the other way."""

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
    opposite: frozenset[str] = frozenset()

    @property
    def main(self) -> str:
        """The number that stands for the metric."""
        return self.name if self.name in self.values else next(iter(self.values))


@dataclass(frozen=True)
class Evaluated:
    """A folder that `run` or `score` has filled."""

    folder: Folder
    metrics: Mapping[str, Judged]
    _scores: dict[str, Mapping[str, Score]] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def results(self) -> Mapping[str, Any]:
        return self.folder.results

    @property
    def protocol(self) -> Mapping[str, Any]:
        return self.results["protocol"]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.resolve().name

    @property
    def model(self) -> str:
        """Who drew the pictures; the folder's name where nobody knows."""
        return str(self.results.get("model") or self.name)

    @cached_property
    def prompts(self) -> Mapping[str, Prompt]:
        """By id, in the order of the file. ValueError for lines that are no prompts."""
        return {prompt.id: prompt for prompt in read_prompts(self.path / PROMPTS)}

    @cached_property
    def errors(self) -> Sequence[Mapping[str, Any]]:
        """The lines of errors.jsonl: what is missing or cannot be scored."""
        path = self.path / ERRORS
        return [one for _, one in read_json_lines(path, MAX_LINES)] if path.is_file() else []

    def scores(self, metric: str) -> Mapping[str, Score]:
        """What a metric says of each picture, by key in order. Empty if the metric looks at whole sets.
        ValueError for scores that are damaged, or of pictures that no prompt has."""
        if metric not in self._scores:
            self._scores[metric] = self._read_scores(metric)
        return self._scores[metric]

    def _read_scores(self, metric: str) -> Mapping[str, Score]:
        try:
            found = self.folder.scores(metric)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path}: scores of {metric} are damaged ({error}); score it again"
            ) from error
        for key in found:
            if key.rpartition("/")[0] not in self.prompts:
                raise ValueError(
                    f"{self.path}: {metric} has a score of {key}, which no prompt is of; score it again"
                )
        return {key: found[key] for key in sorted(found)}

    def entry(self, key: str) -> Entry:
        """The picture of a key. Its file may be gone."""
        if key in self._entries:
            return self._entries[key]
        prompt, _, sample = key.rpartition("/")
        return Entry(self.prompts[prompt], int(sample), self.path / IMAGES / f"{key}.png")

    @cached_property
    def _entries(self) -> Mapping[str, Entry]:
        try:
            return {entry.key: entry for entry in self.folder.found.entries}
        except (ValueError, OSError):  # of pictures that are gone there are scores still
            return {}


def open_evaluated(path: Path) -> Evaluated:
    """Read a folder's results. ValueError, with the way out, for anything that is none."""
    folder = open_folder(path)
    file = path / RESULTS
    metrics = {name: _judged(file, name, one) for name, one in folder.results["metrics"].items()}
    return Evaluated(folder, metrics)


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
        _opposite(stored),
    )


def _opposite(stored: Mapping[str, Any]) -> frozenset[str]:
    """Numbers that say themselves which way is better, and not as the metric does."""
    usual = bool(stored.get("higher_is_better", True))
    values = (stored.get("values") or {}).items()
    return frozenset(name for name, one in values if one.get("higher_is_better", usual) != usual)


def _estimates(where: str, stored: Mapping[str, Any]) -> dict[str, Estimate]:
    """A number without an interval is refused: nothing here prints one. null stands for what JSON has not:
    an interval's end that nobody can tell, as of a single prompt, or a number that is not finite."""
    found = {}
    for name, one in stored.items():
        if not isinstance(one, dict) or not {"value", "low", "high", "n"} <= one.keys():
            raise ValueError(f"{where}.{name} must have value, low, high and n, got {one!r}")
        ends = {"value": math.inf, "low": -math.inf, "high": math.inf}
        told = {end: other if one[end] is None else one[end] for end, other in ends.items()}
        if not all(map(_is_number, told.values())) or told["low"] > told["high"]:
            raise ValueError(f"{where}.{name} must have numbers, low up to high, got {one!r}")
        notes = tuple(map(str, one.get("notes") or ()))
        value, low, high = (float(told[end]) for end in ends)
        found[name] = Estimate(value, low, high, int(one["n"]), str(one.get("method", "")), notes)
    return found


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
