"""`python -m bench.cpu [--json FILE]`: the full-size model's forward pass on a CPU, against diffusers'.

Ours and diffusers' PixArtTransformer2DModel with the same random weights and inputs, in turn in one
process; nothing is timed that does not agree. "caption encoded" is ours as a sampler calls it: the
caption's keys and values were made once for all steps.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.cpu")

from collections.abc import Sequence
from functools import partial

import torch

from bench.command import Command
from bench.measure.case import Case, Context
from bench.workloads import models, sizes


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("cpu", __doc__, ("256", "512", "1k"), ("2k", sizes.TINY))
    names = ["float32", "bfloat16"]
    command.parser.add_argument("--dtypes", nargs="+", default=names, choices=names)
    options = command.parse(arguments)
    if options.device != "cpu":
        command.parser.error(
            f"--device must be cpu, got {options.device}; python -m bench.gpu measures a GPU"
        )
    return command.run(
        [
            Case(f"{size}/{name}", partial(_measure, size, getattr(torch, name)))
            for size in options.sizes
            for name in options.dtypes
        ]
    )


def _measure(size: str, dtype: torch.dtype, context: Context) -> None:
    found = models.rows("denoise", "forward pass", size, models.FORWARD, context, dtype)
    for name, row in found.items():
        context.row(name, **row)
