"""KV token compression (PixArt-Σ, section 3.2): how tokens are merged, and how that starts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.config import KVCompression
from pixart_kernels import (
    compress_kv,
)


def compress_tokens(
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    compression: KVCompression,
    sr: nn.Conv2d | None,
    norm: nn.LayerNorm | None,
) -> tuple[Tensor, Tensor]:
    """Merge keys and values (B, N, C) of a grid as `compression` says: (B, M, C) each.

    sr: the learned convolution of sampling "conv"; norm: what follows, if anything does.
    """
    if compression.sampling in ("conv", "average"):
        weight, bias = _merge_weights(k, compression.ratio, sr)
        affine = (None, None) if norm is None else (norm.weight, norm.bias)
        return compress_kv(k, v, weight, bias, *affine, grid=grid, ratio=compression.ratio)
    k, v = (_take_tokens(tokens, grid, compression) for tokens in (k, v))
    return (k, v) if norm is None else (_layer_norm(k, norm), _layer_norm(v, norm))


def _merge_weights(k: Tensor, ratio: int, sr: nn.Conv2d | None) -> tuple[Tensor, Tensor]:
    if sr is not None:
        assert sr.bias is not None
        return sr.weight, sr.bias
    width = k.shape[-1]
    weight = k.new_full((width, 1, ratio, ratio), ratio**-2, dtype=torch.float32)
    return weight, k.new_zeros(width, dtype=torch.float32)


def _layer_norm(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    # In fp32: on a CPU, PyTorch sums the weight gradients of 16-bit tokens in 16 bits.
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(tokens.float(), weight.shape, weight, bias, norm.eps).to(tokens.dtype)


def _take_tokens(tokens: Tensor, grid: tuple[int, int], compression: KVCompression) -> Tensor:
    ratio = compression.ratio
    if compression.sampling == "uniform_every":
        return tokens[:, ::ratio]
    return tokens.unflatten(1, grid)[:, ::ratio, ::ratio].flatten(1, 2)


def _initial_values(compression: KVCompression) -> dict[str, float]:
    """The convolution starts as the mean of its R×R tokens, the norm as a plain LayerNorm."""
    if compression.ratio == 1:
        return {}
    convolution = {"sr.weight": compression.ratio**-2, "sr.bias": 0.0}
    norm = {"norm.weight": 1.0, "norm.bias": 0.0}
    return (convolution if compression.sampling == "conv" else {}) | (
        norm if compression.norm == "layer" else {}
    )
