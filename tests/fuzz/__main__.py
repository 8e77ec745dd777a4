"""`python tests/fuzz [--seconds 600] [--target NAME] [--seed N]`: damaged files on every reader.

With --seed that one mutant; otherwise fresh seeds, in turn over all targets, until the time is up.
A fault is printed with the command that repeats it, and its files are kept. Exit code 1 if there were
any.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "builders"))

from run import try_seeds
from targets import TARGETS

AT_ONCE = 50  # mutants of one target in a row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--kept", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    started, tried, faults = time.monotonic(), 0, 0
    targets = options.target or list(TARGETS)
    while not tried or (options.seed is None and time.monotonic() < started + options.seconds):
        for target in targets:
            first = random.SystemRandom().randrange(2**40)
            seeds = range(first, first + AT_ONCE) if options.seed is None else [options.seed]
            with tempfile.TemporaryDirectory() as folder:
                for fault in try_seeds(target, seeds, Path(folder), options.kept):
                    faults += 1
                    print(fault, flush=True)
            tried += len(seeds)
    print(f"{tried:,} mutants, {faults} faults" + (f": see {options.kept}" if faults else ""))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
