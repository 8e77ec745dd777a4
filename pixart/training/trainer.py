"""The training loop: resumable to the bit, on one process or many, and the same for every stage.

What a step learns from is a function of (seed, stage, step) alone: data, noise and timesteps are
drawn for the whole batch by a generator made of these, and each process takes its part, or that of
its group. So neither data position nor random states have to be stored, and the number of processes
changes nothing but rounding.
"""

import contextlib
import json
import math
import signal
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from pixart import process
from pixart.distributed import any_process, max_over_processes, mean_over_processes
from pixart.files import parse_json
from pixart.training.ahead import Ahead
from pixart.training.best import Best
from pixart.training.ema import EMA
from pixart.training.finite import not_finite
from pixart.training.optimizers import build_optimizers, forget_steps, set_rate
from pixart.training.parallel import gradients_later, groups, parallelise
from pixart.training.progress import Progress
from pixart.training.stage import Stage
from pixart.training.state import (
    check_whole,
    latest_state,
    load_tensors,
    newest_name,
    numbered,
    read_progress,
    save_state,
    state_name,
)
from pixart.weights import NotFiniteError

MAX_SKIPPED = 20  # steps in a row that may be skipped before a run is given up
SKIP_RATIO = 10.0  # a gradient norm so many times its running mean skips the step
FIRST_NORMS = 10  # tell which norm is usual, also where there is no warm-up
RESUMED = ("step", "accepted", "mean_norm", "skipped", "seconds", "scaler")  # that a state says
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

Losses = dict[str, Tensor]  # must hold "loss"; everything else is only logged


class Task(Protocol):
    """What a stage trains on, its losses and its validation."""

    model: nn.Module

    def load(self, step: int, parts: int) -> list[Any]:
        """This process's data of a step, in so many parts, the same for all of its group. Called ahead
        of time, in a thread."""

    def losses(self, model: nn.Module, part: Any) -> Losses:
        """The losses of one part; `model` is self.model, or what stands for it among processes."""

    def images(self, part: Any) -> int: ...

    def tokens(self, part: Any) -> int: ...

    def flops(self, part: Any) -> float:
        """FLOPs of the forward pass; 0 where they are not counted."""

    def export(self, folder: Path) -> None:
        """Write what a user opens. The model holds the averaged weights; called by all processes."""

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Judge the model, which holds the averaged weights; called by all processes."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; the last good state is kept."""


def step_seed(seed: int, stage: str, step: int) -> int:
    # Not hash(): it differs from process to process.
    return zlib.crc32(f"{seed}/{stage}/{step}".encode())


