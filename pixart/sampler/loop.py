"""Sampling: guidance and the loop over a diffusers scheduler.

The sampler knows no model and no captions: it calls a `Denoiser`. Latents are float32 and timesteps
float32, fractions included, whatever the dtype inside the denoiser. diffusers is imported on use.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pixart.sampler.schedulers import Scheduler, default_guidance, default_steps

Captions = Literal["both", "conditional", "unconditional"]


class Denoiser(Protocol):
    """What the sampler calls: (latents, timesteps, captions) -> prediction.

    latents: (B, C, h, w) float32. timesteps: (B,) float32. captions says which captions belong to
    the batch: the prompts, the negative prompts, or "both", when the batch is twice as large, its
    first half for the negative prompts and its second for the prompts.
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


def check_sampling(
    scheduler: Scheduler,
    steps: int | None,
    guidance: float | None,
    guidance_interval: tuple[float, float],
) -> None:
    """Raise the ValueError that `sample` would, before anything is computed for it."""
    _check_guidance(
        default_guidance(scheduler) if guidance is None else guidance, guidance_interval
    )
    scheduler = copy.deepcopy(scheduler)
    steps = default_steps(scheduler) if steps is None else steps
    timesteps = _set_timesteps(scheduler, steps)
    walk = _Walk(type(scheduler).__name__, repr(scheduler.config), steps, scheduler, timesteps)
    if fault := _fault(walk):
        raise ValueError(
            f"{type(scheduler).__name__} cannot draw in {steps} steps as it is configured ({fault}); "
            "take another number of steps or name another scheduler"
        )


@dataclass(frozen=True)
class _Walk:
    """A scheduler, set to its steps. Two of one class and configuration are alike."""

    class_name: str
    facts: str
    steps: int
    scheduler: Scheduler = field(compare=False)
    timesteps: Tensor = field(compare=False)


@lru_cache(maxsize=64)
def _fault(walk: _Walk) -> str | None:
    """Why a small picture does not come to its end: some configurations fail at their last step only."""
    scheduler, latents = walk.scheduler, torch.linspace(-1, 1, 16).reshape(1, 4, 2, 2)
    latents = latents * scheduler.init_noise_sigma
    options = _step_options(scheduler, latents, seed_generators([0]))
    try:
        for timestep in walk.timesteps:
            inputs = scheduler.scale_model_input(latents, timestep)
            # Not all of it is noise: where nothing of a picture is left, 0 / 0 would hide what is clipped.
            output = inputs / 2
            latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
    except Exception as error:  # what diffusers raises over a configuration has no common kind
        return _one_line(error)
    return None if bool(latents.isfinite().all()) else "it comes to NaN or infinity"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


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
    steps: int | None = None,
    *,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    batched: bool = True,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callable[[Progress], object] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Tensor:
    """Return the latents (B, C, h, w), float32, that the scheduler reaches from unit normal noise.

    scheduler: copied, so one object may serve many calls. steps, guidance: None for its default.
    guidance: u + guidance·(c - u) from the conditional c and the unconditional u; at most 1 means
    c alone. guidance_interval: the part of the trajectory that is guided, from 0 (noise) to 1
    (image); outside it only c is evaluated.
    batched: c and u in one call of twice the batch, or in two calls that take half the memory.
    generators: one per image, for the noise that stochastic schedulers add; None for torch's own.
    cancel: asked before each call of the denoiser (`threading.Event().is_set` will do); when it
    returns True, `Cancelled` is raised.
    """
    scheduler = copy.deepcopy(scheduler)
    guidance = default_guidance(scheduler) if guidance is None else guidance
    _check_guidance(guidance, guidance_interval)
    timesteps = _set_timesteps(scheduler, default_steps(scheduler) if steps is None else steps)
    step_options = _step_options(scheduler, noise, generators)
    # Euler counts in sigmas: its noise is not of unit size.
    latents = noise.float() * scheduler.init_noise_sigma
    for index, timestep in enumerate(timesteps):
        inputs = scheduler.scale_model_input(latents, timestep)
        evaluate = _bind(denoise, inputs, timestep, cancel)
        start, end = guidance_interval
        is_guided = guidance > 1 and start <= index / len(timesteps) < end
        output = _guide(evaluate, guidance, batched) if is_guided else evaluate("conditional")
        latents = scheduler.step(output, timestep, latents, return_dict=False, **step_options)[0]
        if callback is not None:
            # From inputs, which have unit variance; latents are in the scheduler's own scale.
            predicted = predict_clean(scheduler, inputs, output, float(timestep))
            callback(Progress(index + 1, len(timesteps), float(timestep), latents, predicted))
    return latents


