"""`python -m bench.saving [--json FILE]`: kv_compression_saving, the time that compression saves.

One denoising step of the full-size XL/2 model, dense against compressed in its deeper half and against
diffusers' dense one, in turn in one process, beside the share of FLOPs saved and what the paper
reports. A CPU runs the whole model up to 2K; at larger sizes, one block of either kind stands for the
model's 28.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.measure import results, timing, worker
from bench.reporting import sections
from bench.workloads import blocks, comparisons, models
from bench.workloads import sizes as shapes

# Seconds to draw an image, 58 to 38 at 2K and 91 to 60 at 4K: PixArt-Σ, table 3 (d).
PAPER = {"2k": 0.34, "4k": 0.34}
WHOLE_ON_CPU = (shapes.TINY, "256", "512", "1k", "2k", *shapes.MODEL_SIZES["cpu"])
DTYPE = torch.bfloat16
THEIRS = "diffusers"
VARIANTS = {"ours R = 2": 2, "ours R = 4": 4}  # of `pytest bench`, by the ratio


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = results.parser(
        "saving", __doc__, ("512", "1k", "2k", "4k"), ("256", "2880", shapes.TINY)
    )
    parser.add_argument("--ratios", nargs="+", type=int, default=[2, 4], choices=(2, 3, 4))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    run = results.Run("saving", arguments, device, tiny=shapes.TINY in options.sizes)
    with worker.readied(device):
        for size in options.sizes:
            found = measure(size, options.ratios, device, options.seconds, options.rounds)
            run.add({f"{size}/R{row['ratio']}": row for row, _ in found})
            run.save(options.json)
    print(sections.saving(run.save(options.json)))
    return 0


def case(size: str) -> worker.Case:
    """Of `pytest bench`: a compressed model is a variant, and its row tells the saving."""
    return worker.Case(f"saving/{size}", partial(_tell, size), tuple(VARIANTS))


def _tell(size: str, context: worker.Context) -> None:
    chosen = context.choose(VARIANTS)
    found = measure(size, list(chosen.values()), context.device, context.seconds, rounds=3)
    for (name, ratio), (row, compressed) in zip(chosen.items(), found, strict=True):
        flops = shapes.step_flops(size, 1, True, shapes.Compression(ratio))
        rates = comparisons.measured(compressed, context, flops, 0, DTYPE)
        # What these models compute is compared where their steps are timed.
        context.row(step="denoise", resolution=size, variant=name, agrees=None, **row, **rates)


def measure(
    size: str, ratios: Sequence[int], device: torch.device, seconds: float, rounds: int
) -> list[tuple[dict[str, Any], timing.Timing]]:
    """For each ratio a row, and the times of the compressed model. Times the models for about
    `seconds`, and at least `rounds` times each."""
    whole = device.type == "cuda" or size in WHOLE_ON_CPU
    single = {str(ratio): blocks.ours(size, ratio, device, DTYPE) for ratio in (1, *ratios)}
    if whole:
        calls = {name: _model(size, int(name), device) for name in single}
        calls[THEIRS] = models.make_denoiser(models.RECIPES[THEIRS], size, device)
    else:
        calls = single | {THEIRS: blocks.theirs(size, device, DTYPE)}
    times = timing.measure_all(calls, device, seconds=seconds, least_rounds=rounds)
    del calls  # the models
    passes = blocks.operations(single, size, device, rounds)
    return [_result(size, ratio, whole, times, passes) for ratio in ratios]


def _model(size: str, ratio: int, device: torch.device) -> timing.Call:
    compression = shapes.Compression(ratio) if ratio > 1 else None
    return models.make_denoiser(models.Recipe("ours", compression), size, device)


def _result(
    size: str,
    ratio: int,
    whole: bool,
    times: Mapping[str, timing.Timing],
    passes: Mapping[str, Sequence[Mapping[str, float]]],
) -> tuple[dict[str, Any], timing.Timing]:
    """times: of models, or of blocks where not `whole`. passes: of blocks, by family of operations."""
    sizes, names = shapes.model(size), ("1", str(ratio), THEIRS)
    rounds = list(zip(*(times[name].samples for name in names), strict=True))
    if not whole:
        rounds = [
            (*compose(sizes, dense, compressed), sizes.depth * theirs)
            for dense, compressed, theirs in rounds
        ]
    dense, compressed, theirs = (
        timing.summarize(list(samples), times["1"].method) for samples in zip(*rounds, strict=True)
    )
    # Of a round's pair, for the machine's own changes then touch both.
    shares = timing.summarize([1 - after / before for before, after, _ in rounds], "").summary()
    work = [blocks.flops(size, one) for one in (1, ratio)]
    before, after = compose(sizes, *(sum(families.values()) for families in work))
    pairs = zip(passes["1"], passes[str(ratio)], strict=True)
    row = {
        "size": size,
        "tokens": shapes.tokens(size),
        "ratio": ratio,
        "dtype": str(DTYPE).removeprefix("torch."),
        "scope": "whole" if whole else "block",  # what was timed
        "depth": sizes.depth,
        "dense": dense.summary(),
        "compressed": compressed.summary(),
        "diffusers": theirs.summary(),
        "time_saved": shares["median"],
        "time_saved_p20": shares["p20"],
        "time_saved_p80": shares["p80"],
        "flops_saved": 1 - after / before,
        "paper": PAPER.get(size) if ratio == shapes.RATIO else None,
        "operations": {
            "dense": medians(passes["1"]),
            "compressed": medians(passes[str(ratio)]),
        },
        "eaten": medians([eaten(sizes, *pair, *work) for pair in pairs]),
    }
    return row, compressed


def medians(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what each pass found, by name."""
    found = defaultdict(list)
    for one in passes:
        for name, value in one.items():
            found[name].append(value)
    return {name: median(values) for name, values in found.items()}


def compose(sizes: shapes.Model, dense: float, compressed: float) -> tuple[float, float]:
    """Of all the blocks of a dense and of a compressed model, from those of a block of either kind:
    seconds, or FLOPs."""
    merged = len(sizes.compressed_layers)
    return sizes.depth * dense, (sizes.depth - merged) * dense + merged * compressed


def eaten(
    sizes: shapes.Model,
    dense: Mapping[str, float],
    compressed: Mapping[str, float],
    dense_flops: Mapping[str, int],
    compressed_flops: Mapping[str, int],
) -> dict[str, float]:
    """How much of the saving each family of operations eats: a share of the dense model's time;
    negative where time fell by more than FLOPs. All together are what is missing where the models take
    as long as these blocks do.

    dense, compressed: seconds of a block of either kind, by family; so the FLOPs.
    """
    seconds, work = sum(dense.values()), sum(dense_flops.values())
    merged = len(sizes.compressed_layers) / sizes.depth
    return {
        family: merged
        * (
            (compressed[family] - dense[family]) / seconds
            + (dense_flops[family] - compressed_flops[family]) / work
        )
        for family in dense
    }


if __name__ == "__main__":
    sys.exit(main())