@dataclass
class Trainer:
    """A stage in progress, in `directory`."""

    task: Task
    stage: Stage
    directory: Path
    device: torch.device
    save_every: int = 500
    keep: int = 2
    begun: Mapping[str, Any] | None = None
    """What the stage is trained with, kept with its states."""

    def __post_init__(self) -> None:
        check_save_every(self.save_every)
        self.model = self.task.model.to(self.device).train()
        self.step, self.accepted, self.mean_norm, self.skipped, self.seconds = 0, 0, 0.0, 0, 0.0
        self.resumed_from: Path | None = None
        self.best = Best(self.stage, self.directory)
        self.groups = groups(self.stage)
        self.called = parallelise(self.model, self.stage.parallel, self.stage.sequence)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(self.model, self.stage.optimizer, self.stage.factors)
        self.ema = None if self.stage.ema is None else EMA(self.parameters, self.stage.ema)
        scaled = self.stage.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    @property
    def done(self) -> bool:
        hours = self.stage.hours
        return self.step >= self.stage.steps or (hours is not None and self.seconds >= hours * 3600)

    def run(
        self, progress: Progress, stop_after: int | None = None, start_from: Path | None = None
    ) -> bool:
        """Advance to the end, for `stop_after` steps, or until SIGTERM, SIGHUP or Ctrl-C; saves at
        the end of each. start_from: a state to go on from instead of the newest one in `directory`.
        Returns whether the stage is finished."""
        self._counted = time.perf_counter()
        self.resume(start_from)
        progress.start(self.step, self.stage.steps)
        last = self.stage.steps if stop_after is None else self.step + stop_after
        resumed = start_from or latest_state(self.directory)
        saved = self.step if resumed and resumed.parent == self.directory else -1
        with StopSignals() as stop, Ahead(self._load) as ahead, progress:
            # One process's clock may be ahead: all leave together, or the others wait for ever.
            while not any_process(self.done or self.step >= last or stop.asked, self.device):
                self._advance_and_report(ahead, progress)
                if self.step % self.save_every == 0 or self.best.is_at(self.step):
                    saved = self.save()
                self._give_up_if_lost()
            if saved != self.step:
                self.save()
            return any_process(self.done, self.device)

    def _advance_and_report(self, ahead: Ahead, progress: Progress) -> None:
        started = time.perf_counter()
        parts = ahead(self.step)
        waited = time.perf_counter() - started
        values = self.advance(parts)
        self._synchronise()
        spent = time.perf_counter() - started
        task = self.task
        images, tokens, flops = (
            self.groups * sum(map(count, parts)) for count in (task.images, task.tokens, task.flops)
        )
        progress.step(self.step, values, spent, waited, int(images), int(tokens), flops)
        every = self.stage.validation.every
        if every and (self.step % every == 0 or self.step == self.stage.steps):
            found = self._validate()
            progress.validation(self.step, found)
            self.best.note(found, self.step)
        self._count_time()

    def _give_up_if_lost(self) -> None:
        """Raise TrainingFailed where validation has found it worse than its best for too long."""
        found = self.best.found
        if found is not None and self.best.is_lost:
            raise TrainingFailed(
                f"stage {self.stage.name}: given up at step {self.step}: {found.worse} validations in a row "
                f"were worse than the best by {found.metric}, {found.value:.4g} at step {found.step}, which is "
                f"kept, {self.directory / state_name(found.step)}; try a lower optimizer.learning_rate"
            )

    def _count_time(self) -> None:
        """Called once a step: a save counts with the step after it, so that the time by which a stage
        ends is the time that its last state tells."""
        now = time.perf_counter()
        self.seconds += now - self._counted
        self._counted = now

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _load(self, step: int) -> list[Any]:
        return self.task.load(step, self.stage.batch.accumulate)

    def advance(self, parts: Sequence[Any]) -> dict[str, float]:
        """One optimiser step. A gradient that is not finite or explodes is skipped and counted."""
        losses = self._backward(parts)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = _clip(self.parameters, self.stage.optimizer.clip_norm)
        accepted = self._accept(norm, losses["loss"])
        if accepted:
            self._update(sum(map(self.task.images, parts)) * self.groups)
        elif self.scaler.is_enabled():
            self.scaler.update()
        for parameter in self.parameters:
            parameter.grad = None
        self.step += 1
        if self.skipped >= MAX_SKIPPED:
            raise TrainingFailed(
                f"stage {self.stage.name}: losses or gradients of {MAX_SKIPPED} steps in a row were not "
                f"finite or {SKIP_RATIO:g} times the usual, last at step {self.step} (loss "
                f"{losses['loss']:g}, norm {norm:g}); {self._way_back()}"
            )
        return {**losses, "norm": norm, "skipped": float(not accepted)}

    def _backward(self, parts: Sequence[Any]) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            with gradients_later(self.called, number < len(parts) - 1):
                losses = self.task.losses(self.called, part)
                self.scaler.scale(losses["loss"] / len(parts)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / len(parts)
        means = mean_over_processes(torch.stack(list(sums.values())))
        return dict(zip(sums, means.tolist(), strict=True))

    def _update(self, batch: int) -> None:
        rate = self.stage.optimizer.rate(self.step, self.stage.steps, batch)
        for optimizer in self.optimizers:
            set_rate(optimizer, rate)
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.step)

    def _way_back(self) -> str:
        return (
            f"the last good state is {latest_state(self.directory)}; try a lower "
            "optimizer.learning_rate or --precision bf16"
        )

    def _accept(self, norm: float, loss: float = 0.0) -> bool:
        warm = self.step < self.stage.optimizer.warmup_steps or self.accepted < FIRST_NORMS
        finite = math.isfinite(norm) and math.isfinite(loss)
        good = finite and (warm or norm <= SKIP_RATIO * self.mean_norm)
        if good:
            rest = min(0.98, self.accepted / (self.accepted + 1))
            self.mean_norm = rest * self.mean_norm + (1 - rest) * norm
            self.accepted += 1
        # A scale of fp16 that is too high is found out by skipping: that is no failure, until it can
        # no longer be the scale.
        searching = not math.isfinite(norm) and self.scaler.get_scale() > 1
        self.skipped = 0 if good or searching else self.skipped + 1
        return good

    def _validate(self) -> dict[str, float]:
        folder = self.directory / "pictures"
        self.model.eval()
        try:
            with self._averaged(), torch.no_grad():
                return self.task.validate(self.step, folder)
        finally:
            self.model.train()

    def _averaged(self) -> Any:
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped()

    def save(self) -> int:
        """Save the state of this step, and what a user opens beside it; returns the step. Raises
        TrainingFailed, and saves nothing, for what is not finite."""
        tensors = self._tensors()
        if problem := not_finite(tensors, self.device):
            raise TrainingFailed(
                f"stage {self.stage.name}: step {self.step} is not saved: {problem}; {self._way_back()}"
            )

        def export(folder: Path) -> None:
            self.model.eval()
            try:
                with self._averaged():
                    self.task.export(folder)
            except NotFiniteError as error:  # rounded to fp16, say
                raise TrainingFailed(str(error)) from error
            self.model.train()

        progress = {
            "stage": self.stage.name,
            "averaged": self.ema is not None,
            "lora": asdict(self.stage.lora),
            **({} if self.begun is None else {"begun": self.begun}),
            "accepted": self.accepted,
            "mean_norm": self.mean_norm,
            "skipped": self.skipped,
            "batch_unit": self.stage.batch.unit(self.groups),
            "seconds": max_over_processes(self.seconds, self.device),
            "scaler": self.scaler.state_dict(),
            **self.best.said(),
        }
        save_state(
            self.directory,
            self.step,
            tensors,
            progress,
            keep=self.keep,
            spare=[*self.best.spared(), *([self.resumed_from] if self.resumed_from else ())],
            export=export,
        )
        self.best.link()
        return self.step

    def resume(self, state: Path | None = None) -> bool:
        """Take up the newest state, if there is one, or the one that is named."""
        named, state = state, state or latest_state(self.directory)
        if state is None:
            return False
        is_newest = state.name == newest_name(self.directory)
        # What was gone back to stays until there is something better.
        self.resumed_from = state if named or not is_newest else None
        values = read_progress(state)
        check_state(self.stage, state, values)
        if missing := [name for name in RESUMED if name not in values]:
            raise ValueError(f"{state} must say {', '.join(missing)}; give another --output")
        tensors = self._tensors()
        load_tensors(state, tensors)
        if problem := not_finite(tensors, self.device):
            raise ValueError(f"{state}: {problem}; go on from an earlier state with --resume")
        states: dict[str, Any] = get_state_dict(self.model, self.optimizers, options=_FLAT)[1]
        states.update(tensors["optimizer"])
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=tensors["model"],
            optim_state_dict=states,
            options=_FLAT,
        )
        self.step, self.accepted = values["step"], values["accepted"]
        self.mean_norm = values["mean_norm"]
        self.skipped, self.seconds = values["skipped"], values["seconds"]
        self._resume_scaler(state, values["scaler"])
        self.best.resume(values)
        return True

    def _resume_scaler(self, state: Path, values: dict[str, Any]) -> None:
        if not values:  # of another precision
            return
        try:
            self.scaler.load_state_dict(values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{state}: scaler must be that of fp16, got {values}") from error

    def _tensors(self) -> dict[str, dict[str, Any]]:
        untouched = [optimizer for optimizer in self.optimizers if not optimizer.state]
        model, optimizer = get_state_dict(self.model, self.optimizers, options=_FLAT)
        for one in untouched:
            forget_steps(one)  # that get_state_dict took to have states to show
        # What stands there beside states are settings, which the recipe gives.
        states = {name: value for name, value in optimizer.items() if name.startswith("state.")}
        average = {} if self.ema is None else dict(numbered(self.ema.tensors))
        return {"model": model, "optimizer": states, "ema": average}


def check_save_every(steps: int) -> None:
    """Raise ValueError for a number of steps between two saves that is none."""
    if steps < 1:
        raise ValueError(
            f"--save-every must be at least 1, got {steps}; a number beyond --steps saves at the "
            "end only"
        )


def check_state(stage: Stage, state: Path, progress: Mapping[str, Any]) -> None:
    """Raise ValueError for a saved state that a stage cannot go on from. progress: what it says."""
    check_whole(state)
    trained, wanted = progress.get("lora"), parse_json(json.dumps(asdict(stage.lora)), "lora")
    if trained is not None and trained != wanted:
        raise ValueError(f"lora must be as {state} was trained, {trained}, got {wanted}")
    if progress.get("stage") != stage.name:
        raise ValueError(
            f"--resume must name a state of stage {stage.name}, got one of "
            f"{progress.get('stage')}, {state}"
        )


def _clip(parameters: Sequence[Tensor], limit: float) -> float:
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class StopSignals:
    """Turns SIGTERM, Ctrl-C and a terminal that is closed into a wish to stop after the current step.
    What is ignored from outside, as nohup does, stays ignored."""

    asked = False

    def __enter__(self) -> "StopSignals":
        known = [getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP")]
        wanted = [s for s in known if s and signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._ask) for s in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self.asked = True
        if number != signal.SIGTERM:  # which, from a scheduler, ends in success: all is saved
            process.ENDING.note(number)
