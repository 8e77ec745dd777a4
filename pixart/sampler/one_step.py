"""The scheduler of models distilled by distribution matching (DMD): one step, from timestep 400.

diffusers has none. The published α model of this kind, PixArt-Alpha-DMD-XL-2-512x512, was distilled
to take pure noise for the state at timestep 400 and to be finished in one prediction:
x0 = (x - sqrt(1 - a) noise) / sqrt(a), a being the product of alphas there. Others of its kind begin
elsewhere, which --timesteps says.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

START = 400


class OneStep:
    """As much of a diffusers scheduler as sampling uses, with linear betas by default."""

    init_noise_sigma = 1.0

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        if beta_schedule != "linear" or trained_betas is not None or prediction_type != "epsilon":
            raise ValueError(
                "scheduler dmd must have linear betas and predict epsilon, "
                f"got {beta_schedule} and {prediction_type}"
            )
        self.config = _Config(
            num_train_timesteps=num_train_timesteps,
            original_inference_steps=1,
            prediction_type=prediction_type,
        )
        self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.timesteps = torch.tensor([START])

    def set_timesteps(
        self, num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """There is one step, whatever is asked for: the sampler refuses other numbers. timesteps: where it is,
        in the place of START."""
        if timesteps is not None and len(timesteps) != 1:
            raise ValueError("dmd makes one step")
        self.timesteps = torch.tensor([START] if timesteps is None else list(timesteps))

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor]:
        level = self.alphas_cumprod[int(timestep)].item()
        return ((sample - (1 - level) ** 0.5 * model_output) / level**0.5,)


class _Config(SimpleNamespace):
    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)
