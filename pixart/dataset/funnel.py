"""Which pictures a set of rules keeps: the lines that `clean` wrote, and the samples of `prepare`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart.dataset.expression import (
    NUMBER,
    TEXT,
    TRUTH,
    NotMeasured,
    Rule,
    check_names,
    names_of,
    parse_rules,
)
from pixart.dataset.measurement_store import identity
from pixart.dataset.samples import Item, Rejected, writable
from pixart.files import parse_json, short

UNREADABLE = "unreadable"  # the field that says why a picture has no measurements
NOT_VALUES = ("path", UNREADABLE)


@dataclass
class Step:
    """A rule, what came to it, what it left, and of what it took how many had not been measured."""

    rule: str
    before: int = 0
    after: int = 0
    unmeasured: int = 0


@dataclass
class Funnel:
    """Rules, applied one after the other. steps: that a picture can be read, then one for each rule."""

    rules: Sequence[Rule]
    steps: list[Step] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = [Step("can be read"), *(Step(rule.text) for rule in self.rules)]

    def take(self, line: Mapping[str, Any]) -> tuple[int, str] | None:
        """Count a line. Returns the step that rejects it and the reason, None if it is kept. ValueError over
        numbers that cannot be computed, with the picture's name."""
        self.steps[0].before += 1
        if line.get(UNREADABLE) is not None:
            return 0, str(line[UNREADABLE])
        self.steps[0].after += 1
        for number, rule in enumerate(self.rules, 1):
            step = self.steps[number]
            step.before += 1
            try:
                if not rule.holds(line):
                    return number, f"{rule.text} does not hold"
            except NotMeasured as error:
                step.unmeasured += 1
                return number, f"no {error} was measured, for {rule.text}"
            except ValueError as error:
                name = short(writable(str(line.get("path"))))
                raise ValueError(f"--keep: of {name}, {error}") from error
            step.after += 1
        return None

    def table(self) -> str:
        """Rows in → out, in Markdown."""
        rows: list[tuple[str, ...]] = [("rule", "in", "out", "left", "kept of in", "not measured")]
        for step in self.steps:
            share = f"{step.after / step.before:.1%}" if step.before else "-"
            counts = (step.before, step.before - step.after, step.after)
            name = step.rule.replace("|", "\\|")
            rows.append((name, *(f"{n:,}" for n in counts), share, f"{step.unmeasured:,}"))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            f"| {row[0]:<{widths[0]}} | "
            + " | ".join(
                f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)
            )
            + " |"
            for row in rows
        ]
        rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
        return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def kept(items: Iterable[Item], keep: str | None, measurements: Path | None) -> Iterable[Item]:
    """The items that an expression keeps by the lines of a file of `clean`, the others rejected. ValueError
    for one without the other, and for what check_rules refuses."""
    if (keep is None) != (measurements is None):
        raise ValueError("--keep and --measurements must be given together, got one of them")
    if keep is None or measurements is None:
        return items
    verdicts, reasons = _verdicts(keep, measurements)
    return _kept(items, verdicts, reasons, measurements.name)


def _kept(
    items: Iterable[Item], verdicts: Mapping[int, int], reasons: Sequence[str], name: str
) -> Iterator[Item]:
    for item in items:
        if isinstance(item, Rejected):
            yield item
            continue
        verdict = verdicts.get(identity(item.key))
        if verdict is None:
            yield Rejected(item.path, f"no measurements in {name}; run `pixart data clean` again")
        else:
            yield Rejected(item.path, reasons[verdict]) if verdict else item


def _verdicts(keep: str, measurements: Path) -> tuple[dict[int, int], list[str]]:
    """Of each path's identity a place in the list of reasons, of which the first is to be kept."""
    rules = parse_rules(keep)
    kinds = kinds_in(measurements, rules)
    try:
        check_names(rules, kinds)
    except ValueError as error:
        raise ValueError(f"{error}; the measurements are those of {measurements}") from None
    wanted = {name: kinds[name] for name in names_of(rules)}
    funnel, reasons = Funnel(rules), [""]
    places: dict[str, int] = {}
    verdicts = {}
    for line in read_measurements(measurements):
        _check_kinds(line, wanted, measurements)
        taken = funnel.take(line)
        verdict = 0
        if taken is not None:
            verdict = places.setdefault(taken[1], len(reasons))
            if verdict == len(reasons):
                reasons.append(taken[1])
        verdicts[identity(line["path"])] = verdict
    return verdicts, reasons


def _check_kinds(line: Mapping[str, Any], kinds: Mapping[str, str], file: Path) -> None:
    for name, kind in kinds.items():
        if (value := line.get(name)) is not None and _kind_of(value) != kind:
            raise ValueError(
                f"{file}: {name} must be {kind}, as of the pictures before, got {short(value)} of "
                f"{short(writable(line['path']))}"
            )


def kinds_in(file: Path, rules: Sequence[Rule]) -> dict[str, str]:
    """The measurements that a file has, and what they are: as far as it must be read to know the names of
    the rules. What is measured of no picture is a number."""
    wanted, kinds = names_of(rules), {}
    unsure: set[str] = set()
    for line in read_measurements(file):
        if line.get(UNREADABLE) is not None:
            continue
        for name, value in line.items():
            if name not in NOT_VALUES and name not in kinds:
                unsure.add(name)
                if value is not None:
                    kinds[name] = _kind_of(value)
        if wanted <= kinds.keys():
            break
    return dict.fromkeys(unsure, NUMBER) | kinds


def _kind_of(value: object) -> str:
    return TRUTH if isinstance(value, bool) else NUMBER if isinstance(value, int | float) else TEXT


def read_measurements(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that `clean` wrote, one after the other. ValueError for a file that is none: a pipe
    gives its lines once, and they are read twice."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file}: must be a file, got a folder, a pipe or a device")
        with file.open(encoding="utf-8", errors="surrogateescape") as lines:
            for number, content in enumerate(lines, 1):
                if not content.strip():
                    continue
                line = parse_json(content, f"{file}, line {number}")
                if not isinstance(line, dict) or not isinstance(line.get("path"), str):
                    raise ValueError(f"{file}, line {number}: must be an object with a path")
                for name, value in line.items():
                    if not isinstance(value, str | int | float | None):
                        raise ValueError(f"{file}, line {number}: {name} must be one value")
                yield line
    except FileNotFoundError:
        raise ValueError(f"{file} must be what `pixart data clean` wrote, there is none") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
