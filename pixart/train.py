"""`python -m pixart.train RECIPE`: train the stages of a recipe, one after the other.

A run is taken up where it stopped: what a step learns from depends on its number alone. Under
`torchrun` the batches are shared among processes. `python -m pixart.train plot RUN...` draws the
curves of runs. Exit codes: 0 done or stopped as asked, 2 bad input, 1 failure.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from pixart.training.stage import Stage

BAD_INPUT, FAILURE = 2, 1


@dataclass(frozen=True)
class Options:
    """Train a recipe: a shipped one (alpha, kv-convert, lora, shapes, shapes-kv, sigma) or a YAML file. Every
    field of a stage is an option too, and holds for all stages that are trained."""

    recipe: tyro.conf.Positional[str]
    output: Path | None = None
    """Where stages, logs and checkpoints go. Default runs/RECIPE."""
    stage: str | None = None
    """Train this stage alone; what it starts from must be there. Default: all, in order."""
    resume: str = "auto"
    """auto: the newest checkpoint. none: refuse an --output that holds a run. Or a checkpoint's
    folder, for --stage."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints of a stage that are kept."""
    stop_after: int | None = None
    """Stop after this many steps of a stage, saved."""
    dry_run: bool = False
    """Print the plan: parameters, tokens a bucket, memory and time a step; train nothing."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Report to these as well; log.jsonl is always written."""
    device: str | None = None
    """cpu or cuda. Default CUDA when there is one."""
    threads: int = 0
    """CPU threads of a process; 0 leaves it to PyTorch."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class PlotOptions:
    """Draw loss and validation curves as a PNG."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or of single stages."""
    output: Path = Path("loss.png")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    from pixart.training.state import CheckpointSaveError
    from pixart.training.trainer import TrainingFailed

    try:
        if arguments[:1] == ["plot"]:
            return _plot(arguments[1:])
        return _train(*_parse(arguments))
    except ValueError as error:
        return _complain(error, BAD_INPUT)
    except (CheckpointSaveError, TrainingFailed, OSError) as error:
        return _complain(error, FAILURE)


def _complain(error: Exception, code: int) -> int:
    print(f"pixart.train: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _plot(arguments: list[str]) -> int:
    from pixart.training.plot import plot

    options = tyro.cli(PlotOptions, prog="python -m pixart.train plot", args=arguments)
    if not options.runs:
        raise ValueError("RUN must name at least one folder, got none")
    plot(options.runs, options.output)
    print(options.output)
    return 0


def _parse(arguments: list[str]) -> "tuple[Options, list[Stage]]":
    """The options, and the recipe's stages with what the command line says otherwise."""
    from pixart.training.recipe import load_recipe
    from pixart.training.stage import Stage

    named = [argument for argument in arguments[:1] if not argument.startswith("-")]
    if arguments and not named and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"RECIPE must come first, before all options, got {arguments[0]!r}")
    stages = load_recipe(named[0]) if named else [Stage("STAGE")]

    @dataclass(frozen=True)
    class Command:
        options: Annotated[Options, tyro.conf.arg(name="")]
        stage: Annotated[Stage, tyro.conf.arg(name="")] = field(default=stages[0])

    def parse(stage: Stage) -> Command:
        default = Command(Options(recipe=named[0] if named else tyro.MISSING), stage)
        return tyro.cli(Command, default=default, prog="python -m pixart.train", args=arguments)

    names = [stage.name for stage in stages]
    # Fields for one stage need not make sense in another.
    told = _value_of("--stage", arguments)
    options = parse(stages[names.index(told) if told in names else 0]).options
    if options.stage is not None and options.stage not in names:
        raise ValueError(f"--stage must be one of {', '.join(names)}, got {options.stage!r}")
    chosen = {options.stage} if options.stage else set(names)
    return options, [parse(one).stage if one.name in chosen else one for one in stages]


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """What a flag is given, in the argument after it or in one with it."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return next((value for before, value in pairwise(words) if before == flag), None)


def _train(options: Options, stages: "Sequence[Stage]") -> int:
    import torch

    from pixart.device import choose_device
    from pixart.distributed import connect, rank
    from pixart.training.run import Run

    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    connect(device)
    output = options.output or Path("runs") / Path(options.recipe).stem
    if options.resume == "none" and output.exists() and any(output.iterdir()):
        raise ValueError(f"--output must be new with --resume none, got {output}")
    start_from = None if options.resume in ("auto", "none") else Path(options.resume)
    if start_from is not None and options.stage is None:
        raise ValueError(
            f"--stage must say which stage goes on from --resume {start_from}, got none"
        )
    run = Run(
        output,
        stages,
        device,
        save_every=options.save_every,
        keep=options.keep,
        trackers=options.track,
        quiet=options.quiet,
        start_from=start_from,
    )
    names = [options.stage] if options.stage else [stage.name for stage in stages]
    if options.dry_run:
        if rank() == 0:
            print("\n\n".join(run.plan(name) for name in names))
        return 0
    for name in names:
        if not run.train(name, options.stop_after):
            how = "--resume auto" if start_from else "the same command"
            print(f"stopped in stage {name}; {how} goes on", file=sys.stderr)
            return 0
    return 0


if __name__ == "__main__":
    code = main()
    from pixart.distributed import leave

    leave(code)
