"""The UNets of the scalability paper, as diffusers builds them: rows of a table, not models of ours.

arXiv 2404.02883, table 1. The paper gives channels, multipliers, residual blocks, the resolutions with
attention, and the transformer blocks at each; what else a UNet has is that of the family it varies:
Stable Diffusion 2, SDXL (without the embedding of sizes and pooled text), DeepFloyd IF-XL (without the
projection of text).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pixart.libraries import importing

HEAD_DIM = 64
LATENT_CHANNELS, LATENT_SIDE = 4, 32  # of 256 px
TEXT = (1024, 77)  # channels and tokens of OpenCLIP-H, for all of them


@dataclass(frozen=True)
class UNet:
    """channels: of the first level; multipliers: of each level's. depth: transformer blocks behind each
    residual block of a level, 0 for a level without attention; of IF the attention is a layer alone."""

    family: Literal["SD2", "SDXL", "IF"]
    channels: int
    multipliers: tuple[int, ...]
    depth: tuple[int, ...]
    residual_blocks: int = 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)


def _sd2(channels: int) -> UNet:
    return UNet("SD2", channels, (1, 2, 4, 4), (1, 1, 1, 0))


def _sdxl(channels: int, half: int = 2, quarter: int = 10) -> UNet:
    """half, quarter: transformer blocks at these resolutions."""
    return UNet("SDXL", channels, (1, 2, 4), (0, half, quarter))


def _if(channels: int) -> UNet:
    return UNet("IF", channels, (1, 2, 3, 4), (1, 1, 1, 0), residual_blocks=3)


UNETS: Mapping[str, UNet] = {
    "SD2-C320": _sd2(320),
    "SD2-C512": _sd2(512),
    "IF-XL-C512": _if(512),
    "IF-XL-C704": _if(704),
    "SDXL-C128": _sdxl(128),
    "SDXL-C192": _sdxl(192),
    "SDXL-C320": _sdxl(320),
    "SDXL-C384": _sdxl(384),
    "TD2": _sdxl(320, 2, 2),
    "TD4": _sdxl(320, 2, 4),
    "TD12": _sdxl(320, 2, 12),
    "TD14": _sdxl(320, 2, 14),
    "TD4_4": _sdxl(320, 4, 4),
    "TD4_8": _sdxl(320, 4, 8),
    "TD4_12": _sdxl(320, 4, 12),
    "C384-TD4_12": _sdxl(384, 4, 12),
}


def unet(name: str, device: torch.device | str = "meta") -> nn.Module:
    """One of UNETS, a UNet2DConditionModel with diffusers' random weights, for inference; on the meta device
    it takes no memory.

    Its forward: latents (B, 4, h, w), h and w multiples of 8; timesteps; text (B, L, 1024).
    """
    if name not in UNETS:
        raise ValueError(f"name must be one of {', '.join(UNETS)}, got {name!r}")
    with importing():
        from diffusers import UNet2DConditionModel
    with torch.device(device):
        model: Any = UNet2DConditionModel(**arguments(UNETS[name]))
    return model.eval()


def arguments(row: UNet) -> dict[str, Any]:
    """What diffusers' UNet2DConditionModel takes for a row."""
    common = {
        "sample_size": LATENT_SIDE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": row.widths,
        "layers_per_block": row.residual_blocks,
        "cross_attention_dim": TEXT[0],
    }
    return common | (_if_blocks() if row.family == "IF" else _transformer_blocks(row))


def _transformer_blocks(row: UNet) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in row.depth]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(row.depth)]
    return {
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        # Where a level has no attention, as where SD2's last is, the middle's has one block all the same.
        "transformer_layers_per_block": [max(depth, 1) for depth in row.depth],
        "attention_head_dim": [width // HEAD_DIM for width in row.widths],  # heads, by its old name
        "use_linear_projection": True,
    }


def _if_blocks() -> dict[str, Any]:
    attends = "SimpleCrossAttn"
    return {
        "down_block_types": (f"{attends}DownBlock2D",) * 3 + ("ResnetDownsampleBlock2D",),
        "mid_block_type": f"UNetMidBlock2D{attends}",
        "up_block_types": ("ResnetUpsampleBlock2D",) + (f"{attends}UpBlock2D",) * 3,
        "attention_head_dim": HEAD_DIM,  # here it is the channels of a head
        "act_fn": "gelu",
        "time_embedding_act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
        "resnet_skip_time_act": True,
        "cross_attention_norm": "group_norm",
    }
