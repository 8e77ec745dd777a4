"""`python -m pixart.train RECIPE`: train the stages of a recipe, one after the other.

A run is taken up where it stopped: what a step learns from depends on its number alone. Under
`torchrun` the batches are shared among processes. `python -m pixart.train plot RUN...` draws the
curves of runs. Exit codes: 0 done or stopped as asked, 2 bad input, 3 weights that a validation metric
needs are missing, 1 failure, 130 cancelled; what is done by then is saved.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["train", *sys.argv[1:]])

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro

from pixart import process
from pixart.command import BAD_INPUT, DONE, MISSING, complain, parse, run_command

if TYPE_CHECKING:
    import torch

    from pixart.training.run import Run
    from pixart.training.stage import Stage

NAME = "train"
MAX_COMPLAINTS = 40  # what is wrong in every field of a file would scroll the first away


@dataclass(frozen=True)
class Options:
    """Train a recipe."""

    recipe: tyro.conf.Positional[str]
    """A shipped recipe (alpha, controlnet, dmd, kv-convert, lcm, lora, scalability, shapes, shapes-clip,
    shapes-control, shapes-kv, shapes-lcm, shapes-tdm, sigma, tdm) or a YAML file. Every field of a stage is an
    option too, and holds for all stages that are trained; --size NAME is a variant's (pixart.variants). In its
    place, `plot RUN...` draws the curves of runs."""
    output: Path | None = None
    """Where stages, logs and states go. Default runs/RECIPE."""
    stage: str | None = None
    """Train this stage alone; what it starts from must be there. Default: all, in order."""
    resume: str = "auto"
    """auto: the newest state of a stage. none: refuse an --output that holds a run. Or a state's folder,
    for --stage."""
    accept_changes: tuple[str, ...] = ()
    """Fields that may be others than those that a run was begun with: --accept-changes learning-rate,data"""
    save_every: int = 500
    """Steps between saved states."""
    keep: int = 2
    """States of a stage that are kept."""
    stop_after: int | None = None
    """Stop after this many steps of a stage, saved."""
    dry_run: bool = False
    """Print the plan (parameters, tokens a bucket, memory and time a step) and all that is wrong, where
    something is; train and write nothing."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Report to these as well; log.jsonl is always written."""
    device: str | None = None
    """cpu or cuda. Default CUDA when there is one."""
    threads: int = 0
    """CPU threads of a process; 0 leaves it to PyTorch."""
    log_every: int = 20
    """Steps between two lines of log.jsonl, and between two reports of progress."""
    quiet: bool = False
    """No progress bar, and no notes on what a stage takes from its start and data."""


@dataclass(frozen=True)
class PlotOptions:
    """Draw loss and validation curves as a PNG."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of runs, or of single stages."""
    output: Path = Path("loss.png")
    """The picture, in any format that matplotlib writes; one that is there is replaced."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Under torchrun it ends the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    code = run_command(NAME, lambda: _command(arguments), "cancelled; what was saved is kept")
    if "RANK" in os.environ:
        from pixart.distributed import leave

        leave(code)
    return code


def _command(arguments: list[str]) -> int:
    from pixart.training.problems import Problems

    try:
        if arguments[:1] == ["plot"]:
            return _plot(arguments[1:])
        if {"-h", "--help"} & set(arguments):
            return _help(arguments)
        return _train(*read_command(arguments))
    except Problems as problems:
        return _complain(problems.lines)


def _complain(lines: Sequence[str], code: int = BAD_INPUT) -> int:
    """One line each. Of processes on one machine the first speaks: what lacks on another is its own."""
    shown = list(lines[:MAX_COMPLAINTS])
    if more := len(lines) - len(shown):
        shown.append(f"{more} more are wrong")
    for line in shown if os.environ.get("LOCAL_RANK", "0") == "0" else ():
        complain(NAME, line, code)
    return code


def _plot(arguments: list[str]) -> int:
    from pixart.training.plot import plot

    options = parse(PlotOptions, f"{NAME} plot", arguments)
    if not options.runs:
        raise ValueError("RUN must name at least one folder, got none")
    process.at_work()
    plot(options.runs, options.output)
    print(options.output)
    return DONE


def _help(arguments: list[str]) -> int:
    """Print the options, with what a recipe's first stage says as their defaults."""
    from pixart.training.recipe import load_recipe
    from pixart.training.stage import Stage

    named = [argument for argument in arguments[:1] if not argument.startswith("-")]
    stage = load_recipe(named[0])[0] if named else Stage("STAGE")

    @dataclass(frozen=True)
    class Command:
        options: Annotated[Options, tyro.conf.arg(name="")]
        stage: Annotated[Stage, tyro.conf.arg(name="")]

    default = Command(Options(recipe=named[0] if named else tyro.MISSING), stage)
    parse(Command, NAME, ["--help"], default=default)
    return DONE


