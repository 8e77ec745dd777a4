"""One block of the transformer: self-attention, cross-attention and MLP, under published names.

Axis letters: B batch, N image tokens (rows·cols), M key tokens, L caption tokens, C channels, H heads.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.config import KVCompression, PixArtConfig
from pixart.model.compression import _layer_norm, _merge_weights, compress_tokens
from pixart.model.mlp import MLP, is_plain
from pixart_kernels import (
    flash_attention,
    fold_projection,
    gate_add,
    gate_add_modulate,
)

KeysValues = tuple[Tensor, Tensor]  # (B, L, H, D) each
FOLDED_TOKENS = 256  # merged ones, at least, that repay reading R² times the weights


@dataclass(frozen=True)
class EncodedCaption:
    """What the blocks see of the captions of a batch, the same at every step: see encode_caption.

    keys_values: those of each block. lengths: (B,) int32, or None if every token counts.
    """

    keys_values: tuple[KeysValues, ...]
    lengths: Tensor | None

    @property
    def batch(self) -> int:
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

    def clone(self) -> "EncodedCaption":
        pairs = tuple((k.clone(), v.clone()) for k, v in self.keys_values)
        return EncodedCaption(pairs, None if self.lengths is None else self.lengths.clone())


class SelfAttention(nn.Module):
    """Attention among image tokens, with keys and values merged R×R if the block compresses."""

    def __init__(self, config: PixArtConfig, compression: KVCompression | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
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
        self._folded: tuple[object, list[Tensor], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self._folds(x, grid):
            return self._attend(*self._project_folded(x, grid))
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, C) each, views of one tensor
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _layer_norm(q, self.q_norm), _layer_norm(k, self.k_norm)
        if self.compression is not None:
            k, v = compress_tokens(k, v, grid, self.compression, self.sr, self.norm)  # (B, M, C)
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tokens.unflatten(2, (self.num_heads, -1)) for tokens in (q, k, v))
        return self.proj(flash_attention(q, k, v).flatten(2))

    def _folds(self, x: Tensor, grid: tuple[int, int]) -> bool:
        """Whether projecting and merging K and V are one product. Its share of the time of both (C =
        1152, torch 2.13) depends on the tokens that are left, 64, 256 or 1,024. Two Sapphire Rapids
        cores: with R = 2 1.27, 0.99, 0.75 in bf16 and 1.12, 0.98, 0.86 in fp32; with R = 4 1.67,
        0.96, 0.66 in bf16. One core of an EPYC of Zen 4, which has no AMX: with R = 2 1.05, 0.92,
        0.88 and 1.06, 1.05, 0.93; with R = 4 1.02, 0.92 in bf16 and 1.21, 1.00 to 1.09 in fp32. So
        both break even near the same number. On a GPU it is not measured, and not done."""
        compression, layer = self.compression, self.qkv
        return (
            compression is not None
            and compression.sampling in ("conv", "average")
            and compression.ratio > 1
            and len(x) * x.shape[1] >= FOLDED_TOKENS * compression.ratio**2
            and not (grid[0] % compression.ratio or grid[1] % compression.ratio)
            and self.k_norm is None
            and x.device.type == "cpu"
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
            and is_plain(layer, x)
            and not layer.weight.is_inference()  # those do not count their changes
        )

    def _project_folded(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        assert self.compression is not None
        ratio, width = self.compression.ratio, x.shape[2]
        rows, cols = grid[0] // ratio, grid[1] // ratio
        patches = x.view(len(x), rows, ratio, cols, ratio, width).transpose(2, 3)
        weight, bias = self._folded_weights(ratio)
        k, v = F.linear(patches.reshape(len(x), rows * cols, -1), weight, bias).chunk(2, dim=-1)
        if self.norm is not None:
            k, v = _layer_norm(k, self.norm), _layer_norm(v, self.norm)
        q = F.linear(x, self.qkv.weight[:width], self.qkv.bias[:width])
        return q, k, v

    def _folded_weights(self, ratio: int) -> tuple[Tensor, Tensor]:
        """Kept until a weight changes: folding takes as long as projecting some hundred tokens."""
        sources = [self.qkv.weight, self.qkv.bias]
        sources += [] if self.sr is None else [self.sr.weight, cast(Tensor, self.sr.bias)]
        # Held, so that nothing else can come to lie where they lay.
        key = [(id(source), source.data_ptr(), source._version, source.dtype) for source in sources]
        if self._folded is None or self._folded[0] != key:
            width = self.qkv.in_features
            projection = (self.qkv.weight[width:], self.qkv.bias[width:])
            merging = _merge_weights(self.qkv.weight, ratio, self.sr)
            self._folded = (key, sources, fold_projection(*projection, *merging))
        return self._folded[2]


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
        q = self.q_linear(x).unflatten(2, (self.num_heads, -1))
        k, v = self.keys_values(caption) if isinstance(caption, Tensor) else caption
        return self.proj(flash_attention(q, k, v, kv_lengths=lengths).flatten(2))


class Block(nn.Module):
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
        rows: tuple[Tensor, ...],
        next_rows: tuple[Tensor, ...],
        caption: Tensor | KeysValues,
        lengths: Tensor | None,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """x: (B, N, C); modulated: x ready for self-attention. Returns both for the next block.

        rows: gate of the attention, shift, scale and gate of the MLP; next_rows: shift and scale
        of whatever follows; (B, C) each. So each of the three passes over the tokens ends one
        branch, and all but the first prepare the next.
        """
        gate_attention, shift_mlp, scale_mlp, gate_mlp = rows
        x = gate_add(x, self.attn(modulated, grid), gate_attention)
        branch = self.cross_attn(x, caption, lengths)  # neither normed nor gated
        x, modulated = gate_add_modulate(x, branch, None, shift_mlp, scale_mlp)
        return gate_add_modulate(x, self.mlp(modulated), gate_mlp, *next_rows)


class FinalLayer(nn.Module):
    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, modulated: Tensor) -> Tensor:
        return self.linear(modulated)
