"""What a model's prediction says about the clean picture."""

from torch import Tensor

from pixart.sampler.schedulers import Scheduler


def noise_level(scheduler: Scheduler, timestep: float) -> tuple[float, float]:
    """Return how much of the picture and of the noise is in what a denoiser is given: their squares
    add up to 1. A fractional timestep lies between two levels of the table."""
    below = int(timestep)
    levels = scheduler.alphas_cumprod[below : below + 2].double().tolist()
    level = levels[0] + (timestep - below) * (levels[-1] - levels[0])
    return level**0.5, (1 - level) ** 0.5


def predict_clean(scheduler: Scheduler, inputs: Tensor, output: Tensor, timestep: float) -> Tensor:
    """Return the clean latents that a prediction implies, from the denoiser's input and output."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    alpha, sigma = noise_level(scheduler, timestep)
    if kind == "epsilon":
        return (inputs - sigma * output) / alpha
    return alpha * inputs - sigma * output


def clean_per_output(scheduler: Scheduler, timestep: float) -> float:
    """Return by how much the clean latents of `predict_clean` move with the prediction."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return 1.0
    alpha, sigma = noise_level(scheduler, timestep)
    return -sigma / alpha if kind == "epsilon" else -sigma
