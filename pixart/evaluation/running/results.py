"""The folder of an evaluation: what stands in its files, and reading them again.

run.json        who made it, where the pictures are; not the same twice
protocol.json   how it was made, and its id
prompts.jsonl   what the pictures are of
results.json    the numbers: the same whatever was stopped, resumed or shared
errors.jsonl    pictures that are missing, cannot be read or cannot be scored
features/, scores/, reference/    parts, see pixart.evaluation.store.parts
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pixart.evaluation.metric import Estimate, Metric, PictureMetric, Score
from pixart.evaluation.prompt_sets.files import read_prompts
from pixart.evaluation.running.shape import check_record, check_results
from pixart.evaluation.store.entries import Entry
from pixart.evaluation.store.folders import Found, find_pictures
from pixart.evaluation.store.parts import ScoreStore
from pixart.files import read_json, write_bytes

VERSION = 1
RUN, PROTOCOL, PROMPTS = "run.json", "protocol.json", "prompts.jsonl"
RESULTS, ERRORS, IMAGES = "results.json", "errors.jsonl", "images"


def score_folder(name: str, version: str, constants: Mapping[str, Any]) -> str:
    """Under scores/: of other constants, such as another judge, another."""
    if not constants:
        return f"{name}-{version}"
    text = json.dumps(constants, sort_keys=True, default=str)
    return f"{name}-{version}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def block_of(
    metric: Metric,
    values: Mapping[str, Estimate],
    categories: Mapping[str, Mapping[str, Estimate]],
    left_out: int = 0,
) -> dict[str, Any]:
    """What results.json says of a metric. left_out: pictures that its numbers are not of."""
    block: dict[str, Any] = {
        "version": metric.version,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "per_picture": isinstance(metric, PictureMetric),
        "constants": dict(metric.constants),
        "source": metric.source,
        "values": {name: _numbers(one) for name, one in values.items()},
    }
    for name in metric.opposite:
        if name in values:
            block["values"][name]["higher_is_better"] = not metric.higher_is_better
    if left_out:
        block["left_out"] = left_out
    if categories:
        block["categories"] = {
            category: {name: _numbers(one) for name, one in found.items()}
            for category, found in categories.items()
        }
    return block


def distinct_names(blocks: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """What to call each (metric, name of a number) where those of several metrics stand together: its own
    name, or "NAME of METRIC" where another metric has it too, as all FIDs have their fid-infinity."""
    counts = Counter(name for names in blocks.values() for name in names)
    return {
        (metric, name): name if counts[name] == 1 or name == metric else f"{name} of {metric}"
        for metric, names in blocks.items()
        for name in names
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _finite(estimate.value),
        "low": _finite(estimate.low),
        "high": _finite(estimate.high),
        "n": estimate.n,
        "method": estimate.method,
        "notes": list(estimate.notes),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: an interval that has no end there is None."""
    return float(value) if math.isfinite(value) else None


def write_errors(folder: Path, errors: Sequence[Mapping[str, str]]) -> None:
    """errors.jsonl, or none where there is nothing to say."""
    if errors:
        write_bytes(folder / ERRORS, "".join(json.dumps(one) + "\n" for one in errors).encode())
    else:
        (folder / ERRORS).unlink(missing_ok=True)


@dataclass(frozen=True)
class Folder:
    """An evaluation on disk, as `open_folder` found it. results, run, protocol: what its JSON says."""

    path: Path
    results: Mapping[str, Any]
    run: Mapping[str, Any]
    protocol: Mapping[str, Any]

    @cached_property
    def found(self) -> Found:
        """The pictures, in order of their keys."""
        prompts = read_prompts(self.path / PROMPTS)
        samples = self.results["protocol"].get("images_per_prompt")
        return find_pictures(self.images, prompts, samples)

    @property
    def images(self) -> Path:
        """Where the pictures are."""
        own = self.path / IMAGES
        return own if own.is_dir() else Path(str(self.run.get("images", own)))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The pictures that are there."""
        return tuple(one for one in self.found.entries if one.key not in self.found.missing)

    def scores(self, metric: str) -> dict[str, Score]:
        """What a metric says of each picture, by key; empty for one that compares sets."""
        block = self.results["metrics"][metric]
        name = score_folder(metric, block["version"], block["constants"])
        store = ScoreStore(self.path / "scores" / name)
        count = len(list(store.folder.glob(f"part-*{store.suffix}")))
        rows = [row for number in range(count) for row in store.read(number)]
        return {row.key: row.value for row in rows if not row.error}


def open_folder(path: Path) -> Folder:
    """ValueError for a folder that holds no results."""
    if not (path / RESULTS).is_file():
        raise ValueError(
            f"{path}: must be a folder of results, it has no {RESULTS}; `pixart evaluate score` makes it"
        )
    results = read_json(path / RESULTS)
    if results.get("version") != VERSION:
        raise ValueError(
            f"{path / RESULTS}: version must be {VERSION}, got {results.get('version')!r}; score it again"
        )
    check_results(str(path / RESULTS), results)
    return Folder(path, results, _told(path / RUN), _record(path / PROTOCOL))


def read_record(file: Path) -> dict[str, Any]:
    """protocol.json. ValueError in one line for what no evaluation writes."""
    record = read_json(file)
    check_record(str(file), record)
    return record


def _record(file: Path) -> dict[str, Any]:
    return read_record(file) if file.is_file() else {}


def _told(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
