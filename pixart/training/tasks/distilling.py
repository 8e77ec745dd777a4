"""Distilling into few steps, wherever captions come from: student, teacher and what learns beside them.

One module holds what trains, and one call of it is a whole step: so processes, states and averages are those
of any other stage. The teacher lies outside of it, in no state. Beside adapters all of them share the memory
of one base.

A task for other data is a class with `load`, which gives parts as `TrainingSample` (lcm) or `Walked` (tdm),
and `losses`, which calls `distilled_losses` with the captions of a part:

    check        distilling_problems, and what it asks of its data
    check_files  teacher_problems, and what it asks of its files
    plan         pixart.training.plan.distilling_plan
    build        begin_distilled; then starts.add_compression, as the student may be compressed
    export       export_student
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.cost import forward_flops
from pixart.diffusion import add_noise, predict_x0
from pixart.distributed import rank
from pixart.few_step import FewStep
from pixart.model.exchange import TokenExchange
from pixart.model.transformer import PixArt
from pixart.training import distillation
from pixart.training.batch import TrainingSample, whole_state
from pixart.training.distillation import CLEAN
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.stage import DISTILLED, DIT, LCM, PREVIOUS, RANDOM, TDM, ResolvedStage, Stage
from pixart.training.starts import (
    Start,
    adapt,
    add_adapters,
    open_start,
    start_is_here,
    weightless_model,
)
from pixart.training.state import load_tensors
from pixart.training.tasks.transformer import export_transformer

STUDENT, FAKE = "student.", "fake."  # before the names of their weights
_UNREAD = {TDM: ("ddim_steps", "huber"), LCM: ("also", "fake_rate", "fake_first")}


# What a stage says.


def few_step_of(stage: Stage) -> FewStep:
    """How what a stage distils is drawn: by its own deterministic walk (tdm), or LCM's."""
    distil = stage.distil
    if stage.trains == TDM:
        return FewStep("ddim", distil.walk, also=tuple(distil.walks[1:]))
    return FewStep(
        "lcm", distil.timesteps or distillation.grid_timesteps(distil.count, distil.ddim_steps)
    )


