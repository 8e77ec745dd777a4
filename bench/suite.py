"""What the files bench_*.py share: a case times its variants in turn, and each is a benchmark.

pytest-benchmark by itself times one function after the other on the host's clock. Here bench.measure.timing
measures (interleaved, with events and a cold cache on a GPU), and pytest-benchmark is given a clock
that replays what was measured: its statistics, its JSON and its comparisons are of those samples.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from bench.measure import machine, results
from bench.measure.worker import Case, Context
from bench.reporting.format import saved

Row = dict[str, Any]
STATISTICS = {"median", "p20", "p80", "reps", "samples", "status"}  # pytest-benchmark has its own
COMPILES = ("compiled", "flex")  # for seconds at every shape: no part of the smoke run


class Replay:
    """A clock on which a function takes as long as it did when it was measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def rewind(self) -> None:
        self.now = 0.0  # a sum would round away the end of short times

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Replay()


@cache
def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def at_each(
    sizes: Sequence[str], cases: Callable[[str], Sequence[Case]]
) -> Callable[[Callable[..., None]], pytest.MarkDecorator]:
    """Parametrize a bench by `rows` (of a case) and `variant`; the first size is the smoke run."""
    params = [
        pytest.param(
            case,
            name,
            id=f"{case.name}-{name}",
            marks=[pytest.mark.benchmark(timer=CLOCK.read, group=case.name)]
            + [pytest.mark.smoke] * (size == sizes[0] and not any(w in name for w in COMPILES)),
        )
        for size in sizes
        for case in cases(size)
        for name in case.variants
    ]
    return pytest.mark.parametrize(("rows", "variant"), params, indirect=["rows"])


def chosen(items: Sequence[pytest.Item], case: Case) -> frozenset[str]:
    """The variants of a case that this session is to run, by -k, -m or name."""
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return frozenset(call["variant"] for call in calls if call.get("rows") is case)


def timed_once(context: Context, items: Sequence[pytest.Item]) -> Callable[[Case], dict[str, Row]]:
    """What times the chosen variants of a case in turn when the first of them is asked for. In each
    row stands what other processes took of the CPUs meanwhile."""

    @lru_cache(maxsize=1)
    def found(case: Case) -> dict[str, Row] | Exception:
        context.chosen = chosen(items, case)
        before = results.Moment()
        try:
            context.run(case)
        except Exception as error:  # not tried again for the next variant
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the case
            return error
        company = {"busy_elsewhere": results.Moment().elsewhere(before)}
        return {row["variant"]: {**row, **company} for row in context.rows}

    def timed(case: Case) -> dict[str, Row]:
        rows = found(case)
        if isinstance(rows, Exception):
            raise rows
        return rows

    return timed


def report(benchmark: Any, row: Row) -> None:
    """Give a row to pytest-benchmark: its samples, and all that it says about them.

    What was not measured is skipped with its reason; our own must not fail wherever the memory
    suffices. Whoever computes something else than the others fails: its time says nothing.
    """
    if row["status"] != "measured":
        is_broken = row["status"].startswith("failed") and "OutOfMemory" not in row["status"]
        is_ours = row["variant"].startswith("ours")
        (pytest.fail if is_ours and is_broken else pytest.skip)(row["status"])
    assert row["agrees"] is not False, f"computes something else: {row}"
    benchmark.extra_info |= {key: row[key] for key in row if key not in STATISTICS}
    samples = iter(row["samples"])
    benchmark.pedantic(
        lambda: CLOCK.pass_by(next(samples)), setup=CLOCK.rewind, rounds=len(row["samples"])
    )


def outcome(item: pytest.Item, row: Row) -> Row:
    """Of a bench that has no time, for pytest-benchmark keeps none of these: which it is, and why."""
    marker = item.get_closest_marker("benchmark")
    assert marker is not None and isinstance(item, pytest.Function)
    known = {key: value for key, value in row.items() if key not in STATISTICS - {"status"}}
    return {"bench": item.originalname, "group": marker.kwargs["group"], **known}


def rate(row: Row) -> str:
    """The line about a row that pytest-benchmark's table has no column for; empty if there is none."""
    parts = []
    if "flops_per_second" in row:
        share = f"{row['share_of_matmul']:.0%} of the matrix product"
        parts.append(f"{row['flops_per_second'] / 1e12:.3g} TFLOP/s, {share}")
    elif "bytes_per_second" in row:
        share = f"{row['share_of_copy']:.0%} of the copy"
        parts.append(f"{row['bytes_per_second'] / 1e9:.3g} GB/s, {share}")
    if row.get("images_per_second"):
        parts.append(f"{row['images_per_second']:.3g} images/s")
    if "time_saved" in row:
        parts.append(saved(row))
    if row.get("peak_bytes") is not None:
        parts.append(f"{row['peak_bytes'] / 2**20:.0f} MiB at its peak")
    return "; ".join(parts)


def machine_info() -> Mapping[str, Any]:
    """Of the machine alone: two commits on one machine have the same."""
    found, commit = machine.identity(device()), commit_info()
    return {key: value for key, value in found.items() if key not in commit}


def commit_info() -> Mapping[str, Any]:
    return machine.revision()
