"""Key/value token compression (PixArt-Σ, section 3.2): merge each R×R patch of tokens into one.

    T'[b, i, j] = LayerNorm(bias + sum_{p, q < R} weight[:, p, q] · T[b, R·i + p, R·j + q])

for T = K and T = V with the same weights. B batch, C channels, R ratio; the grid has H rows of W
tokens. A grid that R does not divide is completed by repeating its last row or column: no token is
dropped (the published code drops them), and under averaging weights a constant stays constant. Sums
and statistics are fp32; the output is rounded once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_kernels.dispatch.bypass import Compute
from pixart_kernels.dispatch.registration import (
    are_known,
    check_device,
    check_floating,
    register_backward,
    register_operator,
    without_autocast,
)

MAX_RATIO = 4


@without_autocast
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
    """LayerNorm(bias + conv(T)) of keys and of values, with the same weights, in plain PyTorch.

    The convolution is depthwise, ratio × ratio with a stride of ratio (PixArt-Σ, arXiv:2403.04692,
    section 3.2), over a grid whose last row and column are repeated where ratio does not divide it.
    k, v: (B, H·W, C) in row-major order of grid = (H, W); weight: (C, 1, ratio, ratio); bias: (C,);
    norm_weight, norm_bias: (C,), or both None for no LayerNorm. Computes in fp32 whatever the
    dtypes, also under autocast; fp64 stays fp64. Returns (B, ⌈H/ratio⌉·⌈W/ratio⌉, C) twice, in the
    dtype of k and of v.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    weight, bias = weight.to(dtype), bias.to(dtype)

    def compress(tokens: Tensor) -> Tensor:
        merged = _merge_patches(tokens.to(dtype), weight, bias, grid, ratio)
        if norm_weight is not None and norm_bias is not None:
            merged = F.layer_norm(
                merged, bias.shape, norm_weight.to(dtype), norm_bias.to(dtype), eps
            )
        return merged.to(tokens.dtype)

    return compress(k), compress(v)


def _merge_patches(
    tokens: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], ratio: int
) -> Tensor:
    image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, C, H, W)
    padding = (0, -grid[1] % ratio, 0, -grid[0] % ratio)
    if not are_known(*padding):
        rows, cols = (_completed(length, ratio, image.device) for length in grid)
        image = image.index_select(2, rows).index_select(3, cols)
    elif any(padding):
        image = F.pad(image, padding, mode="replicate")
    merged = F.conv2d(image, weight, bias, stride=ratio, groups=image.shape[1])
    return merged.flatten(2).transpose(1, 2)


