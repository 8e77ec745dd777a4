"""From noise to latents: schedulers, guidance and the denoising loop."""

from pixart.sampler.guidance import APG, Captions, Guidance
from pixart.sampler.loop import (
    Cancelled,
    Denoiser,
    Progress,
    Start,
    check_sampling,
    initial_noise,
    sample,
    seed_generators,
)
from pixart.sampler.prediction import predict_clean
from pixart.sampler.schedulers import (
    PREDICTIONS,
    SCHEDULERS,
    Scheduler,
    Solver,
    default_guidance,
    default_steps,
    make_scheduler,
)
from pixart.sampler.walk import timesteps_within
from pixart.sampler.windows import Windows

__all__ = [
    "APG",
    "Cancelled",
    "Captions",
    "Denoiser",
    "Guidance",
    "PREDICTIONS",
    "Progress",
    "SCHEDULERS",
    "Scheduler",
    "Solver",
    "Start",
    "Windows",
    "check_sampling",
    "default_guidance",
    "default_steps",
    "initial_noise",
    "make_scheduler",
    "predict_clean",
    "sample",
    "seed_generators",
    "timesteps_within",
]
