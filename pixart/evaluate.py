"""`python -m pixart.evaluate run|draw|score|report|compare ...`: how good a model is, with intervals.

All go on where they were stopped, and share work with others of the same folder. Exit codes: 0 done, 1
failure (a picture is missing), 2 bad input, 3 weights or data missing, 130 cancelled. From Python:

    from pixart.evaluate import evaluate
    result = evaluate("images/", metrics=["clip", "shapes"], prompts="prompts.jsonl")
    result.values["clip"].mean, result.values["clip"].low, result.values["clip"].high
    result.compare(other)["clip"].difference
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["evaluate", *sys.argv[1:]])

import json
from typing import TYPE_CHECKING, Any

from pixart.command import DONE, parse, run_command
from pixart.evaluation import commands
from pixart.evaluation.metric import Metric
from pixart.evaluation.metrics import register
from pixart.evaluation.options import Command
from pixart.lazy import lazily

if TYPE_CHECKING:
    from pixart.evaluation.api import Result, evaluate
    from pixart.evaluation.distances import frechet_distance, kernel_distance

__all__ = [
    "Metric",
    "Result",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "main",
    "register",
]
NAME = "evaluate"
_LAZY = {
    "Result": "pixart.evaluation.api",
    "evaluate": "pixart.evaluation.api",
    "frechet_distance": "pixart.evaluation.distances",
    "kernel_distance": "pixart.evaluation.distances",
}


__getattr__ = lazily(__name__, _LAZY)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME,
        lambda: run(parse(Command, NAME, arguments)),  # type: ignore[arg-type]
        "cancelled; the same command goes on",
    )


def run(options: Any) -> int:
    """Do what is asked, and print it: in words, or one JSON object."""
    said = commands.COMMANDS[type(options)](options)
    from pixart.evaluation.running.drawing import speaks

    if speaks():
        print(json.dumps(said.values) if options.json else said.text)
    if said.failed:
        raise RuntimeError(said.failed)
    return DONE
