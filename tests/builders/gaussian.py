"""The exact denoiser of pictures of independent values N(MEAN, DEVIATION²), for any noise schedule."""

MEAN, DEVIATION = 0.7, 0.5
# As PixArt was trained, where a class has these options; clipping would cut the Gaussian off.
FACTS = {
    "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False,
    "snr_shift_scale": 1.0,
}  # fmt: skip


def alpha_sigma(scheduler, timestep):
    """Noise levels of a timestep; of a fractional one, sigma / alpha is linear between whole ones."""
    below = min(int(timestep), len(scheduler.alphas_cumprod) - 2)
    levels = scheduler.alphas_cumprod[below : below + 2].double()
    low, high = (1 / levels - 1).sqrt().tolist()
    ratio = low + (timestep - below) * (high - low)
    alpha = (1 + ratio**2) ** -0.5
    return alpha, alpha * ratio


def spread(scheduler, timestep):
    """The deviation of noised values."""
    alpha, sigma = alpha_sigma(scheduler, timestep)
    return (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5


class GaussianDenoiser:
    """Predicts what the scheduler's configuration says, and keeps what it was asked.

    is_distilled: predicts the end of the probability flow, as consistency models and those of one step
    do; otherwise the mean of all clean pictures that the noised one may come from. is_pure: takes what it
    is given for pure noise, whatever the timestep, as a model distilled to one step does.
    """

    def __init__(self, scheduler, is_distilled=False, is_pure=False):
        self.scheduler, self.is_distilled, self.is_pure = scheduler, is_distilled, is_pure
        self.timesteps, self.inputs = [], []

    def __call__(self, latents, timesteps, captions):
        timestep = timesteps[0].item()
        self.timesteps.append(timestep)
        self.inputs.append(latents)
        alpha, sigma = alpha_sigma(self.scheduler, timestep)
        deviations = (latents.double() - alpha * MEAN) / spread(self.scheduler, timestep)
        if self.is_pure:
            deviations = latents.double()
        share = 1 if self.is_distilled else alpha * DEVIATION / spread(self.scheduler, timestep)
        clean = MEAN + DEVIATION * share * deviations
        epsilon = (latents - alpha * clean) / sigma
        velocity = alpha * epsilon - sigma * clean
        kind = self.scheduler.config.prediction_type
        return {"epsilon": epsilon, "v_prediction": velocity, "sample": clean}[kind].float()
