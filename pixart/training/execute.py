"""Stages looked at, planned and trained: what is wrong is reported before anything is begun."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pixart.device import measure_peak
from pixart.distributed import rank, said_by_first, world_size
from pixart.evaluation.needs import MissingError
from pixart.locks import Occupied, occupied
from pixart.training.batch import settings_problems
from pixart.training.changes import check_accepted, check_changes, other_settings, record
from pixart.training.measuring import check_metrics, metric_problems
from pixart.training.optimizers import check_installed
from pixart.training.parallel import groups, sequence_problems
from pixart.training.problems import Problems, attempt, problems_of, refuse
from pixart.training.progress import Progress
from pixart.training.run import Run
from pixart.training.stage import Stage
from pixart.training.starts import pipeline_is_here, start_is_here
from pixart.training.state import read_progress
from pixart.training.tasks import task_of
from pixart.training.trackers import check_installed as check_tracker
from pixart.training.trainer import Task, Trainer, check_save_every, check_state, step_seed
from pixart.weights import without_downloads

logger = logging.getLogger("pixart")


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a run's directory for the processes of this run. Raises Occupied, in all of them, where
    another run has it."""
    failure: Exception | None = None
    with ExitStack() as stack:
        if rank() == 0:
            try:
                stack.enter_context(occupied(directory, "training"))
            except (OSError, Occupied) as error:
                failure = error
        if line := said_by_first(str(failure or "")):
            raise failure or Problems([line])
        yield


def train(run: Run, name: str, stop_after: int | None = None) -> bool:
    """Bring a stage to its end, or so many steps further. Returns whether it is finished. Raises
    Problems, before anything is written, for what cannot be trained."""
    stage = run.stage(name)
    if run.is_over(stage):
        _say_finished(run, stage)
        return True
    # What a stage needs is looked for where it says nothing that cannot be.
    refuse(check_fields(run, stage))
    refuse(check_surroundings(run, stage))
    resolved = run.resolved(stage)
    begun = record(run, resolved)  # before the run forgets its data
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(stage.precision, torch.bfloat16)
    peak = world_size() * measure_peak(run.device, dtype)  # draws random numbers
    torch.manual_seed(step_seed(stage.seed, stage.name, 0))
    task = build(run, resolved)
    trainer = Trainer(task, resolved, run.folder(name), run.device, run.save_every, run.keep, begun)
    progress = Progress(
        run.folder(name),
        name,
        every=run.log_every,
        peak=peak,
        trackers=run.trackers,
        quiet=run.quiet,
    )
    return trainer.run(progress, stop_after, run.start_from)


def _say_finished(run: Run, stage: Stage) -> None:
    """What a finished stage says now does nothing any more."""
    resolved, _ = attempt(lambda: run.resolved(stage))
    others, _ = attempt(lambda: other_settings(run, resolved)) if resolved else (None, [])
    if others:
        run.say(
            f"stage {stage.name} is finished; it was trained with {', '.join(others)}; another "
            "--output trains it anew"
        )


def build(run: Run, stage: Stage) -> Task:
    """Make what a stage trains, as the stage begins."""
    try:
        return task_of(stage).build(run.resolved(stage), run)
    finally:
        run.forget()


def dry_run(run: Run, names: Sequence[str]) -> tuple[str, list[str]]:
    """What stages will cost, and all that is wrong with them: every check of `train`, and no more than
    these. Nothing is written or downloaded: what is not on this machine is not looked at."""
    plans: list[str] = []
    lines: list[tuple[str, str]] = []
    with without_downloads():
        absent = (source for name in names for source in _absent(run, run.stage(name)))
        for source in dict.fromkeys(absent):
            logger.warning("%s: not on this machine, not looked at in a dry run", source)
        for looked_at, stage in _in_order(run, names):
            if not looked_at.is_over(stage):
                for check in (check_fields, check_surroundings):
                    lines += [(stage.name, line) for line in check(looked_at, stage)]
            plan, _ = attempt(
                partial(_plan, looked_at, stage)
            )  # its complaints are among the lines
            plans += [] if plan is None else [plan]
    return "\n\n".join(plans), _grouped(lines, names)


