"""`python -m bench.tune --out FILE [--write]`: the table of configurations, measured on this GPU.

Tries every candidate of every kernel at the shapes of a model (bench/workloads/candidates.py): tiles,
warps and stages; attention also with plain pointers instead of the copy engine, and with the search
for a bound on its scores at all sizes and at none. What is not right against fp64 wins nowhere. FILE
gets the whole table with the rows for this GPU before all others; --write puts those rows into this
checkout's own table, to be committed. A candidate that hangs or dies is told, and the rest goes on.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.tune")

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import results, supervisor, table
from bench.measure.machine import ROOT
from bench.reporting import pages
from pixart.files import check_writable
from pixart_kernels.dispatch import configurations

AT = ("1k", "2k", "4k", "512")
SHARES = {"columns": 0.1, "configurations": 0.9}  # of the time


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if options.worker:
        return _work(options)
    if not torch.cuda.is_available():
        print("bench.tune measures a GPU, and torch sees none here", file=sys.stderr)
        return 2
    try:
        for path in [options.out] + [configurations.PATH] * options.write:
            check_writable(path)
    except OSError as error:
        print(f"bench.tune could not write its table: {error}", file=sys.stderr)
        return 2
    options.out.unlink(missing_ok=True)  # an earlier run's, which this one would begin with
    content, log = supervisor.measure("tune", arguments, options.json, options.minutes)
    if content is None:
        print(log)
        return 2
    print(pages.page(content, ""))
    return _keep(content, options.out, is_ours=options.write)


def _keep(content: results.Content, out: Path, *, is_ours: bool) -> int:
    """Say what the table that the worker wrote holds, and put that into the checkout's own; 1 if
    nothing was found."""
    rows = content["runs"][-1]["rows"]  # the file may have earlier ones
    found = [row["entries"] for row in rows if row.get("entries")]
    if not found:
        print("no candidate is known to be right: no table was written", file=sys.stderr)
        return 1
    if is_ours:
        table.write(configurations.PATH, table.with_entries(table.read(), found[-1]))
    for path in [out] + [configurations.PATH] * is_ours:
        print(f"{path}: {len(found[-1])} rows, {found[-1][0]['source']}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=about)
    parser.add_argument("--out", type=Path, required=True, help="file for the whole table")
    parser.add_argument(
        "--write", action="store_true", help="rewrite this checkout's table as well"
    )
    parser.add_argument("--json", type=Path, help="file to keep every figure in")
    parser.add_argument("--minutes", type=float, default=10, help="when to stop (10)")
    parser.add_argument("--sizes", nargs="+", default=AT, choices=AT, help="shapes, in this order")
    supervisor.add_worker_options(parser)
    options = parser.parse_args(arguments)
    if options.write and ROOT not in configurations.PATH.parents:
        parser.error(f"--write needs the kernels of this checkout, got {configurations.PATH}")
    return options


def _work(options: argparse.Namespace) -> int:
    from bench.measure import worker
    from bench.workloads import candidates, columns

    cases = {
        "columns": lambda: columns.cases(options.out),
        "configurations": lambda: candidates.cases(options.sizes, options.out),
    }
    chosen = [
        worker.Part(name, share, table.adopting(options.out, cases[name]))
        for name, share in SHARES.items()
    ]
    worker.main(chosen, "cuda", options.events, options.deadline)
    return 0
