"""Keys and values as 8-bit numbers: the two kernels that make them for attention.

    mean = Σ_m K / M        K8 = round((K - mean) / c),   c = max |K - mean| / 127 of KEYS keys of a head
                            V8 = e4m3(V / f),             f = max |V| / 448 of a channel of a head

The first sums up parts of a head, the second makes a block of it. K is read twice and written once, in 8
bits, each key padded with zeros to what products of 8-bit numbers sum over; so is V, if that is asked for,
with its tokens contiguous: such a product reads both factors along what it sums over.

B batch, M keys, H heads, D head channels.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.attention import eight_bit_formats as formats
from pixart_kernels.attention.tiles import (
    head_of,
    length_of,
    load_tile,
    stride_divisor,
    strides_of,
)
from pixart_kernels.dispatch import launch

KEYS = tl.constexpr(formats.KEYS)
LEAST = tl.constexpr(formats.LEAST)
INTEGER = tl.constexpr(formats.LARGEST_INTEGER)
E4M3 = tl.constexpr(formats.LARGEST_E4M3)
# Adding and taking away 1.5 · 2^23 rounds an fp32 of less than 2^22 to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
PARTS = tl.constexpr(16)  # programs that sum up the tokens of a head

Quantised = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@triton.jit
def integers(x, largest):
    """x as int8, where `largest` is at least each |x|."""
    scaled = x * (INTEGER / tl.maximum(largest, LEAST))
    return (scaled + ROUNDER - ROUNDER).to(tl.int8)


@triton.jit
def _scale_of(largest, x, AXIS: tl.constexpr):
    """That of _integers; NaN if x has NaN or infinity, which int8 would hide."""
    return tl.maximum(largest, LEAST) / INTEGER + tl.sum(x * 0.0, AXIS)


@triton.jit
def _statistics(
    k_ptr, v_ptr, sums_ptr, largest_ptr, lengths_ptr,
    k_strides, v_strides, heads, keys, size,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Sums of K, and the largest |V| unless that is not asked for, of each of PARTS parts of a head,
    `size` tokens each: (B·H, PARTS, D)."""
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    b, h, first = row // heads, row % heads, part * size
    b_64, h_64, first_64 = b.to(tl.int64), h.to(tl.int64), first.to(tl.int64)
    k_stride, v_stride = k_strides[1] * DIVISOR, v_strides[1] * DIVISOR
    k_ptr = head_of(k_ptr, k_strides, b_64, h_64, DIVISOR) + first_64 * k_stride
    v_ptr = head_of(v_ptr, v_strides, b_64, h_64, DIVISOR) + first_64 * v_stride
    last = tl.minimum(first + size, length_of(lengths_ptr, b, keys))
    sums = tl.zeros([COLUMNS], tl.float32)
    largest = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(first, last, KEYS):
        k = load_tile(k_ptr, k_stride, last - start, 0, HEAD_DIM, KEYS, COLUMNS, True)
        sums += tl.sum(k.to(tl.float32), 0)
        k_ptr += KEYS * k_stride
        if largest_ptr is not None:
            v = load_tile(v_ptr, v_stride, last - start, 0, HEAD_DIM, KEYS, COLUMNS, True)
            largest = tl.maximum(largest, tl.max(tl.abs(v.to(tl.float32)), 0))
            v_ptr += KEYS * v_stride
    columns = tl.arange(0, COLUMNS)
    place = tl.program_id(0) * HEAD_DIM + columns
    tl.store(sums_ptr + place, sums, mask=columns < HEAD_DIM)
    if largest_ptr is not None:
        tl.store(largest_ptr + place, largest, mask=columns < HEAD_DIM)


