"""The autoencoder of PixArt, SD and SDXL (arXiv:2112.10752, appendix E): residual blocks of convolutions.

It gives the bits of diffusers' AutoencoderKL, under its names for parts and tensors, whose import takes seconds: a
small picture is drawn in less. What that class can do beside this is left to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-6
# What diffusers takes for what a configuration leaves out, of what else there is no choice here.
_ONLY: dict[str, Any] = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
_IDLE = (
    "force_upcast",
    "sample_size",
)  # of its precision, which pixart.vae.autoencoder reads, and of nothing
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True)
class AutoencoderConfig:
    """What of a config.json decides what is computed, by the names that it has there."""

    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: Any = 0.18215
    shift_factor: Any = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "AutoencoderConfig | None":
        """Of a config.json whose sizes are whole numbers; None for one that is another network's."""
        channels = values.get("block_out_channels")
        if not isinstance(channels, list) or any(
            values.get(name, only) != only for name, only in _ONLY.items()
        ):
            return None
        if any(values.get(name) != [kind] * len(channels) for name, kind in _BLOCKS.items()):
            return None
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        config = cls(**{**known, "block_out_channels": tuple(channels)})
        switches = (
            config.use_quant_conv,
            config.use_post_quant_conv,
            config.mid_block_add_attention,
        )
        groups = config.norm_num_groups
        fits = all(one % groups == 0 for one in channels)
        return config if fits and all(isinstance(one, bool) for one in switches) else None


def unread(values: Mapping[str, Any]) -> list[str]:
    """The names in a config.json, of what says something, that are read neither here nor by diffusers' class,
    or that only other pipelines of diffusers use (latents_mean, latents_std)."""
    known = {*AutoencoderConfig.__dataclass_fields__, *_ONLY, *_BLOCKS, *_IDLE}
    said = (name for name, value in values.items() if value is not None)
    return [name for name in said if name not in known and not name.startswith("_")]


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, W) to the moments of latents, and latents (B, C, h, w) to pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def decode(self, latents: Tensor) -> tuple[Tensor]:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents),)


class Encoder(nn.Module):
    """All but the last level end with half of the sides."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = _conv(config.in_channels, channels[0])
        self.down_blocks = nn.ModuleList()
        before = channels[0]
        for level, width in enumerate(channels):
            resnets = _resnets(config.layers_per_block, before, width, groups)
            is_last = level == len(channels) - 1
            self.down_blocks.append(DownBlock(resnets, None if is_last else Downsampling(width)))
            before = width
        self.mid_block = Middle(before, groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=_EPSILON)
        self.conv_act = nn.SiLU()
        self.conv_out = _conv(before, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """All but the last level end with twice the sides."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        before = channels[0]
        self.conv_in = _conv(config.latent_channels, before)
        self.mid_block = Middle(before, groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            resnets = _resnets(config.layers_per_block + 1, before, width, groups)
            is_last = level == len(channels) - 1
            self.up_blocks.append(UpBlock(resnets, None if is_last else Upsampling(width)))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, before, eps=_EPSILON)
        self.conv_act = nn.SiLU()
        self.conv_out = _conv(before, config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    """A level of the encoder."""

    def __init__(self, resnets: nn.ModuleList, downsampling: "Downsampling | None") -> None:
        super().__init__()
        self.resnets = resnets
        self.downsamplers = None if downsampling is None else nn.ModuleList([downsampling])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *(self.downsamplers or ())):
            x = module(x)
        return x


class UpBlock(nn.Module):
    """A level of the decoder."""

    def __init__(self, resnets: nn.ModuleList, upsampling: "Upsampling | None") -> None:
        super().__init__()
        self.resnets = resnets
        self.upsamplers = None if upsampling is None else nn.ModuleList([upsampling])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *(self.upsamplers or ())):
            x = module(x)
        return x


class Middle(nn.Module):
    """Between encoder and latents, and latents and decoder: all positions see each other in its attention."""

    def __init__(self, width: int, groups: int, has_attention: bool) -> None:
        super().__init__()
        self.resnets = _resnets(2, width, width, groups)
        self.attentions = nn.ModuleList([SpatialAttention(width, groups)] if has_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        return second(x)


class ResidualBlock(nn.Module):
    """Two convolutions of 3 × 3, each after a norm and SiLU, added to what they are given."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=_EPSILON)
        self.conv1 = _conv(inputs, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=_EPSILON)
        self.conv2 = _conv(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        """The second argument is a timestep's embedding in diffusers, which these have none of."""
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(F.silu(self.norm2(branch)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + branch


class SpatialAttention(nn.Module):
    """One head as wide as the features, over all positions, added to what it is given."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=_EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        seen = self.group_norm(x.flatten(2)).transpose(1, 2)  # (B, H·W, C)
        q, k, v = (layer(seen).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.to_out[0](mixed).transpose(1, 2).reshape(x.shape) + x


class Downsampling(nn.Module):
    """Half of the sides, by a convolution that looks one pixel beyond the right and lower edge."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsampling(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _resnets(count: int, inputs: int, outputs: int, groups: int) -> nn.ModuleList:
    widths = [inputs] + [outputs] * (count - 1)
    return nn.ModuleList(ResidualBlock(width, outputs, groups) for width in widths)
