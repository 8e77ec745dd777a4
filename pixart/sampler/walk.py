"""How a scheduler walks from noise to a picture: the whole way, or from a step on."""

import copy
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pixart.few_step import TAKE_TIMESTEPS, check_timesteps, spelt
from pixart.sampler.schedulers import Scheduler, default_steps, takes_timesteps

Steps = int | Sequence[int]  # how many, or the timesteps themselves


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser. timestep: as the scheduler takes it. share: how much of the whole
    trajectory lies before it. picture, noise: what the state before it has of either, in the scheduler's
    own scale, in which Euler's noise is not of unit size."""

    timestep: Tensor
    share: float
    picture: float
    noise: float

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The state that these clean latents have here, with unit normal noise."""
        return self.picture * clean + self.noise * noise


class Walk:
    """A copy of a scheduler, set to its steps, and the evaluations in which it makes them.

    steps: how many, or the timesteps themselves; None for as many as is usual. strength: of n steps the
    first round(n * (1 - strength)) are left out, of given timesteps those above 1000 * strength; None is the
    walk from pure noise as diffusers' pipelines have it. ValueError for steps that the scheduler cannot make,
    and for a strength that leaves none.
    """

    def __init__(
        self, scheduler: Scheduler, steps: Steps | None, strength: float | None = None
    ) -> None:
        self.scheduler: Any = copy.deepcopy(scheduler)
        self.given = tuple(steps) if isinstance(steps, list | tuple) else None
        wanted: Any = default_steps(scheduler) if steps is None else self.given or steps
        timesteps = _set_timesteps(self.scheduler, wanted)
        self.steps: int = wanted if self.given is None else len(self.given)
        self._is_begun = strength is not None
        self.first = 0
        if strength is not None and self.given is None:
            self.first = _first_step(self.scheduler, strength)
        elif strength is not None and self.given is not None:
            self.first = _first_given(self.scheduler, self.given, strength)
        if self.first and _is_pndm(scheduler):
            self.evaluations = _begin_pndm(self.scheduler, self.first)
        else:
            skipped = self.first * _evaluations_per_step(scheduler)
            if skipped and hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(skipped)  # others go by the timestep alone
            self.evaluations = [
                Evaluation(at, index / len(timesteps), *_scales(self.scheduler, index, at))
                for index, at in enumerate(timesteps)
            ][skipped:]

    def step_options(
        self, images: int, generators: Sequence[torch.Generator] | None
    ) -> dict[str, Any]:
        """What `step` hands on to the scheduler at every step."""
        taken = inspect.signature(self.scheduler.step).parameters
        # As diffusers' pipelines do: TCD's own default would add noise at every step.
        options: dict[str, Any] = {"eta": 0.0} if "eta" in taken else {}
        if generators is None:
            return options
        if len(generators) != images:
            raise ValueError(
                f"generators must be one per image, got {len(generators)} for {images} images"
            )
        # UniPC draws nothing and takes none.
        return options | ({"generator": list(generators)} if "generator" in taken else {})

    def scaled(self, latents: Tensor, number: int) -> Tensor:
        """What the denoiser is given at this evaluation: the latents in unit variance."""
        return self.scheduler.scale_model_input(latents, self.evaluations[number].timestep)

    def step(
        self, output: Tensor, latents: Tensor, number: int, options: Mapping[str, Any]
    ) -> Tensor:
        """The state after an evaluation. All of them must be made, in their order."""
        if self._is_begun:
            options = {**options, **self._begun_options(number)}
        timestep = self.evaluations[number].timestep
        return self.scheduler.step(output, timestep, latents, return_dict=False, **options)[0]

    def amend(self, change: Callable[[Tensor, Evaluation], Tensor], number: int) -> None:
        """Change the state before an evaluation that was made, where the scheduler goes back to it: the
        correctors of UniPC and SA-Solver step from it a second time, not from what they are given."""
        last = getattr(self.scheduler, "last_sample", None)
        if last is not None:
            self.scheduler.last_sample = change(last, self.evaluations[number])

    def _begun_options(self, number: int) -> dict[str, Any]:
        name = type(self.scheduler).__name__
        # LMS takes the steps before its first one for made.
        if name == "LMSDiscreteScheduler":
            return {"order": min(number + 1, 4)}
        # UnCLIP would take a step of 1 / num_train_timesteps: the state would be where no level says.
        if name == "UnCLIPScheduler" and number + 1 < len(self.evaluations):
            return {"prev_timestep": self.evaluations[number + 1].timestep}
        return {}


def check_walk(scheduler: Scheduler, steps: Steps | None, strength: float | None = None) -> None:
    """ValueError for a walk that does not come to its end."""
    walk = Walk(scheduler, steps, strength)
    name = type(scheduler).__name__
    key = _Key(name, repr(scheduler.config), walk.given or walk.steps, strength, walk)
    if fault := _fault(key):
        begun = "" if strength is None else f" from strength {strength:g} on"
        raise ValueError(
            f"{name} cannot draw in {walk.steps} steps{begun} as it is configured ({fault}); "
            "take another number of steps or name another scheduler"
        )


def timesteps_within(
    scheduler: Scheduler, steps: Steps | None, interval: tuple[float, float]
) -> tuple[float, float]:
    """Return (high, low): the denoiser is called within this part of the trajectory, as
    `Guidance.interval` counts it, iff high >= timestep >= low. Of calls that share a timestep, as the
    two halves of Heun's steps, the first one decides. An interval that holds no call gives (-1, 0).
    """
    start, end = interval
    shares: dict[float, float] = {}
    for each in Walk(scheduler, steps).evaluations:
        # In float32, as the denoiser is given it.
        shares.setdefault(each.timestep.to(torch.float32).item(), each.share)
    within = [timestep for timestep, share in shares.items() if start <= share < end]
    return (max(within), min(within)) if within else (-1.0, 0.0)


@dataclass(frozen=True)
class _Key:
    """A walk. Two of one class, configuration and strength are alike."""

    class_name: str
    facts: str
    steps: int | tuple[int, ...]
    strength: float | None
    walk: Walk = field(compare=False)


@lru_cache(maxsize=64)
def _fault(key: _Key) -> str | None:
    """Why a small picture does not come to its end: some configurations fail at their last step only."""
    walk, latents = key.walk, torch.linspace(-1, 1, 16).reshape(1, 4, 2, 2)
    if key.strength is None:
        latents = latents * walk.scheduler.init_noise_sigma
    else:
        latents = walk.evaluations[0].noised(latents, latents)
    options = walk.step_options(1, [torch.Generator("cpu").manual_seed(0)])
    try:
        for number in range(len(walk.evaluations)):
            # Not all of it is noise: where nothing of a picture is left, 0 / 0 would hide what is clipped.
            output = walk.scaled(latents, number) / 2
            latents = walk.step(output, latents, number, options)
    except Exception as error:  # what diffusers raises over a configuration has no common kind
        return _one_line(error)
    return None if bool(latents.isfinite().all()) else "it comes to NaN or infinity"


def _evaluations_per_step(scheduler: Scheduler) -> int:
    return int(getattr(scheduler, "order", 1))


def _is_pndm(scheduler: Scheduler) -> bool:
    return hasattr(scheduler, "pndm_order")


def _steps_of(scheduler: Any) -> int:
    """Steps of the whole walk; the last one of second order has a single evaluation."""
    if _is_pndm(scheduler):
        return len(scheduler._timesteps)
    return -(-len(scheduler.timesteps) // _evaluations_per_step(scheduler))


def _first_step(scheduler: Scheduler, strength: float) -> int:
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    steps = _steps_of(scheduler)
    first = round(steps * (1 - strength))
    if first == steps:
        enough = math.floor(0.5 / strength) + 1
        or_more = f", or {enough} steps" if enough <= _most_steps(scheduler) else ""
        raise ValueError(
            f"strength must be above {0.5 / steps:g} to leave one of {steps} steps, got {strength:g}; "
            f"take more strength{or_more}"
        )
    return first


def _first_given(scheduler: Scheduler, timesteps: tuple[int, ...], strength: float) -> int:
    """The first one at which the noise is no more than the strength asks for: what is begun with has the
    level of noise that the model is to be evaluated at."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    count = scheduler.config.num_train_timesteps
    first = sum(timestep > strength * count + 1e-6 for timestep in timesteps)
    if first == len(timesteps):
        raise ValueError(
            f"strength must be at least {timesteps[-1] / count:g} to leave one of timesteps "
            f"{spelt(timesteps)}, got {strength:g}; take more strength, or lower timesteps"
        )
    return first


