"""The kernel of 8-bit attention: softmax over blocks of keys, with both products in 8 bits or the first.

With s = scale · log2(e), and K8, V8 and their scales c and f as quantisation.py makes them:

    Q8 = round(s Q / a),  a = max |s Q| / 127 of a query
    P = exp2(a c · Q8 K8ᵀ - peak)     total = Σ_m P     O = P V / total

where peak is the largest score so far, made up to a whole number: so P is rounded alike beside every
peak, whatever the blocks are. Q8 K8ᵀ is exact, in 32-bit integers. Under "int8" P is rounded to the dtype
of V (bf16 where that is fp32) and P V summed in fp32. Under "fp8" P is made up to 2^8 and rounded to e4m3,
as V8 is, and O gets the factors f when it is stored. Tensor cores of Ada and Hopper keep about 14 bits of a
sum of e4m3 products, so each block of keys is summed on its own and added in fp32, by the instruction
that shrinks what was summed before it.

B batch, N queries, M keys, H heads, D head channels, cut in two as tiles.py says: for Q Kᵀ, whose 8-bit
products sum over 32, 72 is 64 + 32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.attention import eight_bit_formats as formats
from pixart_kernels.attention.forward_launcher import value_tail
from pixart_kernels.attention.quantisation import (
    INTEGER,
    KEYS,
    LEAST,
    Quantised,
    integers,
    quantiser,
)
from pixart_kernels.attention.tiles import (
    head_of,
    length_of,
    load_tile,
    split,
    stride_divisor,
    strides_of,
)
from pixart_kernels.dispatch import configurations, launch
from pixart_kernels.dispatch.bypass import Compute

KERNEL = "attention.eight_bit"  # in the table of configurations
SHIFT = tl.constexpr(formats.SHIFT["fp8"])
SMALLEST = 32  # columns that an 8-bit product may sum over


@triton.jit
def _scores(
    q, q_tail, ptr, BLOCK_K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Q8 K8ᵀ of a block, as fp32."""
    rows = tl.arange(0, BLOCK_K)[:, None] * (MAIN + TAIL)
    k = tl.load(ptr + rows + tl.arange(0, MAIN)[None, :])
    if TAIL:
        k_tail = tl.load(ptr + rows + MAIN + tl.arange(0, TAIL)[None, :])
        scores = tl.dot(q_tail, k_tail.T, out_dtype=tl.int32)
        return tl.dot(q, k.T, scores, out_dtype=tl.int32).to(tl.float32)
    else:
        return tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def _values(
    ptr, stride, left, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """V of a block, (BLOCK_K, COLUMNS), or V8, whose tokens are contiguous."""
    if FP8:
        channels = FIRST + tl.arange(0, COLUMNS)[:, None]
        return tl.load(ptr + channels * stride + tl.arange(0, BLOCK_K)[None, :]).T
    else:
        return load_tile(ptr, stride, left, FIRST, HEAD_DIM, BLOCK_K, COLUMNS, MASKED)


@triton.jit
def _add(acc, shrink, weights, v, FP8: tl.constexpr, BLOCK_K: tl.constexpr):
    """shrink · acc + P V."""
    if FP8:
        return acc * shrink[:, None] + tl.dot(weights, v, max_num_imprecise_acc=BLOCK_K)
    else:
        return tl.dot(weights, v, acc * shrink[:, None])


@triton.jit
def _attend(
    q_ptr, k_ptr, k_scales_ptr, v_ptr, v_scales_ptr, out_ptr, lengths_ptr,
    q_strides, v_strides, scale, heads, queries, keys, blocks,
    HEAD_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_TAIL: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, DIVISOR: tl.constexpr, FP8: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_Q)
    row = tl.program_id(0) // tiles
    b, h, first = row // heads, row % heads, tl.program_id(0) % tiles * BLOCK_Q
    left = queries - first
    b_64, h_64, first_64 = b.to(tl.int64), h.to(tl.int64), first.to(tl.int64)
    q_ptr += (b_64 * q_strides[0] + first_64 * q_strides[1] + h_64 * q_strides[2]) * DIVISOR
    q_stride = q_strides[1] * DIVISOR
    k_ptr += row.to(tl.int64) * blocks * KEYS * (K_MAIN + K_TAIL)
    k_scales_ptr += row.to(tl.int64) * blocks
    if FP8:
        v_ptr += row.to(tl.int64) * blocks * KEYS * (V_MAIN + V_TAIL)
        v_stride, v_step = blocks * KEYS, 1
    else:
        v_ptr = head_of(v_ptr, v_strides, b_64, h_64, DIVISOR)
        v_stride = v_strides[1] * DIVISOR
        v_step = v_stride
    length = length_of(lengths_ptr, b, keys)

    q = load_tile(q_ptr, q_stride, left, 0, HEAD_DIM, BLOCK_Q, K_MAIN, True).to(tl.float32) * scale
    largest, spoilt = tl.max(tl.abs(q), 1), tl.sum(q * 0.0, 1)
    q_tail = q
    if K_TAIL:
        q_tail = load_tile(q_ptr, q_stride, left, K_MAIN, HEAD_DIM, BLOCK_Q, K_TAIL, True)
        q_tail = q_tail.to(tl.float32) * scale
        largest = tl.maximum(largest, tl.max(tl.abs(q_tail), 1))
        spoilt += tl.sum(q_tail * 0.0, 1)
        q_tail = integers(q_tail, largest[:, None])
    q = integers(q, largest[:, None])
    q_scales = tl.maximum(largest, LEAST) / INTEGER + spoilt

    # The block that may be short comes first: there is nothing yet to shrink, and no other needs a mask.
    # Its length is 0 for a sample without keys only.
    last = tl.maximum(length - 1, 0) // BLOCK_K * BLOCK_K
    short, last_64 = length - last, last.to(tl.int64)
    k_block = k_ptr + last_64 * (K_MAIN + K_TAIL)
    factor = q_scales * tl.load(k_scales_ptr + last // KEYS)
    scores = _scores(q, q_tail, k_block, BLOCK_K, K_MAIN, K_TAIL) * factor[:, None]
    scores = tl.where(tl.arange(0, BLOCK_K)[None, :] < short, scores, float("-inf"))
    peak = tl.where(short == 0, 0.0, tl.ceil(tl.max(scores, 1)))
    weights = tl.math.exp2(scores - (peak - (SHIFT if FP8 else 0.0))[:, None])
    total = tl.sum(weights, 1)
    v_block = v_ptr + last_64 * v_step
    v = _values(v_block, v_stride, short, 0, HEAD_DIM, BLOCK_K, V_MAIN, True, FP8)
    rounded = weights.to(v.dtype)
    acc = tl.dot(rounded, v)
    acc_tail = acc
    if V_TAIL:
        v = _values(v_block, v_stride, short, V_MAIN, HEAD_DIM, BLOCK_K, V_TAIL, True, FP8)
        acc_tail = tl.dot(rounded, v)

    k_block, v_block = k_ptr, v_ptr
    for start in tl.range(0, last, BLOCK_K):
        factor = q_scales * tl.load(k_scales_ptr + start // KEYS)
        scores = _scores(q, q_tail, k_block, BLOCK_K, K_MAIN, K_TAIL)
        highest = tl.maximum(peak, tl.ceil(tl.max(scores, 1) * factor))
        offset = highest - (SHIFT if FP8 else 0.0)
        weights = tl.math.exp2(scores * factor[:, None] - offset[:, None])
        shrink = tl.math.exp2(peak - highest)
        total = total * shrink + tl.sum(weights, 1)
        v = _values(v_block, v_stride, 0, 0, HEAD_DIM, BLOCK_K, V_MAIN, False, FP8)
        rounded = weights.to(v.dtype)
        acc = _add(acc, shrink, rounded, v, FP8, BLOCK_K)
        if V_TAIL:
            v = _values(v_block, v_stride, 0, V_MAIN, HEAD_DIM, BLOCK_K, V_TAIL, False, FP8)
            acc_tail = _add(acc_tail, shrink, rounded, v, FP8, BLOCK_K)
        peak = highest
        k_block += BLOCK_K * (K_MAIN + K_TAIL)
        v_block += BLOCK_K * v_step

    total = tl.where(total == 0, 1.0, total)  # no key: acc is 0
    out_ptr += ((b_64 * queries + first) * heads + h) * HEAD_DIM
    v_scales_ptr = v_scales_ptr + row * (V_MAIN + V_TAIL) if FP8 else None
    _store(
        out_ptr, heads * HEAD_DIM, left, acc / total[:, None], v_scales_ptr,
        0, HEAD_DIM, BLOCK_Q, V_MAIN, FP8,
    )  # fmt: skip
    if V_TAIL:
        _store(
            out_ptr, heads * HEAD_DIM, left, acc_tail / total[:, None], v_scales_ptr,
            V_MAIN, HEAD_DIM, BLOCK_Q, V_TAIL, FP8,
        )  # fmt: skip


@triton.jit
def _store(
    ptr, stride, tokens, tile, factors_ptr,
    FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, COLUMNS)
    if FP8:
        tile *= tl.load(factors_ptr + columns)[None, :]
    mask = (rows < tokens) & (columns < HEAD_DIM)[None, :]
    tl.store(ptr + rows * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float | None, precision: str
) -> Compute:
    """What computes 8-bit attention, (B, N, H, D), for tensors like these: it takes the same arguments.

    Raises ValueError for "fp8" on a GPU without products of e4m3 numbers.
    """
    architecture = launch.architecture(q.device)
    check_architecture(precision, architecture)
    if q.numel() == 0 or k.shape[1] == 0:
        return lambda q, *_: q.new_zeros(q.shape)
    is_dense = kv_lengths is None or kv_lengths.is_contiguous()
    if not (is_dense and all(x.stride(3) == 1 for x in (q, k, v)) and _takes(v, precision)):
        return _prepare_fitted(q, k, v, kv_lengths, scale, precision)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    arguments = (scale * math.log2(math.e), precision == "fp8", architecture)
    quantise, attend = _launches(q, k, v, *arguments)

    def compute(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *_: object) -> Tensor:
        out = q.new_empty(q.shape)
        k8, k_scales, v8, v_scales = quantise(k, v, lengths)
        attend(q, k8, k_scales, v if v8 is None else v8, v_scales, out, lengths)
        return out

    return compute


def check_architecture(precision: str, architecture: str) -> None:
    """Raise ValueError where `precision` is "fp8" and tensor cores have no e4m3."""
    number = architecture.removeprefix("sm_")
    has_e4m3 = architecture == "interpreter" or (number.isdigit() and int(number) >= 89)
    if precision == "fp8" and not has_e4m3:
        raise ValueError(
            f'precision must be "int8" or None on {architecture}, which has no products of e4m3 '
            'numbers, got "fp8"; NVIDIA has them from sm_89 on'
        )


def _takes(v: Tensor, precision: str) -> bool:
    return precision == "fp8" or v.dtype != torch.float32


def _prepare_fitted(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float | None, precision: str
) -> Compute:
    """For what the kernels do not take as it is."""

    def fit(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Any, ...]:
        v = v if _takes(v, precision) else v.to(torch.bfloat16)
        tokens = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)]
        lengths = None if lengths is None else lengths.contiguous()
        return *tokens, lengths, scale, precision

    inner = prepare(*fit(q, k, v, kv_lengths))
    return lambda q, k, v, lengths, *_: inner(*fit(q, k, v, lengths))


def _launches(
    q: Tensor, k: Tensor, v: Tensor, scale: float, fp8: bool, architecture: str
) -> tuple[Callable[..., Quantised], launch.Launch]:
    """What quantises k and v, and what attends to the result."""
    batch, queries, heads, head_dim = q.shape
    rows = batch * heads
    k_main, k_tail = split(head_dim, SMALLEST)
    v_main, v_tail = split(head_dim)[0], value_tail(head_dim, architecture)
    blocks = triton.cdiv(k.shape[1], KEYS.value)
    choice = configurations.choose(KERNEL, architecture, q.element_size() * 8, head_dim)
    tuned, options = configurations.split(choice)
    divisor = stride_divisor(q) if fp8 else stride_divisor(q, v)
    attend = launch.Launch(
        _attend,
        q.device,
        (triton.cdiv(queries, tuned["BLOCK_Q"]) * rows,),
        (
            strides_of(q, divisor), strides_of(v, divisor),
            scale, heads, queries, k.shape[1], blocks,
        ),
        {
            "HEAD_DIM": head_dim, "K_MAIN": k_main, "K_TAIL": k_tail, "V_MAIN": v_main,
            "V_TAIL": v_tail, "DIVISOR": divisor, "FP8": fp8, **tuned,
        },
        options,
    )  # fmt: skip
    return quantiser(k, v, k_main + k_tail, v_main + v_tail, blocks, fp8), attend
