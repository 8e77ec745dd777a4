"""The kernels of 8-bit attention: statistics of K and V, their quantisation, softmax over blocks.

With s = scale · log2(e), and keys in blocks of KEYS:

    mean = Σ_m K / M        K8 = round((K - mean) / c),   c = max |K - mean| / 127 of a block of a head
    Q8 = round(s Q / a),    a = max |s Q| / 127 of a query
    P = exp2(a c · Q8 K8ᵀ - peak)     total = Σ_m P     O = P V / total

Q8 K8ᵀ is exact, in 32-bit integers. Under "int8" P is rounded to the dtype of V (bf16 where that is fp32)
and P V summed in fp32. Under "fp8" P is made up to 2^8 and rounded to e4m3; V8 = V / f is e4m3 too, with f
= max |V| / 448 of a channel of a head, and O gets its factor f when it is stored. Tensor cores of Ada and
Hopper keep about 14 bits of a sum of 8-bit products, so each block is summed on its own and added in
fp32, by the instruction that shrinks what was summed before it.

K is read twice and written once, 8 bits; so is V under "fp8", with its tokens contiguous: an 8-bit
product reads both factors along what it sums over. Two small launches, little beside N · M.

B batch, N queries, M keys, H heads, D head channels, cut in two as tiles.py says: for Q Kᵀ, whose 8-bit
products sum over 32, 72 is 64 + 32.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.attention import eight_bit_operator as formula
from pixart_kernels.attention.tiles import (
    head_of,
    length_of,
    load_tile,
    split,
    stride_divisor,
    strides_of,
)
from pixart_kernels.dispatch import launch

KEYS = tl.constexpr(formula.KEYS)
LEAST = tl.constexpr(formula.LEAST)
INTEGER = tl.constexpr(formula.LARGEST_INTEGER)
E4M3 = tl.constexpr(formula.LARGEST_E4M3)
SHIFT = tl.constexpr(formula.SHIFT["fp8"])
# Adding and taking away 1.5 · 2^23 rounds an fp32 of less than 2^22 to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
PARTS = tl.constexpr(16)  # programs that sum up the tokens of a head
SMALLEST = 32  # columns that an 8-bit product may sum over


@triton.jit
def _integers(x, largest):
    """x as int8, where `largest` is at least each |x|."""
    scaled = x * (INTEGER / tl.maximum(largest, LEAST))
    return (scaled + ROUNDER - ROUNDER).to(tl.int8)


@triton.jit
def _scale_of(largest, x, AXIS: tl.constexpr):
    """That of _integers; NaN if x has NaN or infinity, which int8 would hide."""
    return tl.maximum(largest, LEAST) / INTEGER + tl.sum(x * 0.0, AXIS)


@triton.jit
def _statistics(
    k_ptr, k_strides, v_ptr, v_strides, sums_ptr, largest_ptr, lengths_ptr,
    heads, keys, size,
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
def _quantise_kv(
    k_ptr, k_strides, v_ptr, v_strides, sums_ptr, largest_ptr,
    k_out_ptr, k_scales_ptr, v_out_ptr, v_scales_ptr, lengths_ptr,
    heads, keys, blocks,
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
        mean = tl.sum(_parts(sums_ptr, row, HEAD_DIM, COLUMNS), 0) / tl.maximum(length, 1)
        k = tl.where(inside, k - mean[None, :], 0.0)
        largest = tl.max(tl.max(tl.abs(k), 1), 0)
        tl.store(k_scales_ptr + row * blocks + block, _scale_of(largest, tl.sum(k * 0.0, 1), 0))
        token = row.to(tl.int64) * blocks * KEYS + first
        place = k_out_ptr + token * K_WIDTH + rows * K_WIDTH + columns
        tl.store(place, _integers(k, largest), mask=columns < K_WIDTH)
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
    q_ptr, q_strides, k_ptr, k_scales_ptr, v_ptr, v_strides, v_scales_ptr, out_ptr, lengths_ptr,
    scale, heads, queries, keys, blocks,
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
        q_tail = _integers(q_tail, largest[:, None])
    q = _integers(q, largest[:, None])
    q_scales = tl.maximum(largest, LEAST) / INTEGER + spoilt

    # The block that may be short comes first: there is nothing yet to shrink, and no other needs a mask.
    # Its length is 0 for a sample without keys only.
    last = tl.maximum(length - 1, 0) // BLOCK_K * BLOCK_K
    short, last_64 = length - last, last.to(tl.int64)
    k_block = k_ptr + last_64 * (K_MAIN + K_TAIL)
    factor = q_scales * tl.load(k_scales_ptr + last // KEYS)
    scores = _scores(q, q_tail, k_block, BLOCK_K, K_MAIN, K_TAIL) * factor[:, None]
    scores = tl.where(tl.arange(0, BLOCK_K)[None, :] < short, scores, float("-inf"))
    peak = tl.where(short == 0, 0.0, tl.max(scores, 1))
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
        highest = tl.maximum(peak, tl.max(scores, 1) * factor)
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
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float, precision: str
) -> Callable[..., Tensor]:
    """What computes 8-bit attention, (B, N, H, D), of tensors like these, from the same arguments.

    ValueError for "fp8" on a GPU without such products.
    """
    architecture = launch.architecture(q.device)
    check_architecture(precision, architecture)
    config = _candidates(architecture)[0]

    def compute(
        q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float, precision: str
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if out.numel() == 0 or k.shape[1] == 0:
            return out.zero_()
        fp8 = precision == "fp8"
        if v.dtype == torch.float32 and not fp8:
            v = v.to(torch.bfloat16)
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        lengths = None if kv_lengths is None else kv_lengths.contiguous()
        with launch.on(q.device):
            _launch(q, k, v, lengths, scale * math.log2(math.e), out, fp8, config)
        return out

    return compute


def check_architecture(precision: str, architecture: str) -> None:
    """Raise ValueError where `precision` is "fp8" and tensor cores have no e4m3."""
    number = architecture.removeprefix("sm_")
    has_e4m3 = architecture == "interpreter" or (number.isdigit() and int(number) >= 89)
    if precision == "fp8" and not has_e4m3:
        raise ValueError(
            f'precision must be "int8" or None on {architecture}, which has no products of e4m3 '
            'numbers, got "fp8"; they come with NVIDIA sm_89'
        )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    out: Tensor,
    fp8: bool,
    config: dict[str, int],
) -> None:
    batch, queries, heads, head_dim = q.shape
    keys, rows = k.shape[1], batch * heads
    k_main, k_tail = split(head_dim, SMALLEST)
    # An 8-bit product has an even number of 8 columns, and of 16 bits one of 8 would do for some GPUs.
    v_main, v_tail = split(head_dim)
    blocks = triton.cdiv(keys, KEYS.value)
    divisor = stride_divisor(q, k, v)
    columns = triton.next_power_of_2(max(k_main + k_tail, v_main + v_tail))
    sizes = {"HEAD_DIM": head_dim, "COLUMNS": columns, "DIVISOR": divisor}

    sums = q.new_empty((rows, PARTS.value, head_dim), dtype=torch.float32)
    largest = torch.empty_like(sums) if fp8 else None
    part = triton.cdiv(keys, PARTS.value * KEYS.value) * KEYS.value
    strides = (strides_of(k, divisor), strides_of(v, divisor))
    _statistics[(rows * PARTS.value,)](
        k, strides[0], v, strides[1], sums, largest, lengths, heads, keys, part,
        **sizes, enable_fp_fusion=True,
    )  # fmt: skip

    k8 = q.new_empty((rows, blocks * KEYS.value, k_main + k_tail), dtype=torch.int8)
    k_scales = q.new_empty((rows, blocks), dtype=torch.float32)
    v8 = v_scales = None
    if fp8:
        shape = (rows, v_main + v_tail, blocks * KEYS.value)
        v8 = q.new_empty(shape, dtype=torch.float8_e4m3fn)
        v_scales = q.new_empty(shape[:2], dtype=torch.float32)
    _quantise_kv[(rows * blocks,)](
        k, strides[0], v, strides[1], sums, largest, k8, k_scales, v8, v_scales, lengths,
        heads, keys, blocks,
        K_WIDTH=k_main + k_tail, V_WIDTH=v_main + v_tail, **sizes, enable_fp_fusion=True,
    )  # fmt: skip

    _attend[(triton.cdiv(queries, config["BLOCK_Q"]) * rows,)](
        q, strides_of(q, divisor), k8, k_scales, v8 if fp8 else v, strides[1], v_scales, out, lengths,
        scale, heads, queries, keys, blocks,
        HEAD_DIM=head_dim, K_MAIN=k_main, K_TAIL=k_tail, V_MAIN=v_main, V_TAIL=v_tail,
        DIVISOR=divisor, FP8=fp8, **config, enable_fp_fusion=True,
    )  # fmt: skip


def _candidates(architecture: str) -> list[dict[str, int]]:
    return [{"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}]
