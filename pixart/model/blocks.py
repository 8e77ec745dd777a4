"""One block of the transformer: self-attention, cross-attention and MLP, under published names.

Axis letters: B batch, N image tokens (rows·cols), M key tokens, L caption tokens, C channels, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.config import KVCompression, PixArtConfig
from pixart.cost import merged_grid
from pixart.distributed import cut_again, whole
from pixart.model.compression import averaging, compress_tokens, layer_norm, mean_tokens
from pixart.model.exchange import Share
from pixart.model.folding import FoldedProjection, folds
from pixart.model.mlp import MLP, is_plain
from pixart.model.projection import scaled_queries, scales_queries
from pixart_kernels import SCALE_OF_SCALED, flash_attention, gate_add, gate_add_modulate

KeysValues = tuple[Tensor, Tensor]  # (B, L, H, D) each


@dataclass(frozen=True)
class EncodedCaption:
    """What the blocks see of the captions of a batch, the same at every step: see encode_caption.

    keys_values: those of each block. lengths: (B,) int32, or None if every token counts.
    """

    keys_values: tuple[KeysValues, ...]
    lengths: Tensor | None

    @property
    def batch(self) -> int:
        """B."""
        return self.keys_values[0][0].shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        lengths = [] if self.lengths is None else [self.lengths]
        return [tensor for pair in self.keys_values for tensor in pair] + lengths

    def pad(self, length: int) -> "EncodedCaption":
        """The same captions in `length` tokens, which must be at least their own number."""
        own = self.keys_values[0][0]
        spare = (0, 0, 0, 0, 0, length - own.shape[1])
        lengths = self.lengths
        if lengths is None:
            lengths = torch.full((self.batch,), own.shape[1], dtype=torch.int32, device=own.device)
        return EncodedCaption(
            tuple((F.pad(k, spare), F.pad(v, spare)) for k, v in self.keys_values), lengths
        )

    def with_tensors(self, tensors: list[Tensor]) -> "EncodedCaption":
        """A caption of the same kind, of others in the order of `tensors`."""
        count = 2 * len(self.keys_values)  # behind which the lengths come
        pairs = tuple(zip(tensors[:count:2], tensors[1:count:2], strict=True))
        return EncodedCaption(pairs, None if self.lengths is None else tensors[-1])


class SelfAttention(nn.Module):
    """Attention among image tokens, with keys and values merged R×R if the block compresses."""

    def __init__(self, config: PixArtConfig, compression: KVCompression | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.precision: str | None = None  # of its products: see PixArt.set_attention
        self.compression = compression
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(width) if config.qk_norm else None
        self.sr: nn.Conv2d | None = None
        if compression is not None and compression.sampling == "conv":
            self.sr = nn.Conv2d(
                width, width, compression.ratio, stride=compression.ratio, groups=width
            )
        has_norm = compression is not None and compression.norm == "layer"
        self.norm = nn.LayerNorm(width) if has_norm else None
        self._folded = FoldedProjection()

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        is_perturbed: bool = False,
        share: Share | None = None,
        ratio: int | None = None,
    ) -> Tensor:
        """x: (B, N, C), its N tokens row by row from a grid of (rows, cols). Returns (B, N, C).

        is_perturbed: every token attends to itself alone, the identity in the place of the attention
        map (perturbed-attention guidance, arXiv:2403.17377). share: x and grid are this process's rows
        of a picture, whose other keys and values other processes have. ratio: merge keys and values
        ratio × ratio, in this call, None for what the block does: a dense block by their mean, without
        training; one that compresses merges further what it has merged, by the mean too.
        """
        if is_perturbed:
            return self.proj(self._own_values(x))
        batch, tokens, width = x.shape
        can_scale = self.q_norm is None and self.precision is None
        head_dim = width // self.num_heads
        is_scaled = can_scale and scales_queries(x, self.qkv, head_dim)
        compression, further = self._merging(ratio)
        if compression is None and self.q_norm is None and not is_scaled:
            q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, head_dim).unbind(2)
        else:
            parts = self._merge(x, grid, compression, further, is_scaled)
            q, k, v = (each.unflatten(2, (self.num_heads, -1)) for each in parts)
        scale = SCALE_OF_SCALED if is_scaled else None
        # A precision is named where there is one: what is measured beside these operators knows none.
        settings: dict[str, Any] = {} if self.precision is None else {"precision": self.precision}
        attention: Callable[..., Tensor] = partial(flash_attention, scale=scale, **settings)
        if share is not None:
            seen = compression if further == 1 else averaging(ratio or 1)
            attention = partial(share.attend, attention, seen)
        return self.proj(attention(q, k, v).flatten(2))  # of (B, N, H, D)

    def _merging(self, ratio: int | None) -> tuple[KVCompression | None, int]:
        """How keys and values are merged, and by how much further then."""
        own = self.compression
        if ratio is None:
            return own, 1
        if own is None:
            return (None if ratio == 1 else averaging(ratio)), 1
        return own, ratio // own.ratio

    def _merges_first(self, x: Tensor) -> bool:
        """Whether tokens are merged before they are projected: the mean of projections is the projection of
        the mean, which is of R² times fewer tokens, unless a norm stands between."""
        return self.k_norm is None and is_plain(self.qkv, x)

    def _project_merged(
        self, x: Tensor, grid: tuple[int, int], ratio: int, is_scaled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, N, C), and k, v (B, M, C) of the means of x."""
        width, weights, biases = x.shape[2], self.qkv.weight, self.qkv.bias
        if is_scaled:
            q = scaled_queries(x, weights[:width], biases[:width], width // self.num_heads)
        else:
            q = F.linear(x, weights[:width], biases[:width])
        merged = mean_tokens(x, grid, ratio)
        k, v = F.linear(merged, weights[width:], biases[width:]).chunk(2, dim=-1)
        return q, k, v

    def _own_values(self, x: Tensor) -> Tensor:
        """(B, N, C): the value of each token.

        Where the block compresses, the map is N × M and there is no identity. The value is then the one
        that a patch of R×R tokens like this one would be merged to: of every token still, and as large
        as `proj` has learned to take it, behind the convolution and the norm.
        """
        v = self.qkv(x).chunk(3, dim=-1)[2]
        if self.sr is not None and self.sr.bias is not None:
            weight, bias = self.sr.weight.float().sum((1, 2, 3)), self.sr.bias.float()
            v = torch.addcmul(bias, v.float(), weight).to(v.dtype)
        return v if self.norm is None else layer_norm(v, self.norm)

    def _merge(
        self,
        x: Tensor,
        grid: tuple[int, int],
        compression: KVCompression | None,
        further: int,
        is_scaled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, N, C) and k, v (B, N or M, C), normed, merged and scaled as the block does, and then merged
        further."""
        if further > 1:
            assert compression is not None
            q, k, v = self._merge(x, grid, compression, 1, is_scaled)
            left = merged_grid(grid, compression.ratio)
            return (q, *compress_tokens(k, v, left, averaging(further), None, None))
        is_own = compression is self.compression
        if compression is not None and not is_own and self._merges_first(x):
            return self._project_merged(x, grid, compression.ratio, is_scaled)
        if compression is not None and is_own and not is_scaled and self._folds(x, grid):
            merging = (compression.ratio, self.sr, self.norm)
            return self._folded.project(x, grid, self.qkv, *merging)
        if is_scaled:
            weights, biases = self.qkv.weight, self.qkv.bias
            width = x.shape[2]
            q = scaled_queries(x, weights[:width], biases[:width], width // self.num_heads)
            k, v = F.linear(x, weights[width:], biases[width:]).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, C) each, views of one tensor
        if self.q_norm is not None and self.k_norm is not None:
            q, k = layer_norm(q, self.q_norm), layer_norm(k, self.k_norm)
        if compression is not None:
            learned = (self.sr, self.norm) if is_own else (None, None)
            k, v = compress_tokens(k, v, grid, compression, *learned)
        return q, k, v

    def _folds(self, x: Tensor, grid: tuple[int, int]) -> bool:
        if self.compression is None or self.k_norm is not None:  # a norm stands between
            return False
        return folds(x, grid, self.qkv, self.compression)


class CrossAttention(nn.Module):
    """Attention of image tokens over the kept caption tokens."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """caption: (B, L, C). Returns two views (B, L, H, D) of one tensor."""
        k, v = self.kv_linear(caption).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return k, v

    def forward(self, x: Tensor, caption: "Tensor | KeysValues", lengths: Tensor | None) -> Tensor:
        """x: (B, N, C); caption: (B, L, C), or what keys_values made of it; lengths: (B,) int32, how
        many of the L tokens count, None for all. Returns (B, N, C)."""
        scale = None
        if scales_queries(x, self.q_linear, x.shape[2] // self.num_heads):
            linear, scale = self.q_linear, SCALE_OF_SCALED
            q = scaled_queries(x, linear.weight, linear.bias, x.shape[2] // self.num_heads)
        else:
            q = self.q_linear(x)
        q = q.unflatten(2, (self.num_heads, -1))  # (B, N, H, D)
        k, v = self.keys_values(caption) if isinstance(caption, Tensor) else caption
        return self.proj(flash_attention(q, k, v, kv_lengths=lengths, scale=scale).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each added to the residual stream."""

    def __init__(self, config: PixArtConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        compression = config.kv_compression
        if compression is not None and not compression.applies_to(layer):
            compression = None
        # Shift, scale and gate of the self-attention, then of the MLP.
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn = SelfAttention(config, compression)
        self.cross_attn = CrossAttention(config)
        self.mlp = MLP(width, config.mlp_hidden_size, width)

    def forward(
        self,
        x: Tensor,
        modulated: Tensor,
        rows: Sequence[Tensor],
        next_rows: Sequence[Tensor] | None,
        caption: Tensor | KeysValues,
        lengths: Tensor | None,
        grid: tuple[int, int],
        is_perturbed: bool = False,
        share: Share | None = None,
        ratio: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: (B, N, C); modulated: x ready for self-attention. Returns both for the next block.

        rows: gate of the attention, shift, scale and gate of the MLP; next_rows: shift and scale
        of whatever follows; (B, C) each. So each of the three passes over the tokens ends one
        branch, and all but the first prepare the next. next_rows None: x changes before the next
        block, so that nothing is prepared for it, and what is returned in its place is x.
        is_perturbed, share, ratio: of SelfAttention.
        """
        gate_attention, shift_mlp, scale_mlp, gate_mlp = rows
        x = gate_add(x, self.attn(modulated, grid, is_perturbed, share, ratio), gate_attention)
        # PixArt's cross-attention is neither normed nor gated: it sees the residual stream itself.
        branch = self.cross_attn(x, caption, lengths)  # (B, N, C)
        x, modulated = gate_add_modulate(x, branch, None, shift_mlp, scale_mlp)
        branch = self.mlp(modulated)
        if next_rows is None:
            x = gate_add(x, branch, gate_mlp)
            return x, x
        shift, scale = next_rows
        return gate_add_modulate(x, branch, gate_mlp, shift, scale)


def modulation_rows(shared: Tensor, blocks: Sequence[Block]) -> list[tuple[Tensor, ...]]:
    """Shift, scale and gate of the self-attention and of the MLP, (B, C) fp32 each, of every block.

    shared: (B, 6·C), what the model made of the timestep for all of them.
    """
    # A few rows per sample: their sums are worth fp32 in any model. All blocks in one step: one by one
    # they would be 28 launches of next to nothing, or 28 exchanges among processes.
    for block in blocks:  # FSDP makes each whole in its own forward only
        cut_again(block)
    tables = whole(torch.stack([block.scale_shift_table for block in blocks])).float()
    rows = shared.float().unflatten(1, (1, 6, -1)) + tables  # (B, blocks, 6, C)
    return [table.unbind(1) for table in rows.unbind(1)]


class FinalLayer(nn.Module):
    """The last projection, from tokens to patches of the prediction."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden_size))  # shift, scale
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, modulated: Tensor) -> Tensor:
        """(B, N, C) to (B, N, patch_size² · out_channels), channels last within a patch."""
        return self.linear(modulated)
