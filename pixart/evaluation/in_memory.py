"""Scores of pictures that are in memory, and are few: nothing of it is kept on the disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pixart.evaluation.metric import (
    Estimate,
    Extractor,
    Features,
    Metric,
    PictureMetric,
    Score,
    SetMetric,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

BATCH = 32  # pictures in a network at a time


@dataclass
class Pictures:
    """Pictures that are judged together, and what extractors said of them. entries: in order of keys.
    images: RGB, one for each entry."""

    entries: "Sequence[Entry]"
    images: "Sequence[Image]"
    _features: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, init=False)

    def features(self, extractor: Extractor) -> np.ndarray:
        """(n, width), or (n, rows, width), fp32; computed once for all metrics that read them."""
        key = extractor.name, extractor.digest
        if key not in self._features:
            self._features[key] = self._computed(extractor)
        return self._features[key]

    def _computed(self, extractor: Extractor) -> np.ndarray:
        found = []
        for start in range(0, len(self.entries), BATCH):
            places = slice(start, start + BATCH)
            pairs = zip(self.images[places], self.entries[places], strict=True)
            found.append(extractor([extractor.prepare(image, entry) for image, entry in pairs]))
        return np.concatenate(found)


def scores_of(metric: PictureMetric, pictures: Pictures) -> list[Score]:
    """The score of each picture for its own prompt."""
    if metric.extractor is not None:
        return metric.score(pictures.entries, None, pictures.features(metric.extractor))
    found: list[Score] = []
    for start in range(0, len(pictures.entries), BATCH):
        places = slice(start, start + BATCH)
        found += metric.score(pictures.entries[places], pictures.images[places], None)
    return found


def measure(
    metric: Metric, pictures: Pictures, reference: Pictures | None = None
) -> Mapping[str, Estimate]:
    """The numbers of a metric by name. reference: what sets are compared with. ValueError where a set
    metric has none."""
    if isinstance(metric, PictureMetric):
        return metric.reduce(pictures.entries, scores_of(metric, pictures))
    assert isinstance(metric, SetMetric)
    if reference is None:
        raise ValueError(f"{metric.name} must have pictures to compare with, got none")
    ours, theirs = (
        Features([entry.key for entry in some.entries], some.features(metric.extractor))
        for some in (pictures, reference)
    )
    return metric.compare(ours, theirs)