def _completed(length: int, ratio: int, device: torch.device) -> Tensor:
    """The rows or columns 0 ... length - 1, the last repeated until ratio divides their number."""
    whole = -(-length // ratio) * ratio
    return torch.arange(whole, device=device).clamp(max=length - 1)


def _compress(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    height: int,
    width: int,
    ratio: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    affine = (norm_weight, norm_bias)
    return compress_kv_reference(
        k, v, weight, bias, *affine, grid=(height, width), ratio=ratio, eps=eps
    )


def _prepare(*arguments: Any) -> Compute:
    from pixart_kernels.compression.kernels import prepare_forward

    return prepare_forward(*arguments)


def _fake(k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, height, width, ratio, _ = rest
    merged = -(-height // ratio) * -(-width // ratio)
    shape = (k.shape[0], merged, k.shape[2])
    return k.new_empty(shape), v.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, height, width, ratio, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = height, width, ratio, eps


def _backward(ctx: Any, grad_k: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
    given = grad_v if grad_k is None else grad_k
    if given is None:
        return (None,) * 10
    # One kernel takes both; who uses one of the two has a gradient of the other that is zero.
    grad_k = torch.zeros_like(given) if grad_k is None else grad_k
    grad_v = torch.zeros_like(given) if grad_v is None else grad_v
    *inputs, norm_bias = ctx.saved_tensors
    dk, dv, rows = _compress_backward(grad_k, grad_v, *inputs, *ctx.rest)
    weight, taps = inputs[2], ctx.rest[2] ** 2
    found = [dk, dv, rows[:taps].t().reshape(weight.shape), *rows[taps:], None, None]
    parameters = zip(found, (*inputs, norm_bias), ctx.needs_input_grad, strict=False)
    gradients = [
        grad.to(tensor.dtype) if needs and grad is not None else None
        for grad, tensor, needs in parameters
    ]
    return *gradients, None, None, None, None


def _backward_schema(
    grad_k: Tensor,
    grad_v: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    height: int,
    width: int,
    ratio: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and, as one (rows, C) in fp32, the gradients of weight, R·R rows of it, and of bias,
    norm_weight and norm_bias."""
    raise NotImplementedError


def _prepare_backward(*arguments: Any) -> Compute:
    from pixart_kernels.compression.kernels import prepare_backward

    return prepare_backward(*arguments)


def _fake_backward(
    grad_k: Tensor,
    grad_v: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    height: int,
    width: int,
    ratio: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = ratio**2 + (1 if norm_weight is None else 3)
    return (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        k.new_empty((rows, k.shape[2]), dtype=torch.float32),
    )


_compress_operator = register_operator(
    "compress_kv",
    _compress,
    check=lambda *arguments: _check(*arguments),  # which stands below
    prepare=_prepare,
    fake=_fake,
    save=_save,
    backward=_backward,
)
_compress_backward = register_backward(
    "compress_kv_backward", _backward_schema, prepare=_prepare_backward, fake=_fake_backward
)


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
    the LayerNorm out. k and v are of one dtype, fp32, bf16, fp16 or fp64, each weight of any; sums are
    fp32 (fp64 for fp64, by the reference). Returns (B, ⌈H/ratio⌉·⌈W/ratio⌉, C) twice, in the dtype of
    k and v, under autocast too. Raises ValueError for shapes that do not fit the grid and for a ratio
    beyond 4. Differentiable in all tensors; in forward mode and under torch.func by the reference.
    From PixArt-Σ (arXiv:2403.04692), section 3.2.
    """
    height, width = grid
    # A symbol made an int would be the number that it was traced with.
    height = height if isinstance(height, torch.SymInt) else int(height)
    width = width if isinstance(width, torch.SymInt) else int(width)
    return _compress_operator(
        k, v, weight, bias, norm_weight, norm_bias, height, width, int(ratio), float(eps)
    )


def _check(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    height: int,
    width: int,
    ratio: int,
    eps: float,
) -> None:
    channels = k.shape[-1]
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"k and v must be two (B, H·W, C), got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    check_floating("k", k)
    check_device("v", v, k)
    if k.dtype != v.dtype:
        raise ValueError(f"v must have the dtype of k, {k.dtype}, got {v.dtype}")
    if height * width != k.shape[1]:
        raise ValueError(f"grid must have {k.shape[1]} tokens, got {height}×{width}")
    if not 1 <= ratio <= MAX_RATIO:
        raise ValueError(f"ratio must be from 1 to {MAX_RATIO}, got {ratio}")
    if weight.shape != (channels, 1, ratio, ratio):
        raise ValueError(
            f"weight must have shape {(channels, 1, ratio, ratio)}, got {tuple(weight.shape)}"
        )
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must be given together, got one of them")
    rows = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, row in rows.items():
        if row is not None and row.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(row.shape)}")
    for name, parameter in {"weight": weight, **rows}.items():
        if parameter is not None:
            check_floating(name, parameter)
            check_device(name, parameter, k)


def fold_projection(
    weight_kv: Tensor, bias_kv: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The projection to keys and values and the merging of their patches, as one projection.

    weight_kv: (2·C, I), keys before values, and bias_kv: (2·C,), as in a Linear of I features;
    weight: (C, 1, R, R) and bias: (C,), as in compress_kv. Returns (2·C, R·R·I) and (2·C,) in the
    dtype of weight_kv, for tokens laid side by side by patch, (B, M, R·R·I) with the R·R tokens in
    row-major order: a view of a sequence that is ordered by patches. What is left of compress_kv is
    the LayerNorm: ratio=1 with a weight of ones and a bias of zeros. Raises ValueError if weight_kv
    does not have 2·C rows.
    """
    channels = weight.shape[0]
    if weight_kv.dim() != 2 or weight_kv.shape[0] != 2 * channels:
        raise ValueError(
            f"weight_kv must have {2 * channels} rows, got shape {tuple(weight_kv.shape)}"
        )
    taps = weight.float().flatten(1).repeat(2, 1)  # (2·C, R·R)
    folded = (taps.unsqueeze(2) * weight_kv.float().unsqueeze(1)).flatten(1)
    offset = taps.sum(1) * bias_kv.float() + bias.float().repeat(2)
    return folded.to(weight_kv.dtype), offset.to(bias_kv.dtype)