def distilling_problems(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that distils, whatever its data."""
    if stage.start == RANDOM or stage.start.startswith(DIT):
        yield f"start must be a trained PixArt where trains is {stage.trains}, got {stage.start}"
    if _is_no_teacher(stage.distil.teacher):
        yield (
            f"distil.teacher must be a trained PixArt, by its path or hub id, got {stage.distil.teacher}; without "
            "it the teacher is what the stage starts from"
        )
    if stage.lora.rank and stage.kv_compress:
        rule = "kv_compress must be empty, in a stage of its own,"
        yield f"{rule} with lora.rank {stage.lora.rank}"
    for name in _UNREAD[stage.trains]:
        if (value := getattr(stage.distil, name)) != getattr(type(stage.distil)(), name):
            other = next(one for one in DISTILLED if one != stage.trains)
            yield f"distil.{name} is read where trains is {other} only, got {value}"
    if stage.trains == LCM:
        if stage.min_snr is not None:
            yield f"min_snr must be None where trains is {LCM}, got {stage.min_snr}"
        if not stage.distil.timesteps and stage.distil.count > stage.distil.ddim_steps:
            yield (
                f"distil.ddim_steps must be at least distil.steps, {stage.distil.count}, got "
                f"{stage.distil.ddim_steps}"
            )
        else:
            yield from problems_of(lambda: few_step_of(stage))


def _is_no_teacher(name: str) -> bool:
    """Whether it is another way to start than from a trained PixArt."""
    return name in (RANDOM, PREVIOUS) or name.startswith(DIT)


def teacher_problems(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield why a stage cannot begin, or learn of its teacher."""
    if stage.start == PREVIOUS:
        yield from problems_of(lambda: run.expect_previous(stage))
        before, _ = attempt(lambda: run.before(stage))
        if before is not None and not before.trains_transformer:
            yield f"start must be no {before.trains}, which stage {before.name} trains, got previous"
            return
    if _is_no_teacher(stage.distil.teacher):
        return  # as the rules of its fields say
    teacher, lines = attempt(lambda: teacher_start(stage, run))
    yield from (f"distil.teacher: {line}" if stage.distil.teacher else line for line in lines)
    if teacher is None:
        return
    few_step = teacher.config.few_step
    if few_step is not None:
        yield (
            f"distil.teacher must be a model of many steps, got one that was distilled for {few_step}; name "
            "the one that it was made of"
        )
    plain = replace(stage, kv_compress="", kv_start="mean", kv_norm=None)
    taught, lines = attempt(lambda: weightless_model(plain, teacher.config))
    yield from (f"distil.teacher: {line}" if stage.distil.teacher else line for line in lines)
    model, _ = attempt(lambda: run.known_model(stage))
    if taught is None or model is None:
        return
    for name in ("in_channels", "caption_channels", "micro_condition", "model_max_length"):
        given, wanted = (getattr(one.config, name) for one in (taught, model))
        if given != wanted:
            yield f"distil.teacher must have the student's {name}, {wanted}, got {given}"


def teacher_start(stage: Stage, run: Run) -> Start | None:
    """What the teacher is opened from: distil.teacher, else what the stage starts from, or after a stage that
    distilled that one's teacher. None for what is not here yet."""
    if stage.distil.teacher:
        if stage.distil.teacher == stage.start:
            return run.start(stage)
        named = replace(stage, start=stage.distil.teacher)
        return open_start(named, None) if start_is_here(named) else None
    if stage.start == PREVIOUS and run.before(stage).trains in DISTILLED:
        return teacher_start(run.before(stage), run)
    return run.start(stage)


# What a step sees.


@dataclass(frozen=True)
class Walked:
    """What a part of a step of tdm learns from. There are no pictures: sample.noise is where the student's
    walk begins, sample.latents is the noise that is added to where it leads, and sample.timesteps are integers
    from 0 to 999 that say how far, between the walk's next timestep and this one.

    walk: the timesteps. place: of which of its steps the student learns. is_student: whether it learns
    at all yet, or the fake alone.
    """

    sample: TrainingSample
    walk: tuple[int, ...]
    place: int
    is_student: bool

    def __len__(self) -> int:
        return len(self.sample)

    def to(self, device: torch.device) -> "Walked":
        return replace(self, sample=self.sample.to(device))


def walked(stage: Stage, step: int, sample: TrainingSample) -> Walked:
    """A part of a step, whose walk and place in it all parts and processes share."""
    rng = random.Random(f"{stage.seed}/{stage.name}/{step}/walk")
    walk = rng.choice(stage.distil.walks)
    return Walked(sample, walk, rng.randrange(len(walk)), step >= stage.distil.fake_first)


def sample_of(part: "TrainingSample | Walked") -> TrainingSample:
    """The samples of a part, of either kind."""
    return part.sample if isinstance(part, Walked) else part


@dataclass(frozen=True)
class Captions:
    """What a part is drawn for. features, mask: (B, L, D) and (B, L). null_features, null_mask: the same of
    the null caption, for a teacher with guidance. sizes: of pictures, for a model that is told them."""

    features: Tensor
    mask: Tensor
    null_features: Tensor
    null_mask: Tensor
    sizes: tuple[Tensor, ...] = ()

    @property
    def conditional(self) -> tuple[Tensor, ...]:
        """What a model takes behind latents and timesteps."""
        return (self.features, self.mask, *self.sizes)

    @property
    def unconditional(self) -> tuple[Tensor, ...]:
        return (self.null_features, self.null_mask, *self.sizes)


# What trains.


class Distilled(nn.Module):
    """A student beside its teacher. Called with a part of a step and its captions, it returns losses, (B,)
    each: that of the student, and of tdm that of the fake."""

    def __init__(self, student: PixArt, teacher: PixArt, stage: ResolvedStage) -> None:
        super().__init__()
        self.student, self.stage = student, stage
        self._teacher = (teacher.requires_grad_(False),)  # in a tuple: no part of this module

    @property
    def teacher(self) -> PixArt:
        return self._teacher[0]

    def _clean(
        self,
        model: PixArt,
        x_t: Tensor,
        t: Tensor,
        conditions: tuple[Tensor, ...],
        exchange: TokenExchange | None,
    ) -> Tensor:
        """x0 as a model predicts it."""
        output = model(x_t, t, *conditions, exchange=exchange).float()
        return predict_x0(output[:, : x_t.shape[1]], x_t, t, self.stage.prediction)

    @torch.no_grad()
    def _taught(
        self, x_t: Tensor, t: Tensor, captions: Captions, exchange: TokenExchange | None
    ) -> Tensor:
        """x0 as the teacher predicts it, guided."""
        guidance = self.stage.distil.guidance
        found = self._clean(self.teacher, x_t, t, captions.conditional, exchange)
        if guidance == 1:
            return found
        without = self._clean(self.teacher, x_t, t, captions.unconditional, exchange)
        return distillation.guided(without, found, guidance)


class Matching(Distilled):
    """Trajectory distribution matching; see pixart.training.distillation."""

    def __init__(
        self, student: PixArt, fake: PixArt, teacher: PixArt, stage: ResolvedStage
    ) -> None:
        super().__init__(student, teacher, stage)
        self.fake = fake
        if stage.lora.rank:  # its base is the teacher's: it need not be kept with each state
            self.register_state_dict_post_hook(_leave_out_base)
            self.register_load_state_dict_pre_hook(_put_in_base)

    def forward(
        self, part: Walked, captions: Captions, exchange: TokenExchange | None = None
    ) -> tuple[Tensor, Tensor]:
        sample, conditions = part.sample, captions.conditional
        stops = [torch.full_like(sample.timesteps, stop) for stop in (*part.walk, CLEAN)]
        x_t = sample.noise
        with torch.no_grad():
            for t, s in zip(stops[: part.place], stops[1:], strict=False):
                x0 = self._clean(self.student, x_t, t, conditions, exchange)
                x_t = distillation.ddim(x0, x_t, t, s)
        t, s = stops[part.place : part.place + 2]
        x0 = self._clean(self.student, x_t, t, conditions, exchange)
        tau = distillation.between(s, t, sample.timesteps)
        reached = distillation.ddim(x0.detach(), x_t, t, s)
        x_tau = distillation.noise_on(reached, sample.latents, s, tau)
        fake = self._clean(self.fake, x_tau, tau, conditions, exchange)
        real = self._taught(x_tau, tau, captions, exchange)
        error = distillation.fake_loss(
            fake, x0, tau, prediction_type=self.stage.prediction, min_snr=self.stage.min_snr
        )
        return distillation.matching_loss(x0, real, fake.detach()), error


def _leave_out_base(module: "Matching", state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, parameter in module.fake.state_dict(keep_vars=True).items():
        if not parameter.requires_grad:
            state.pop(f"{prefix}{FAKE}{name}", None)


def _put_in_base(module: "Matching", state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.fake.state_dict(keep_vars=True).items():
        if not parameter.requires_grad:
            state.setdefault(f"{prefix}{FAKE}{name}", parameter.detach())


class Consistent(Distilled):
    """Latent consistency; see pixart.training.distillation."""

    def forward(
        self, part: TrainingSample, captions: Captions, exchange: TokenExchange | None = None
    ) -> tuple[Tensor]:
        distil, conditions = self.stage.distil, captions.conditional
        t, s = distillation.grid_pair(part.timesteps, distil.ddim_steps)
        x_t = add_noise(part.latents, part.noise, t)
        x_s = distillation.ddim(self._taught(x_t, t, captions, exchange), x_t, t, s)
        with torch.no_grad():
            target = distillation.consistency(
                self._clean(self.student, x_s, s, conditions, exchange), x_s, s
            )
        x0 = self._clean(self.student, x_t, t, conditions, exchange)
        return (distillation.huber(distillation.consistency(x0, x_t, t), target, distil.huber),)


def begin_distilled(stage: ResolvedStage, run: Run) -> Distilled:
    """What a stage trains, as it begins, on the run's device: the student as its start, the fake as the
    teacher, or as the stage before left it; of both, where adapters alone train, these."""
    start, source = run.start(stage), teacher_start(stage, run)
    assert start is not None and source is not None  # rules of `distilling_problems`
    shares = stage.lora.rank > 0 and stage.parallel == "ddp"  # FSDP cuts each where it is
    teacher = adapt(source.load(), stage).to(run.device)
    is_own = source is start
    student = _twin(teacher, shares) if is_own else adapt(start.load(), stage).to(run.device)
    learners = [student] if stage.trains == LCM else [student, _twin(teacher, shares)]
    for fake in learners[1:]:
        _go_on(fake, stage, run)
    for model in learners:
        model.requires_grad_(True)
        add_adapters(stage, model)
        model.gradient_checkpointing = stage.checkpoint_blocks
    for model in (*learners, teacher):
        # Captions are dropped where they are drawn: the model's own lots are nobody's seed.
        model.y_embedder.dropout_prob = 0.0
    if stage.trains == LCM:
        return Consistent(student, teacher, stage)
    return Matching(student, learners[1], teacher, stage)


def _go_on(fake: PixArt, stage: Stage, run: Run) -> None:
    """Give a fake, which is as the teacher, the weights of the stage before: it knows the student already."""
    if stage.start != PREVIOUS:
        return
    before = run.before(stage)
    is_other = stage.distil.teacher not in ("", before.distil.teacher)
    if before.trains == TDM and not (is_other or before.lora.rank or stage.lora.rank):
        weights = {f"{FAKE}{name}": p.detach() for name, p in fake.named_parameters()}
        load_tensors(run.previous(stage), {"model": weights})


def _twin(model: PixArt, shares: bool) -> PixArt:
    """A copy; shares: of everything but the weights."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo if shares else {})


# What a task does with it.


def distilled_losses(
    model: nn.Module, part: "TrainingSample | Walked", captions: Captions, stage: ResolvedStage
) -> dict[str, Tensor]:
    """The losses of a part on its device, in the stage's precision; the loss of tdm is the sum of both."""
    with stage.autocast(captions.features.device):
        student, *fake = (one.mean() for one in model(part, captions))
    if not isinstance(part, Walked):
        return {"loss": student}
    return {"loss": part.is_student * student + fake[0], "student": student, "fake": fake[0]}


def distilled_flops(
    stage: ResolvedStage, model: Distilled, tokens: int, part: "TrainingSample | Walked"
) -> float:
    """FLOPs of a part, so counted that three times as many make a step. tokens: of a picture."""
    learns = 2 if stage.lora.rank else 3  # frozen weights have no gradient
    student, teacher = (forward_flops(one.config, tokens) for one in (model.student, model.teacher))
    taught = teacher * (1 if stage.distil.guidance == 1 else 2)
    if not isinstance(part, Walked):
        return len(part) * (taught + (learns + 1) * student) / 3
    walked = part.place * student
    return len(part) * (taught + walked + learns * (student + teacher)) / 3


def export_student(
    model: nn.Module, stage: Stage, student: PixArt, folder: Path, parts: Path | None
) -> None:
    """Write the student as any transformer is, but that all of it says how it is drawn. Called by all
    processes."""
    state = whole_state(model)
    if rank() != 0:
        return
    own = {n.removeprefix(STUDENT): one for n, one in state.items() if n.startswith(STUDENT)}
    config = replace(student.config, few_step=few_step_of(stage))
    is_stored = getattr(student, "null_caption_stored", True)
    export_transformer(own, config, stage, folder, parts, is_stored)
