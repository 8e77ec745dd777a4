"""Evaluation from Python: `evaluate`, and the Result that it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pixart.evaluation.metric import PictureMetric, Score
from pixart.evaluation.protocols.protocol import Use
from pixart.evaluation.running.opening import Given, open_metrics
from pixart.evaluation.running.results import distinct_names, open_folder
from pixart.evaluation.running.run import Pictures, check_reference, score
from pixart.evaluation.statistics.intervals import Difference, paired_difference
from pixart.evaluation.store.entries import Entry


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval [low, high]. n: prompts, or pictures. per_image: by key
    ("ID/0000"), what the metric says of each picture; empty for one that compares sets."""

    mean: float
    low: float
    high: float
    n: int
    per_image: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What `evaluate` found. values: by name; some metrics have several, "NAME of METRIC" where two have one
    of the same name. results: as in results.json."""

    values: Mapping[str, Value]
    results: Mapping[str, Any]
    entries: tuple[Entry, ...]
    scores: Mapping[str, Mapping[str, Score]]

    def compare(self, other: "Result") -> dict[str, Difference]:
        """By metric, how much `other` is above this: difference, low, high, p and n, with the same resampled
        prompts for both. Metrics of single pictures alone. ValueError if the prompts differ."""
        return {
            name: paired_difference(*self._pairs(name), *other._pairs(name))
            for name in self.scores
            if name in other.scores
        }

    def _pairs(self, metric: str) -> tuple[list[Entry], list[float]]:
        scores = self.scores[metric]
        entries = [entry for entry in self.entries if entry.key in scores]
        return entries, [scores[entry.key].value for entry in entries]


def evaluate(
    images: str | Path,
    *,
    metrics: Sequence[str],
    prompts: str | Path | None = None,
    reference: str | Path | None = None,
    output: str | Path | None = None,
    samples: int | None = None,
    weights: str | Path | None = None,
    judge: str | None = None,
    files: Mapping[str, str | Path] | None = None,
    options: Mapping[str, str] | None = None,
    device: str | None = None,
    allow_missing: bool = False,
) -> Result:
    """Score a folder of pictures: see `pixart evaluate score`, which has the same options.

    output: the folder that keeps features and scores; without one they are not kept. MissingError where
    weights or data are missing, MissingPictures (both are ValueErrors) where pictures are.
    """
    uses = [Use(name) for name in metrics]
    if not uses:
        raise ValueError("metrics must be named, got none")
    given = Given(
        device,
        Path(weights) if weights else None,
        judge,
        {name: Path(path) for name, path in (files or {}).items()},
        options or {},
    )
    opened = open_metrics(uses, given)
    unread = not any(metric.reads_prompts for metric in opened)
    given_prompts = Path(prompts) if prompts else None
    pictures = Pictures.others(Path(images), given_prompts, samples, uses, unread=unread)
    against = Path(reference) if reference else None
    check_reference(pictures.protocol, opened, against)
    with TemporaryDirectory() as aside:
        folder = Path(output) if output else Path(aside)
        results = score(pictures, opened, folder, reference=against, allow_missing=allow_missing)
        kept = open_folder(folder)
        of_pictures = [one.name for one in opened if isinstance(one, PictureMetric)]
        scores = {name: kept.scores(name) for name in of_pictures}
    blocks = {metric: block["values"] for metric, block in results["metrics"].items()}
    values = {
        called: _value(
            blocks[metric][name], {key: one.value for key, one in scores.get(name, {}).items()}
        )
        for (metric, name), called in distinct_names(blocks).items()
    }
    return Result(values, results, pictures.found.entries, scores)


def _value(told: Mapping[str, Any], per_image: Mapping[str, float]) -> Value:
    low = -float("inf") if told["low"] is None else told["low"]
    high = float("inf") if told["high"] is None else told["high"]
    return Value(told["value"], low, high, told["n"], per_image, tuple(told["notes"]))
