"""Scores pictures by metrics: one network in memory at a time, features kept and shared.

What is missing for any metric is asked before anything is opened. Pictures and features go into parts;
the numbers are made of the parts alone, in order of keys.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pixart.evaluation.distances.reference import statistics_for
from pixart.evaluation.metric import (
    Estimate,
    Extractor,
    Features,
    Metric,
    Moments,
    PictureMetric,
    SetMetric,
)
from pixart.evaluation.running.computing import FEATURES, IMAGES, extracting, scoring
from pixart.evaluation.running.results import block_of, score_folder, write_errors
from pixart.evaluation.store.entries import Entry
from pixart.evaluation.store.folders import Found, MissingPictures
from pixart.evaluation.store.parts import FeatureStore, Filling, Row, ScoreStore, Store, identity_of
from pixart.files import listed


@dataclass(frozen=True)
class Reference:
    """What sets are compared with: pictures, or a file of their statistics. digest: tells it from others.
    categories: of pictures, by the ids that they have."""

    pictures: Found | None = None
    file: Path | None = None
    digest: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Scoring:
    """Scores of `found` by `metrics`, kept in the folder `output`."""

    output: Path
    found: Found
    metrics: Sequence[Metric]
    reference: Reference | None = None
    errors: list[dict[str, str]] = field(default_factory=list, init=False)
    _identities: dict[str, str] = field(default_factory=dict, init=False)

    def run(self, *, allow_missing: bool = False) -> dict[str, Any]:
        """The blocks of results.json by metric. MissingPictures if a picture is missing or cannot be scored,
        unless allowed; errors.jsonl names them all."""
        self._identities = identities(self.found.entries)
        self._tell_missing(allow_missing)
        blocks = {}
        for extractor, metrics in self._by_network():
            sets = any(isinstance(metric, SetMetric) for metric in metrics)
            features = self._features(extractor, for_sets=sets) if extractor else None
            for metric in metrics:
                blocks[metric.name] = self._measured(metric, features)
        write_errors(self.output, self.errors)
        failed = sorted({error["key"] for error in self.errors})
        if failed and not allow_missing:
            first = self.errors[0]
            raise MissingPictures(
                f"{self.output}: {len(failed)} of {len(self.found.entries)} pictures are missing, cannot be "
                f"read or cannot be scored ({listed(failed)}; {first['error']}): see errors.jsonl; mend "
                "them, or say --allow-missing to leave them out"
            )
        return {metric.name: blocks[metric.name] for metric in self.metrics}

    @property
    def failed(self) -> int:
        """Pictures that some metric does not have."""
        return len({error["key"] for error in self.errors})

    @property
    def pictures(self) -> int:
        """Pictures that are there."""
        return len(self._identities)

    def _tell_missing(self, allow_missing: bool) -> None:
        gone = [one.key for one in self.found.entries if one.key not in self._identities]
        self.errors = [{"key": key, "error": "is missing"} for key in gone]
        if gone and not allow_missing:
            write_errors(self.output, self.errors)
            raise MissingPictures(
                replace(self.found, missing=frozenset(gone)).complaint(self.output)
            )
        if not self._identities:
            raise MissingPictures(f"{self.output}: all pictures are missing")

    def _by_network(self) -> list[tuple[Extractor | None, list[Metric]]]:
        """Metrics that share a network follow each other."""
        groups: dict[tuple[str, str] | None, tuple[Extractor | None, list[Metric]]] = {}
        for metric in self.metrics:
            extractor = getattr(metric, "extractor", None)
            key = (extractor.name, extractor.digest) if extractor else None
            groups.setdefault(key, (extractor, []))[1].append(metric)
        return list(groups.values())

    def _features(self, extractor: Extractor, *, for_sets: bool) -> "_Extracted":
        folder = f"{extractor.name}-{extractor.digest}"
        found = self.reference.pictures if self.reference and for_sets else None
        theirs: Features | Moments | None = None
        try:
            store = FeatureStore(self.output / "features" / folder)
            ours = self._fill(store, self.found.entries, self._identities, extractor)
            if found is not None:
                store = FeatureStore(self.output / "reference" / folder)
                rows = self._fill(store, found.entries, identities(found.entries), extractor)
                if faults := [row for row in rows.values() if row.error]:
                    raise ValueError(
                        f"{len(faults)} reference pictures cannot be used ({faults[0].error}); take them "
                        "away"
                    )
                theirs = _rows_to_features(rows)
            elif for_sets and self.reference and self.reference.file:
                theirs = statistics_for(self.reference.file, extractor)
        finally:
            extractor.release()
        return _Extracted(ours, theirs)

    def _fill(
        self,
        store: Store,
        entries: Sequence[Entry],
        there: Mapping[str, str],
        extractor: Extractor,
    ) -> dict[str, Row]:
        filling = Filling(store, entries, there, FEATURES)
        filling.run(extracting(extractor), extractor.name)
        return {row.key: row for row in filling.rows()}

    def _measured(self, metric: Metric, features: "_Extracted | None") -> dict[str, Any]:
        if isinstance(metric, SetMetric):
            assert features is not None
            return self._compared(metric, features)
        assert isinstance(metric, PictureMetric)
        return self._scored(metric, features.ours if features else None)

    def _scored(self, metric: PictureMetric, features: Mapping[str, Row] | None) -> dict[str, Any]:
        name = score_folder(metric.name, metric.version, metric.constants)
        store = ScoreStore(self.output / "scores" / name)
        batch = IMAGES if features is None else FEATURES
        filling = Filling(store, self.found.entries, self._identities, batch)
        try:
            filling.run(scoring(metric, features), metric.name)
        finally:
            metric.release()
        rows = list(filling.rows())
        self._note(rows, metric.name)
        by_key = {row.key: row.value for row in rows if not row.error}
        entries = [entry for entry in self.found.entries if entry.key in by_key]
        if not entries:
            raise MissingPictures(f"{metric.name}: no picture can be scored ({rows[0].error})")
        categories: dict[str, list[Entry]] = {}
        for entry in entries:
            categories.setdefault(entry.prompt.category, []).append(entry)
        reduced = {
            category: metric.reduce(some, [by_key[one.key] for one in some])
            for category, some in sorted(categories.items())
            if category
        }
        whole = metric.reduce(entries, [by_key[entry.key] for entry in entries])
        left_out = len(self.found.entries) - len(entries)
        return block_of(metric, self._noted(whole, left_out), reduced, left_out)

    def _compared(self, metric: SetMetric, features: "_Extracted") -> dict[str, Any]:
        assert features.theirs is not None
        self._note(features.ours.values(), metric.name)
        ours = _rows_to_features(features.ours)
        values = metric.compare(ours, features.theirs)
        categories = {
            category: metric.compare(*sides)
            for category, sides in self._by_category(metric, ours, features.theirs)
        }
        metric.release()
        left_out = len(self.found.entries) - len(ours.keys)
        return block_of(metric, self._noted(values, left_out), categories, left_out)

    def _by_category(
        self, metric: SetMetric, ours: Features, theirs: "Features | Moments"
    ) -> Iterator[tuple[str, tuple[Features, Features]]]:
        """Categories that have pictures enough on both sides."""
        known = self.reference.categories if self.reference else {}
        if isinstance(theirs, Moments) or not known:
            return
        own = {entry.key: entry.prompt.category for entry in self.found.entries}
        for category in sorted(set(own.values()) - {""}):
            sides = (
                _subset(ours, [own[key] == category for key in ours.keys]),
                _subset(
                    theirs,
                    [known.get(key.rpartition("/")[0]) == category for key in theirs.keys],
                ),
            )
            if min(len(side.keys) for side in sides) >= metric.category_pictures:
                yield category, sides

    def _note(self, rows: Any, name: str) -> None:
        self.errors += [
            {"key": row.key, "metric": name, "error": row.error} for row in rows if row.error
        ]

    def _noted(self, values: Mapping[str, Estimate], left_out: int) -> Mapping[str, Estimate]:
        """With a note where pictures are left out."""
        if not left_out:
            return values
        note = f"{left_out} of {len(self.found.entries)} pictures are missing or cannot be scored."
        return {name: replace(one, notes=(*one.notes, note)) for name, one in values.items()}


@dataclass(frozen=True)
class _Extracted:
    ours: Mapping[str, Row]
    theirs: "Features | Moments | None"


def identities(entries: Sequence[Entry]) -> dict[str, str]:
    """By key, of the pictures that are there."""
    found = {entry.key: identity_of(entry.path) for entry in entries}
    return {key: identity for key, identity in found.items() if identity is not None}


def _rows_to_features(rows: Mapping[str, Row]) -> Features:
    import numpy as np

    good = [row for row in rows.values() if not row.error]
    if not good:
        raise MissingPictures("no picture has features")
    return Features([row.key for row in good], np.stack([row.value for row in good]))


def _subset(features: Features, kept: Sequence[bool]) -> Features:
    import numpy as np

    places = [int(place) for place in np.flatnonzero(kept)]
    return Features([features.keys[place] for place in places], features.values[places])
