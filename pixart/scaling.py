"""`python -m pixart.scaling table|fit|study|contrast`: which denoiser scales, and by which law.

table counts UNets and diffusion transformers; fit finds the law behind runs; study trains a small world's
worth of them; contrast sets MobileDiffusion beside PixArt-Σ. Exit codes: 0 done, 2 bad input, 1 failure,
130 cancelled. From Python:

    from pixart.scaling import VARIANTS, fit_power_law, unet
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["scaling", *sys.argv[1:]])

from typing import TYPE_CHECKING

from pixart import process
from pixart.command import DONE, parse, run_command
from pixart.lazy import lazily
from pixart.scalability.options import Command, Contrast, Fit, Study, Table

if TYPE_CHECKING:
    from pixart.scalability.laws import fit_power_law
    from pixart.scalability.unets import unet
    from pixart.variants import VARIANTS

__all__ = ["VARIANTS", "fit_power_law", "main", "unet"]
NAME = "scaling"
_LAZY = {
    "VARIANTS": "pixart.variants",
    "fit_power_law": "pixart.scalability.laws",
    "unet": "pixart.scalability.unets",
}


__getattr__ = lazily(__name__, _LAZY)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(NAME, lambda: run(parse(Command, NAME, arguments)))  # type: ignore[arg-type]


def run(options: Table | Fit | Study | Contrast) -> int:
    commands = {Table: table, Fit: fit, Study: study, Contrast: contrast}
    process.at_work()
    print(commands[type(options)](options))  # type: ignore[operator]
    return DONE


def table(options: Table) -> str:
    """Returns the table in words or as JSON."""
    from pixart.scalability.table import table

    return table(options)


def fit(options: Fit) -> str:
    """Returns what was fitted in words or as JSON."""
    from pixart.scalability.fitting import fit

    return fit(options)


def study(options: Study) -> str:
    """Returns where the report is."""
    from pixart.scalability.study.command import study

    process.ENDING.words = "cancelled; the runs that ended are kept, the same command goes on"
    return study(options)


def contrast(options: Contrast) -> str:
    """Returns the table in words or as JSON."""
    from pixart.scalability.contrast import contrast

    return contrast(options)
