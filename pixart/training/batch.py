"""What the tasks share: the samples of a batch, their loss, and rules about where they come from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pixart.dataset.batches import pad
from pixart.diffusion import NUM_TIMESTEPS, LossTerms, training_loss
from pixart.training.stage import (
    CONTROLNET,
    DRAWN,
    ControlSettings,
    Data,
    ResolvedStage,
    Stage,
)

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class TrainingSample:
    """What one place of a batch trains on, or B of them stacked.

    latents, noise: (B, C, h, w) fp32. timesteps: (B,). features: (B, L, D), mask: (B, L). size:
    (B, 2) and aspect_ratio: (B, 1) for micro-conditioned models. weight: (B,) of the loss. control:
    (B, C, h, w) fp32, scaled latents of pictures that steer; None where none do.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    features: Tensor
    mask: Tensor
    size: Tensor
    aspect_ratio: Tensor
    weight: Tensor
    control: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device) -> "TrainingSample":
        values: list[Any] = [getattr(self, one.name) for one in fields(self)]
        moved = (None if one is None else one.to(device, non_blocking=True) for one in values)
        return TrainingSample(*moved)  # type: ignore[arg-type]


def whole_state(model: nn.Module) -> Any:
    """The state dict on the host of the first process, put together if it is cut among several."""
    return get_model_state_dict(model, options=_WHOLE)


def stack(samples: Sequence[TrainingSample]) -> TrainingSample:
    """One batch of single samples of a bucket, captions padded to the longest."""
    features, mask = pad([sample.features[0][sample.mask[0]] for sample in samples])
    joined = {
        one.name: torch.cat([getattr(sample, one.name) for sample in samples])
        for one in fields(TrainingSample)
        if one.name not in ("features", "mask", "control")
    }
    hints = [sample.control for sample in samples if sample.control is not None]
    control = torch.cat(hints) if hints else None
    return TrainingSample(features=features, mask=mask, control=control, **joined)


def draw_timestep(mean: float | None, generator: torch.Generator) -> Tensor:
    """One timestep (1,): uniform, or logit-normal with a mean."""
    if mean is None:
        return torch.randint(0, NUM_TIMESTEPS, (1,), generator=generator)
    part = torch.sigmoid(torch.randn(1, generator=generator) + mean)
    return (NUM_TIMESTEPS * part).long().clamp(max=NUM_TIMESTEPS - 1)


def diffusion_losses(
    model: Callable[..., Tensor], part: TrainingSample, stage: ResolvedStage, *conditions: Tensor
) -> LossTerms:
    """The terms of each sample's loss, (B,), in the stage's precision. conditions: what the model takes
    beside noised latents and timesteps; all on the device of the part."""

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        with stage.autocast(part.latents.device):
            return model(x_t, timesteps, *conditions)

    return training_loss(
        denoise,
        part.latents,
        part.timesteps,
        part.noise,
        prediction_type=stage.prediction,
        min_snr=stage.min_snr,
    )


def unread_data(stage: Stage, *unread: str) -> Iterator[str]:
    """Yield a complaint for each of these fields of `data` that is given: the task does not read it."""
    for name in unread:
        if (value := getattr(stage.data, name)) != getattr(Data(), name):
            yield f"data.{name} is {_read_by(name, stage)} only, got {value}"


def _read_by(name: str, stage: Stage) -> str:
    if stage.data.source != DRAWN:
        return f'for the source "{DRAWN}"'
    if name in ("captions", "prior", "prior_weight"):
        return "for prepared data"
    readers = {
        "crop": "autoencoder or decoder",
        "sizes": "transformer, controlnet, autoencoder or decoder",
        "nameless": "controlnet",
    }
    others = "transformer, controlnet, text_encoder or clip"
    return f"read where trains is {readers.get(name, others)}"


def drawn_data_problems(stage: Stage, *reads: str) -> Iterator[str]:
    """Yield what is wrong with fields about drawn data. reads: the fields of `data` that the task reads."""
    unread = {"captions", "prior", "prior_weight", "scenes", "sizes", "crop", "nameless"} - set(
        reads
    )
    yield from unread_data(stage, *sorted(unread))
    if stage.aspect:
        yield f'aspect must be false for the source "{DRAWN}", got true'
    if stage.validation.every and not stage.validation.images:
        yield "validation.images must be positive for drawn data, got 0"
    if stage.batch.tokens is not None:
        yield f"batch.tokens is for prepared data only, got {stage.batch.tokens}"


def control_problems(stage: Stage) -> Iterator[str]:
    """Yield a complaint about settings of a control where none is trained."""
    if stage.control != ControlSettings():
        yield f"control is read where trains is {CONTROLNET} only, got trains {stage.trains}"


def part_problems(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with a stage that trains a part of the embedded model by itself."""
    if stage.lora.rank:
        yield f"trains must be transformer or controlnet with lora.rank {stage.lora.rank}, got {stage.trains}"
    if stage.validation.prompts:
        yield (
            f"validation.prompts must be empty where trains is {stage.trains}, which draws "
            "nothing; name another stage with --stage"
        )
