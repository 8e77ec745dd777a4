"""`python -m pixart.serve --model sigma-1024`: pictures over HTTP, for programs and for people.

Prints the address to open as soon as it listens, which is when the model is open, and serves until Ctrl-C or
SIGTERM. Exit codes: 2 bad input, 1 failure, 130 Ctrl-C.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["serve", *sys.argv[1:]])

from typing import TYPE_CHECKING

from pixart.command import parse, run_command

if TYPE_CHECKING:
    from pixart.serving.options import Options

NAME, ENDED = "serve", "cancelled; nothing is served any more"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(NAME, lambda: _run(arguments), ENDED)


def _run(arguments: list[str] | None) -> int:
    from pixart.serving.options import Options

    return run(parse(Options, NAME, arguments))


def run(options: "Options") -> int:
    """Serve until a signal comes, which is a KeyboardInterrupt as soon as all is closed."""
    from pixart.serving.running import serve

    serve(options)
    raise KeyboardInterrupt
