"""`python -m pixart.calibrate --model M --budget 0.05 --output plan.json`: how much less work a picture needs.

Merges keys and values block by block and by timestep as far as the error of the latents allows it, verifies
that on pictures, and writes a plan for `generate --fast`. What was measured is kept beside the plan until it is
written, so that a run that is cut off goes on there. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["calibrate", *sys.argv[1:]])

from pixart.command import DONE, parse, run_command

NAME, KEPT = "calibrate", "cancelled; the same command goes on with what was measured"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(NAME, lambda: _run(arguments), KEPT)


def _run(arguments: list[str] | None) -> int:
    """Measure, write the plan, and print the table of it."""
    from pixart.calibration.options import Options

    options = parse(Options, NAME, arguments)
    from pixart.calibration.work import calibrate

    print(calibrate(options))
    return DONE
