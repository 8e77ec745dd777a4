"""How time and memory grow with the number of tokens, and the least time that the work can take."""

import math
from collections.abc import Callable, Sequence

from bench.measure.results import Content, Row
from bench.reporting.comparisons import tokens
from bench.reporting.text import MISSING


def seconds(row: Row) -> float:
    return row["seconds"]["median"]


def peak_bytes(row: Row) -> int:
    return row.get("peak_bytes") or 0


def curves(content: Content) -> dict[tuple[str, str], list[Row]]:
    """The rows of bench.growth by variant and dtype, small images first; empty of other results."""
    rows = [row for run in content["runs"] for row in run["rows"] if row["part"] == "growth"]
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=tokens):
        found.setdefault((row["variant"], row["dtype"]), []).append(row)
    return found


def fits(rows: Sequence[Row]) -> str:
    """By which power of the tokens time and memory grow."""
    timed = [row for row in rows if row.get("seconds")]
    held = [row for row in timed if peak_bytes(row)]
    return (
        f"time grows with tokens to the power of {fit(timed, seconds)} over all sizes, "
        f"{fit(timed[-2:], seconds)} between the last two; "
        f"memory {fit(held, peak_bytes)} and {fit(held[-2:], peak_bytes)}"
    )


def fit(rows: Sequence[Row], value: Callable[[Row], float]) -> str:
    if len({tokens(row) for row in rows}) < 2:
        return MISSING
    return f"{exponent([(tokens(row), value(row)) for row in rows]):.2f}"


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """b of the least-squares fit y = a·x^b, which is a line through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    rise = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return rise / sum((x - mean_x) ** 2 for x, _ in logs)


def ceiling(content: Content) -> tuple[float, float]:
    """FLOP/s and bytes/s of the run that measured the largest size."""
    largest = {
        max((tokens(row) for row in run["rows"] if row.get("seconds")), default=0): run
        for run in content["runs"]
    }
    peaks = largest[max(largest)]["peaks"]
    return peaks["matmul"]["per_second"], peaks["copy"]["per_second"]


def roofline(row: Row, peaks: tuple[float, float]) -> float | None:
    """Seconds that a row's operations take at least; None in a dtype that has no measured peak."""
    if row["floors"] is None:
        return None
    return sum(max(flops / peaks[0], moved / peaks[1]) for flops, moved in row["floors"])
