"""From noise to latents: schedulers, guidance and the denoising loop."""

from pixart.sampler.loop import (
    PREDICTIONS,
    SCHEDULERS,
    Cancelled,
    Captions,
    Denoiser,
    Progress,
    Scheduler,
    Solver,
    check_sampling,
    default_guidance,
    default_steps,
    initial_noise,
    make_scheduler,
    predict_clean,
    sample,
    seed_generators,
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