def read_command(arguments: list[str]) -> "tuple[Options, list[Stage]]":
    """The options, and the recipe's stages with what the command line says otherwise. Raises Problems
    with all that is wrong."""
    from pixart.training.arguments import read_options
    from pixart.training.problems import Problems, attempt, refuse
    from pixart.training.recipe import load_recipe, shipped, stage_fields

    if not arguments:
        known = ", ".join(shipped())
        raise Problems([f"RECIPE must be given: one of {known}, or a YAML file"])
    if arguments[0].startswith("-"):
        raise Problems([f"RECIPE must come first, before all options, got {arguments[0]!r}"])
    kinds = get_type_hints(Options, include_extras=True)
    del kinds["recipe"]
    settable = {name: kind for name, kind in stage_fields().items() if name != "name"}
    # A size has a name too, in the place of its fields.
    settings, wrong = read_options(arguments[1:], settable | {"size": str} | kinds)
    given: dict[str, Any] = {name: settings.pop(name) for name in kinds if name in settings}
    stages, more = attempt(lambda: load_recipe(arguments[0], settings, given.get("stage")))
    refuse([*wrong, *more])
    assert stages is not None
    given["track"] = tuple(given.get("track", ()))
    words = ",".join(given.get("accept_changes", ())).split(",")
    given["accept_changes"] = tuple(word for word in words if word)
    return Options(arguments[0], **given), stages


def _train(options: Options, stages: "Sequence[Stage]") -> int:
    import logging

    import torch

    from pixart.distributed import connect, rank
    from pixart.training.execute import alone, check_rules, check_writable
    from pixart.training.problems import attempt, problems_of, refuse
    from pixart.training.run import Run

    device, lines = attempt(lambda: _device(options.device, stages))
    refuse(lines)
    assert device is not None
    output = options.output or Path("runs") / Path(options.recipe).stem
    wrong = list(_option_problems(options, output))
    if options.threads and not wrong:
        torch.set_num_threads(options.threads)
    connect(device)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    silent = options.quiet or rank() > 0
    logging.getLogger("pixart").setLevel(logging.WARNING if silent else logging.INFO)
    start_from = None if options.resume in ("auto", "none") else Path(options.resume)
    run = Run(
        output,
        stages,
        device,
        save_every=options.save_every,
        keep=options.keep,
        trackers=options.track,
        quiet=options.quiet,
        log_every=options.log_every,
        start_from=start_from,
        accepted=options.accept_changes,
    )
    names = [options.stage] if options.stage else [stage.name for stage in stages]
    if options.dry_run:
        return _dry_run(run, names, wrong)
    if wrong or list(problems_of(lambda: check_writable(output))):
        return _complain([*wrong, *check_rules(run, names)])
    with alone(output):
        return _train_stages(run, names, options.stop_after)


def _device(wanted: str | None, stages: "Sequence[Stage]") -> "torch.device":
    """Where to train. ValueError if it is not there, or cannot run the kernels that a stage needs."""
    from pixart.device import check_kernels, choose_device
    from pixart.training.stage import CONTROLNET

    device = choose_device(wanted)
    if any(stage.trains_transformer or stage.trains == CONTROLNET for stage in stages):
        check_kernels(device)
    return device


def _train_stages(run: "Run", names: Sequence[str], stop_after: int | None) -> int:
    from pixart.distributed import rank
    from pixart.training.checkpoints import last_words
    from pixart.training.execute import check_rules, missing_for_metrics, train
    from pixart.training.state import latest_state

    if wrong := check_rules(run, names):
        return _complain(wrong)
    if missing := missing_for_metrics(run, names):
        return _complain(missing, MISSING)
    process.at_work()
    for name in names:
        if not train(run, name, stop_after):
            how = "--resume auto" if run.start_from else "the same command"
            process.write_line(f"stopped in stage {name}; {how} goes on")
            if process.ENDING.asked:
                return process.ENDING.code()
            break
    state = latest_state(run.folder(name))
    if state is not None and not run.quiet and rank() == 0:
        print("\n".join(last_words(state, run.stage(name))))
    return DONE


def _option_problems(options: Options, output: Path) -> Iterator[str]:
    from pixart.training.bounds import MAX_STEPS, Bounds, number_problems

    if options.resume == "none" and _holds_a_run(output):
        yield f"--output must be new with --resume none, got {output}"
    if options.resume not in ("auto", "none") and options.stage is None:
        yield f"--stage must say which stage goes on from --resume {options.resume}, got none"
    bounds = {
        "threads": Bounds(0, 1024),
        "keep": Bounds(1, MAX_STEPS),
        "stop_after": Bounds(0, MAX_STEPS),
        "log_every": Bounds(1, MAX_STEPS),
    }
    for line in number_problems(options, bounds):
        name, rule = line.split(" ", 1)
        yield f"--{name.replace('_', '-')} {rule}"


def _holds_a_run(output: Path) -> bool:
    from pixart.locks import HELD

    return output.is_dir() and any(path.name != HELD for path in output.iterdir())


def _dry_run(run: "Run", names: Sequence[str], wrong: Sequence[str]) -> int:
    from pixart.distributed import rank
    from pixart.training.execute import dry_run, missing_for_metrics

    plans, more = dry_run(run, names)
    missing = missing_for_metrics(run, names)
    if rank() == 0 and plans:
        print(plans)
    lines = [*wrong, *more, *missing]
    code = BAD_INPUT if len(lines) > len(missing) else MISSING
    return _complain(lines, code) if lines else DONE
