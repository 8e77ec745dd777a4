"""`python -m bench.ladder [--size 4k]`: seconds from a prompt to a picture, from all steps of a dense model to few
steps of a compressed one: predicted, measured where bench/results has it, and what others publish.

Computes and prints; measuring is what `python -m bench.gpu --only ladder` does.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.ladder")

import argparse
from collections.abc import Sequence

from bench.measure import results
from bench.measure.machine import ROOT
from bench.reporting import ladder
from bench.workloads.ladder import SIZE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ladder", description=__doc__)
    parser.add_argument("--size", choices=("1k", "2k", "4k"), default=SIZE, help=f"({SIZE})")
    options = parser.parse_args(arguments)
    print(ladder.overview(results.read_all(ROOT / "bench" / "results"), options.size))
    return 0
