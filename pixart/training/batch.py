"""What the tasks share: the samples of a batch, their loss, and rules about where they come from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pixart.dataset.batches import pad
from pixart.diffusion import NUM_TIMESTEPS, LossTerms, training_loss
from pixart.training.distil_settings import DistilSettings
from pixart.training.stage import (
    CONTROLNET,
    DISTILLED,
    DRAWN,
    SEQUENCE,
    ControlSettings,
    Data,
    ResolvedStage,
    Stage,
)

LATENT = 8  # pixels a latent is wide, for every VAE of the family
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


def noise_sample(
    features: Tensor, shape: tuple[int, int, int], mean: float | None, generator: torch.Generator
) -> TrainingSample:
    """A caption without a picture: features (1, L, D), all of which count, and two draws of noise of that shape,
    (C, h, w), one in the place of latents. mean: of the logit of its timestep, None for uniform."""
    height, width = (LATENT * side for side in shape[1:])
    return TrainingSample(
        latents=torch.randn((1, *shape), generator=generator),
        noise=torch.randn((1, *shape), generator=generator),
        timesteps=draw_timestep(mean, generator),
        features=features,
        mask=torch.ones(features.shape[:2], dtype=torch.bool),
        size=torch.tensor([[height, width]]),
        aspect_ratio=torch.full((1, 1), height / width),
        weight=torch.ones(1),
    )


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
        "sizes": "transformer, tdm, lcm, controlnet, autoencoder or decoder",
        "nameless": "controlnet",
        "short": " or ".join(DISTILLED),
    }
    others = "transformer, tdm, lcm, controlnet, text_encoder or clip"
    return f"read where trains is {readers.get(name, others)}"


def drawn_data_problems(stage: Stage, *reads: str) -> Iterator[str]:
    """Yield what is wrong with fields about drawn data. reads: the fields of `data` that the task reads."""
    unread = {"captions", "prior", "prior_weight", "scenes", "sizes", "crop", "nameless", "short"}
    unread -= set(reads)
    yield from unread_data(stage, *sorted(unread))
    if stage.aspect:
        yield f'aspect must be false for the source "{DRAWN}", got true'
    if stage.validation.every and not stage.validation.images:
        yield "validation.images must be positive for drawn data, got 0"
    if stage.batch.tokens is not None:
        yield f"batch.tokens is for prepared data only, got {stage.batch.tokens}"


def settings_problems(stage: Stage) -> Iterator[str]:
    """Yield a complaint about settings of what is not trained: a control, or a student."""
    if stage.trains != CONTROLNET and stage.control != ControlSettings():
        yield f"control is read where trains is {CONTROLNET} only, got trains {stage.trains}"
    if stage.trains not in DISTILLED and stage.distil != DistilSettings():
        readers = " or ".join(DISTILLED)
        yield f"distil is read where trains is {readers} only, got trains {stage.trains}"


def part_problems(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with a stage that trains a part of the embedded model by itself."""
    if stage.parallel == SEQUENCE:
        yield (
            f"parallel must be ddp or fsdp where trains is {stage.trains}, got {SEQUENCE}: only a "
            "transformer has tokens of a picture to share"
        )
    if stage.lora.rank:
        yield (
            f"trains must be transformer, tdm, lcm or controlnet with lora.rank {stage.lora.rank}, got "
            f"{stage.trains}"
        )
    if stage.validation.prompts:
        yield (
            f"validation.prompts must be empty where trains is {stage.trains}, which draws "
            "nothing; name another stage with --stage"
        )