def _begin_pndm(scheduler: Any, first: int) -> list[Evaluation]:
    """PNDM from a later step on. It counts its evaluations and takes the timesteps of its first ones
    from a table, so the walk is made anew, with the linear multistep method from the start: the steps
    that are left need not be as many as its Runge-Kutta steps are."""
    scheduler.register_to_config(skip_prk_steps=True)
    scheduler.prk_timesteps = []
    left = torch.as_tensor(scheduler._timesteps.astype("int64")).flip(0)[first:]
    timesteps = torch.cat([left[:2], left[1:]])  # the second one is evaluated twice
    steps = first + len(left)
    return [
        Evaluation(
            at,
            (first + len(left) * index / len(timesteps)) / steps,
            *_scales(scheduler, index, at),
        )
        for index, at in enumerate(timesteps)
    ]


def _scales(scheduler: Any, index: int, timestep: Tensor) -> tuple[float, float]:
    """How much of the picture and of the noise is in the state before an evaluation."""
    if not hasattr(scheduler, "sigmas"):
        level = scheduler.alphas_cumprod[int(timestep)].item()
        return level**0.5, (1 - level) ** 0.5
    sigma = scheduler.sigmas[index].double()
    if index % 2 and hasattr(scheduler, "sigmas_interpol"):
        # Half a step of KDPM2; its ancestral sibling has this table shifted by one.
        is_shifted = type(scheduler).__name__ == "KDPM2AncestralDiscreteScheduler"
        sigma = scheduler.sigmas_interpol[index - is_shifted].double()
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # these keep the latents in unit variance
        picture, noise = scheduler._sigma_to_alpha_sigma_t(sigma)
        return float(picture), float(noise)
    return 1.0, float(sigma)


