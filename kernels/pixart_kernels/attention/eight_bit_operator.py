"""Attention whose products are of 8-bit numbers, for inference: what it computes, and on a CPU how.

    O[b, n, h] = sum_m softmax_m(scale · Q[b, n, h]·K[b, m, h]) V[b, m, h],    m < kv_lengths[b]

Queries and keys are multiplied as 8-bit integers, exactly, with sums of 32 bits. Before that the mean
of a head's keys is taken from each: it adds the same to all scores of a query, which the softmax does
not see, and it is what most outliers of K are (SageAttention, arXiv:2410.02367). A query has a scale
of its own, KEYS keys together have one. Under "int8" weights and values are multiplied in 16 bits,
under "fp8" as e4m3, of which each channel of V has a scale (SageAttention2, arXiv:2411.10958).
"""

import math
from typing import Any

import torch
from torch import Tensor

from pixart_kernels.attention.eight_bit_formats import (
    KEYS,
    LARGEST_E4M3,
    LARGEST_INTEGER,
    LEAST,
    PRECISIONS,
    SHIFT,
)
from pixart_kernels.dispatch.bypass import Compute, Door
from pixart_kernels.dispatch.registration import (
    NAMESPACE,
    TRITON_DEVICES,
    in_forward_mode,
    is_transformed,
    without_autocast,
)


@without_autocast
def flash_attention_8bit_reference(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float | None, precision: str
) -> Tensor:
    """The formula, rounding where the kernel rounds: what runs on a CPU.

    q: (B, N, H, D); k, v: (B, M, H, D), fp32, bf16 or fp16; kv_lengths: (B,) integers or None; precision:
    one of PRECISIONS. Returns (B, N, H, D) in q's dtype. Slower than the formula in full precision.
    """
    if q.numel() == 0 or k.shape[1] == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if kv_lengths is None:
        return _attend(q, k, v, scale, precision)
    lengths = kv_lengths.clamp(0, k.shape[1]).tolist()
    samples = zip(q.split(1), k.split(1), v.split(1), lengths, strict=True)
    return torch.cat(
        [
            _attend(one_q, one_k[:, :length], one_v[:, :length], scale, precision)
            for one_q, one_k, one_v, length in samples
        ]
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str) -> Tensor:
    """Of samples that have all their keys."""
    keys = k.shape[1]
    if keys == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    dtype, shift = q.dtype, SHIFT[precision]
    factors = v.float().new_ones(())  # of the channels of V
    if precision == "fp8":
        v, factors = _as_e4m3(v)
    weight_dtype = v.dtype if v.dtype != torch.float32 else torch.bfloat16
    v = v.to(weight_dtype).float().transpose(1, 2)  # (B, H, M, D)
    q = q.float().transpose(1, 2) * (scale * math.log2(math.e))
    k = k.float()
    k = (k - k.mean(1, keepdim=True)).transpose(1, 2)
    q, q_scales = _as_integers(q, q.abs().amax(-1, keepdim=True))
    # As the kernel does, the block that may be short first. Peaks are whole numbers, of powers of two.
    last = (keys - 1) // KEYS * KEYS
    peak = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, acc = torch.zeros_like(peak), torch.zeros_like(q)
    for start in (last, *range(0, last, KEYS)):
        some = k[:, :, start : start + KEYS]
        some, k_scale = _as_integers(some, some.abs().amax((2, 3), keepdim=True))
        # fp32 holds sums of 128 products of 127 · 127 exactly.
        scores = (q @ some.transpose(2, 3)) * (q_scales * k_scale)
        highest = torch.maximum(peak, scores.amax(-1, keepdim=True).ceil())
        weights = torch.exp2(scores - (highest - shift))
        shrink = torch.exp2(peak - highest)
        total = total * shrink + weights.sum(-1, keepdim=True)
        weights = weights.to(weight_dtype).float()
        acc = acc * shrink + weights @ v[:, :, start : start + KEYS]
        peak = highest
    return (acc / total * factors).transpose(1, 2).to(dtype).contiguous()


def _as_integers(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """x as whole numbers of at most LARGEST_INTEGER, and their scale; NaN where x has NaN or infinity."""
    largest = largest.clamp(min=LEAST)
    # A number over a tensor would be the number times the rounded reciprocal.
    factor = torch.full_like(largest, LARGEST_INTEGER) / largest
    return (x * factor).round(), largest / LARGEST_INTEGER


def _as_e4m3(v: Tensor) -> tuple[Tensor, Tensor]:
    """v (B, M, H, D) as e4m3, and the factors (B, H, 1, D) of its channels."""
    largest = v.float().abs().amax(1, keepdim=True).clamp(min=LEAST)
    factor = torch.full_like(largest, LARGEST_E4M3) / largest
    rounded = (v.float() * factor).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return rounded, (largest / LARGEST_E4M3).transpose(1, 2)


def _prepare(*arguments: Any) -> Compute:
    from pixart_kernels.attention.eight_bit import prepare

    return prepare(*arguments)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float | None, precision: str
) -> Tensor:
    return q.new_empty(q.shape)


# Neither has a gradient: that of rounding is zero.
_operator: Any = torch.library.custom_op(
    f"{NAMESPACE}::flash_attention_8bit", flash_attention_8bit_reference, mutates_args=()
)
_attention = Door(TRITON_DEVICES, None, _prepare, _operator)
_operator.register_kernel(TRITON_DEVICES)(_attention.compute)
_operator.register_fake(_fake)


def flash_attention_8bit(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float | None, precision: str
) -> Tensor:
    """What `flash_attention` returns when it is given a precision; its other arguments are checked.

    precision: "int8", or "fp8", which wants an NVIDIA GPU of sm_89 or later where there is a GPU.
    Raises ValueError for another, for fp64 tokens, and where a gradient is wanted.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be "int8", "fp8" or None, got {precision!r}')
    if q.dtype == torch.float64:
        raise ValueError(
            f"q must be fp32, bf16 or fp16 where precision is {precision!r}, got {q.dtype}; cast it"
        )
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wants_grad or in_forward_mode() or is_transformed():
        raise ValueError(
            f"precision must be None where a derivative is wanted or torch.func is at work, got "
            f"{precision!r}: 8-bit attention has none; call it under torch.no_grad()"
        )
    return _attention(q, k, v, kv_lengths, scale, precision)
