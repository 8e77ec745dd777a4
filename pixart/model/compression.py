"""KV token compression (PixArt-Σ, section 3.2): how tokens are merged, and how that starts.

Axis letters: B batch, N image tokens (rows·cols), M merged tokens, C channels, R ratio.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pixart.config import KVCompression
from pixart_kernels import compress_kv


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
        weight, bias = merging_weights(k, compression.ratio, sr)
        affine = (None, None) if norm is None else (norm.weight, norm.bias)
        return compress_kv(k, v, weight, bias, *affine, grid=grid, ratio=compression.ratio)
    k, v = (_take_tokens(tokens, grid, compression) for tokens in (k, v))
    return (k, v) if norm is None else (layer_norm(k, norm), layer_norm(v, norm))


@lru_cache(maxsize=8)
def averaging(ratio: int) -> KVCompression:
    """Merging without training, whatever the block."""
    return KVCompression((), ratio, "average", "none")


def mean_tokens(tokens: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """(B, M, C) of (B, N, C): the mean of each R×R patch, summed in fp32, as compress_tokens has it for an
    "average": a grid that R does not divide is completed by repeating its last row or column."""
    image = tokens.unflatten(1, grid)  # (B, rows, cols, C)
    for axis, side in ((1, grid[0]), (2, grid[1])):
        if missing := -side % ratio:
            last = image.narrow(axis, side - 1, 1)
            image = torch.cat([image, last.repeat_interleave(missing, axis)], axis)
    patches = image.unflatten(2, (-1, ratio)).unflatten(1, (-1, ratio))  # (B, m, R, m', R, C)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return patches.mean((2, 4), dtype=dtype).to(tokens.dtype).flatten(1, 2)


def merging_weights(like: Tensor, ratio: int, sr: nn.Conv2d | None) -> tuple[Tensor, Tensor]:
    """(C, 1, R, R) and (C,) by which patches of tokens are summed: the convolution's own, or those
    of the mean, in fp32 and as many as `like` (..., C) has channels."""
    if sr is not None:
        assert sr.bias is not None
        return sr.weight, sr.bias
    width = like.shape[-1]
    weight = like.new_full((width, 1, ratio, ratio), _mean(ratio), dtype=torch.float32)
    return weight, like.new_zeros(width, dtype=torch.float32)


def layer_norm(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(tokens), computed in fp32 and rounded to the tokens' dtype."""
    # On a CPU, PyTorch sums the weight gradients of 16-bit tokens in 16 bits.
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(tokens.float(), weight.shape, weight, bias, norm.eps).to(tokens.dtype)


def _take_tokens(tokens: Tensor, grid: tuple[int, int], compression: KVCompression) -> Tensor:
    ratio = compression.ratio
    if compression.sampling == "uniform_every":
        return tokens[:, ::ratio]
    return tokens.unflatten(1, grid)[:, ::ratio, ::ratio].flatten(1, 2)


def initial_values(
    compression: KVCompression, width: int
) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and number of every tensor that compression adds to a self-attention of that width, by
    its name there: the convolution starts as the mean of its R×R tokens, the norm plain."""
    ratio = compression.ratio
    values: dict[str, tuple[tuple[int, ...], float]] = {}
    if ratio > 1 and compression.sampling == "conv":
        values["sr.weight"] = ((width, 1, ratio, ratio), _mean(ratio))
        values["sr.bias"] = ((width,), 0.0)
    if ratio > 1 and compression.norm == "layer":
        values["norm.weight"] = ((width,), 1.0)
        values["norm.bias"] = ((width,), 0.0)
    return values


def initialise(attention: nn.Module, compression: KVCompression, width: int) -> None:
    """Set what compression has added to a self-attention to its initial values."""
    for name, (_, value) in initial_values(compression, width).items():
        nn.init.constant_(attention.get_parameter(name), value)


def add_merging(
    attention: nn.Module,
    compression: KVCompression,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Add `sr` and `norm` to a self-attention, ours or diffusers', at their initial values. Draws no
    random numbers, so that what is drawn afterwards is what it was."""
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    added = initial_values(compression, width)
    if "sr.weight" in added:
        shape: dict[str, Any] = {"kernel_size": compression.ratio, "stride": compression.ratio}
        attention.sr = skip_init(nn.Conv2d, width, width, **shape, groups=width, **place)
    if "norm.weight" in added:
        attention.norm = nn.LayerNorm(width, **place)
    initialise(attention, compression, width)


def _mean(ratio: int) -> float:
    return ratio**-2
