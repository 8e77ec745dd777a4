"""How long pictures will take: one evaluation of each kind that their steps are made of, counted as often
as it comes. Nothing is drawn.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixart.device import wait_for
from pixart.graphs.capture import GraphError
from pixart.pipeline.drawing import Hooks, Parts, Pass
from pixart.pipeline.fast import step_reuse
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.request import Request
from pixart.pipeline.stages import Stage
from pixart.sampler.denoiser import PictureControl, StepReuse
from pixart.sampler.guidance import Captions
from pixart.sampler.loop import Denoiser, Start, seed_generators

ROUNDS = 2  # that are timed, after one that is not

# Captions, which controls steer, what the blocks merge, and whether the first of them alone are computed.
_Kind = tuple[Captions, tuple[bool, ...], tuple[int, ...], bool]
# What of an evaluation a second process takes over, where each has one half of guidance.
_OF_SECOND: dict[Captions, float] = {"both": 0.5, "unconditional": 1.0}


@dataclass(frozen=True)
class PassCost:
    """What a pass of so many pictures takes. steps: of all its stages. evaluations: of the denoiser, of which
    a guided step has one, or two where its halves come one after the other. seconds: by stage of the work,
    as `Drawn.seconds` names them, of all its pictures. of_second: seconds of "denoise" that a second process
    would take over, with one half of guidance each. kv_ratios: what the blocks merge by a schedule, and in
    how many of the evaluations; () where there is none."""

    pictures: int
    steps: int
    evaluations: int
    seconds: dict[str, float]
    of_second: float
    kv_ratios: Mapping[tuple[int, ...], int]

    @property
    def step(self) -> float:
        """Seconds of a step, on average."""
        return self.seconds["denoise"] / self.steps


def rehearse(pipe: Parts, group: list[Request], inputs: Inputs) -> PassCost:
    """What a pass over these resolved requests takes, which agree in everything but prompts and seed. Their
    captions must be known: see `Pipeline.prepare`. Where a mesh shares the pictures, all must call it."""
    hooks = Hooks(None, None, None, None)
    try:
        return _Rehearsal(pipe, group, hooks, inputs).cost()
    except GraphError as error:
        pipe.graphs.give_up(error)
    return _Rehearsal(pipe, group, hooks, inputs).cost()


class _Rehearsal(Pass):
    @torch.no_grad()
    def cost(self) -> PassCost:
        pipe, count, seconds = self._pipe, self._count, dict[str, float]()
        pipe.transformer.to(pipe.device)
        self._of_second = 0.0
        steps, counts = 0, Counter[_Kind]()
        for number, stage in enumerate(self._stages):
            start = self._rehearse_start(stage, number, seconds)
            more, kinds = self._rehearse_steps(stage, start, seconds)
            steps, counts = steps + more, counts + kinds
            latent = self._latents(stage, 1)
            with self._clock(seconds, "decode", count):
                self._decode(latent, self._group[0], None)
        ratios = Counter[tuple[int, ...]]()
        for (_, _, merged, _), evaluations in counts.items():
            ratios[merged] += evaluations
        return PassCost(count, steps, counts.total(), seconds, self._of_second, ratios)

    def _rehearse_start(self, stage: Stage, number: int, seconds: dict[str, float]) -> Start | None:
        if stage.strength is None or (stage.strength == 1 and not stage.is_masked):
            return None
        image = torch.zeros(1, 3, stage.height, stage.width)
        # The picture of the request is one for all, those before a larger stage are each its own.
        with self._clock(seconds, "encode", self._count if number else 1):
            self._encode(image)
        latents = self._latents(stage, self._count)
        redraw = torch.ones_like(latents[:, :1]) if stage.is_masked else None
        return Start(latents, stage.strength, redraw)

    def _rehearse_steps(
        self, stage: Stage, start: Start | None, seconds: dict[str, float]
    ) -> tuple[int, Counter[_Kind]]:
        pipe, steps = self._pipe, list[object]()
        with self._clock(seconds, "denoise"):  # where pictures of controls are encoded
            denoise = self._denoiser(stage, pipe.graphs.of_size(*self._seen))
        like = self._group[0]
        reuse = step_reuse(like, pipe.solver(like.scheduler))
        noted = _Noted(self._controls(stage), self._ratios, reuse)
        generators = seed_generators(request.seed for request in self._group)
        with self._clock(seconds, "denoise"):  # the solver's own arithmetic
            self._sample(noted, stage, start, generators, steps.append)
        for kind, call in noted.first.items():
            spent = dict[str, float]()
            self._rehearse_call(denoise, call, noted.counts[kind], spent)
            seconds["denoise"] += spent["denoise"]
            self._of_second += spent["denoise"] * _OF_SECOND.get(kind[0], 0.0)
        return len(steps), noted.counts

    def _ratios(self, timestep: float) -> tuple[int, ...]:
        schedule = self._kv_schedule()
        return () if schedule is None else schedule.ratios(timestep, self._pipe.opened.config)

    def _rehearse_call(
        self,
        denoise: Denoiser,
        call: tuple[Tensor, Tensor, Captions],
        count: int,
        seconds: dict[str, float],
    ) -> None:
        denoise(*call)  # what it keeps is there then for a call that reuses it
        with self._clock(seconds, "denoise", count / ROUNDS):
            for _ in range(ROUNDS):
                denoise(*call)

    def _latents(self, stage: Stage, count: int) -> Tensor:
        side, channels = self._pipe.vae.downsample, self._pipe.opened.config.in_channels
        sides = stage.height // side, stage.width // side
        return torch.zeros(count, channels, *sides, device=self._pipe.device)

    @contextmanager
    def _clock(self, seconds: dict[str, float], stage: str, times: float = 1) -> Iterator[None]:
        """Adds what the block takes, so many times."""
        device = self._pipe.device
        wait_for(device)
        started = time.perf_counter()
        yield
        wait_for(device)
        spent = time.perf_counter() - started
        seconds[stage] = seconds.get(stage, 0.0) + times * spent


@dataclass
class _Noted:
    """A denoiser that predicts nothing, and notes what it is asked for. first: one call of each kind."""

    controls: Sequence[PictureControl]
    ratios: Callable[[float], tuple[int, ...]]
    reuse: StepReuse | None = None
    known: set[Captions] = field(default_factory=set)
    counts: Counter[_Kind] = field(default_factory=Counter)
    first: dict[_Kind, tuple[Tensor, Tensor, Captions]] = field(default_factory=dict)

    def __call__(self, latents: Tensor, timesteps: Tensor, captions: Captions, /) -> Tensor:
        now = float(timesteps[0])
        steer = tuple(one.timesteps[0] >= now >= one.timesteps[1] for one in self.controls)
        halves: set[Captions] = (
            {"unconditional", "conditional"} if captions == "both" else {captions}
        )
        is_reused = self.reuse is not None and now in self.reuse.timesteps and halves <= self.known
        self.known |= halves
        kind = (captions, steer, self.ratios(now), is_reused)
        self.counts[kind] += 1
        self.first.setdefault(kind, (latents.clone(), timesteps.clone(), captions))
        return torch.zeros_like(latents)