@triton.jit
def _parts(ptr, row, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """What _statistics stored of a head, (PARTS, COLUMNS)."""
    columns = tl.arange(0, COLUMNS)[None, :]
    place = (row * PARTS + tl.arange(0, PARTS)[:, None]) * HEAD_DIM + columns
    return tl.load(ptr + place, mask=columns < HEAD_DIM, other=0.0)


@triton.jit
def _mean(ptr, row, length, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """That of the keys of a head, of each channel."""
    return tl.sum(_parts(ptr, row, HEAD_DIM, COLUMNS), 0) / tl.maximum(length, 1)


@triton.jit
def _quantise_kv(
    k_ptr, v_ptr, sums_ptr, largest_ptr, k_out_ptr, k_scales_ptr, v_out_ptr, v_scales_ptr, lengths_ptr,
    k_strides, v_strides, heads, keys, blocks,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """A block of keys and values of a head: K8 (B·H, M, K_WIDTH) with a scale for each block, and, if
    asked for, V8 (B·H, V_WIDTH, M) with one for each channel; zeros beyond D and beyond M or the length.
    """
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h, first = row // heads, row % heads, block * KEYS
    b_64, h_64, first_64 = b.to(tl.int64), h.to(tl.int64), first.to(tl.int64)
    length = length_of(lengths_ptr, b, keys)
    left = length - first
    if (left > 0) | (block == 0):  # the first is read of a sample without keys, too
        rows, columns = tl.arange(0, KEYS)[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (rows < left) & (columns < HEAD_DIM)
        k_stride = k_strides[1] * DIVISOR
        k_ptr = head_of(k_ptr, k_strides, b_64, h_64, DIVISOR) + first_64 * k_stride
        k = load_tile(k_ptr, k_stride, left, 0, HEAD_DIM, KEYS, COLUMNS, True).to(tl.float32)
        mean = _mean(sums_ptr, row, length, HEAD_DIM, COLUMNS)
        k = tl.where(inside, k - mean[None, :], 0.0)
        largest = tl.max(tl.max(tl.abs(k), 1), 0)
        tl.store(k_scales_ptr + row * blocks + block, _scale_of(largest, tl.sum(k * 0.0, 1), 0))
        token = row.to(tl.int64) * blocks * KEYS + first
        place = k_out_ptr + token * K_WIDTH + rows * K_WIDTH + columns
        tl.store(place, integers(k, largest), mask=columns < K_WIDTH)
        if v_out_ptr is not None:
            v_stride = v_strides[1] * DIVISOR
            v_ptr = head_of(v_ptr, v_strides, b_64, h_64, DIVISOR) + first_64 * v_stride
            v = load_tile(v_ptr, v_stride, left, 0, HEAD_DIM, KEYS, COLUMNS, True).to(tl.float32)
            most = tl.max(_parts(largest_ptr, row, HEAD_DIM, COLUMNS), 0)
            most = tl.maximum(most, LEAST)
            factor = E4M3 / most
            v8 = (v * factor[None, :]).to(tl.float8e4nv)
            channels = tl.arange(0, COLUMNS)
            if block == 0:
                tl.store(
                    v_scales_ptr + row * V_WIDTH + channels, most / E4M3, mask=channels < V_WIDTH
                )
            place = (row.to(tl.int64) * V_WIDTH + channels[:, None]) * (blocks * KEYS) + first
            place += tl.arange(0, KEYS)[None, :]
            tl.store(v_out_ptr + place, v8.T, mask=channels[:, None] < V_WIDTH)


def quantiser(
    k: Tensor, v: Tensor, k_width: int, v_width: int, blocks: int, fp8: bool
) -> Callable[[Tensor, Tensor, Tensor | None], Quantised]:
    """What makes, for tensors like k and v, from those and lengths: K8 (B·H, M, k_width) and its scales
    (B·H, blocks); V8 (B·H, v_width, M) and its scales (B·H, v_width), or None and None unless fp8. M is
    made up to whole blocks."""
    batch, keys, heads, head_dim = k.shape
    rows, divisor = batch * heads, stride_divisor(k, v)
    columns = triton.next_power_of_2(max(k_width, v_width))
    strides = (strides_of(k, divisor), strides_of(v, divisor))
    part = triton.cdiv(keys, PARTS.value * KEYS.value) * KEYS.value
    find = launch.Launch(
        _statistics,
        k.device,
        (rows * PARTS.value,),
        (*strides, heads, keys, part),
        {"HEAD_DIM": head_dim, "COLUMNS": columns, "DIVISOR": divisor},
        {},
    )
    quantise = launch.Launch(
        _quantise_kv,
        k.device,
        (rows * blocks,),
        (*strides, heads, keys, blocks),
        {
            "HEAD_DIM": head_dim, "COLUMNS": columns, "K_WIDTH": k_width, "V_WIDTH": v_width,
            "DIVISOR": divisor,
        },
        {"num_warps": 8},
    )  # fmt: skip
    tokens = blocks * KEYS.value

    def compute(k: Tensor, v: Tensor, lengths: Tensor | None) -> Quantised:
        sums = k.new_empty((rows, PARTS.value, head_dim), dtype=torch.float32)
        k8 = k.new_empty((rows, tokens, k_width), dtype=torch.int8)
        k_scales = k.new_empty((rows, blocks), dtype=torch.float32)
        largest = v8 = v_scales = None
        if fp8:
            largest = torch.empty_like(sums)
            v8 = k.new_empty((rows, v_width, tokens), dtype=torch.float8_e4m3fn)
            v_scales = k.new_empty((rows, v_width), dtype=torch.float32)
        find(k, v, sums, largest, lengths)
        quantise(k, v, sums, largest, k8, k_scales, v8, v_scales, lengths)
        return k8, k_scales, v8, v_scales

    return compute
