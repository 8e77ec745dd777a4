"""`python -m pixart.train shapes`: train the embedded model from random weights, on a CPU.

The run is taken up where it stopped: every stage keeps its state in `--output`/STAGE, and the data
of a step depend on its number alone. `torchrun --nproc-per-node 2 -m pixart.train shapes` shares the
batches among processes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

StageName = Literal["vae-crops", "vae-whole", "base", "double", "export"]


@dataclass(frozen=True)
class Options:
    """Train a recipe. The only one so far is "shapes", the embedded model."""

    recipe: tyro.conf.Positional[Literal["shapes"]]
    output: Path = Path("runs/shapes")
    """Where state, logs and the exported pipeline go."""
    stage: StageName | None = None
    """Run this stage alone; what it builds on must be there. Default: all, in order."""
    resume: Literal["auto", "none"] = "auto"
    """none refuses to continue in an --output that holds a run already."""
    save_every: int = 200
    """Steps between saves."""
    stop_after: int | None = None
    """Stop after this many steps of a stage, saved."""
    threads: int = 0
    """CPU threads; 0 takes all cores."""
    scale: float = 1.0
    """Multiplies every stage's number of steps: 0.001 tries the whole recipe in minutes."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m pixart.train", args=arguments)
    try:
        return _train(options)
    except ValueError as error:
        print(f"pixart.train: {error}", file=sys.stderr)
        return 2


def _train(options: Options) -> int:
    import torch

    from pixart.training.parallel import connect
    from pixart.training.recipe import ShapesRun

    connect()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.resume == "none" and options.output.exists() and any(options.output.iterdir()):
        raise ValueError(f"--output must be new with --resume none, got {options.output}")
    run: ShapesRun = ShapesRun(options.output, scale=options.scale)
    for name in [options.stage] if options.stage else run.stages:
        if not run.train(name, save_every=options.save_every, stop_after=options.stop_after):
            print(f"stopped in stage {name}; the same command goes on", file=sys.stderr)
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
