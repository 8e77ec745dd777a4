"""What the files bench_*.py share. pytest-benchmark times nothing here: on a clock that replays what
bench.measure.timing measured (variants in turn, cold cache, events on a GPU) it prints, saves and compares.

By itself it would time one function after the other on the host's clock.
"""

import traceback
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from bench.measure.case import FAULTS, MEASURED, Case, Context, failed
from bench.measure.results import Row

COMPILES = ("compiled", "flex")  # for seconds at every shape: no part of the smoke run
OF_TIME = ("seconds", "samples", "status")  # pytest-benchmark has its own


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


class Bench:
    """A case, and the part of the results that its rows belong to."""

    def __init__(self, part: str, case: Case) -> None:
        self.part, self.case = part, case


def at_each(
    part: str,
    sizes: Sequence[str],
    cases: Callable[[str], Sequence[Case]],
    smoke: Sequence[str] = (),
) -> Callable[[Callable[..., None]], pytest.MarkDecorator]:
    """Parametrize a bench by `row`, of a case and a variant. The smoke run has the first size, of it
    these variants; all that do not compile unless told."""

    def is_short(name: str) -> bool:
        return name in smoke if smoke else not any(word in name for word in COMPILES)

    params = [
        pytest.param(
            (bench, name),
            id=f"{bench.case.name}-{name}",
            marks=[pytest.mark.benchmark(timer=CLOCK.read, group=bench.case.name)]
            + [pytest.mark.smoke] * (size == sizes[0] and is_short(name)),
        )
        for size in sizes
        for bench in [Bench(part, case) for case in cases(size)]
        for name in bench.case.variants
    ]
    return pytest.mark.parametrize("row", params, indirect=True)


def chosen(items: Sequence[pytest.Item], bench: Bench) -> frozenset[str]:
    """The variants of a case that this session is to run, by -k, -m or name."""
    rows = [item.callspec.params.get("row") for item in items if hasattr(item, "callspec")]
    return frozenset(row[1] for row in rows if row is not None and row[0] is bench)


def timed_once(context: Context, items: Sequence[pytest.Item]) -> Callable[[Bench], dict[str, Row]]:
    """What times the chosen variants of a case in turn when the first of them is asked for. A case
    that fails is not tried again for the next variant: each gets a row that says so."""

    @lru_cache(maxsize=1)
    def found(bench: Bench) -> dict[str, Row]:
        context.chosen = chosen(items, bench)
        try:
            context.run(bench.part, bench.case)
        except Exception as error:
            context.survive(error)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the case
            what: Row = {"what": bench.case.name, "shape": {}, "dtype": None}
            for name in context.choose(dict.fromkeys(bench.case.variants)):
                context.row(name, failed(error), **what)
        return {row["variant"]: row for row in context.rows}

    return found


def report(benchmark: Any, row: Row) -> None:
    """Give a row to pytest-benchmark: its samples, and all that it says about them.

    What was not measured is skipped with its reason; our own must not fail wherever the memory
    suffices. Whoever computes something else than the others fails: its time would say nothing.
    """
    status = row["status"]
    if status != MEASURED:
        is_broken = status.startswith(FAULTS) and "OutOfMemory" not in status
        is_at_fault = row["variant"].startswith("ours") or not status.startswith("failed")
        (pytest.fail if is_broken and is_at_fault else pytest.skip)(status)
    benchmark.extra_info |= {key: row[key] for key in row if key not in OF_TIME}
    samples = iter(row["samples"])
    benchmark.pedantic(
        lambda: CLOCK.pass_by(next(samples)), setup=CLOCK.rewind, rounds=len(row["samples"])
    )


def rate(row: Row) -> str:
    """The line about a row that pytest-benchmark's table has no column for; empty if there is none."""
    parts: list[str] = []
    for work, unit, scale, share, of in (
        ("flops", "TFLOP/s", 1e12, "share_of_matmul", "matrix product"),
        ("bytes", "GB/s", 1e9, "share_of_copy", "copy"),
    ):
        if work in row and not parts:
            speed = row[work] / row["seconds"]["median"] / scale
            parts.append(f"{speed:.3g} {unit}, {row[share]:.0%} of the {of}")
    if row.get("images_per_second"):
        parts.append(f"{row['images_per_second']:.3g} images/s")
    if "layer_norms" in row:
        parts.append(f"{row['layer_norms']:.1f} × F.layer_norm, {row['launches']} launches")
    if "saving" in row:
        time, flops = row["saving"]["time"]["median"], row["saving"]["flops"]
        parts.append(f"time saved {time:.1%}, FLOPs saved {flops:.1%}")
    if row.get("peak_bytes") is not None:
        held = (row["peak_bytes"] + (row.get("held_bytes") or 0)) / 2**20
        parts.append(f"{held:.0f} MiB at its peak")
    return "; ".join(parts)
