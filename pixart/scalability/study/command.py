"""`python -m pixart.scaling study`: trains what is missing, on processes of one thread, and reports."""

import contextlib
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pixart.files import check_writable
from pixart.locks import occupied
from pixart.progress import Bar
from pixart.scalability.options import Study
from pixart.scalability.study.plan import (
    FULL,
    RUNS,
    TERA,
    TINY,
    TINY_RUNS,
    Run,
    Scale,
)
from pixart.scalability.study.report import check_drawing, write_report
from pixart.scalability.study.store import Store
from pixart.workers import pool

GUESS = 1.0  # seconds per second that `guess` tells, before anything is known


def study(options: Study) -> str:
    """Returns where the report is, and what it lacks. What was finished in OUTPUT is not trained again."""
    check(options)
    check_writable(options.output / "README.md")
    with occupied(options.output, "a scaling study"):
        return _study(options)


def _study(options: Study) -> str:
    scale, runs = (TINY, TINY_RUNS) if options.tiny else (FULL, RUNS)
    store = Store(options.output, scale, runs)
    store.pictures.mkdir(parents=True, exist_ok=True)
    earlier = len(store.finished)
    if store.missing:
        train_missing(store, options.processes, time.time() + 60 * options.minutes)
    store.write()
    write_report(store)
    lines = [str(options.output / "README.md")]
    if earlier:
        lines.append(
            f"{earlier} of {len(runs)} runs were there; another --output trains them again"
        )
    if store.missing:
        names = ", ".join(run.name for run in store.missing)
        lines.append(f"not run in {options.minutes:g} minutes: {names}; the same command goes on")
    return "\n".join(lines)


def check(options: Study) -> None:
    """ValueError for what cannot be run."""
    if not options.minutes > 0:
        raise ValueError(f"minutes must be positive, got {options.minutes:g}")
    if not 1 <= options.processes <= 64:
        raise ValueError(f"processes must be from 1 to 64, got {options.processes}")
    check_drawing()


def train_missing(store: Store, processes: int, until: float) -> None:
    """Train what the store lacks, the longest first, each only if it is likely to end in time."""
    import torch

    from pixart.scalability.study.world import make_world

    one_thread = partial(torch.set_num_threads, 1)
    waiting = sorted(store.missing, key=lambda run: -guess(run, store.scale))
    bar = Bar("study", len(store.planned), done=len(store.finished))
    since = time.time()
    try:
        with TemporaryDirectory() as folder, pool(processes, one_thread) as workers:
            file = Path(folder) / "world.safetensors"
            make_world(store.scale).save(file)
            slowness, going = GUESS, dict[Future[Any], Run]()
            while True:
                while len(going) < processes:
                    run = next_run(waiting, store.scale, slowness, until)
                    if run is None:
                        break
                    waiting.remove(run)
                    asked = (run, store.scale, file, store.pictures, until)
                    going[workers.submit(work, *asked)] = run
                if not going:
                    return
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    run, found = going.pop(future), future.result()
                    if found is None:
                        continue
                    store.add(found, time.time() - since)
                    since = time.time()
                    slowness = max(slowness, found["seconds"] / guess(run, store.scale))
                    bar.advance(note=run.name)
    finally:
        bar.close()


def next_run(waiting: list[Run], scale: Scale, slowness: float, until: float) -> Run | None:
    """The first that ends in time, if it is as slow as the slowest so far."""
    left = until - time.time()
    return next((run for run in waiting if slowness * guess(run, scale) <= left), None)


def guess(run: Run, scale: Scale) -> float:
    """Seconds that a run takes on one core, roughly: only the order and the end of the study follow it."""
    # Of a forward pass; `denoisers.cost` counts them, and takes longer.
    flops = 216e6 if run.denoiser == "unet" else 11.2e6 * run.depth * (run.width / 72) ** 1.9
    rate = 32e9 if run.denoiser == "unet" else 60e9
    seconds_of_step = 0.03 + 0.008 * run.depth + 48 * flops / rate
    return 1.1 * run.compute * scale.share * TERA / (48 * flops) * seconds_of_step


def work(
    run: Run, scale: Scale, world: Path, pictures: Path, until: float
) -> dict[str, Any] | None:
    """Train one run in a process of its own; None if the time was over before it was done."""
    from pixart.scalability.study.training import Bench, OutOfTimeError, train
    from pixart.scalability.study.world import World

    with contextlib.suppress(OutOfTimeError):
        if not _BENCH:
            _BENCH.append(Bench(World.load(world), scale))
        return train(run, _BENCH[0], pictures, until)
    return None


_BENCH: list[Any] = []  # of this process
