"""`python -m pixart.evaluate score|accuracy ...`: how good a model is, each number with its interval.

All go on where they were stopped. Exit codes: 0 done, 1 failure (a picture is missing), 2 bad input, 3
weights or data missing, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["evaluate", *sys.argv[1:]])

import json
from typing import Any

from pixart.command import DONE, parse, run_command
from pixart.evaluation import commands
from pixart.evaluation.metric import Metric
from pixart.evaluation.metrics import register
from pixart.evaluation.options import Accuracy, Command, Score

__all__ = ["Metric", "main", "register"]
NAME = "evaluate"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME,
        lambda: run(parse(Command, NAME, arguments)),  # type: ignore[arg-type]
        "cancelled; the same command goes on",
    )


def run(options: Any) -> int:
    """Do what is asked, and print it: in words, or one JSON object."""
    work = {Score: commands.score, Accuracy: commands.accuracy}
    said = work[type(options)](options)
    print(json.dumps(said.values) if options.json else said.text)
    return DONE
