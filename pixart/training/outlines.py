"""How exactly a model of drawn shapes places their outlines, which its loss hardly shows.

Nearly all of a drawn scene is flat. The loss is ruled by the few samples whose captions leave the most
open, and stays flat while outlines sharpen; the error of x_0 on outlines at little noise goes with how
clean the pictures are that are sampled in the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.diffusion import add_noise, predict_x0
from pixart.training.batch import TrainingSample

TIMESTEPS = (50, 100, 200)
BLOCK = 8  # pixels of a picture that one latent pixel stands for
CONTRAST = 0.1  # between two pixels of a block, in the units of [-1, 1], that an outline crosses


def outline_blocks(pictures: Tensor) -> Tensor:
    """Which blocks of pictures (B, 3, H, W) in [-1, 1] an outline crosses: (B, H / 8, W / 8)."""
    lightest, darkest = F.max_pool2d(pictures, BLOCK), -F.max_pool2d(-pictures, BLOCK)
    return (lightest - darkest).amax(dim=1) > CONTRAST


@torch.no_grad()
def outline_errors(
    denoise: Callable[[Tensor, Tensor], Tensor],
    part: TrainingSample,
    pictures: Sequence[Tensor],
    prediction: str,
) -> dict[int, float]:
    """The root mean square error of x_0 on the outlines of these pictures, in units of the latents, by
    timestep. denoise(x_t, timesteps): what the model predicts. part: the pictures' latents and noise."""
    blocks = outline_blocks(torch.cat(list(pictures))).to(part.latents.device)
    errors = {}
    for timestep in TIMESTEPS:
        at = replace(part, timesteps=torch.full_like(part.timesteps, timestep))
        x_t = add_noise(at.latents, at.noise, at.timesteps)
        predicted = denoise(x_t, at.timesteps).float()[:, : x_t.shape[1]]
        x_0 = predict_x0(predicted, x_t, at.timesteps, prediction)
        squared = (x_0 - at.latents).square().mean(dim=1)[blocks]
        errors[timestep] = float(squared.mean().sqrt())
    return errors
