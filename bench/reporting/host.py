"""What calls take of the host: the page of bench.host, and its part of BENCHMARKS.md."""

from collections.abc import Iterator, Sequence

from bench.measure.results import Content, Row
from bench.reporting import comparisons
from bench.reporting.plots import Named
from bench.reporting.text import MISSING, duration, spread, table

KIND, PREFIX = "host", "host: "
BEFORE = "ours at "  # and an earlier commit
# Seconds, of a Xeon: what a call may take, so that 28 blocks do not keep a GPU waiting at 1K.
TARGETS = {
    "flash_attention self forward": 16e-6,
    "flash_attention cross forward": 16e-6,
    "flash_attention bounded forward": 24e-6,
    "modulate forward": 8e-6,
    "gate_add forward": 8e-6,
    "gate_add_modulate forward": 10e-6,
    "compress_kv forward": 13e-6,
    "model of 28 small blocks, forward": 10e-3,
    "model of 28 small blocks, forward and backward": 46e-3,
}


def page(rows: Sequence[Row]) -> Iterator[str]:
    """rows: each with the number of its run."""
    columns = ("call", "variant", "least", "median (20 % to 80 %)", "× F.layer_norm", "launches")
    lines = []
    for group in comparisons.grouped(rows):
        times = comparisons.timed(group)
        ours = times.get(comparisons.OURS)
        for name, row in times.items():
            ratio = _least(row) / _least(ours) if ours else None
            lines.append(
                [
                    _call(row),
                    name,
                    duration(_least(row)),
                    spread(row["seconds"]),
                    f"{row['layer_norms']:.1f}",
                    str(row["launches"]),
                    f"{ratio:.2f} ×" if ratio else "",
                    row["run"],
                ]
            )
    yield table((*columns, "its least / ours", "run"), lines)


def overview(results: Sequence[Named]) -> str:
    """Ours, others (or ours at an earlier commit) and the target of every call that has one."""
    columns = ("call", "the same before, or by others", "ours", "target", "from")
    lines = [
        line for name, result in results if result["kind"] == KIND for line in _lines(name, result)
    ]
    return table(columns, lines or [["every call", "", MISSING, "", ""]])


def _lines(name: str, result: Content) -> Iterator[list[str]]:
    rows = [row for run in result["runs"] for row in run["rows"]]
    for group in comparisons.grouped(rows):
        times = comparisons.timed(group)
        ours = times.get(comparisons.OURS)
        if ours is None or _call(ours) not in TARGETS:
            continue
        others = [
            f"{duration(_least(row))} ({variant.removeprefix(BEFORE)})"
            for variant, row in times.items()
            if row is not ours
        ]
        goal = TARGETS[_call(ours)]
        met = "" if _least(ours) <= goal else ", **missed**"
        lines = [_call(ours), ", ".join(others), duration(_least(ours)), f"≤ {duration(goal)}{met}"]
        yield [*lines, f"[{name}](bench/results/{name}.md)"]


def _call(row: Row) -> str:
    return str(row["what"]).removeprefix(PREFIX)


def _least(row: Row) -> float:
    return float(row["seconds"]["least"])
