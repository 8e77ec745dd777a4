"""Key/value token compression (PixArt-Σ, section 3.2): merge each R×R patch of tokens into one.

    T'[b, i, j] = LayerNorm(bias + sum_{p, q < R} weight[:, p, q] · T[b, R·i + p, R·j + q])

for T = K and T = V with the same weights. B batch, C channels, R ratio; the grid has H rows of W
tokens. A grid that R does not divide is completed by repeating its last row or column: no token is
dropped (the published code drops them), and under averaging weights a constant stays constant. Sums
and statistics are fp32; the output is rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RATIO = 4


def compress_kv_reference(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    grid: tuple[int, int],
    ratio: int,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(k.dtype, torch.float32)
    weight, bias = weight.to(dtype), bias.to(dtype)

    def compress(tokens: Tensor) -> Tensor:
        merged = _merge_patches(tokens.to(dtype), weight, bias, grid, ratio)
        if norm_weight is not None and norm_bias is not None:
            merged = F.layer_norm(
                merged, bias.shape, norm_weight.to(dtype), norm_bias.to(dtype), eps
            )
        return merged.to(tokens.dtype)

    with torch.autocast(k.device.type, enabled=False):
        return compress(k), compress(v)


def _merge_patches(
    tokens: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], ratio: int
) -> Tensor:
    image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, C, H, W)
    padding = (0, -grid[1] % ratio, 0, -grid[0] % ratio)
    if any(padding):
        image = F.pad(image, padding, mode="replicate")
    merged = F.conv2d(image, weight, bias, stride=ratio, groups=image.shape[1])
    return merged.flatten(2).transpose(1, 2)


def compress_kv(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    grid: tuple[int, int],
    ratio: int,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Merge each ratio×ratio patch of key and of value tokens into one, with the same weights.

    k, v: (B, H·W, C) in row-major grid order, C contiguous, any token stride; grid: (H, W).
    weight: (C, 1, ratio, ratio); bias: (C,). norm_weight, norm_bias: (C,), or both None to leave
    the LayerNorm out. Returns (B, ⌈H/ratio⌉·⌈W/ratio⌉, C) twice, in the dtype of k and v.
    """
    channels = k.shape[-1]
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"k and v must be two (B, H·W, C), got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if grid[0] * grid[1] != k.shape[1]:
        raise ValueError(f"grid must have {k.shape[1]} tokens, got {grid[0]}×{grid[1]}")
    if not 1 <= ratio <= MAX_RATIO:
        raise ValueError(f"ratio must be from 1 to {MAX_RATIO}, got {ratio}")
    if weight.shape != (channels, 1, ratio, ratio):
        raise ValueError(
            f"weight must have shape {(channels, 1, ratio, ratio)}, got {tuple(weight.shape)}"
        )
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must be given together, got one of them")
    for name, row in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if row is not None and row.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(row.shape)}")
    return compress_kv_reference(
        k, v, weight, bias, norm_weight, norm_bias, grid=grid, ratio=ratio, eps=eps
    )