def _check_guidance(guidance: float, interval: tuple[float, float]) -> None:
    if not math.isfinite(guidance) or guidance < 0:
        raise ValueError(f"guidance must be a finite number from 0 up, got {guidance}")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval must be 0 <= start <= end <= 1, got {interval}")


def _set_timesteps(scheduler: Scheduler, steps: int) -> Tensor:
    """Set and return the timesteps, on the CPU: schedulers index their tables by them."""
    training_steps = scheduler.config.num_train_timesteps
    limit = min(training_steps, scheduler.config.get("original_inference_steps", training_steps))
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= limit:
        raise ValueError(f"steps must be an integer from 1 to {limit}, got {steps!r}")
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:  # what diffusers raises over a configuration has no common kind
        raise ValueError(
            f"steps must be a number that {type(scheduler).__name__} can make as it is configured, "
            f"got {steps} ({_one_line(error)})"
        ) from error
    timesteps = scheduler.timesteps
    if timesteps[0] == 0:  # diffusers' Euler would walk its single step from the clean end
        raise ValueError(f"steps must be at least 2 for this scheduler, got {steps}")
    _check_levels(scheduler, timesteps, steps)
    return timesteps


def _check_levels(scheduler: Scheduler, timesteps: Tensor, steps: int) -> None:
    sigmas = _sigmas(scheduler)
    if not (torch.isfinite(timesteps).all() and torch.isfinite(sigmas).all()):
        raise ValueError(
            f"{type(scheduler).__name__} must have finite noise levels, got others at {steps} steps; "
            "its configuration is damaged"
        )
    last = scheduler.config.num_train_timesteps - 1
    if not (timesteps.min() >= 0 and timesteps.max() <= last):
        raise ValueError(
            f"{type(scheduler).__name__} must walk timesteps from 0 to {last}, got "
            f"{timesteps.max():g} to {timesteps.min():g} at {steps} steps; take fewer, or a smaller "
            "steps_offset"
        )
    levels = list(zip(timesteps.tolist(), sigmas.tolist(), strict=False))
    # Rounding can give two steps the same noise level, between which multistep solvers divide by 0.
    # PNDM evaluates one twice on purpose.
    repeats = getattr(scheduler, "order", 1) > 1 or hasattr(scheduler, "pndm_order")
    if not repeats and len(set(levels)) < len(levels):
        raise ValueError(
            f"steps must be fewer for this scheduler, got {steps}: two fall on one timestep"
        )


def _sigmas(scheduler: Scheduler) -> Tensor:
    return getattr(scheduler, "sigmas", scheduler.timesteps)


def _step_options(
    scheduler: Scheduler, noise: Tensor, generators: Sequence[torch.Generator] | None
) -> dict[str, Any]:
    taken = inspect.signature(scheduler.step).parameters
    # As diffusers' pipelines do: TCD's own default would add noise at every step.
    options: dict[str, Any] = {"eta": 0.0} if "eta" in taken else {}
    if generators is None:
        return options
    if len(generators) != len(noise):
        raise ValueError(
            f"generators must be one per image, got {len(generators)} for {len(noise)} images"
        )
    # UniPC draws nothing and takes none.
    return options | ({"generator": list(generators)} if "generator" in taken else {})


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


def _guide(evaluate: Callable[[Captions], Tensor], guidance: float, batched: bool) -> Tensor:
    if batched:
        unconditional, conditional = evaluate("both").chunk(2)
    else:
        unconditional, conditional = evaluate("unconditional"), evaluate("conditional")
    return unconditional + guidance * (conditional - unconditional)


def predict_clean(scheduler: Scheduler, inputs: Tensor, output: Tensor, timestep: float) -> Tensor:
    """Return the clean latents that a prediction implies, from the denoiser's input and output."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    below = int(timestep)
    # A fractional timestep lies between two levels of the table.
    levels = scheduler.alphas_cumprod[below : below + 2].double().tolist()
    level = levels[0] + (timestep - below) * (levels[-1] - levels[0])
    alpha, sigma = level**0.5, (1 - level) ** 0.5
    if kind == "epsilon":
        return (inputs - sigma * output) / alpha
    return alpha * inputs - sigma * output
