"""Rows of results: what a row's verdicts come to, and what they differ by from the teacher's on the same cases."""

from collections.abc import Mapping, Sequence

import numpy as np

from bench.measure.results import Row
from bench.reporting.few_steps import TEACHERS
from bench.studies.few_steps.cases import SIDE
from bench.studies.few_steps.record import Record
from bench.studies.few_steps.ways import PARTS, TEACHER
from pixart.evaluation.statistics.intervals import wilson
from pixart.evaluation.statistics.resampling import RESAMPLES, interval, picks

KINDS = {"one": ("one",), "pair": ("pair",), "both": ("one", "pair")}
COLUMNS = ("statements", "right", "purity")


def rows(records: Sequence[Record]) -> list[Row]:
    """Of every row and kind that has verdicts: the teacher first, then by evaluations of a picture."""
    found = [one for one in records if one.about["part"] == TEACHER]
    # By the pipeline's own settings it is guided, then by those that all others are drawn by, it is not.
    found.sort(key=lambda one: -one.about["settings"]["guidance"])
    teachers = dict(zip(TEACHERS, found, strict=False))
    ordered = sorted(records, key=lambda one: (PARTS.index(one.about["part"]), _place(one)))
    return [
        _row(record, kind, teachers)
        for record in ordered
        for kind in KINDS
        if all(record.count(one) for one in KINDS[kind])
    ]


def _place(record: Record) -> tuple[str, int, str]:
    model, _, _ = record.name.rpartition(": ")
    return model, record.about["evaluations"], record.name


def _row(record: Record, kind: str, teachers: Mapping[str, Record]) -> Row:
    about, values = record.about, _values(record, kind)
    found: Row = {
        "id": f"few_steps/{record.name}/{kind}",
        "part": about["part"],
        "what": f"short captions, {kind}",
        "variant": record.name,
        "kind": kind,
        "shape": {"size": str(SIDE), "batch": 1, "tokens": (SIDE // 16) ** 2},
        "dtype": "float32",
        "status": "measured",
        "cases": len(values["right"]),
        "control": about["control"],
        "settings": about["settings"],
        "evaluations": about["evaluations"],
        "flops": about["flops"],
        "figures": {name: _figure(name, one) for name, one in values.items()},
    }
    for name, teacher in teachers.items():
        if teacher is not record and all(map(teacher.count, KINDS[kind])):
            found[name] = _differences(record, teacher, kind)
    return found


def _values(
    record: Record, kind: str, most: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """By column, a number for each case: the share of its statements that hold, whether all do, its purity."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for one in KINDS[kind]:
        kept = record.verdicts[one]
        end = None if most is None else most[one]
        held, of, purity = (np.array(kept[name][:end], float) for name in ("held", "of", "purity"))
        for name, values in zip(COLUMNS, (held / of, held == of, purity), strict=True):
            parts[name].append(values.astype(float))
    return {name: np.concatenate(each) for name, each in parts.items()}


def _figure(name: str, values: np.ndarray) -> Row:
    """A mean with its 95 % interval: Wilson's of what is true or not, else a bootstrap over cases."""
    if name == "right":
        low, high = wilson(float(values.sum()), len(values))
    else:
        low, high = _bootstrap(values)
    return _numbers(float(values.mean()), low, high)


def _differences(record: Record, teacher: Record, kind: str) -> Row:
    """By column: what it is above the teacher's mean, on the cases that both have; bootstrap over them."""
    both = {one: min(record.count(one), teacher.count(one)) for one in KINDS[kind]}
    here, there = (_values(one, kind, both) for one in (record, teacher))
    gaps = {name: here[name] - there[name] for name in COLUMNS}
    return {name: _numbers(float(gap.mean()), *_bootstrap(gap)) for name, gap in gaps.items()}


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    drawn = [values[chosen].mean(axis=1) for chosen in picks(len(values), RESAMPLES, seed=0)]
    return interval(np.concatenate(drawn))


def _numbers(mean: float, low: float, high: float) -> Row:
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
