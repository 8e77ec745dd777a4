"""Stages looked at, planned and trained: what is wrong is reported before anything is begun."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pixart.device import measure_peak
from pixart.distributed import world_size
from pixart.training.optimizers import check_installed
from pixart.training.problems import attempt, problems_of, refuse
from pixart.training.progress import Progress
from pixart.training.run import Run
from pixart.training.stage import Stage
from pixart.training.starts import would_download
from pixart.training.state import read_progress
from pixart.training.tasks import task_of
from pixart.training.trackers import check_installed as check_tracker
from pixart.training.trainer import Task, Trainer, check_save_every, check_state, step_seed

logger = logging.getLogger("pixart")


def train(run: Run, name: str, stop_after: int | None = None) -> bool:
    """Bring a stage to its end, or so many steps further. Returns whether it is finished. Raises
    Problems, before anything is written, for what cannot be trained."""
    stage = run.stage(name)
    if run.start_from is None and run.is_finished(stage):
        return True
    # What a stage needs is looked for where it says nothing that cannot be.
    refuse(check_fields(run, stage))
    refuse(check_surroundings(run, stage))
    resolved = run.resolved(stage)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(stage.precision, torch.bfloat16)
    peak = world_size() * measure_peak(run.device, dtype)  # draws random numbers
    torch.manual_seed(step_seed(stage.seed, stage.name, 0))
    task = build(run, resolved)
    trainer = Trainer(task, resolved, run.folder(name), run.device, run.save_every, run.keep)
    progress = Progress(
        run.folder(name),
        name,
        peak=peak,
        trackers=run.trackers,
        quiet=run.quiet,
    )
    return trainer.run(progress, stop_after, run.start_from)


def build(run: Run, stage: Stage) -> Task:
    """Make what a stage trains, as the stage begins."""
    try:
        return task_of(stage).build(run.resolved(stage), run)
    finally:
        run.forget()


def dry_run(run: Run, names: Sequence[str]) -> tuple[str, list[str]]:
    """What stages will cost, and all that is wrong with them: every check of `train`, and no more than
    these. Nothing is written or downloaded."""
    for source in dict.fromkeys(one for s in run.stages for one in (s.start, s.pipeline)):
        if would_download(source):
            logger.warning("%s: not on this machine, not looked at in a dry run", source)
    plans: list[str] = []
    lines: list[tuple[str, str]] = []
    for number, name in enumerate(names):
        looked_at = replace(run, to_come=frozenset(names[:number]), downloads=False)
        stage = looked_at.stage(name)
        if not (run.start_from is None and run.is_finished(stage)):
            for check in (check_fields, check_surroundings):
                lines += [(name, line) for line in check(looked_at, stage)]
        plan, _ = attempt(partial(_plan, looked_at, stage))  # its complaints are among the lines
        plans += [] if plan is None else [plan]
    return "\n\n".join(plans), _grouped(lines, names)


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
    yield from problems_of(lambda: stage.batch.unit(world_size()))
    unknown = list(problems_of(lambda: task_of(stage)))
    yield from unknown or task_of(stage).check(stage)


def check_surroundings(run: Run, stage: Stage) -> Iterator[str]:
    """Yield what a stage needs and is not there, or does not fit it."""
    for work in (
        lambda: check_writable(run.directory),
        lambda: check_installed(stage.optimizer),
        lambda: check_precision(stage, run.device),
        lambda: _check_state(run, stage),
        *(lambda name=name: check_tracker(name) for name in run.trackers),  # type: ignore[misc]
    ):
        yield from problems_of(work)
    if list(problems_of(lambda: task_of(stage))):
        return  # a complaint of check_fields
    resolved, lines = attempt(lambda: run.resolved(stage))
    yield from lines
    if resolved is not None:
        yield from task_of(stage).check_files(resolved, run)


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