def _set_timesteps(scheduler: Any, steps: int | tuple[int, ...]) -> Tensor:
    """Set and return the timesteps, on the CPU: schedulers index their tables by them."""
    if isinstance(steps, tuple):
        return _set_given(scheduler, steps)
    limit = _most_steps(scheduler)
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


def _set_given(scheduler: Any, timesteps: tuple[int, ...]) -> Tensor:
    check_timesteps("timesteps", timesteps)
    name = type(scheduler).__name__
    if not takes_timesteps(scheduler, timesteps):
        if takes_timesteps(scheduler, timesteps[:1]):
            raise ValueError(
                f"timesteps must be one number for dmd, which makes one step, got {spelt(timesteps)}; name "
                "ddim or lcm for several"
            )
        takers = ", ".join(one for one in TAKE_TIMESTEPS if one != "dmd")
        raise ValueError(
            f"timesteps must be left out for {name} as it is configured, which chooses them itself, got "
            f"{spelt(timesteps)}; give steps, or one of the schedulers {takers}"
        )
    if timesteps[0] >= scheduler.config.num_train_timesteps:
        raise ValueError(
            f"timesteps must be from 0 to {scheduler.config.num_train_timesteps - 1} for this model, got "
            f"{timesteps[0]}"
        )
    # LCM's warns of any that are not among those it was distilled with by default; who gives them knows.
    log = logging.getLogger(type(scheduler).__module__)
    was_disabled, log.disabled = log.disabled, True
    try:
        scheduler.set_timesteps(timesteps=list(timesteps))
    except Exception as error:  # what diffusers raises over a configuration has no common kind
        raise ValueError(
            f"timesteps must be such as {name} can make as it is configured, got {spelt(timesteps)} "
            f"({_one_line(error)})"
        ) from error
    finally:
        log.disabled = was_disabled
    _check_levels(scheduler, scheduler.timesteps, len(timesteps))
    return scheduler.timesteps


def _most_steps(scheduler: Scheduler) -> int:
    training_steps: int = scheduler.config.num_train_timesteps
    return min(training_steps, scheduler.config.get("original_inference_steps", training_steps))


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
    repeats = _evaluations_per_step(scheduler) > 1 or _is_pndm(scheduler)
    if not repeats and len(set(levels)) < len(levels):
        raise ValueError(
            f"steps must be fewer for this scheduler, got {steps}: two fall on one timestep"
        )


def _sigmas(scheduler: Scheduler) -> Tensor:
    return getattr(scheduler, "sigmas", scheduler.timesteps)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
