"""What one place of a batch trains on, shared by the tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pixart.dataset.batches import pad
from pixart.diffusion import NUM_TIMESTEPS

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Sample:
    """What one place of a batch trains on, or B of them stacked.

    latents, noise: (B, C, h, w) fp32. timesteps: (B,). features: (B, L, D), mask: (B, L). size:
    (B, 2) and aspect_ratio: (B, 1) for micro-conditioned models. weight: (B,) of the loss.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    features: Tensor
    mask: Tensor
    size: Tensor
    aspect_ratio: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device) -> "Sample":
        moved = (getattr(self, one.name).to(device, non_blocking=True) for one in fields(self))
        return Sample(*moved)


def whole_state(model: nn.Module) -> Any:
    """The state dict on the host of the first process, put together if it is cut among several."""
    return get_model_state_dict(model, options=_WHOLE)


def stack(samples: Sequence[Sample]) -> Sample:
    """One batch of single samples of a bucket, captions padded to the longest."""
    features, mask = pad([sample.features[0][sample.mask[0]] for sample in samples])
    joined = {
        one.name: torch.cat([getattr(sample, one.name) for sample in samples])
        for one in fields(Sample)
        if one.name not in ("features", "mask")
    }
    return Sample(features=features, mask=mask, **joined)


def draw_timestep(mean: float | None, generator: torch.Generator) -> Tensor:
    """One timestep (1,): uniform, or logit-normal with a mean."""
    if mean is None:
        return torch.randint(0, NUM_TIMESTEPS, (1,), generator=generator)
    part = torch.sigmoid(torch.randn(1, generator=generator) + mean)
    return (NUM_TIMESTEPS * part).long().clamp(max=NUM_TIMESTEPS - 1)
