"""`python -m bench.growth [--json FILE]`: time and memory against the number of image tokens.

One block of the full-size model (28 of them are the model but for its ends), dense, compressed and
diffusers', from 256 tokens to the 65,536 of a 4K image; and the roofline of each size up to 8K: how
long the work takes at least at the peaks that this machine reached in the same process.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.measure import memory, results, timing, worker
from bench.reporting import sections
from bench.workloads import blocks
from bench.workloads import sizes as shapes

VARIANTS = ("dense", "compressed", "diffusers")
# Inputs and outputs of a block's matrix products, in widths: qkv and its output, query and output of
# the cross-attention, the two layers of the MLP.
PRODUCTS = ((1, 3), (1, 1), (1, 1), (1, 1), (1, 4), (4, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    sizes = ("256", "512", "1k", "2k", "4k")
    parser = results.parser("growth", __doc__, sizes, ("2880", shapes.TINY))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    run = results.Run("growth", arguments, device, tiny=shapes.TINY in options.sizes)
    patience = {"seconds": options.seconds, "least_rounds": options.rounds}
    with worker.readied(device):
        for size in options.sizes:
            rows = measure(size, options.variants, device, dtype, **patience)
            run.add({f"{size}/{options.dtype}/{row['variant']}": row for row in rows})
            run.save(options.json)
    size = shapes.PREDICTED
    known = {name: describe(size, shapes.grid(size), name, dtype) for name in options.variants}
    run.add({f"{size}/{options.dtype}/{name}": row for name, row in known.items()})
    print(sections.growth(run.save(options.json)))
    return 0


def measure(
    size: str,
    variants: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    **patience: Any,
) -> list[dict[str, Any]]:
    """A row for each variant. patience: of timing.measure_all."""
    makers = {
        "dense": lambda: blocks.ours(size, 1, device, dtype),
        "compressed": lambda: blocks.ours(size, shapes.RATIO, device, dtype),
        "diffusers": lambda: blocks.theirs(size, device, dtype),
    }
    calls = {name: makers[name]() for name in variants}
    used = {name: memory.of_next(call, device)[1] for name, call in calls.items()}
    times = timing.measure_all(calls, device, **patience)
    return [
        {
            **describe(size, shapes.grid(size), name, dtype),
            **times[name].summary(),
            "peak_bytes": used[name],  # beyond the weights and the inputs
        }
        for name in variants
    ]


def describe(size: str, grid: tuple[int, int], variant: str, dtype: torch.dtype) -> dict[str, Any]:
    """The part of a row that is known without measuring."""
    return {
        "size": size,
        "tokens": grid[0] * grid[1],
        "dtype": str(dtype).removeprefix("torch."),
        "variant": variant,
        # Of 16 bits: fp32 has other bytes, and another peak.
        "floors": floors(shapes.model(size), grid, variant) if dtype == torch.bfloat16 else None,
    }


def floors(sizes: shapes.Model, grid: tuple[int, int], variant: str) -> list[tuple[int, int]]:
    """FLOPs and bytes, in 16 bits, of each operation of a block of ours."""
    ratio = shapes.RATIO if variant == "compressed" else 1
    width, count = sizes.hidden_size, grid[0] * grid[1]
    keys = -(-grid[0] // ratio) * -(-grid[1] // ratio)
    work = [
        (
            2 * count * before * after * width**2,
            2 * width * (count * (before + after) + before * after * width),
        )
        for before, after in PRODUCTS
    ]
    for m in (keys, sizes.text_tokens):
        work.append(
            (
                shapes.attention_flops(1, count, m, width, backward=False),
                shapes.attention_bytes(1, count, m, width, 2, backward=False),
            )
        )
    for name in ("gate_add", "add_modulate", "gate_add_modulate"):
        work.append((0, shapes.elementwise_bytes(name, 1, count, width, 2, backward=False)))
    if ratio > 1:
        work.append((0, shapes.compress_bytes(1, grid, ratio, width, 2, backward=False)))
    return work


if __name__ == "__main__":
    sys.exit(main())