def check_rules(run: Run, names: Sequence[str]) -> list[str]:
    """What is wrong with stages, before the first is trained, whatever the files may be that a later one
    will meet."""
    lines: list[tuple[str, str]] = []
    left = [stage for _, stage in _in_order(run, names) if not run.is_over(stage)]
    for stage in left:
        for check in (check_fields, check_machine):
            lines += [(stage.name, line) for line in check(run, stage)]
    return _grouped(lines, [stage.name for stage in left])


def missing_for_metrics(run: Run, names: Sequence[str]) -> list[str]:
    """What the validation metrics of stages lack on this machine, a line for each stage that is not
    finished."""
    lines: list[str] = []
    for looked_at, stage in _in_order(run, names):
        if not looked_at.is_over(stage):
            try:
                check_metrics(stage, run.device)
            except MissingError as error:
                lines.append(str(error))
            except ValueError:
                pass  # a complaint of check_fields
    return lines


def _in_order(run: Run, names: Sequence[str]) -> Iterator[tuple[Run, Stage]]:
    """Each stage, and the run as it will be when the stages before have been trained."""
    for number, name in enumerate(names):
        looked_at = replace(run, to_come=frozenset(names[:number]))
        yield looked_at, looked_at.stage(name)


def _absent(run: Run, stage: Stage) -> Iterator[str]:
    """The start, the teacher and the pipeline of a stage that would have to be downloaded."""
    if not start_is_here(stage):
        yield stage.start
    teacher = stage.distil.teacher
    if teacher and not start_is_here(replace(stage, start=teacher)):
        yield teacher
    if not run.has(stage.pipeline) and not pipeline_is_here(stage):
        yield stage.pipeline


def _plan(run: Run, stage: Stage) -> str:
    return task_of(stage).plan(run.resolved(stage), run)


def _grouped(lines: Iterable[tuple[str, str]], names: Sequence[str]) -> list[str]:
    """Each line once, after the names of the stages that it is about; after none if of all."""
    stages: dict[str, list[str]] = {}
    for name, line in lines:
        stages.setdefault(line, []).append(name)
    return [
        line if len(set(about)) == len(names) else f"{', '.join(dict.fromkeys(about))}: {line}"
        for line, about in stages.items()
    ]


def check_fields(run: Run, stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage, whatever there is on this machine."""
    yield from problems_of(lambda: check_save_every(run.save_every))
    unshared = list(sequence_problems(stage))
    yield from unshared or problems_of(lambda: stage.batch.unit(groups(stage)))
    yield from check_accepted(run.accepted)
    unknown = list(problems_of(lambda: task_of(stage)))
    yield from unknown or task_of(stage).check(stage)
    yield from settings_problems(stage)
    yield from metric_problems(stage, run.device)


def check_machine(run: Run, stage: Stage) -> Iterator[str]:
    """Yield what a stage needs of this machine and of its own state, and is not there."""
    for work in (
        lambda: check_writable(run.directory),
        lambda: check_installed(stage.optimizer),
        lambda: check_precision(stage, run.device),
        lambda: _check_state(run, stage),
        *(lambda name=name: check_tracker(name) for name in run.trackers),  # type: ignore[misc]
    ):
        yield from problems_of(work)


def check_surroundings(run: Run, stage: Stage) -> Iterator[str]:
    """Yield what a stage needs and is not there, or does not fit it."""
    yield from check_machine(run, stage)
    if list(problems_of(lambda: task_of(stage))):
        return  # a complaint of check_fields
    resolved, lines = attempt(lambda: run.resolved(stage))
    yield from lines
    if resolved is not None:
        yield from task_of(stage).check_files(resolved, run)
        _, lines = attempt(lambda: refuse(check_changes(run, resolved)))
        yield from lines


def _check_state(run: Run, stage: Stage) -> None:
    state = run.state(stage)
    if state is not None:
        check_state(stage, state, read_progress(state))


def check_writable(directory: Path) -> None:
    """Raise ValueError for an output that cannot be made or written to."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--output must be a folder, got {directory}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--output must be writable, got {directory}: {place} is not")


def check_precision(stage: Stage, device: torch.device) -> None:
    """Raise ValueError for a precision that the device does not compute in: PyTorch would warn, and go
    on in fp32."""
    reason = f"precision must be fp32 on this {device.type} device, got {stage.precision}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with stage.autocast(device):
                is_on = torch.is_autocast_enabled(device.type)
        except RuntimeError as error:
            raise ValueError(f"{reason}: {error}") from error
    if is_on != (stage.precision != "fp32"):
        raise ValueError(reason)
