"""Sampling: the loop over a diffusers scheduler, from noise or from a picture.

The sampler knows no model and no captions: it calls a `Denoiser`. Latents are float32 and timesteps
float32, fractions included, whatever the dtype inside the denoiser. diffusers is imported on use.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.sampler.guidance import Captions, Guidance, Guide
from pixart.sampler.prediction import clean_per_output, predict_clean
from pixart.sampler.schedulers import Scheduler, default_guidance
from pixart.sampler.walk import Evaluation, Steps, Walk, check_walk


class Denoiser(Protocol):
    """What the sampler calls: (latents, timesteps, captions) -> prediction.

    latents: (B, C, h, w) float32. timesteps: (B,) float32. captions says which captions belong to
    the batch: the prompts, the negative prompts, or "both", when the batch is twice as large, its
    first half for the negative prompts and its second for the prompts. "perturbed" are the prompts
    again, for the denoiser with perturbed attention; it is asked for with Guidance.pag only.
    Returns (B, C, h, w), or (B, 2C, h, w) with learned variances, which sampling ignores.
    """

    def __call__(self, latents: Tensor, timesteps: Tensor, captions: Captions, /) -> Tensor: ...


class Cancelled(Exception):
    """Sampling stopped because the caller's `cancel` returned True."""


@dataclass(frozen=True)
class Progress:
    """One finished step, for a callback.

    step: 1 to total. timestep: where the step started. latents: the state after it, in the
    scheduler's own scale. predicted: the clean latents that the denoiser's output implies.
    """

    step: int
    total: int
    timestep: float
    latents: Tensor
    predicted: Tensor


@dataclass(frozen=True, eq=False)
class Start:
    """A picture to begin with, in the place of pure noise (SDEdit, arXiv:2108.01073).

    latents: (B, C, h, w), clean, scaled as the VAE's. strength: above 0 and up to 1; of n steps the first
    round(n * (1 - strength)) are left out, and the latents with the noise of that level are where the
    others begin. 1 without a mask begins with pure noise and looks at no latents.
    redraw: (1 or B, 1, h, w) from 0 to 1. Where it is 0, every state is that of the latents with their
    noise, and the last one the latents to the bit; where it is 1, the picture is drawn; between, both are
    mixed after every step, and the more steps, the more is kept. What is drawn follows what is kept less
    than the data would have it: of two values correlated by a small r, the mean of one moves with the
    other by r / 3, with a stochastic scheduler by r / 2.
    coarse: above 1, the predicted clean latents have these latents' coarse part at every step, means over
    cells of so many a side (ILVR, arXiv:2108.02938, with a bilinear filter): only what is finer is drawn.
    """

    latents: Tensor
    strength: float = 1.0
    redraw: Tensor | None = None
    coarse: int = 1

    def check(self, noise: Tensor) -> None:
        """ValueError for what does not go with this noise."""
        images, _, height, width = noise.shape
        if self.latents.shape != noise.shape:
            raise ValueError(
                f"start.latents must have the shape of the noise, {tuple(noise.shape)}, "
                f"got {tuple(self.latents.shape)}"
            )
        if not 1 <= self.coarse <= min(height, width):
            raise ValueError(
                f"start.coarse must be from 1 to {min(height, width)}, got {self.coarse}"
            )
        if self.redraw is None:
            return
        if tuple(self.redraw.shape) not in {(count, 1, height, width) for count in (1, images)}:
            raise ValueError(
                f"start.redraw must have the shape (1 or {images}, 1, {height}, {width}), "
                f"got {tuple(self.redraw.shape)}"
            )
        if not self.redraw.is_meta and not ((self.redraw >= 0) & (self.redraw <= 1)).all():
            raise ValueError("start.redraw must be from 0 to 1, got other values")


def check_sampling(
    scheduler: Scheduler,
    steps: Steps | None,
    guidance: Guidance | float | None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    *,
    strength: float | None = None,
    is_masked: bool = False,
) -> None:
    """Raise the ValueError that `sample` would, before anything is computed for it. strength and
    is_masked: of its start, where there is one."""
    _guidance_of(guidance, guidance_interval, scheduler).check(scheduler)
    check_walk(scheduler, steps, None if strength == 1 and not is_masked else strength)


def _guidance_of(
    guidance: Guidance | float | None, interval: tuple[float, float], scheduler: Scheduler
) -> Guidance:
    if isinstance(guidance, Guidance):
        if interval != (0.0, 1.0):
            raise ValueError(f"guidance_interval must be within guidance, got {interval} beside it")
        return guidance
    return Guidance(default_guidance(scheduler) if guidance is None else guidance, interval)


def seed_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """Return one CPU generator per image: an image depends on its seed, not on batch or device."""
    generators = []
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
        generators.append(torch.Generator("cpu").manual_seed(seed))
    return generators


