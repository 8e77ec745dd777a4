"""How patches, numbers, captions and positions become vectors of the transformer's width.

Axis letters: B batch, N image tokens (rows·cols), L caption tokens, C channels.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.config import PixArtConfig
from pixart.model.mlp import MLP
from pixart.resolution import position_embedding

FREQUENCIES = 256  # channels of the sinusoids that embed timesteps and sizes


class PatchEmbedder(nn.Module):
    """A linear map of each patch, kept as the convolution that the state dict has."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """latents: (B, in_channels, h, w). Returns (B, N, C), row by row."""
        if type(self.proj) is not nn.Conv2d:  # an adapter around it, which must be called
            return self.proj(latents).flatten(2).transpose(1, 2).contiguous()
        # A matrix product leaves (B, N, C) in memory, the convolution would leave (B, C, N).
        side = self.patch_size
        patches = latents.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, cols, in_channels, side, side)
        patches = patches.flatten(3).flatten(1, 2)  # (B, N, in_channels·side·side)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class SinusoidEmbedder(nn.Module):
    """Numbers to vectors: cosines and sines of 128 frequencies, then a small MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, numbers: Tensor) -> Tensor:
        """numbers: (B,) fp32. Returns (B, hidden_size)."""
        # Always in fp32: bf16 turns timestep 999 into 1000.
        half = FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=numbers.device) / half
        angles = numbers[:, None].float() * torch.exp(-math.log(10000) * exponents)
        # Cosines first, unlike the position tables: the published order.
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, FREQUENCIES)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class CaptionEmbedder(nn.Module):
    """Text features to the transformer's width, or as they are without config.caption_embedding; some
    become the null caption in training, whose table is of the features' width either way."""

    y_embedding: Tensor

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.dropout_prob = config.class_dropout_prob
        width = config.hidden_size
        # The identity has no weights: a state dict without y_proj is one of such a model.
        self.y_proj: nn.Module = (
            MLP(config.caption_channels, width, width)
            if config.caption_embedding
            else nn.Identity()
        )
        # A buffer, as published: saved with the model, never trained.
        null_caption = torch.empty(config.model_max_length, config.caption_channels)
        self.register_buffer("y_embedding", null_caption)

    def forward(self, caption: Tensor, caption_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """caption: (B, L, caption_channels); caption_mask: (B, L) booleans or None.

        Returns the kept tokens, packed to (B, longest kept, C), and how many each sample has.
        """
        # A dropped caption keeps its mask, as when the published models were trained.
        caption, lengths = pack_captions(self._drop(caption), caption_mask)
        return self.y_proj(caption), lengths

    def _drop(self, caption: Tensor) -> Tensor:
        if not self.training or self.dropout_prob == 0:
            return caption
        length, longest = caption.shape[1], self.y_embedding.shape[0]
        if length > longest:
            raise ValueError(f"caption must have at most {longest} tokens to train, got {length}")
        dropped = torch.rand(caption.shape[0], 1, 1, device=caption.device) < self.dropout_prob
        return torch.where(dropped, self.y_embedding[:length].to(caption.dtype), caption)


def pack_captions(caption: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move the kept tokens of each caption to the front, and cut the batch to the longest.

    caption: (B, L, any); mask: (B, L) booleans. Returns the captions and the number of kept tokens,
    (B,) int32, or None if all that remain are kept. A compiled graph cannot cut by a value that is
    not yet computed, nor what has no values: there the length stays L.
    """
    if mask is None:
        return caption, None
    lengths = mask.sum(dim=1, dtype=torch.int32)
    longest, shortest = mask.shape[1], 0
    is_known = type(mask) is Tensor and not torch.compiler.is_compiling()
    if is_known and lengths.numel():
        counts = lengths.tolist()  # waits for the GPU, if that is where the mask is
        longest, shortest = max(max(counts), 1), min(counts)
    # Stable: attention does not see the order of the tokens, but its rounding does.
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest].to(caption.device)
    caption = caption.gather(1, order.unsqueeze(2).expand(-1, -1, caption.shape[2]))
    return caption, None if shortest == longest else lengths.to(caption.device)


class PositionTables:
    """The position tables of the grids seen last: a sampler meets one, a training run dozens."""

    def __init__(self, config: PixArtConfig, size: int = 8) -> None:
        self.config = config
        self.size = size
        self.tables: OrderedDict[Any, Tensor] = OrderedDict()

    def __call__(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Return the (rows·cols, C) table of a grid on the device and in the dtype of `like`."""
        # Sizes of an exported program may be symbols, and what is traced has no values to keep.
        if torch.compiler.is_exporting() or type(like) is not Tensor:
            device = "cpu" if like.device.type == "mps" else like.device
            return self._compute(grid, device).to(like.device, like.dtype)
        key = (grid, like.device, like.dtype)
        if key not in self.tables:
            self.tables[key] = self._compute(grid, "cpu").to(like.device, like.dtype)
            if len(self.tables) > self.size:
                self.tables.popitem(last=False)
        self.tables.move_to_end(key)
        return self.tables[key]

    def _compute(self, grid: tuple[int, int], device: torch.device | str) -> Tensor:
        config = self.config
        sizes = (config.hidden_size, grid, config.base_size, config.pe_interpolation)
        return position_embedding(*sizes, device)

    def __reduce__(self) -> tuple[Any, ...]:
        return PositionTables, (self.config, self.size)  # a copied or pickled model takes no table
