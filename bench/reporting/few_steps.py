"""Pictures in few steps: the page of bench.studies.few_steps, its gates, and its part of BENCHMARKS.md."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.measure.results import Row, rows_of_kind
from bench.reporting.plots import Named
from bench.reporting.text import MISSING, percent, table

KIND = "studies.few_steps"
COUNT = 300  # captions of a kind
KINDS = {"one": "one thing", "pair": "pairs", "both": "both"}
TEACHER, UNDISTILLED, DISTILLED = "teacher", "undistilled", "distilled"
COLUMNS = {"statements": "statements held", "right": "all right", "purity": "palette purity"}
# By what a row has of the differences from them: the pipeline's own 20 steps, and the same without guidance.
OWN, UNGUIDED = TEACHERS = ("to_teacher", "to_unguided")
_TEACHERS = {OWN: "teacher", UNGUIDED: "teacher without guidance"}
HEADINGS = ("model and sampler", "evaluations", "FLOPs", *COLUMNS.values())
DIFFERENCES = tuple(f"{name}, points" for name in COLUMNS.values())


@dataclass(frozen=True)
class Gate:
    """What a distilled model is to reach in so many evaluations. purity: of the palette, at least. below: how
    far statements may be below a teacher's, of TEACHERS; None where they do not count."""

    evaluations: int
    purity: float
    below: float | None = None
    teacher: str = OWN

    def __str__(self) -> str:
        steps = "1 step" if self.evaluations == 1 else f"{self.evaluations} steps"
        goal = f"{steps}: purity ≥ {percent(self.purity, 0)}"
        if self.below is None:
            return goal
        return f"{goal}, statements ≥ {_TEACHERS[self.teacher]} − {100 * self.below:g} points"

    def is_met(self, row: Row) -> bool:
        met: bool = row["figures"]["purity"]["mean"] >= self.purity
        if self.below is None:
            return met
        return met and row[self.teacher]["statements"]["mean"] >= -self.below


GATES = (Gate(2, 0.97, 0.03), Gate(2, 0.97, 0.03, UNGUIDED), Gate(1, 0.90))


def page(rows: Sequence[Row]) -> Iterator[str]:
    """The gates, and two tables for each kind of caption; rows: each with the number of its run."""
    yield "## What a distilled model is to reach"
    yield gates(rows)
    for kind, words in KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        yield f"## {words.capitalize()}, {own[0]['cases']} captions" + _others(own)
        yield table((*HEADINGS, "captions", "run"), map(_line, own))
        for name, teacher in _TEACHERS.items():
            columns = (f"the same captions and noise, less the {teacher}", *DIFFERENCES)
            yield table(columns, (_gaps(row, name) for row in own if name in row))


def _others(rows: Sequence[Row]) -> str:
    return " or fewer" if len({row["cases"] for row in rows}) > 1 else ""


def overview(results: Sequence[Named]) -> str:
    """The gates, and what all rows come to, on captions of both kinds."""
    both = [row for row in rows_of_kind(results, KIND) if row["kind"] == "both"]
    lines = ([*_line({**row, "run": ""})[: len(HEADINGS)]] for row in ordered(both))
    return "\n\n".join([gates(both), *([table(HEADINGS, lines)] if both else [])])


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The teacher, then what is not distilled, then what is."""
    parts = (TEACHER, UNDISTILLED, DISTILLED)
    return sorted(rows, key=lambda row: (parts.index(row["part"]), row["evaluations"]))


def gates(rows: Sequence[Row]) -> str:
    """Whether each distilled model reaches what it is to, and all that is not distilled misses it."""
    columns = ("to be reached", "captions", "distilled", "found", "undistilled", "")
    lines = [line for gate in GATES for line in _of_gate(gate, rows)]
    return table(columns, lines)


def _of_gate(gate: Gate, rows: Sequence[Row]) -> Iterator[list[str]]:
    fitting = [row for row in rows if row["evaluations"] == gate.evaluations]
    tried = [row for row in fitting if row["part"] == DISTILLED]
    if not tried:
        yield [str(gate), "", "", MISSING, "", ""]
    for row in sorted(tried, key=lambda one: (one["variant"], list(KINDS).index(one["kind"]))):
        controls = [
            one for one in fitting if one["part"] == UNDISTILLED and one["kind"] == row["kind"]
        ]
        controls.sort(key=lambda one: one["variant"] != row["control"])  # its own sampler first
        met = [one["variant"] for one in controls if gate.is_met(one)]
        is_reached = gate.is_met(row) and not met
        words = "; ".join(f"{one['variant']}: {_found(gate, one)}" for one in controls)
        why = f": {met[0]} reaches it too" if met and gate.is_met(row) else ""
        yield [
            str(gate), KINDS[row["kind"]], row["variant"], _found(gate, row), words,
            "reached" if is_reached else f"**missed**{why}",
        ]  # fmt: skip


def _found(gate: Gate, row: Row) -> str:
    words = f"purity {percent(row['figures']['purity']['mean'])}"
    if gate.below is not None:
        words += f", statements {_points(row[gate.teacher]['statements'])}"
    return words


def _line(row: Row) -> list[str]:
    figures: Mapping[str, Row] = row["figures"]
    return [
        row["variant"],
        str(row["evaluations"]),
        f"{row['flops'] / 1e9:.3g} G",
        *(_share(figures[name]) for name in COLUMNS),
        str(row["cases"]),
        row["run"],
    ]


def _gaps(row: Row, teacher: str) -> list[str]:
    return [row["variant"], *(_points(row[teacher][name]) for name in COLUMNS)]


def _share(figure: Row) -> str:
    low, high = (100 * figure[end] for end in ("low", "high"))
    return f"{percent(figure['mean'])} ({low:.1f} to {high:.1f})"


def _points(figure: Row) -> str:
    mean, low, high = (100 * figure[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
