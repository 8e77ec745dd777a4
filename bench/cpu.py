"""`python -m bench.cpu [--json FILE]`: the full-size model's forward pass on a CPU, against diffusers'.

Ours and diffusers' PixArtTransformer2DModel with the same random weights and inputs, in turn in one
process; nothing is timed before their outputs agree. "caption encoded" is ours as a sampler calls it:
the caption's keys and values were made once for all steps.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import machine, memory, results, timing
from bench.reporting import sections
from bench.workloads import models, sizes
from pixart.model.transformer import PixArt

CPU = torch.device("cpu")
ENCODED = "ours, caption encoded"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = results.parser("cpu", __doc__, ("256", "512", "1k"), ("2k", sizes.TINY))
    names = ["float32", "bfloat16"]  # fp32 first: it becomes bf16
    parser.add_argument("--dtypes", nargs="+", default=names, choices=names)
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error(
            f"--device must be cpu, got {options.device}; python -m bench.gpu measures a GPU"
        )
    run = results.Run("cpu", arguments, CPU, tiny=sizes.TINY in options.sizes)
    for size in options.sizes:
        ours, theirs = (
            models.build_ours(size, CPU, None).eval(),
            models.build_theirs(size, CPU).eval(),
        )
        for name in [name for name in names if name in options.dtypes]:
            dtype = getattr(torch, name)
            calls = variants(size, dtype, ours, theirs)
            rows = measure(size, dtype, calls, seconds=options.seconds, least_rounds=options.rounds)
            peak = machine.product_rate(run.values["peaks"], dtype)
            for row in rows:
                row["share_of_matmul"] = row["flops"] / row["median"] / peak
            run.add({f"{size}/{name}/{row['variant']}": row for row in rows})
            run.save(options.json)
    print(sections.cpu(run.save(options.json)))
    return 0


def measure(
    size: str, dtype: torch.dtype, calls: Mapping[str, timing.Call], **patience: Any
) -> list[dict[str, Any]]:
    """A row for each variant. Raises RuntimeError if they do not agree. patience: of
    timing.measure_all."""
    outputs: dict[str, Tensor] = {}
    peaks: dict[str, int | None] = {}
    for name, call in calls.items():
        outputs[name], peaks[name] = memory.of_next(call, CPU)
    differences = {name: difference(out, outputs["diffusers"]) for name, out in outputs.items()}
    check(differences, dtype)
    times = timing.measure_all(calls, CPU, **patience)
    return [
        {
            "size": size,
            "tokens": sizes.tokens(size),
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            **times[name].summary(),
            "flops": sizes.step_flops(size, 1, compressed=False, captions=name != ENCODED),
            "difference_from_diffusers": differences[name],
            "peak_bytes": peaks[name],  # beyond the weights
            "times_as_fast": times["diffusers"].median / times[name].median,
        }
        for name in calls
    ]


@torch.no_grad()
def variants(
    size: str, dtype: torch.dtype, ours: PixArt, theirs: nn.Module
) -> dict[str, timing.Call]:
    """Forward passes without gradients of models with the same weights, which become of this dtype."""
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    caption = models.random_caption(size, CPU, dtype)
    inputs = models.random_latents(size, CPU), torch.tensor([500])
    calls = {
        "ours": partial(ours, *inputs, caption),
        ENCODED: partial(ours, *inputs, ours.encode_caption(caption)),
        "diffusers": partial(models.call_theirs, theirs, caption, *inputs),
    }
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative, of the norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def check(differences: dict[str, float], dtype: torch.dtype) -> None:
    for name, found in differences.items():
        if not found <= models.SAME[dtype]:
            raise RuntimeError(
                f"{name} must agree with diffusers within {models.SAME[dtype]:.2g} in {dtype}, "
                f"got {found:.2g}"
            )


if __name__ == "__main__":
    sys.exit(main())
