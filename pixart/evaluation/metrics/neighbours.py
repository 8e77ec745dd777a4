"""Precision, recall, density and coverage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixart.evaluation.distances import neighbourhoods
from pixart.evaluation.distances.neighbours import MOST, OF_DENSITY, OF_PRECISION
from pixart.evaluation.metric import Features, Moments
from pixart.evaluation.metrics.of_sets import FeatureMetric, groups
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.intervals import mean_over_prompts
from pixart.evaluation.store.entries import Entry, Prompt

SEED = 0  # of which 10,000 pictures


class PrecisionRecall(FeatureMetric):
    """precision and density: of our pictures. recall and coverage: of the real ones. Of at most 10,000 of
    each set. Their intervals take the other set as it is."""

    usual = "inception-clean"
    higher_is_better = True
    source = "precision and recall arXiv:1904.06991, density and coverage arXiv:2002.09797"
    category_pictures = 1000

    @property
    def constants(self) -> Mapping[str, Any]:
        return {
            **super().constants,
            "neighbours": OF_PRECISION,
            "neighbours_of_density": OF_DENSITY,
            "most": MOST,
        }

    def compare(self, ours: Features, reference: Features | Moments) -> Mapping[str, Estimate]:
        some, real = _at_most(ours), _at_most(self.features_of(reference))
        found = neighbourhoods(some.values, real.values, device=self.device)
        notes = (*self.notes(), "The interval takes the neighbourhoods of the other set as given.")
        if len(some.keys) != len(real.keys):
            notes += (
                f"Of {len(some.keys):,} pictures and {len(real.keys):,} real ones: the numbers depend on both.",
            )
        return {
            "precision": _mean(some, found.precise, notes),
            "recall": _mean(real, found.recalled, notes),
            "density": _mean(some, found.density, notes),
            "coverage": _mean(real, found.covered, notes),
        }


def _at_most(features: Features) -> Features:
    """10,000 pictures, the same whatever the order."""
    if len(features.keys) <= MOST:
        return features
    by_key = sorted(range(len(features.keys)), key=lambda row: features.keys[row])
    drawn = np.random.default_rng(SEED).choice(len(by_key), MOST, replace=False)
    rows = [by_key[place] for place in sorted(drawn.tolist())]
    return Features([features.keys[row] for row in rows], features.values[rows])


def _mean(features: Features, values: np.ndarray, notes: tuple[str, ...]) -> Estimate:
    """Over prompts, as of any score."""
    seen: dict[str, int] = {}
    entries = []
    for key, group in zip(features.keys, groups(features), strict=True):
        seen[group] = seen.get(group, -1) + 1
        entries.append(Entry(Prompt(group, ""), seen[group], Path(key)))
    found = mean_over_prompts(entries, [float(value) for value in values])
    return Estimate(
        found.value, found.low, found.high, found.n, found.method, (*found.notes, *notes)
    )
