"""Schedulers by name: diffusers' classes, and the single step of DMD."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pixart.libraries import importing
from pixart.sampler.multistep import DPMSolverMultistepScheduler
from pixart.sampler.numbers import check_numbers
from pixart.sampler.one_step import OneStep


class Scheduler(Protocol):
    """The part of a diffusers scheduler that the sampler uses."""

    config: Any
    timesteps: Tensor
    alphas_cumprod: Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...
    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> Any: ...


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler class and the options that make it the solver of this name."""

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)


_GENERAL = {
    "dpm-solver++": Solver("DPMSolverMultistepScheduler"),
    "sa-solver": Solver("SASolverScheduler"),
    # DDIM is DPM-Solver++ of order 1. diffusers' DDIMScheduler assumes that the number of steps
    # divides 1000: otherwise its steps fall short of the next timestep and noise remains. With given
    # timesteps it is what few-step models of TDM (arXiv:2503.06674) are drawn with: their last
    # prediction is the picture.
    "ddim": Solver("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "euler": Solver("EulerDiscreteScheduler"),
    "euler-a": Solver("EulerAncestralDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler"),
    "unipc": Solver("UniPCMultistepScheduler"),
}
# Noise levels spaced as in EDM (arXiv 2206.00364, equation 5), where the class has them.
_KARRAS = ("dpm-solver++", "sa-solver", "euler", "heun", "unipc")
SCHEDULERS = {
    **_GENERAL,
    **{
        f"{name}-karras": Solver(_GENERAL[name].class_name, {"use_karras_sigmas": True})
        for name in _KARRAS
    },
    "lcm": Solver("LCMScheduler"),  # of distilled models
    "dmd": Solver("OneStep"),
}
# Those of diffusers that a pipeline may have of its own: made for a model that predicts the noise of
# DDPM, and drawing all their random numbers from the caller's generators. Others are for flow matching,
# EDM's preconditioning, discrete tokens, or walk from the picture to the noise.
OWN = (
    "DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
    "SASolverScheduler", "LCMScheduler", "PNDMScheduler", "DDPMScheduler", "TCDScheduler",
    "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "UnCLIPScheduler",
    "DDIMParallelScheduler", "DDPMParallelScheduler", "CogVideoXDDIMScheduler",
)  # fmt: skip
# Facts of a model's training, which no sampler may choose.
_TRAINING = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_DISTILLATION = ("original_inference_steps", "timestep_scaling")  # of consistency models
STEPS, GUIDANCE = 20, 4.5  # what PixArt is drawn with where nothing says otherwise
_DEFAULTS = {  # steps, guidance
    "SASolverScheduler": (25, GUIDANCE),
    "LCMScheduler": (4, 1.0),
    "OneStep": (1, 1.0),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def make_scheduler(name: str | None = None, config: Mapping[str, Any] | None = None) -> Scheduler:
    """Return a scheduler by name for a model whose pipeline has this scheduler_config.json.

    name: one of SCHEDULERS; None for the pipeline's own scheduler as it is or, without one,
    DPM-Solver++. With a name only the training facts are taken from the config (betas, prediction
    type, the steps of a distilled model): how another solver was tuned does not carry over.
    """
    if name is not None and name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    facts = dict(config or {})
    check_numbers(facts)
    if "_class_name" in facts:
        # Through its class: what the file leaves out has the defaults of that class, not of
        # another.
        own = _make_own(facts)
        if name is None:
            return _check(own)
        facts = dict(own.config)
    return _check(_build(SCHEDULERS[name or "dpm-solver++"], facts))


def _make_own(facts: Mapping[str, Any]) -> Any:
    class_name = facts["_class_name"]
    if class_name not in OWN:
        # The name first: callers cut long lines.
        raise ValueError(
            f"the pipeline's own {str(class_name):.60} is not supported; _class_name must be one of "
            f"{', '.join(OWN)}"
        )
    try:
        return _class_named(class_name, facts).from_config(facts)
    except Exception as error:  # what diffusers raises over a configuration has no common kind
        raise ValueError(
            f"{class_name} cannot be made of this configuration ({' '.join(str(error).split())})"
        ) from error


def _class_named(class_name: str, options: Mapping[str, Any]) -> Any:
    """The class for these options: ours where it can, as diffusers' takes seconds to import."""
    ours = DPMSolverMultistepScheduler
    if class_name == ours.__name__ and ours.takes(options):
        return ours
    return of_diffusers(class_name)


def of_diffusers(class_name: str) -> Any:
    """diffusers' class."""
    with importing():
        from diffusers import schedulers

    return getattr(schedulers, class_name)


def options_of(kind: Any) -> Collection[str]:
    """The names of what a class of schedulers is configured by."""
    if kind is DPMSolverMultistepScheduler:
        return kind.OPTIONS
    return inspect.signature(kind.__init__).parameters


def _build(solver: Solver, facts: Mapping[str, Any]) -> Scheduler:
    training = {key: facts.get(key, default) for key, default in _TRAINING.items()}
    scheduler_class: Any = OneStep
    if solver.class_name != OneStep.__name__:
        scheduler_class = _class_named(solver.class_name, {**training, **solver.options})
    accepted = options_of(scheduler_class)
    refused = [key for key, value in training.items() if value and key not in accepted]
    if refused:
        raise ValueError(
            f"scheduler must support the model's {refused[0]}={training[refused[0]]}, "
            f"got {solver.class_name}; leave the scheduler out to use the pipeline's own"
        )
    distillation = {key: facts[key] for key in _DISTILLATION if key in facts}
    options = {**training, **distillation, **solver.options}
    return scheduler_class(**{key: value for key, value in options.items() if key in accepted})


def _check(scheduler: Scheduler) -> Scheduler:
    kind = scheduler.config.prediction_type
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {kind!r}")
    levels = scheduler.alphas_cumprod
    # Under rescale_betas_zero_snr the last level is nothing but noise on purpose.
    seen = levels[:-1] if scheduler.config.get("rescale_betas_zero_snr") else levels
    if not (torch.isfinite(levels).all() and (seen > 0).all() and (levels <= 1).all()):
        raise ValueError(
            "beta_start, beta_end and trained_betas must leave something of the picture at every "
            f"timestep, got {scheduler.config.get('beta_start')} to "
            f"{scheduler.config.get('beta_end')} in {scheduler.config.num_train_timesteps} steps"
        )
    return scheduler


# They add noise at every step: what was computed before it says little of what comes after.
_STOCHASTIC = (
    "SASolverScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "OneStep", "DDPMScheduler",
    "DDPMParallelScheduler", "TCDScheduler", "KDPM2AncestralDiscreteScheduler", "UnCLIPScheduler",
)  # fmt: skip


def adds_noise(scheduler: Scheduler) -> bool:
    """Whether its steps draw random numbers."""
    algorithm = str(scheduler.config.get("algorithm_type") or "")
    return type(scheduler).__name__ in _STOCHASTIC or algorithm.startswith("sde-")


# With noise levels of their own diffusers' schedulers refuse timesteps.
_OWN_LEVELS = (
    "use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas",
)  # fmt: skip


def takes_timesteps(scheduler: Scheduler, timesteps: Sequence[int]) -> bool:
    """Whether the walk of this scheduler may be given timestep by timestep, and these ones."""
    if isinstance(scheduler, OneStep):
        return len(timesteps) == 1
    taken = inspect.signature(scheduler.set_timesteps).parameters
    return "timesteps" in taken and not any(scheduler.config.get(name) for name in _OWN_LEVELS)


def default_steps(scheduler: Scheduler) -> int:
    """Return 20, or what this solver or distilled model is published with."""
    return _DEFAULTS.get(type(scheduler).__name__, (STEPS, GUIDANCE))[0]


def default_guidance(scheduler: Scheduler) -> float:
    """Return 4.5, or 1 (no guidance) for distilled models, which have it inside."""
    return _DEFAULTS.get(type(scheduler).__name__, (STEPS, GUIDANCE))[1]
