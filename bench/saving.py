"""`python -m bench.saving [--json FILE]`: kv_compression_saving, the time that compression saves.

One denoising step of the full-size XL/2 model, dense against compressed in its deeper half and against
diffusers' dense one, in turn in one process, beside the share of FLOPs saved and what the paper
reports. A CPU runs the whole model up to 2K; at larger sizes, one block of either kind stands for the
model's 28.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.saving")

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.command import Command
from bench.measure import timing
from bench.measure.case import Case, Context, measured
from bench.measure.results import Row
from bench.workloads import blocks, models, sizes
from bench.workloads.models import OURS, THEIRS, Recipe
from bench.workloads.sizes import Compression

# Seconds to draw an image, 58 to 38 at 2K and 91 to 60 at 4K: PixArt-Σ, table 3 (d).
PAPER = {"2k": 0.34, "4k": 0.34}
WHOLE_ON_CPU = (sizes.TINY, "256", "512", "1k", "2k", *sizes.MODEL_SIZES["cpu"])
DTYPE = torch.bfloat16


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("saving", __doc__, ("512", "1k", "2k", "4k"), ("256", "2880", sizes.TINY))
    command.parser.add_argument("--ratios", nargs="+", type=int, default=[2, 4], choices=(2, 3, 4))
    options = command.parse(arguments)
    return command.run([case(size, options.ratios) for size in options.sizes])


def case(size: str, ratios: Sequence[int] = (2, 4)) -> Case:
    merged = [Compression(ratio) for ratio in ratios]
    names = (OURS, *(one.variant for one in merged), THEIRS)
    return Case(size, partial(_measure, size, merged), names)


def _measure(size: str, merged: Sequence[Compression], context: Context) -> None:
    whole = context.device.type == "cuda" or size in WHOLE_ON_CPU
    if context.chosen is not None:
        context.chosen |= {OURS}  # what all others are compared with
    found = _models(size, merged, context) if whole else _composed(size, merged, context)
    single = {
        name: blocks.ours(size, one, context.device, DTYPE)
        for name, one in [(OURS, None), *((one.variant, one) for one in merged)]
        if name in found
    }
    passes = blocks.operations(single, size, context.device, context.least_rounds or 3)
    for name, row in found.items():
        own = next((one for one in merged if one.variant == name), None)
        if own is not None and "samples" in row and "samples" in found[OURS]:
            row["ratio"] = own.ratio
            row["saving"] = saving(size, own, found[OURS], row, passes)
        context.row(name, **row, scope="whole" if whole else "block")


def _models(size: str, merged: Sequence[Compression], context: Context) -> dict[str, Row]:
    recipes = {OURS: Recipe(), **{one.variant: Recipe(compression=one) for one in merged}}
    recipes[THEIRS] = Recipe(THEIRS)
    return models.rows("denoise", "denoising step", size, recipes, context)


def _composed(size: str, merged: Sequence[Compression], context: Context) -> dict[str, Row]:
    """Of models, from the times of their blocks in each round."""
    found = blocks.rows(size, merged, context, DTYPE)
    depth = sizes.config(size).depth
    composed: dict[str, Row] = {}
    for name, row in found.items():
        composed[name] = {**row, "what": "denoising step", "depth": depth}
        if "samples" not in row or "samples" not in found[OURS]:
            continue
        kind = next((one for one in merged if one.variant == name), None)
        rounds = zip(found[OURS]["samples"], row["samples"], strict=True)
        samples = [
            depth * own if kind is None else compose(size, dense, own) for dense, own in rounds
        ]
        whole = timing.summarize(samples, row["seconds"]["method"])
        recipe = Recipe(THEIRS if name == THEIRS else OURS, kind)
        flops = models.step_flops("denoise", size, recipe)
        composed[name] |= measured(context, whole, flops, 0, DTYPE)
    return composed


def compose(size: str, dense: float, compressed: float) -> float:
    """Of all the blocks of a compressed model, from those of a block of either kind: seconds or FLOPs."""
    config = sizes.config(size, Compression())
    assert config.kv_compression is not None
    merged = len(config.kv_compression.layers)
    return (config.depth - merged) * dense + merged * compressed


def saving(
    size: str,
    merged: Compression,
    dense: Row,
    compressed: Row,
    passes: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, Any]:
    """Of a round's pair, for the machine's own changes then touch both; and where it is lost."""
    pairs = zip(dense["samples"], compressed["samples"], strict=True)
    shares = timing.summarize([1 - after / before for before, after in pairs], "").summary()
    work = [blocks.flops(size, one) for one in (None, merged)]
    before, after = (sum(families.values()) for families in work)
    rounds = zip(passes[OURS], passes[merged.variant], strict=True)
    depth = sizes.config(size).depth
    return {
        "time": {name: shares[name] for name in ("median", "p20", "p80")},
        "flops": 1 - compose(size, before, after) / (depth * before),
        "paper": PAPER.get(size) if merged.ratio == sizes.RATIO else None,
        "operations": {
            OURS: medians(passes[OURS]),
            merged.variant: medians(passes[merged.variant]),
        },
        "lost": medians([lost(size, *pair, *work) for pair in rounds]),
    }


def medians(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what each pass found, by name."""
    found = defaultdict(list)
    for one in passes:
        for name, value in one.items():
            found[name].append(value)
    return {name: median(values) for name, values in found.items()}


def lost(
    size: str,
    dense: Mapping[str, float],
    compressed: Mapping[str, float],
    dense_flops: Mapping[str, int],
    compressed_flops: Mapping[str, int],
) -> dict[str, float]:
    """How much of the saving is lost in each family of operations: a share of the dense model's time;
    negative where time fell by more than FLOPs. All together are what is missing where the models take
    as long as these blocks do.

    dense, compressed: seconds of a block of either kind, by family; so the FLOPs.
    """
    seconds, work = sum(dense.values()), sum(dense_flops.values())
    share = compose(size, 0, 1) / sizes.config(size).depth
    return {
        family: share
        * (
            (compressed[family] - dense[family]) / seconds
            + (dense_flops[family] - compressed_flops[family]) / work
        )
        for family in dense
    }
