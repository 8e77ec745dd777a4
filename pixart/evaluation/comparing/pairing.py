"""Two evaluated folders, number by number: the difference on the same prompts, its interval, a verdict.

B - A everywhere. Numbers of single pictures are compared by a paired bootstrap over prompts; distances of sets
by a jackknife that leaves the same prompts out of both (pixart.evaluation.comparing.paired_sets).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixart.evaluation.comparing.paired_sets import Unpaired, apart, paired_distance
from pixart.evaluation.metric import Estimate, Score
from pixart.evaluation.report.columns import flattened
from pixart.evaluation.report.folder import Evaluated, Judged
from pixart.evaluation.statistics.intervals import (
    INCONCLUSIVE,
    Difference,
    holm,
    is_inconclusive,
    paired_difference,
)
from pixart.evaluation.store.entries import Entry
from pixart.files import listed

A, B, OPEN = "A better", "B better", "not decided"
ERROR = 0.05  # of the first kind: p below it decides
FRECHET = ("fid", "fd-")  # what begins so is a Fréchet distance
_SAME = 1e-9  # of a mean that is computed twice


@dataclass(frozen=True)
class Change:
    """A number in both. difference: B - A, with its 95 % interval. adjusted: p after Holm, over the
    categories of a metric. verdict: A, B or OPEN."""

    name: str
    metric: str
    unit: str
    higher_is_better: bool
    a: Estimate
    b: Estimate
    difference: Difference
    verdict: str
    adjusted: float | None = None

    @property
    def decides(self) -> float:
        """The p that the verdict goes by."""
        return self.difference.p if self.adjusted is None else self.adjusted

    def values(self) -> dict[str, Any]:
        """As JSON holds it: an end that is infinite is null."""
        one = self.difference
        found = {
            "a": self.a.value, "b": self.b.value, "difference": one.difference,
            "low": _finite(one.low), "high": _finite(one.high), "p": one.p, "n": one.n,
            "method": one.method, "notes": list(one.notes),
            "higher_is_better": self.higher_is_better, "unit": self.unit, "verdict": self.verdict,
        }  # fmt: skip
        return found if self.adjusted is None else {**found, "p_holm": self.adjusted}


@dataclass(frozen=True)
class Comparison:
    """numbers: by name in the order of the results, metric by metric. categories: of each metric by
    category. settings: (name, A's, B's) of what else differs. only: metrics that one folder alone has."""

    a: Evaluated
    b: Evaluated
    numbers: tuple[Change, ...]
    categories: Mapping[str, Mapping[str, Change]]
    settings: tuple[tuple[str, str, str], ...]
    only: tuple[str, ...]

    def __getitem__(self, name: str) -> Change:
        return next(one for one in self.numbers if one.name == name)

    def values(self) -> dict[str, Any]:
        """As compare.json has it."""
        names = ({"folder": one.name, "model": one.model, "protocol": one.protocol.get("id")}
                 for one in (self.a, self.b))  # fmt: skip
        return {
            "version": 1,
            **dict(zip("ab", names, strict=True)),
            "differs": [list(one) for one in self.settings],
            "only_in_one": list(self.only),
            "metrics": {
                metric: {
                    "values": {one.name: one.values() for one in changes},
                    "categories": {
                        name: one.values() for name, one in self.categories.get(metric, {}).items()
                    },
                }
                for metric, changes in self._by_metric().items()
            },
        }

    def _by_metric(self) -> dict[str, list[Change]]:
        found: dict[str, list[Change]] = {}
        for one in self.numbers:
            found.setdefault(one.metric, []).append(one)
        return found


def compared(a: Evaluated, b: Evaluated, *, pair_sets: bool = True) -> Comparison:
    """Compare two folders. pair_sets: whether distances of sets are made again without each block, which
    takes minutes of many pictures. ValueError, with all that differs, for other prompts, versions or
    constants of metrics, or features of other weights."""
    common = [name for name in a.metrics if name in b.metrics]
    _check_alike(a, b, common)
    numbers: list[Change] = []
    categories: dict[str, Mapping[str, Change]] = {}
    for name in common:
        one, other = a.metrics[name], b.metrics[name]
        scores = (a.scores(name), b.scores(name)) if one.per_picture else ({}, {})
        numbers += _numbers(a, b, one, other, scores, pair_sets)
        if all(scores):
            found = _by_category(a, b, one, other, scores)
            categories |= {name: found} if found else {}
    only = [f"{name} (A)" for name in a.metrics if name not in b.metrics]
    only += [f"{name} (B)" for name in b.metrics if name not in a.metrics]
    return Comparison(a, b, tuple(numbers), categories, _settings(a, b), tuple(only))


def verdict(
    difference: Difference, higher_is_better: bool, p: float, numbers: tuple[str, float, float]
) -> str:
    """numbers: the name and both values, for Fréchet distances too close to call."""
    is_open = p >= ERROR or difference.low <= 0 <= difference.high
    if is_open or _too_close(*numbers):
        return OPEN
    return B if (difference.difference > 0) == higher_is_better else A


def _check_alike(a: Evaluated, b: Evaluated, common: Sequence[str]) -> None:
    reasons = _of_prompts(a, b)
    for name in common:
        one, other = a.metrics[name], b.metrics[name]
        if one.version != other.version:
            reasons.append(f"{name}: version {one.version} and {other.version}")
        ours, theirs = (dict(flattened(metric.constants)) for metric in (one, other))
        for key in dict.fromkeys([*ours, *theirs]):
            values = [settings.get(key, "not set") for settings in (ours, theirs)]
            if values[0] != values[1]:
                reasons.append(f"{name}: {key} {values[0]} and {values[1]}")
    if not common:
        reasons.append(f"metrics {', '.join(a.metrics)} and {', '.join(b.metrics)}")
    if reasons:
        raise ValueError(
            f"{a.path} and {b.path} must be of the same prompts and metrics, they differ in "
            f"{listed(reasons)}; evaluate both in the same way"
        )


def _of_prompts(a: Evaluated, b: Evaluated) -> list[str]:
    ours, theirs = a.prompts, b.prompts
    odd = sorted(ours.keys() ^ theirs.keys())
    other = [
        key
        for key in sorted(ours.keys() & theirs.keys())
        if (ours[key].prompt, ours[key].category) != (theirs[key].prompt, theirs[key].category)
    ]
    reasons = []
    if odd:
        reasons.append(f"{len(odd)} prompts that one of them has ({listed(odd[:3])})")
    if other:
        reasons.append(f"the words or category of {len(other)} prompts ({listed(other[:3])})")
    return reasons


def _numbers(
    a: Evaluated,
    b: Evaluated,
    one: Judged,
    other: Judged,
    scores: tuple[Mapping[str, Score], Mapping[str, Score]],
    pair_sets: bool,
) -> list[Change]:
    found = []
    for name in sorted(one.values, key=lambda name: name != one.main):
        if name not in other.values:
            continue
        ours, theirs = one.values[name], other.values[name]
        if not (math.isfinite(ours.value) and math.isfinite(theirs.value)):
            continue
        difference = None
        if all(scores):
            part = None if name == one.main else name.removeprefix(f"{one.name}/")
            difference = _paired(a, b, scores, part, (ours, theirs))
        if difference is None:
            difference = _of_sets(a, b, one, name, (ours, theirs), pair_sets)
        higher = one.higher_is_better != (name in one.opposite)
        words = verdict(difference, higher, difference.p, (name, ours.value, theirs.value))
        difference = _with_gap(difference, name, ours.value, theirs.value)
        found.append(Change(name, one.name, one.unit, higher, ours, theirs, difference, words))
    return found


def _paired(
    a: Evaluated,
    b: Evaluated,
    scores: tuple[Mapping[str, Score], Mapping[str, Score]],
    part: str | None,
    told: tuple[Estimate, Estimate],
    category: str | None = None,
) -> Difference | None:
    """On the prompts that both have scores of. part: of the scores, None for the score itself. None where
    the number is not the mean over prompts of these."""
    sides = [
        _side(folder, found, part, category) for folder, found in zip((a, b), scores, strict=True)
    ]
    ids = [{entry.prompt.id for entry, _ in side} for side in sides]
    both = ids[0] & ids[1]
    if not both:
        return None
    means = [_mean(side) for side in sides]
    is_mean = all(
        abs(mean - one.value) <= _SAME * max(1.0, abs(mean))
        for mean, one in zip(means, told, strict=True)
    )
    if not is_mean and part is not None:
        return None
    chosen = [[pair for pair in side if pair[0].prompt.id in both] for side in sides]
    difference = paired_difference(
        *(list(column) for side in chosen for column in zip(*side, strict=True))
    )
    notes = list(difference.notes)
    if left := len(ids[0] ^ ids[1]):
        notes.append(f"{left} prompts have scores in one folder only and are left out")
    if not is_mean:
        notes.append(
            "the metric's own number is not the mean over prompts; this compares the means"
        )
    return replace(difference, notes=tuple(notes))


def _side(
    folder: Evaluated, scores: Mapping[str, Score], part: str | None, category: str | None
) -> list[tuple[Entry, float]]:
    """Pictures with what is compared of them."""
    pairs = [
        (folder.entry(key), score.value if part is None else score.parts[part])
        for key, score in scores.items()
        if part is None or part in score.parts
    ]
    return [(entry, value) for entry, value in pairs if category in (None, entry.prompt.category)]


def _mean(side: Sequence[tuple[Entry, float]]) -> float:
    of_prompt: dict[str, list[float]] = {}
    for entry, value in side:
        of_prompt.setdefault(entry.prompt.id, []).append(value)
    return math.fsum(math.fsum(each) / len(each) for each in of_prompt.values()) / len(of_prompt)


def _of_sets(
    a: Evaluated,
    b: Evaluated,
    metric: Judged,
    name: str,
    told: tuple[Estimate, Estimate],
    pair_sets: bool,
) -> Difference:
    try:
        if not pair_sets:
            raise Unpaired("it was not asked for")
        if metric.per_picture:
            raise Unpaired("it is no mean of scores of single pictures")
        extractor = str(metric.constants.get("features", ""))
        found = paired_distance(a.folder, b.folder, name, extractor)
    except Unpaired as reason:
        return apart(*told, str(reason))
    difference = told[1].value - told[0].value
    if abs(found.difference - difference) > 1e-6 * max(1.0, abs(told[0].value)):
        return apart(*told, "the features that are kept give other numbers")
    return found


def _by_category(
    a: Evaluated,
    b: Evaluated,
    one: Judged,
    other: Judged,
    scores: tuple[Mapping[str, Score], Mapping[str, Score]],
) -> dict[str, Change]:
    """Of the metric's main number, p adjusted over all categories."""
    found: dict[str, tuple[Estimate, Estimate, Difference]] = {}
    for category, values in one.categories.items():
        told = values.get(one.main), other.categories.get(category, {}).get(one.main)
        if told[0] is None or told[1] is None:
            continue
        pair = (told[0], told[1])
        difference = _paired(a, b, scores, None, pair, category)
        if difference is not None:
            found[category] = (*pair, difference)
    adjusted = holm([difference.p for *_, difference in found.values()])
    changes = {}
    for (category, (ours, theirs, difference)), p in zip(found.items(), adjusted, strict=True):
        words = verdict(difference, one.higher_is_better, p, (one.name, ours.value, theirs.value))
        changes[category] = Change(
            category, one.name, one.unit, one.higher_is_better, ours, theirs, difference, words, p
        )
    return changes


def _settings(a: Evaluated, b: Evaluated) -> tuple[tuple[str, str, str], ...]:
    """All that the pictures were drawn and scored with, where it is not the same."""
    ours, theirs = (
        dict(flattened({"model": one.model, **one.protocol, "weights": one.results.get("weights") or {}}))
        for one in (a, b)
    )  # fmt: skip
    keys = dict.fromkeys([*ours, *theirs])
    rows = [(key, ours.get(key, "not set"), theirs.get(key, "not set")) for key in keys]
    return tuple(row for row in rows if row[1] != row[2])


def _too_close(name: str, a: float, b: float) -> bool:
    return name.startswith(FRECHET) and a != b and is_inconclusive(a, b)


def _with_gap(difference: Difference, name: str, a: float, b: float) -> Difference:
    if not _too_close(name, a, b):
        return difference
    note = (
        f"a gap below {100 * INCONCLUSIVE:.1f} % is inconclusive: training the same model again moves a "
        "Fréchet distance by as much"
    )
    return replace(difference, notes=(*difference.notes, note))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
