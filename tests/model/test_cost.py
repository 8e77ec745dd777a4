"""What a PixArt costs is what torch's own counter finds in its forward pass."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart import cost
from pixart.config import KVCompression, PixArtConfig
from pixart.model import PixArt
from pixart.model.embedders import FREQUENCIES

SMALL: dict[str, Any] = {
    "input_size": 8,
    "hidden_size": 48,
    "depth": 3,
    "num_heads": 4,
    "caption_channels": 20,
    "model_max_length": 12,
}
MERGED = (1, 2)
CONFIGS = {
    "dense": PixArtConfig(**SMALL),
    "no variance, wider MLP": PixArtConfig(**SMALL, pred_sigma=False, mlp_ratio=5.0),
    "micro_condition": PixArtConfig(**SMALL, micro_condition=True),
    "qk_norm": PixArtConfig(**SMALL, qk_norm=True),
    "no caption embedding": PixArtConfig(
        **SMALL | {"caption_channels": 48}, caption_embedding=False
    ),
    "ratio 1": PixArtConfig(**SMALL, kv_compression=KVCompression(MERGED, 1)),
} | {
    f"{sampling} {ratio}": PixArtConfig(
        **SMALL, kv_compression=KVCompression(MERGED, ratio, sampling)
    )
    for sampling in ("conv", "average", "uniform", "uniform_every")
    for ratio in (2, 3)
}


def _counted(config: PixArtConfig, grid: tuple[int, int], text: int, *, encoded: bool) -> int:
    """With gradients on, what PixArt's operators do is what the counter sees; it does not know every
    attention of a CPU, so the plain one is taken."""
    model = PixArt(config)
    latents = torch.randn(1, config.in_channels, *(config.patch_size * side for side in grid))
    caption: Any = torch.randn(1, text, config.caption_channels)
    sizes: dict[str, Any] = {}
    if config.micro_condition:
        sizes = {"image_size": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
    if encoded:
        caption = model.encode_caption(caption)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(latents, torch.tensor([500]), caption, **sizes)
    return counter.get_total_flops()


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (4, 7)], ids=str)  # the second one no ratio divides
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts(name: str, grid: tuple[int, int], encoded: bool) -> None:
    config = CONFIGS[name]
    expected = _counted(config, grid, 7, encoded=encoded)
    assert cost.forward_flops(config, grid, 7, encoded=encoded) == expected


def test_a_caption_has_its_full_length_and_a_grid_is_one_that_the_ratio_divides() -> None:
    config = CONFIGS["conv 2"]
    assert cost.forward_flops(config, 36) == cost.forward_flops(config, (6, 6), 12)


def test_the_sinusoids_are_those_of_the_model() -> None:
    assert cost.SINUSOIDS == FREQUENCIES


@pytest.mark.parametrize(
    ("side", "saved"), [(32, 0.041), (64, 0.123), (128, 0.248), (256, 0.333)], ids=str
)
def test_compression_of_half_of_the_blocks_saves_the_published_share(
    side: int, saved: float
) -> None:
    dense = cost.forward_flops(PixArtConfig(), side**2, encoded=True)
    merged = PixArtConfig(kv_compression=KVCompression(tuple(range(14, 28)), 2))
    assert 1 - cost.forward_flops(merged, side**2, encoded=True) / dense == pytest.approx(
        saved, abs=6e-4
    )
