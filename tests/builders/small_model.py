"""A model small enough for a test, and inputs that fit it."""

from typing import Any

import torch
from torch import Tensor

from pixart.config import PixArtConfig
from pixart.model.transformer import PixArt

SMALL = {
    "input_size": 16,
    "hidden_size": 144,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 48,
    "model_max_length": 12,
}
PARITY_TOLERANCE = 1e-5  # of the norm, in fp32


def build(seed: int = 0, **changes: Any) -> PixArt:
    """A small model in eval mode, whose output depends on all of its parameters."""
    model = PixArt(PixArtConfig(**(SMALL | changes)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def inputs(batch: int = 2, height: int = 10, width: int = 14, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    caption = torch.randn(batch, length, 48, generator=generator)
    return [latents, torch.linspace(13.5, 999, batch), caption]


def sizes(batch: int = 2) -> dict[str, Tensor]:
    return {
        "image_size": torch.tensor([[80.0, 112.0]]).repeat(batch, 1),
        "aspect_ratio": torch.full((batch, 1), 80 / 112),
    }


# Tokens that the masks of up to four captions keep.
KEPT = [[0, 1, 2, 3, 4], [1, 3, 4, 9], [11], list(range(12))]


def mask_of(kept: list[list[int]]) -> Tensor:
    mask = torch.zeros(len(kept), 12, dtype=torch.int64)
    for row, tokens in zip(mask, kept, strict=True):
        row[tokens] = 1
    return mask


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
