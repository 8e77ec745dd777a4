"""How figures look in a report: times with their spread, shares, bytes, tables."""

from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "not measured"
SPREAD = ("median", "p20", "p80")


def spread(timing: dict[str, Any]) -> str:
    """A median with its 20 % and 80 % quantiles, in one unit."""
    scale, unit = _unit(timing["median"])
    median, low, high = (f"{scale * timing[key]:.4g}" for key in SPREAD)
    return f"{median} {unit} ({low} to {high})"


def duration(seconds: float) -> str:
    scale, unit = _unit(seconds)
    return f"{scale * seconds:.3g} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")


def memory(held: int | None) -> str:
    if held is None:
        return MISSING
    return f"{held / 2**30:.2f} GiB" if held >= 2**30 else f"{held / 2**20:.0f} MiB"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def saved(row: dict[str, Any]) -> str:
    """Time saved by key/value compression, FLOPs saved, and what the paper reports."""
    time, flops = percent(row["time_saved"]), percent(row["flops_saved"])
    paper = "" if row["paper"] is None else f", paper {percent(row['paper'], 0)}"
    return f"time saved {time}, FLOPs saved {flops}{paper}"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])
