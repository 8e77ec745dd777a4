"""What several processes gain where each draws pictures of its own: the page of bench.parallel, and its part of
BENCHMARKS.md."""

from collections.abc import Iterator, Sequence

from bench.measure.results import Row, rows_of_kind
from bench.reporting.plots import Named
from bench.reporting.text import MISSING, percent, spread, table

KIND = "parallel"
TARGET = 1.6  # times as fast, of two processes with a core each
COLUMNS = ("what", "processes", "time", "images/s", "times one process", "CPUs taken by others")


def variant(processes: int) -> str:
    return f"ours, {processes} process{'es' * (processes > 1)}"


def page(rows: Sequence[Row]) -> Iterator[str]:
    """rows: each with the number of its run."""
    yield table((*COLUMNS, "run"), ([*_cells(row), row["run"]] for row in rows))
    missing = [f"- {row['variant']}: {row['status']}" for row in rows if "seconds" not in row]
    yield "\n".join(missing)


def overview(results: Sequence[Named]) -> str:
    """Of all results; without any, what is not measured."""
    lines = [_cells(row) for row in rows_of_kind(results, KIND)]
    return table(COLUMNS, lines or [["pictures, each process its own", "2", MISSING, "", "", ""]])


def _cells(row: Row) -> list[str]:
    count = row["variant"].split()[1]
    if "seconds" not in row:
        return [row["what"], count, MISSING, "", "", ""]
    gain = row["gain"]
    times = f"{gain['median']:.2f} × ({gain['p20']:.2f} to {gain['p80']:.2f})"
    others = row["busy_elsewhere"]
    return [
        row["what"],
        count,
        spread(row["seconds"]),
        f"{row['images_per_second']:.3g}",
        times,
        percent(others, 0) if isinstance(others, float) else "",
    ]
