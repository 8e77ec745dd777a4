"""`python -m bench.parallel [--json FILE]`: what a second process gains where each draws pictures of its own.

As `torchrun --nproc-per-node N -m -- pixart.generate --parallel pictures` shares them: each process has the
pipeline open, a core of its own and one thread, and draws every N-th picture of the embedded model, one at a
time. A call lasts until all are drawn; those of one process and of several take turns.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.parallel")

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.command import told
from bench.measure import results, timing
from bench.measure.case import Case, Context, Unavailable, measured
from bench.measure.results import Row
from bench.reporting.parallel import KIND, variant
from pixart.config import EMBEDDED
from pixart.workers import pool

PROMPT = "a small orange cross in the bottom right corner on black"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    is_tiny = options.steps < 10
    run = results.started(KIND, typed, torch.device("cpu"), dry_run=is_tiny)
    context = Context(torch.device("cpu"))
    context.seconds, context.least_rounds = options.seconds, options.rounds
    run["rows"] += context.run(KIND, case(options.processes, options.pictures, options.steps))
    run["complete"] = True
    content = results.save(options.json, KIND, run)
    return told(content, run, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, help="file to keep the result in, beside earlier runs'")
    add("--processes", type=int, default=2, help="to compare with one (2)")
    add("--pictures", type=int, default=8, help="of a call (8)")
    add("--steps", type=int, default=20, help="of a picture (20); fewer than 10 are a try")
    add("--rounds", type=int, default=5, help="how often to time each, at least (5)")
    add("--seconds", type=float, default=60, help="go on timing for so long (60)")
    options = parser.parse_args(arguments)
    if options.processes < 2 or options.pictures % options.processes or options.steps < 1:
        parser.error("--processes must be 2 or more, and divide --pictures; --steps 1 or more")
    return options


def case(processes: int, pictures: int, steps: int) -> Case:
    names = (variant(1), variant(processes))
    return Case("pictures", partial(_measure, processes, pictures, steps), names)


def _measure(processes: int, pictures: int, steps: int, context: Context) -> None:
    names = {variant(count): count for count in (1, processes)}
    described: Row = {
        "what": f"{pictures} pictures, each process its own",
        "shape": {"size": "128", "batch": 1, "steps": steps},
        "dtype": "float32",
    }
    try:
        found = _timed(names, pictures, steps, context)
    except Unavailable as reason:
        for name in names:
            context.row(name, f"not measured: {reason}", **described)
        return
    alone = found[variant(1)]
    for name, count in names.items():
        timed = found[name]
        row = described | {"processes": count} | measured(context, timed, dtype=torch.float32)
        if isinstance(timed, timing.Timing):
            row["images_per_second"] = pictures / timed.median
            if isinstance(alone, timing.Timing):
                row["gain"] = _gain(alone, timed)
        context.row(name, **row)


def _timed(
    names: dict[str, int], pictures: int, steps: int, context: Context
) -> dict[str, timing.Timing | Exception]:
    most, cores = max(names.values()), _cores()
    if len(cores) < most:
        raise Unavailable(f"{most} processes want a core each, there are {len(cores)}")
    with ExitStack() as stack:
        workers = [
            stack.enter_context(pool(1, partial(_open, core))) for core in sorted(cores)[:most]
        ]
        calls = {
            name: [partial(_draw_all, workers[:count], pictures, steps)]
            for name, count in names.items()
        }
        return timing.measure(
            calls, context.device, seconds=context.seconds, least_rounds=context.least_rounds or 5
        )


def _gain(alone: timing.Timing, several: timing.Timing) -> Row:
    """How many times as fast, of the calls that came in turn."""
    pairs = zip(alone.samples, several.samples, strict=True)
    gains = timing.summarize([one / other for one, other in pairs], "in turn")
    return {"median": gains.median, "p20": gains.p20, "p80": gains.p80}


def _cores() -> set[int]:
    """Those that this process may run on; none where no process can be kept on one."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


_pipe: Any = None  # of a worker


def _open(core: int) -> None:
    """In a worker, once."""
    global _pipe
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    from pixart.pipeline.text_to_image import Pipeline

    _pipe = Pipeline.from_pretrained(EMBEDDED, device="cpu", cache_dir=None)
    _pipe.prepare([PROMPT, ""])


def _draw(seeds: Sequence[int], steps: int) -> int:
    """In a worker: pictures of these seeds, one at a time."""
    from pixart.pipeline.request import Request

    requests = [Request(PROMPT, seed=seed, steps=steps) for seed in seeds]
    return sum(1 for _ in _pipe.draw_many(requests))


def _draw_all(workers: Sequence[ProcessPoolExecutor], pictures: int, steps: int) -> None:
    count = len(workers)
    shares = [
        worker.submit(_draw, range(number, pictures, count), steps)
        for number, worker in enumerate(workers)
    ]
    drawn = sum(share.result() for share in shares)
    if drawn != pictures:
        raise RuntimeError(f"{pictures} pictures were to be drawn, got {drawn}")
