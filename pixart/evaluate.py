"""`python -m pixart.evaluate --model FOLDER`: how well a model of the embedded world follows captions.

Every statement of every caption is checked in the picture. Exit codes: 0 done, 2 bad input, 1
failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import main as command

    sys.exit(command(["evaluate", *sys.argv[1:]]))

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixart.command import DONE, parse, run_command
from pixart.config import EMBEDDED

NAME = "evaluate"


@dataclass(frozen=True)
class Options:
    """Measure the caption accuracy of the embedded model or of another of its kind."""

    model: str = EMBEDDED
    """A pipeline directory, or the embedded model "shapes"."""
    count: int = 300
    """Captions of each task."""
    seed: int = 1_000_000
    """Of the captions and of the first picture."""
    steps: int = 20
    guidance: float = 4.5
    sizes: tuple[int, ...] = ()
    """Sides in pixels of tasks of one object, instead of those of the model card."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of transformer and VAE."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    json_file: Path | None = None
    """Where to write settings and results."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(NAME, lambda: run(parse(Options, NAME, arguments)))


def run(options: Options) -> int:
    """Measure, print the table, and write the report if one is asked for."""
    import torch

    from pixart.evaluation.caption_accuracy import Task, measure, table, tasks, write_report
    from pixart.pipeline.text_to_image import Pipeline
    from pixart.shapes.scene import HELD_OUT

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    pipe = Pipeline.from_pretrained(
        options.model, dtype=dtype, device=options.device, cache_dir=None
    )
    chosen = [Task("one", size, count=options.count) for size in options.sizes]
    settings = {name: getattr(options, name) for name in ("seed", "steps", "guidance")}
    results = [
        measure(pipe, task, **settings) for task in chosen or tasks(pipe.native, options.count)
    ]
    print(table(results))
    print(f"unseen combinations: {', '.join(f'{c} {s}' for s, c in sorted(HELD_OUT))}")
    if options.json_file is not None:
        write_report(options.json_file, {**settings, "dtype": options.dtype}, results)
    return DONE
