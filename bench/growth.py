"""`python -m bench.growth [--json FILE]`: time and memory against the number of image tokens.

One block of the full-size model (28 of them are the model but for its ends), dense, compressed and
diffusers', from 256 tokens to the 65,536 of a 4K image; and the roofline of each size up to 8K: how
long the work takes at least at the peaks that this machine reached in the same process.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.growth")

from collections.abc import Sequence
from functools import partial

import torch

from bench.command import Command
from bench.measure.case import Case, Context
from bench.workloads import blocks, sizes
from bench.workloads.models import OURS, THEIRS

MERGED = sizes.Compression()


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("growth", __doc__, ("256", "512", "1k", "2k", "4k"), ("2880", sizes.TINY))
    command.parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = command.parse(arguments)
    dtype = getattr(torch, options.dtype)
    cases = [
        Case(f"{size}/{options.dtype}", partial(_measure, size, dtype)) for size in options.sizes
    ]
    predicted = Case(f"{sizes.PREDICTED}/{options.dtype}", partial(_predict, dtype))
    return command.run([*cases, predicted])


def _measure(size: str, dtype: torch.dtype, context: Context) -> None:
    for name, row in blocks.rows(size, [MERGED], context, dtype).items():
        context.row(name, **row, floors=_floors(size, name, dtype))


def _predict(dtype: torch.dtype, context: Context) -> None:
    size = sizes.PREDICTED
    for name in (OURS, MERGED.variant, THEIRS):
        reason = "not measured: no machine here runs this size"
        floors = _floors(size, name, dtype)
        context.row(name, reason, **blocks.describe(size, dtype), floors=floors)


def _floors(size: str, variant: str, dtype: torch.dtype) -> list[tuple[int, int]] | None:
    """Of 16 bits: fp32 has other bytes, and another peak. diffusers' dense block has the work of ours."""
    if dtype != torch.bfloat16:
        return None
    return blocks.floors(size, MERGED if variant == MERGED.variant else None)
