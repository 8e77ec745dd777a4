"""What teaches a model to draw in a few steps: the losses, from tensors and timesteps alone.

Trajectory distribution matching (TDM, arXiv 2503.06674) needs captions and no pictures. The student walks
from noise along its own deterministic trajectory, x0 being what it predicts at a timestep t:

    x_s = √ᾱ_s x0 + √(1 - ᾱ_s) ε(x_t, x0)                        `ddim`, s the next timestep, or CLEAN
    x_τ = √(ᾱ_τ / ᾱ_s) x_s + √(1 - ᾱ_τ - (1 - ᾱ_s) ᾱ_τ / ᾱ_s) z  `noise_on`, s <= τ < t, z normal

A second model, the fake, learns what the student's pictures are: it denoises x_τ to x0 (`fake_loss`). The
teacher, which stays as it is, denoises x_τ to what they should be. The difference of both is the gradient
of the divergence between the two distributions at τ, and moves x0 (`matching_loss`). It vanishes where the
student's distribution is the teacher's; where single pictures lie does not matter, their distribution does.

Latent consistency (LCM, arXiv 2310.04378) needs pictures: noised to t, the student's prediction is to be
the one that it makes at s, a step of the teacher's guided DDIM further (`consistency`, `huber`).

Written from the papers. Latents are (B, C, h, w) fp32, timesteps (B,) integers, losses (B,) fp32.
"""

from functools import lru_cache

import torch
from torch import Tensor

from pixart.diffusion import NUM_TIMESTEPS, alphas_cumprod

CLEAN = -1  # the timestep after the last one: a picture without noise
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of LCM's boundary, as diffusers' scheduler has them
_TINY = 1e-6


def even_timesteps(steps: int) -> tuple[int, ...]:
    """So many, evenly from 999 down: 999, 749, 499, 249."""
    last = NUM_TIMESTEPS - 1
    return tuple(last - place * NUM_TIMESTEPS // steps for place in range(steps))


@lru_cache(maxsize=8)
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1 - ᾱ) by timestep; the last, which CLEAN names, are 1 and 0."""
    levels = torch.cat([alphas_cumprod(), torch.ones(1, dtype=torch.float64, device="cpu")])
    both = levels.sqrt(), (1 - levels).sqrt()
    return both[0].to(device, torch.float32), both[1].to(device, torch.float32)


def _at(timesteps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = (table[timesteps.to(x.device)] for table in _levels(x.device))
    shape = (-1, *[1] * (x.dim() - 1))
    return alpha.view(shape), sigma.view(shape)


def ddim(x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The state at s of the deterministic walk that is at x_t and predicts x0; s: below t, or CLEAN."""
    (alpha, sigma), (alpha_s, sigma_s) = _at(t, x_t), _at(s, x_t)
    return alpha_s * x0 + sigma_s * (x_t - alpha * x0) / sigma


def noise_on(x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The state at s noised further to t, at least s, by the forward process. s: a timestep, or CLEAN."""
    (alpha, sigma), (alpha_s, sigma_s) = _at(t, x_s), _at(s, x_s)
    ratio = alpha / alpha_s
    return ratio * x_s + (sigma.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt() * noise


# Trajectory distribution matching.


def between(s: Tensor, t: Tensor, uniform: Tensor) -> Tensor:
    """Timesteps from s (0 for CLEAN) to below t; uniform: (B,), integers from 0 to 999 that say where."""
    low = s.clamp(min=0)
    return low + uniform * (t - low) // NUM_TIMESTEPS


def fake_loss(
    predicted: Tensor, x0: Tensor, t: Tensor, *, prediction_type: str, min_snr: float | None
) -> Tensor:
    """The error of x0 as it is predicted at t, so weighted that it is that of what the model predicts, or
    min(SNR, min_snr) where that is given (arXiv 2303.09556)."""
    alpha, sigma = (one.flatten() for one in _at(t, x0))
    snr = (alpha / sigma).square()
    weight = snr if prediction_type == "epsilon" else snr + 1
    if min_snr is not None:
        weight = snr.clamp(max=min_snr)
    return weight * (predicted - x0.detach()).square().flatten(1).mean(1)


def matching_loss(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Half the squared distance of x0 to where the difference of teacher and fake moves it. Its gradient by x0
    is (fake - real) / mean |x0 - real|: differences at all noise levels weigh alike (DMD, arXiv 2311.18828).
    real, fake: x0 as they predict it; no gradient reaches them."""
    with torch.no_grad():
        size = (x0 - real).abs().flatten(1).mean(1).clamp(min=_TINY)
        step = (real - fake) / size.view(-1, *[1] * (x0.dim() - 1))
        target = x0 + step
    return 0.5 * (x0 - target).square().flatten(1).mean(1)


# Latent consistency.


def consistency(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The consistency function of a prediction of x0: c_skip x_t + c_out x0, which at t = 0 is x_t."""
    scaled = TIMESTEP_SCALING * t.to(x_t.device, torch.float32).view(-1, *[1] * (x_t.dim() - 1))
    square = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / square * x_t + scaled / square.sqrt() * x0


def grid_pair(uniform: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Neighbouring timesteps t > s of DDIM with so many steps, of 50: 19 and 0, 39 and 19 ... 999 and 979.
    uniform: (B,), integers from 0 to 999 that say which."""
    stride = NUM_TIMESTEPS // steps
    t = (uniform // stride).clamp(max=steps - 1) * stride + stride - 1
    return t, (t - stride).clamp(min=0)


def grid_timesteps(steps: int, grid: int) -> tuple[int, ...]:
    """As many of the grid's timesteps as evenly as may be, from 999 down: what diffusers' LCM scheduler
    takes. 4 of 50 are 999, 759, 499, 259."""
    stride = NUM_TIMESTEPS // grid
    return tuple((grid - place * grid // steps) * stride - 1 for place in range(steps))


def guided(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    """u + s (c - u), s being 1 for none. LCM's papers and code write c + w (c - u), whose w is s - 1."""
    return unconditional + guidance * (conditional - unconditional)


def huber(found: Tensor, target: Tensor, c: float) -> Tensor:
    """The pseudo-Huber distance, √(d² + c²) - c on average; no gradient reaches the target."""
    return ((found - target.detach()).square() + c**2).sqrt().sub(c).flatten(1).mean(1)
