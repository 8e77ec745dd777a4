"""DPM-Solver++ of order 1 and 2 (arXiv:2211.01095, algorithm 2), as PixArt is drawn by default.

    x_t = (σ_t / σ_s) x_s - α_t (e^-h - 1) (D_0 + D_1 / 2),    h = λ_t - λ_s,    λ = log(α / σ)

D_0 is the predicted picture, D_1 how it changes, 0 in a first step and in a last one. It gives the bits of
diffusers' class of the same name, whose import takes as long as drawing a small picture, and has its name and its
configuration; what that class can do beside this is left to it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What diffusers' class takes where a configuration says nothing.
_FREE: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "solver_order": 2, "prediction_type": "epsilon", "lower_order_final": True, "euler_at_final": False,
}  # fmt: skip
_ONLY: dict[str, Any] = {
    "trained_betas": None, "thresholding": False, "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint", "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_lu_lambdas": False, "use_flow_sigmas": False,
    "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None,
    "timestep_spacing": "linspace", "rescale_betas_zero_snr": False, "use_dynamic_shifting": False,
}  # fmt: skip
_IDLE: dict[str, Any] = {  # they do nothing beside these
    "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "flow_shift": 1.0,
    "steps_offset": 0, "time_shift_type": "exponential",
}  # fmt: skip
_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "solver_order": (1, 2),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
}


class Config(dict[str, Any]):
    """Options by name, as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DPMSolverMultistepScheduler:
    """Steps from noise to a picture, one evaluation each. timesteps, sigmas: of the walk that was set."""

    OPTIONS: Mapping[str, Any] = {**_FREE, **_ONLY, **_IDLE}
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, **options: Any) -> None:
        """options: those of diffusers' class that `takes` is true for."""
        self.config = config = Config({**self.OPTIONS, **options})
        ends, count = (config.beta_start, config.beta_end), config.num_train_timesteps
        if config.beta_schedule == "linear":
            self.betas = torch.linspace(*ends, count, dtype=torch.float32)
        else:
            low, high = ends[0] ** 0.5, ends[1] ** 0.5
            self.betas = torch.linspace(low, high, count, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self._levels = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self.sigmas, self.timesteps = self._levels, torch.arange(count - 1.0, -1, -1)
        self._before: Tensor | None = None
        self._index: int | None = None
        self._begin: int | None = None

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> bool:
        """Whether it is the solver of these options, beside which may be what a file says of itself."""
        if "_use_default_values" in options:  # it takes others back
            return False
        known = {name: value for name, value in options.items() if not name.startswith("_")}
        return all(
            name in cls.OPTIONS
            and (name not in _ONLY or (type(value), value) == (type(_ONLY[name]), _ONLY[name]))
            and (name not in _CHOICES or value in _CHOICES[name])
            for name, value in known.items()
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DPMSolverMultistepScheduler":
        return cls(**config)

    def set_timesteps(
        self, num_inference_steps: int | None = None, *, timesteps: Sequence[int] | None = None
    ) -> None:
        """Begin a walk of so many steps, or of these timesteps, falling."""
        if timesteps is None:
            assert num_inference_steps is not None
            last, count = self.config.num_train_timesteps - 1, num_inference_steps + 1
            # numpy's: torch counts from both ends, and rounds some halves the other way.
            spaced = np.linspace(0, last, count).round().astype(np.int64)
            self.timesteps = torch.from_numpy(spaced).flip(0)[:-1]
        else:
            self.timesteps = torch.tensor(list(timesteps), dtype=torch.int64)
        self.sigmas = torch.cat([self._levels[self.timesteps], torch.zeros(1)])
        self._before = self._index = self._begin = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Which of the timesteps the next step is of."""
        self._begin = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The state itself: it is of unit variance."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The state after an evaluation, from the one before it. Steps are made in their order."""
        if self._index is None:
            self._index = self._index_of(timestep) if self._begin is None else self._begin
        index = self._index
        clean = self._predict(model_output, sample, self.sigmas[index])
        before, self._before, self._index = self._before, clean, index + 1
        is_last = index == len(self.timesteps) - 1
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            self._sigma_to_alpha_sigma_t(self.sigmas[place]) for place in (index + 1, index)
        )
        now = torch.log(alpha_s) - torch.log(sigma_s)
        h = torch.log(alpha_t) - torch.log(sigma_t) - now
        change = alpha_t * (torch.exp(-h) - 1.0)
        sample = sample.to(torch.float32)
        reached = (sigma_t / sigma_s) * sample - change * clean
        # Its last noise is none, of which the step of second order would be NaN.
        if self.config.solver_order == 2 and before is not None and not is_last:
            alpha_b, sigma_b = self._sigma_to_alpha_sigma_t(self.sigmas[index - 1])
            ratio = (now - (torch.log(alpha_b) - torch.log(sigma_b))) / h
            reached = reached - 0.5 * change * ((1.0 / ratio) * (clean - before))
        return (reached.to(clean.dtype),)

    def _predict(self, output: Tensor, sample: Tensor, sigma: Tensor) -> Tensor:
        """The clean latents."""
        kind = self.config.prediction_type
        if kind == "sample":
            return output
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigma)
        if kind == "epsilon":
            return (sample - sigma * output) / alpha
        return alpha * sample - sigma * output

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the picture and of the noise is in a state of unit variance: the name is diffusers'."""
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        return alpha, sigma * alpha

    def _index_of(self, timestep: Tensor) -> int:
        places = (self.timesteps == timestep.to("cpu")).nonzero().flatten().tolist()
        # Of several, the second: diffusers would not leave out a level of noise where a walk begins.
        return places[min(1, len(places) - 1)] if places else len(self.timesteps) - 1
