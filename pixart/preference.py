"""`python -m pixart.preference build|serve|page|add|judge|fit`: which of two pictures people prefer.

build makes blind pairs; serve and page let people vote, add takes votes in; judge asks a model; fit says
what came of it. Exit codes: 0 done, 2 bad input, 3 a model is missing, 1 failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["preference", *sys.argv[1:]])

from typing import TYPE_CHECKING

from pixart import process
from pixart.command import DONE, parse, run_command
from pixart.evaluation.preference.options import Add, Build, Command, Fit, Judge, Page, Serve
from pixart.lazy import lazily

if TYPE_CHECKING:
    from pixart.evaluation.preference.bradley_terry import bradley_terry

__all__ = ["bradley_terry", "main"]
NAME = "preference"


__getattr__ = lazily(__name__, {"bradley_terry": "pixart.evaluation.preference.bradley_terry"})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME,
        lambda: run(parse(Command, NAME, arguments)),  # type: ignore[arg-type]
        "cancelled; votes and judgements so far are kept",
    )


def run(options: Build | Serve | Page | Add | Judge | Fit) -> int:
    commands = {Build: build, Serve: serve, Page: page, Add: add, Judge: judge, Fit: fit}
    process.at_work()
    print(commands[type(options)](options))  # type: ignore[operator]
    return DONE


def build(options: Build) -> str:
    """Returns a sentence on what was built."""
    from pixart.evaluation.preference.build import build

    return build(options)


def serve(options: Serve) -> str:
    """Ends by Ctrl-C alone."""
    from pixart.evaluation.preference.server import serve

    return serve(options)


def page(options: Page) -> str:
    """Returns a sentence on where the page is."""
    from pixart.evaluation.preference.page import write_page

    return write_page(options)


def add(options: Add) -> str:
    """Returns a sentence on how many votes were added."""
    from pixart.evaluation.preference.adding import add

    return add(options)


def judge(options: Judge) -> str:
    """Returns a sentence on what was judged, and on how often the order decided."""
    from pixart.evaluation.preference.judging import judge

    return judge(options)


def fit(options: Fit) -> str:
    """Returns the results in words, or fit.json."""
    from pixart.evaluation.preference.fit import fit

    return fit(options)
