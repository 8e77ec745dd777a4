"""`python -m pixart.evaluate --model FOLDER`: how good a model is, by one of pixart.evaluation.METRICS.

The first of them is how well a model of the embedded world follows captions: every statement of every
caption is checked in the picture. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["evaluate", *sys.argv[1:]])

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixart import process
from pixart.command import DONE, parse, run_command
from pixart.config import EMBEDDED
from pixart.evaluation import METRICS, SAMPLING, Settings

NAME = "evaluate"
MOST = 1_000_000  # captions; all are made before the first picture


@dataclass(frozen=True)
class Options(Settings):
    """Measure how good a model is; by default the caption accuracy of the embedded one."""

    model: str = EMBEDDED
    """A pipeline directory, or the embedded model "shapes"."""
    metric: str = "caption-accuracy"
    """What is measured: a name in pixart.evaluation.METRICS."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of transformer and VAE."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    attention: Literal["int8", "fp8"] | None = None
    """Self-attention with 8-bit products; on a CPU rounded as the kernels round."""
    json_file: Path | None = None
    """Where to write settings and results."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(NAME, lambda: run(parse(Options, NAME, arguments)))


def run(options: Options) -> int:
    """Measure, print what was found, and write it if a file is named."""
    from importlib import import_module

    import torch

    from pixart.files import check_writable, write_json
    from pixart.pipeline.text_to_image import Pipeline

    if options.metric not in METRICS:
        raise ValueError(f"--metric must be one of {', '.join(METRICS)}, got {options.metric!r}")
    if not 1 <= options.count <= MOST:
        raise ValueError(f"--count must be from 1 to {MOST:,}, got {options.count}")
    if options.json_file is not None and options.json_file.is_dir():
        raise ValueError(f"--json-file must be a file, got the folder {options.json_file}")
    if options.json_file is not None:
        check_writable(options.json_file)
    like = options.like  # refused before a model is opened
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    pipe = Pipeline.from_pretrained(
        options.model,
        dtype=dtype,
        device=options.device,
        attention=options.attention,
        cache_dir=None,
    )
    text, values = import_module(METRICS[options.metric]).evaluate(pipe, options)
    print(text)
    if options.json_file is not None:
        process.at_work()
        used = pipe.resolve(like)
        settings = {name: getattr(used, name) for name in ("seed", *SAMPLING)}
        numbers = {"dtype": options.dtype, "attention": options.attention}
        write_json(options.json_file, {**settings, **numbers, **values}, indent=2)
    return DONE
