"""From noise to latents: schedulers, guidance and the denoising loop."""

from pixart.sampler.loop import (
    Cancelled,
    Captions,
    Denoiser,
    Progress,
    check_sampling,
    initial_noise,
    predict_clean,
    sample,
    seed_generators,
)
from pixart.sampler.schedulers import (
    PREDICTIONS,
    SCHEDULERS,
    Scheduler,
    Solver,
    default_guidance,
    default_steps,
    make_scheduler,
)

__all__ = [
    "Cancelled",
    "Captions",
    "Denoiser",
    "PREDICTIONS",
    "Progress",
    "SCHEDULERS",
    "Scheduler",
    "Solver",
    "check_sampling",
    "default_guidance",
    "default_steps",
    "initial_noise",
    "make_scheduler",
    "predict_clean",
    "sample",
    "seed_generators",
]
