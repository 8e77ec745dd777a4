"""Everything that only a GPU can tell, in one run: `python -m bench.gpu --out DIR [--minutes 8]`.

First whether the narrowest products are right, then every operator against fp64, every candidate of the
table of configurations, operators against their peers, whole steps, pictures, and the rungs of the ladder
to one of 4096 × 4096: the cases of `pytest bench` and more, in a process that is started again when it
dies, and kept as they end. Writes DIR/gpu.json, complete at every moment for what is done so far,
DIR/configurations.json, the table that follows (see bench.tune), and DIR/gpu.log; prints a page last.
Needs torch and triton; peers that are not installed are told as such. A failing or hanging case is told,
and the rest goes on.

`--dry-run` takes every launch as far as a stub of the driver, at tiny shapes without a GPU: nothing is
computed, timed or compared. `--device cpu` computes, without any kernel.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.gpu")

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.measure import supervisor
from bench.reporting import pages
from bench.workloads import sizes

# Of the time, in this order. Last what may leave something behind: a profiler.
SHARES = {
    "columns": 0.1,
    "correctness": 0.16,
    "configurations": 0.2,
    "launches": 0.04,
    "operators": 0.21,
    "steps": 0.2,
    "pictures": 0.05,
    "ladder": 0.2,
    "backends": 0.02,
}
STEPS = [("denoise", "512"), ("denoise", "1k"), ("train", "1k"), ("denoise", "2k")]
STEPS += [("denoise", "4k"), ("train", "512"), ("train", "2k"), ("train", "4k")]
TUNED = ("1k", "2k", "4k", "512")
TABLE = "configurations.json"
ARCHITECTURE = "sm_90"  # that a dry run compiles for
FEW = 1  # candidates of a kernel that a dry run compiles


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if options.worker:
        return _work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / TABLE).unlink(missing_ok=True)
    content, log = supervisor.measure("gpu", arguments, options.out / "gpu.json", options.minutes)
    if content is None:
        print(log)
        return 2
    print(pages.page(content, "gpu.json"))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop (8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes")
    parser.add_argument("--dry-run", action="store_true", help="up to a stub of the driver")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="parts to run (all)")
    supervisor.add_worker_options(parser)
    return parser.parse_args(arguments)


def _work(options: argparse.Namespace) -> int:
    if options.dry_run:
        from bench.compiled import stub_driver

        options.device = "cpu"
        stub_driver.activate(ARCHITECTURE)  # before triton and the kernels are imported
    from bench.measure import worker

    tiny = options.device == "cpu"
    made = parts(options.out / TABLE, tiny=tiny, most=FEW if options.dry_run else None)
    names = [name for name in SHARES if name in (options.only or SHARES)]
    chosen = [worker.Part(name, SHARES[name], made[name]) for name in names]
    worker.main(chosen, options.device, options.events, options.deadline, dry=options.dry_run)
    if options.dry_run:
        print(", ".join(f"{stub_driver.counted(what)} {what}" for what in stub_driver.COUNTS))
    return 0


def parts(
    table: Path, *, tiny: bool, most: int | None = None
) -> dict[str, Callable[[], list[Any]]]:
    """The cases of each part, by its name, which launch by the table in that file as soon as there is
    one. tiny: all at the tiny size, and few of them. most: candidates of each kernel, all if None;
    with it, in bf16 alone."""
    from bench.measure.table import adopting
    from bench.workloads import candidates, columns, comparisons, ladder, launches, models, pictures

    at = (sizes.TINY,) if tiny else sizes.GPU_SIZES
    small = sizes.TINY if tiny else "1k"
    steps = [("denoise", small), ("train", small)] if tiny else STEPS
    drawn = ("embedded",) if tiny else ("embedded", "1k")
    made: dict[str, Callable[[], list[Any]]] = {
        "columns": lambda: columns.cases(table, most),
        "correctness": lambda: comparisons.correctness(at, few=most is not None),
        "configurations": lambda: candidates.cases(at if tiny else TUNED, table, most),
        "launches": lambda: [launches.case(small, table)],
        "operators": lambda: comparisons.operators(at) + ([] if tiny else comparisons.further()),
        "steps": lambda: models.steps(steps),
        "pictures": lambda: [pictures.picture(model) for model in drawn],
        "ladder": lambda: ladder.cases(sizes.TINY)[:2] if tiny else ladder.cases(),
        "backends": lambda: comparisons.backends(small),
    }

    return {name: adopting(table, cases) for name, cases in made.items()}