def initial_noise(
    shape: tuple[int, int, int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return (B, *shape) of unit normal float32 noise, image k from generators[k].

    Hand the same generators on to `sample`, whose stochastic schedulers continue their streams.
    """
    noise = torch.empty((len(generators), *shape), dtype=torch.float32, device="cpu")
    for image, generator in zip(noise, generators, strict=True):
        image.normal_(generator=generator)
    return noise.to(device)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    noise: Tensor,
    scheduler: Scheduler,
    steps: Steps | None = None,
    *,
    guidance: Guidance | float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    start: Start | None = None,
    batched: bool = True,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Tensor:
    """Return the latents (B, C, h, w), float32, that the scheduler reaches from unit normal noise.

    scheduler: copied, so one object may serve many calls. steps, guidance: None for its default. steps: how
    many, or the timesteps themselves, falling, for a scheduler that takes them.
    guidance: a number is the scale of `Guidance`, and guidance_interval its interval.
    start: a picture to begin with, all of it or in part.
    batched: c and u in one call of twice the batch, or in two calls that take half the memory.
    generators: one per image, for the noise that stochastic schedulers add; None for torch's own.
    cancel: asked before each call of the denoiser (`threading.Event().is_set` will do); when it
    returns True, `Cancelled` is raised.
    """
    wanted = _guidance_of(guidance, guidance_interval, scheduler)
    wanted.check(scheduler)
    if start is not None:
        start.check(noise)
        if start.strength == 1 and start.redraw is None and start.coarse == 1:
            start = None
    walk = Walk(scheduler, steps, None if start is None else start.strength)
    options = walk.step_options(len(noise), generators)
    guide = Guide(wanted, walk.scheduler, batched)
    noise = noise.float()
    # Euler counts in sigmas: its noise is not of unit size.
    latents = noise * walk.scheduler.init_noise_sigma
    keep = None if start is None else _Keep(start, noise)
    if keep is not None:
        latents = keep.first(latents, walk.evaluations[0])
    total = len(walk.evaluations)
    for number, at in enumerate(walk.evaluations):
        inputs = walk.scaled(latents, number)
        evaluate = _bind(denoise, inputs, at.timestep, cancel)
        output = guide(evaluate, inputs, float(at.timestep), at.share)
        if keep is not None:
            output = keep.coarse_part(output, inputs, walk.scheduler, float(at.timestep))
        latents = walk.step(output, latents, number, options)
        if keep is not None:
            latents = keep(latents, walk.evaluations[number + 1] if number + 1 < total else None)
            walk.amend(keep, number)
        if callback is not None:
            # From inputs, which have unit variance; latents are in the scheduler's own scale.
            predicted = predict_clean(walk.scheduler, inputs, output, float(at.timestep))
            predicted = predicted if keep is None else keep(predicted, None)
            callback(Progress(number + 1, total, float(at.timestep), latents, predicted))
    return latents


class _Keep:
    """Brings what a start keeps into the states of a walk, always with the same noise."""

    def __init__(self, start: Start, noise: Tensor) -> None:
        self._strength, self._noise, self._clean = start.strength, noise, start.latents.to(noise)
        self._redraw = None if start.redraw is None else start.redraw.to(noise)
        self._coarse = start.coarse

    def first(self, pure: Tensor, at: Evaluation) -> Tensor:
        """The state before the first evaluation, from the one that is pure noise."""
        return self(pure, at) if self._strength == 1 else at.noised(self._clean, self._noise)

    def __call__(self, latents: Tensor, at: Evaluation | None) -> Tensor:
        """The state before this evaluation, None for after the last: clean latents."""
        if self._redraw is None:
            return latents
        kept = self._clean if at is None else at.noised(self._clean, self._noise)
        return self._redraw * latents + (1 - self._redraw) * kept

    def coarse_part(
        self, output: Tensor, inputs: Tensor, scheduler: Scheduler, timestep: float
    ) -> Tensor:
        """A prediction whose clean latents have the coarse part that is kept."""
        slope = clean_per_output(scheduler, timestep)
        if self._coarse == 1 or slope == 0:
            return output
        missing = self._clean - predict_clean(scheduler, inputs, output, timestep)
        height, width = (max(side // self._coarse, 1) for side in missing.shape[2:])
        small = F.adaptive_avg_pool2d(missing, (height, width))
        return output + F.interpolate(small, missing.shape[2:], mode="bilinear") / slope


def _bind(
    denoise: Denoiser, inputs: Tensor, timestep: Tensor, cancel: Callable[[], bool] | None
) -> Callable[[Captions], Tensor]:
    """Return the evaluation of one step: captions -> prediction, float32, without variances."""

    def evaluate(captions: Captions) -> Tensor:
        if cancel is not None and cancel():
            raise Cancelled(f"cancelled at timestep {float(timestep):g}")
        latents = torch.cat([inputs, inputs]) if captions == "both" else inputs
        # Never in the dtype of the model: bfloat16 turns 999 into 1000.
        timesteps = torch.full_like(latents[:, 0, 0, 0], float(timestep))
        output = denoise(latents, timesteps, captions).float()
        channels = latents.shape[1]
        if output.shape not in (latents.shape, (len(latents), 2 * channels, *latents.shape[2:])):
            raise ValueError(
                f"denoise must return the shape {tuple(latents.shape)} or twice its channels, "
                f"got {tuple(output.shape)}"
            )
        return output[:, :channels]

    return evaluate
