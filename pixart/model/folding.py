"""Projecting K and V and merging them R×R as one product, where a CPU draws without gradients.

Both are linear, so a weight of R² times the size does both to a patch of tokens at once.
Axis letters: B batch, N image tokens (rows·cols), M merged tokens, C channels.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.config import KVCompression
from pixart.model.compression import layer_norm, merging_weights
from pixart.model.mlp import is_plain
from pixart_kernels import fold_projection

FOLDED_TOKENS = 256  # merged ones, at least, that repay reading R² times the weights


def folds(x: Tensor, grid: tuple[int, int], qkv: nn.Linear, compression: KVCompression) -> bool:
    """Whether projecting and merging K and V are one product. Its share of the time of both (C =
    1152, torch 2.13) depends on the tokens that are left, 64, 256 or 1,024. Two Sapphire Rapids
    cores: with R = 2 1.27, 0.99, 0.75 in bf16 and 1.12, 0.98, 0.86 in fp32; with R = 4 1.67,
    0.96, 0.66 in bf16. One core of an EPYC of Zen 4, which has no AMX: with R = 2 1.05, 0.92,
    0.88 and 1.06, 1.05, 0.93; with R = 4 1.02, 0.92 in bf16 and 1.21, 1.00 to 1.09 in fp32. So
    both break even near the same number. On a GPU it is not measured, and not done."""
    ratio = compression.ratio
    return (
        compression.sampling in ("conv", "average")
        and ratio > 1
        and x.device.type == "cpu"
        # First: comparing sizes would fix those of an exported program.
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and len(x) * x.shape[1] >= FOLDED_TOKENS * ratio**2
        and not (grid[0] % ratio or grid[1] % ratio)
        and is_plain(qkv, x)
        and not qkv.weight.is_inference()  # those do not count their changes
    )


class FoldedProjection:
    """The folded weight of a self-attention, kept until one of the weights behind it changes:
    folding takes as long as projecting some hundred tokens."""

    def __init__(self) -> None:
        self._kept: tuple[object, list[Tensor], tuple[Tensor, Tensor]] | None = None

    def project(
        self,
        x: Tensor,
        grid: tuple[int, int],
        qkv: nn.Linear,
        ratio: int,
        sr: nn.Conv2d | None,
        norm: nn.LayerNorm | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, N, C). Returns q (B, N, C) and the merged k, v (B, M, C)."""
        width = x.shape[2]
        rows, cols = grid[0] // ratio, grid[1] // ratio
        patches = x.view(len(x), rows, ratio, cols, ratio, width).transpose(2, 3)
        patches = patches.reshape(len(x), rows * cols, -1)  # (B, M, R·R·C)
        k, v = F.linear(patches, *self.weights(qkv, ratio, sr)).chunk(2, dim=-1)
        if norm is not None:
            k, v = layer_norm(k, norm), layer_norm(v, norm)
        q = F.linear(x, qkv.weight[:width], qkv.bias[:width])
        return q, k, v

    def weights(self, qkv: nn.Linear, ratio: int, sr: nn.Conv2d | None) -> tuple[Tensor, Tensor]:
        """(2C, R·R·C) and (2C,)."""
        sources = [qkv.weight, qkv.bias]
        sources += [] if sr is None else [sr.weight, cast(Tensor, sr.bias)]
        # Held, so that nothing else can come to lie where they lay.
        # By its storage, which tensors without numbers have too, and those no address.
        key = [(id(one), one.untyped_storage()._cdata, one._version, one.dtype) for one in sources]
        if self._kept is None or self._kept[0] != key:
            width = qkv.in_features
            projection = (qkv.weight[width:], qkv.bias[width:])
            merging = merging_weights(qkv.weight, ratio, sr)
            self._kept = (key, sources, fold_projection(*projection, *merging))
        return self._kept[2]
