"""`python -m bench.cpu [--json FILE]`: the full-size model's forward pass on a CPU, against diffusers'.

Ours and diffusers' PixArtTransformer2DModel with the same random weights and inputs, in turn in one
process; nothing is timed that does not agree. "caption encoded" is ours as a sampler calls it: the
caption's keys and values were made once for all steps.

`--parts` names what else there is: `compiled`, two blocks of the model as they are and through torch.compile;
`pictures`, denoising by the plans of any model; `cold`, a picture from a process that is started for it, with
`--before CHECKOUT` beside an earlier revision's.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.cpu")

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.command import Command
from bench.measure.case import Case, Context
from bench.workloads import cold, models, planned, sizes

PARTS = ("forward", "compiled", "pictures", "cold")


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("cpu", __doc__, ("256", "512", "1k"), ("2k", sizes.TINY))
    names = ["float32", "bfloat16"]
    command.parser.add_argument("--dtypes", nargs="+", default=names, choices=names)
    command.parser.add_argument("--parts", nargs="+", default=["forward"], choices=PARTS)
    command.parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of an earlier one")
    options = command.parse(arguments)
    if options.before and not (options.before / "pixart").is_dir():
        command.parser.error(f"--before must be a checkout of this project, got {options.before}")
    if options.device != "cpu":
        command.parser.error(
            f"--device must be cpu, got {options.device}; python -m bench.gpu measures a GPU"
        )
    cases = [cold.case(options.before)] if "cold" in options.parts else []
    for size in options.sizes:
        for name in options.dtypes:
            dtype = getattr(torch, name)
            if "forward" in options.parts:
                cases.append(Case(f"{size}/{name}", partial(_measure, size, dtype)))
            if "compiled" in options.parts:
                cases.append(Case(f"compiled/{size}/{name}", partial(_compiled, size, dtype)))
            if "pictures" in options.parts:
                cases.append(planned.case(size, dtype))
    return command.run(cases)


def _compiled(size: str, dtype: torch.dtype, context: Context) -> None:
    size = size if size == sizes.TINY else size + sizes.SHALLOW
    given = ("denoise", "denoising step", size, models.COMPILED, context, dtype)
    for name, row in models.rows(*given).items():
        context.row(name, **row)


def _measure(size: str, dtype: torch.dtype, context: Context) -> None:
    found = models.rows("denoise", "forward pass", size, models.FORWARD, context, dtype)
    for name, row in found.items():
        context.row(name, **row)
