"""The noising process and the training loss of PixArt (improved DDPM): 1000 steps, linear betas.

    x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε        loss = mean (ε - ε̂)² + vb

vb trains the learned variance: the KL divergence in bits per dimension between the true and the
predicted step from t to t-1, at t = 0 the likelihood of x_0 in bins of width 2/255. It sees the
prediction of the mean detached, and is not scaled down. Sources: DDPM (arXiv 2006.11239), improved
DDPM (arXiv 2102.09672).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 2e-2


class LossTerms(NamedTuple):
    """Per sample, (B,) fp32: loss = mse + vb."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


class Schedule(NamedTuple):
    """What depends on the timestep alone, (1000,) each."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_mean_x0: Tensor  # q(x_{t-1} | x_t, x_0) has mean posterior_mean_x0 x_0 + ..._xt x_t
    posterior_mean_xt: Tensor
    posterior_log_variance: Tensor
    log_betas: Tensor


@lru_cache(maxsize=8)
def _schedule(device: torch.device) -> Schedule:
    # fp64 until the tables are final, then fp32 as in the published code.
    betas = _betas()
    alphas = 1 - betas
    cumulative = alphas.cumprod(0)
    previous = torch.cat([torch.ones_like(cumulative[:1]), cumulative[:-1]])
    variance = betas * (1 - previous) / (1 - cumulative)
    variance[0] = variance[1]  # the true step from 0 has no variance and no logarithm
    tables = Schedule(
        sqrt_alphas_cumprod=cumulative.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1 - cumulative).sqrt(),
        posterior_mean_x0=betas * previous.sqrt() / (1 - cumulative),
        posterior_mean_xt=(1 - previous) * alphas.sqrt() / (1 - cumulative),
        posterior_log_variance=variance.log(),
        log_betas=betas.log(),
    )
    return Schedule(*(table.to(device, torch.float32) for table in tables))


def alphas_cumprod() -> Tensor:
    """ᾱ_t, (1000,) fp64."""
    return (1 - _betas()).cumprod(0)


def _betas() -> Tensor:
    # On the CPU whatever the default device: not every one has fp64.
    return torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64, device="cpu")


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t: the latents x0 (B, C, h, w) at timesteps (B,), integers from 0 (little noise) to 999."""
    schedule = _at(timesteps, x0)
    return schedule.sqrt_alphas_cumprod * x0 + schedule.sqrt_one_minus_alphas_cumprod * noise


def velocity(x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """v = √ᾱ ε - √(1 - ᾱ) x_0 (arXiv 2202.00512), the target of prediction_type "v_prediction"."""
    schedule = _at(timesteps, x0)
    return schedule.sqrt_alphas_cumprod * noise - schedule.sqrt_one_minus_alphas_cumprod * x0


def training_loss(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    *,
    prediction_type: str = "epsilon",
    min_snr: float | None = None,
) -> LossTerms:
    """The loss of each sample at given timesteps (B,) and noise; x0, noise: (B, C, h, w).

    denoise(x_t, timesteps) returns (B, C, h, w), or (B, 2C, h, w) with a learned variance; without
    one vb is zero. prediction_type: "epsilon", or "v_prediction" to regress the velocity instead.
    min_snr: weights the squared error so that errors of x_0 count min(SNR, min_snr) (arXiv
    2303.09556); None is the published loss. mse is without the weight.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f'prediction_type must be "epsilon" or "v_prediction", got {prediction_type!r}'
        )
    x0, noise = x0.float(), noise.float()
    x_t = add_noise(x0, noise, timesteps)
    output = denoise(x_t, timesteps).float()
    channels = x0.shape[1]
    if output.shape not in (x0.shape, (x0.shape[0], 2 * channels, *x0.shape[2:])):
        raise ValueError(
            f"denoise must return {channels} or {2 * channels} channels, got {tuple(output.shape)}"
        )
    predicted, variance = output[:, :channels], output[:, channels:]
    target = noise if prediction_type == "epsilon" else velocity(x0, noise, timesteps)
    mse = _mean((predicted - target).square())
    weighted = (
        mse if min_snr is None else mse * _snr_weight(timesteps, x0, prediction_type, min_snr)
    )
    if variance.shape[1] == 0:
        return LossTerms(weighted, mse, torch.zeros_like(mse))
    schedule = _at(timesteps, x0)
    predicted_x0 = predict_x0(predicted.detach(), x_t, timesteps, prediction_type)
    vb = _variational_bound(x0, x_t, predicted_x0, variance, timesteps, schedule)
    return LossTerms(weighted + vb, mse, vb)


def _snr_weight(timesteps: Tensor, x0: Tensor, prediction_type: str, limit: float) -> Tensor:
    schedule = _at(timesteps, x0)
    ratio = schedule.sqrt_alphas_cumprod / schedule.sqrt_one_minus_alphas_cumprod
    snr = ratio.flatten().square()
    # An error of the noise is one of x_0 divided by SNR, of the velocity divided by SNR + 1.
    return snr.clamp(max=limit) / (snr if prediction_type == "epsilon" else snr + 1)


def _at(timesteps: Tensor, x: Tensor) -> Schedule:
    """The tables at each sample's timestep, shaped to broadcast over x."""
    if timesteps.shape != x.shape[:1] or timesteps.is_floating_point():
        raise ValueError(
            f"timesteps must be {x.shape[0]} integers, "
            f"got {tuple(timesteps.shape)} of {timesteps.dtype}"
        )
    index = timesteps.long().to(x.device)
    shape = (-1, *[1] * (x.dim() - 1))
    return Schedule(*(table[index].view(shape) for table in _schedule(x.device)))


def predict_x0(predicted: Tensor, x_t: Tensor, timesteps: Tensor, prediction_type: str) -> Tensor:
    """What x_0 (B, C, h, w) is by a prediction of the noise ("epsilon") or of the velocity
    ("v_prediction") at timesteps (B,)."""
    schedule = _at(timesteps, x_t)
    alpha, sigma = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * predicted
    return (x_t - sigma * predicted) / alpha


def _variational_bound(
    x0: Tensor,
    x_t: Tensor,
    predicted_x0: Tensor,
    variance: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
) -> Tensor:
    from_xt = schedule.posterior_mean_xt * x_t
    true_mean = schedule.posterior_mean_x0 * x0 + from_xt
    mean = schedule.posterior_mean_x0 * predicted_x0 + from_xt
    # The network's output, about -1 to 1, interpolates between the two bounds of the log variance.
    fraction = (variance + 1) / 2
    log_variance = fraction * schedule.log_betas + (1 - fraction) * schedule.posterior_log_variance
    kl = _normal_kl(true_mean, schedule.posterior_log_variance, mean, log_variance)
    nll = -_log_likelihood_of_bin(x0, mean, log_variance / 2)
    is_first = timesteps.to(x0.device) == 0
    return torch.where(is_first, _mean(nll), _mean(kl)) / math.log(2)


def _normal_kl(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    difference = log_variance1 - log_variance2
    scaled = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return (difference.exp() - difference - 1 + scaled) / 2


def _log_likelihood_of_bin(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of what a Gaussian gives to the bin of width 2/255 around x; the end bins are open."""
    centered = x - mean
    inverse_scale = torch.exp(-log_scale)
    upper = _approximate_cdf(inverse_scale * (centered + 1 / 255))
    lower = _approximate_cdf(inverse_scale * (centered - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _approximate_cdf(x: Tensor) -> Tensor:
    # The published loss uses this approximation of the normal distribution function, not erf.
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)
