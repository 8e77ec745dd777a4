"""Drawn scenes as what a diffusion model of the embedded world trains on."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.shapes.caption import describe
from pixart.shapes.scene import SCENES, Scene, draw, draw_outlines, sample_scene
from pixart.training.batch import TrainingSample, draw_timestep, noise_sample
from pixart.training.stage import CONTROLNET, ResolvedStage, Stage

DOWNSAMPLE = 8
COLOUR_SCALE, DETAIL_SCALE = 1.5, 8.0  # bring the latents near unit scale
LINES = (0.018, 0.045)  # widths of outlines, as fractions of the side
HINT_NOISE = 0.055  # of the embedded VAE's posterior and encoder, on latents of outlines


def drawing_problems(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the scenes and their sizes."""
    yield from scene_problems(stage)
    if wrong := [side for side in stage.data.sizes if side < 16 or side % 16]:
        yield f"data.sizes must be positive multiples of 16, got {wrong[0]}"


def drawn_sizes(stage: ResolvedStage) -> list[tuple[int, int]]:
    """Height and width in pixels of what is drawn."""
    return [(side, side) for side in stage.data.sizes or (stage.resolution,)]


def scene_problems(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the weights of the kinds of scenes."""
    weights = dict(stage.data.scenes)
    is_odd = set(weights) - set(SCENES) or min(weights.values(), default=0) < 0
    if is_odd or not sum(weights.values()) > 0:
        yield f"data.scenes must be weights of {', '.join(SCENES)}, got {stage.data.scenes}"


def draw_scene(
    rng: random.Random, kinds: Mapping[str, float], nameless: float = 0.0, short: float = 0.0
) -> tuple[Scene, str]:
    """A scene of one of these kinds, by weight, and a caption of it. nameless: share of captions that tell
    neither shapes nor places; short: of others that leave out all that they may."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    scene = sample_scene(rng, kind)
    # Without a share nothing is drawn for it: old runs go on as they began.
    is_nameless = nameless > 0 and rng.random() < nameless
    if (
        is_nameless
    ):  # all else is told: what nothing tells, such as the ground, would be all of the loss
        return scene, describe(scene, rng, omit=0.0, is_nameless=True)
    if short > 0 and rng.random() < short:
        return scene, describe(scene, rng, omit=1.0)
    return scene, describe(scene, rng)


def draw_sample(
    rng: random.Random, tokenizer: Any, size: int, stage: ResolvedStage
) -> TrainingSample:
    """A scene of `size` pixels as latents, its caption as token ids in place of features."""
    scene, text = draw_scene(rng, dict(stage.data.scenes), stage.data.nameless, stage.data.short)
    latents = anchor_latents(picture_of(scene, size))
    ids = tokenizer.encode("" if rng.random() < stage.data.caption_dropout else text)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return TrainingSample(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        timesteps=draw_timestep(stage.timestep_mean, generator),
        features=torch.tensor(ids)[None, :, None],
        mask=torch.ones(1, len(ids), dtype=torch.bool),
        size=torch.tensor([[size, size]]),
        aspect_ratio=torch.ones(1, 1),
        weight=torch.ones(1),
        control=_hint(scene, size, rng, generator) if stage.trains == CONTROLNET else None,
    )


def draw_caption(
    rng: random.Random, tokenizer: Any, shape: tuple[int, int, int], stage: ResolvedStage
) -> TrainingSample:
    """A caption as token ids in place of features, without its picture: noise of that shape stands for the
    latents, (C, h, w)."""
    text = draw_scene(rng, dict(stage.data.scenes), stage.data.nameless, stage.data.short)[1]
    ids = tokenizer.encode("" if rng.random() < stage.data.caption_dropout else text)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return noise_sample(torch.tensor(ids)[None, :, None], shape, stage.timestep_mean, generator)


def _hint(scene: Scene, size: int, rng: random.Random, generator: torch.Generator) -> Tensor:
    """The latents of a scene's outlines, as the VAE gives them: its encoder leaves so much noise. Lines
    differ, as those of other pictures will."""
    outlines = draw_outlines(scene, size, line=rng.uniform(*LINES), supersample=3)
    latents = anchor_latents(_in_range(outlines))
    return latents + HINT_NOISE * torch.randn(latents.shape, generator=generator)


def picture_of(scene: Scene, size: int) -> Tensor:
    """(1, 3, size, size) in [-1, 1]."""
    return _in_range(draw(scene, size, supersample=3))


def _in_range(picture: np.ndarray) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of an 8-bit picture."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def token_conditions(part: TrainingSample) -> tuple[Tensor, Tensor]:
    """The token ids (B, L) and their mask: a Pair takes them beside latents and timesteps."""
    return part.features[..., 0].long(), part.mask


def anchor_latents(pictures: Tensor) -> Tensor:
    """The latents (B, 4, H/8, W/8) of pictures (B, 3, H, W) in [-1, 1]: the mean colour of each
    8×8 block, and the first moment of its brightness along the diagonal."""
    means = F.avg_pool2d(pictures, DOWNSAMPLE)
    ramp = (torch.arange(DOWNSAMPLE, device=pictures.device) + 0.5) / DOWNSAMPLE - 0.5
    weight = (ramp[:, None] + ramp[None, :])[None, None] / DOWNSAMPLE**2
    detail = F.conv2d(pictures.mean(dim=1, keepdim=True), weight, stride=DOWNSAMPLE)
    return torch.cat([COLOUR_SCALE * means, DETAIL_SCALE * detail], dim=1)
