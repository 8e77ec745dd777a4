"""The forward kernels of attention: softmax over blocks of keys.

For one head and BLOCK_Q queries, m running over BLOCK_K keys at a time, with s = scale · log2(e):

    P = exp2(s · Q Kᵀ - peak)      total = Σ_m P      O = P V / total      lse = peak + log2(total)

where peak is the largest s · q·k so far; when it grows, total and O so far shrink by exp2(old - new).
Where s · |q| |k| is small for all these queries and all keys, no score can leave the range of fp32
and peak is 0 throughout: no maximum, nothing to shrink, a quarter less instructions.
Scores, P, total and O are fp32; P is rounded to the dtype of V for the product P V, and O once more
when it is stored. 4 · B · N · M · H · D FLOP; Q and O pass through memory once, K and V once for
each BLOCK_Q queries (from L2: the programs of one head run side by side).

B batch, N queries, M keys, H heads, D head channels, cut in two as tiles.py says.
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pixart_kernels.attention.bound import (
    is_bounded,
    limit,
    longest_keys,
    longest_queries,
)
from pixart_kernels.attention.tiles import (
    head_of,
    length_of,
    load_tile,
    split,
    stride_divisor,
    strides_of,
)
from pixart_kernels.dispatch import launch


@triton.jit
def _load_keys(
    box,
    b,
    h,
    start,
    ptr,
    stride,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """load_tile without a mask, through a descriptor if there is one: it knows where zeros begin."""
    if box is not None:
        return box.load([b, h, start, FIRST]).reshape(ROWS, COLUMNS)
    else:
        return load_tile(ptr, stride, 0, FIRST, HEAD_DIM, ROWS, COLUMNS, False)


@triton.jit
def _store(
    ptr,
    stride,
    tokens,
    tile,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < tokens) & (columns < HEAD_DIM)
    tl.store(ptr + rows * stride + columns, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(q, q_tail, k, k_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    if TAIL:
        scores = tl.dot(q_tail, k_tail.T, input_precision=PRECISION)
        return tl.dot(q, k.T, scores, input_precision=PRECISION)
    else:
        return tl.dot(q, k.T, input_precision=PRECISION)


@triton.jit
def _scores(
    q, q_tail, box, tail_box, b, h, start, ptr, stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Q Kᵀ for a whole block of keys."""
    k = _load_keys(box, b, h, start, ptr, stride, 0, HEAD_DIM, ROWS, MAIN)
    k_tail = k
    if TAIL:
        k_tail = _load_keys(tail_box, b, h, start, ptr, stride, MAIN, HEAD_DIM, ROWS, TAIL)
    return _product(q, q_tail, k, k_tail, TAIL, PRECISION)


@triton.jit
def _add_values(
    weights, acc, acc_tail, box, tail_box, b, h, start, ptr, stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + P V for a whole block of keys."""
    v = _load_keys(box, b, h, start, ptr, stride, 0, HEAD_DIM, ROWS, MAIN)
    weights = weights.to(v.dtype)
    acc = tl.dot(weights, v, acc, input_precision=PRECISION)
    if TAIL:
        v_tail = _load_keys(tail_box, b, h, start, ptr, stride, MAIN, HEAD_DIM, ROWS, TAIL)
        acc_tail = tl.dot(weights, v_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def _raise_peak(scores, scale, peak, total, acc, acc_tail, TAIL: tl.constexpr):
    """The weights of a block under the larger of its peak and the one before, and what was summed
    before it, shrunk to that."""
    highest = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - highest[:, None])
    shrink = tl.math.exp2(peak - highest)
    total *= shrink
    acc *= shrink[:, None]
    acc_tail = acc_tail * shrink[:, None] if TAIL else acc_tail
    return weights, highest, total, acc, acc_tail


@triton.jit
def _forward(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides,
    k_box, k_tail_box, v_box, v_tail_box,
    out_ptr, lse_ptr, longest_q_ptr, longest_k_ptr, lengths_ptr,
    scale, heads, queries, keys,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, V_TAIL: tl.constexpr,
    DIVISOR: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_Q)
    row = tl.program_id(0) // tiles
    b, h, first = row // heads, row % heads, tl.program_id(0) % tiles * BLOCK_Q
    left = queries - first
    b_64, h_64, first_64 = b.to(tl.int64), h.to(tl.int64), first.to(tl.int64)
    q_ptr += (b_64 * q_strides[0] + first_64 * q_strides[1] + h_64 * q_strides[2]) * DIVISOR
    k_ptr = head_of(k_ptr, k_strides, b_64, h_64, DIVISOR)
    v_ptr = head_of(v_ptr, v_strides, b_64, h_64, DIVISOR)
    q_stride, k_stride = q_strides[1] * DIVISOR, k_strides[1] * DIVISOR
    v_stride = v_strides[1] * DIVISOR
    length = length_of(lengths_ptr, b, keys)

    # The block that may be short comes first: there is nothing yet to shrink, and no other block
    # needs a mask. Its length is 0 for a sample without keys only.
    short = length - tl.maximum(length - 1, 0) // BLOCK_K * BLOCK_K
    q = load_tile(q_ptr, q_stride, left, 0, HEAD_DIM, BLOCK_Q, MAIN, True)
    k = load_tile(k_ptr, k_stride, short, 0, HEAD_DIM, BLOCK_K, MAIN, True)
    q_tail, k_tail = q, k
    if TAIL:
        q_tail = load_tile(q_ptr, q_stride, left, MAIN, HEAD_DIM, BLOCK_Q, TAIL, True)
        k_tail = load_tile(k_ptr, k_stride, short, MAIN, HEAD_DIM, BLOCK_K, TAIL, True)
    bounded = False
    if LIMIT:
        bounded = is_bounded(
            longest_q_ptr, longest_k_ptr, row, first, queries, scale, LIMIT, BLOCK_Q
        )
    scores = _product(q, q_tail, k, k_tail, TAIL, PRECISION)
    scores = tl.where(tl.arange(0, BLOCK_K)[None, :] < short, scores, float("-inf"))
    peak = tl.where(bounded | (short == 0), 0.0, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - peak[:, None])
    total = tl.sum(weights, 1)
    v = load_tile(v_ptr, v_stride, short, 0, HEAD_DIM, BLOCK_K, MAIN, True)
    rounded = weights.to(v.dtype)
    acc = tl.dot(rounded, v, input_precision=PRECISION)
    acc_tail = 0.0
    if TAIL:
        v_tail = load_tile(v_ptr, v_stride, short, MAIN, HEAD_DIM, BLOCK_K, V_TAIL, True)
        acc_tail = tl.dot(rounded, v_tail, input_precision=PRECISION)

    # Two loops of which one has no turns: as branches they would make ptxas wait after each wgmma.
    begin = short
    for ONLINE in tl.static_range(0 if LIMIT else 1, 2):
        end = length if ONLINE else tl.where(bounded, length, short)
        k_block = k_ptr + begin.to(tl.int64) * k_stride
        v_block = v_ptr + begin.to(tl.int64) * v_stride
        for start in tl.range(begin, end, BLOCK_K):
            scores = _scores(
                q, q_tail, k_box, k_tail_box, b, h, start, k_block, k_stride,
                HEAD_DIM, BLOCK_K, MAIN, TAIL, PRECISION,
            )  # fmt: skip
            if ONLINE:
                weights, peak, total, acc, acc_tail = _raise_peak(
                    scores, scale, peak, total, acc, acc_tail, TAIL
                )
            else:
                weights = tl.math.exp2(scores * scale)
            total += tl.sum(weights, 1)
            acc, acc_tail = _add_values(
                weights, acc, acc_tail, v_box, v_tail_box, b, h, start, v_block, v_stride,
                HEAD_DIM, BLOCK_K, MAIN, V_TAIL, PRECISION,
            )  # fmt: skip
            k_block += BLOCK_K * k_stride
            v_block += BLOCK_K * v_stride
        begin = end

    total = tl.where(total == 0, 1.0, total)  # no key: acc and peak are 0
    out_ptr += ((b_64 * queries + first) * heads + h) * HEAD_DIM
    out_stride = heads * HEAD_DIM
    _store(out_ptr, out_stride, left, acc / total[:, None], 0, HEAD_DIM, BLOCK_Q, MAIN)
    if TAIL:
        _store(
            out_ptr, out_stride, left, acc_tail / total[:, None], MAIN, HEAD_DIM, BLOCK_Q, V_TAIL
        )
    rows = tl.arange(0, BLOCK_Q)
    lse_ptr += row.to(tl.int64) * queries + first
    tl.store(lse_ptr + rows, peak + tl.math.log2(total), mask=rows < left)


def _config(block_q: int, block_k: int, num_warps: int, num_stages: int) -> triton.Config:
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages, pre_hook=_fit_boxes)


def _fit_boxes(arguments: dict[str, Any]) -> None:
    for name in ("k_box", "k_tail_box", "v_box", "v_tail_box"):
        if arguments[name] is not None:
            arguments[name].block_shape[2] = arguments["BLOCK_K"]


def _tuned(*configs: triton.Config) -> Any:
    """A tuner for each architecture: what one finds is not for another GPU in the same machine."""

    @cache
    def tuner(arch: str) -> Any:
        return triton.autotune(launch.configurations(*configs), key=["HEAD_DIM", "LIMIT"])(_forward)

    return tuner


# None spills at D <= 96, on Triton 3.6 and 3.9. At 256 × 64 the copy engine fetches each key half
# as often; the others leave room for two programs, or for twice the keys between two waits.
_forward_wgmma = _tuned(
    _config(128, 64, num_warps=8, num_stages=2),
    _config(128, 64, num_warps=8, num_stages=3),
    _config(128, 128, num_warps=8, num_stages=2),
    _config(256, 64, num_warps=8, num_stages=2),
)
# The others of both lists above and below spill there with Triton 3.9.
_forward_tcgen05 = _tuned(
    _config(128, 64, num_warps=8, num_stages=3),
    _config(128, 128, num_warps=8, num_stages=2),
)
_forward_120 = _tuned(
    _config(64, 64, num_warps=4, num_stages=3),
    _config(128, 64, num_warps=8, num_stages=2),
)
_forward_mma = _tuned(
    _config(64, 64, num_warps=4, num_stages=3),
    _config(128, 64, num_warps=8, num_stages=2),
    _config(128, 32, num_warps=4, num_stages=3),
)
# 32 queries a wave: with fewer, the waves of a 32×32 matrix instruction repeat each other's work.
_forward_amd = _tuned(
    _config(128, 32, num_warps=4, num_stages=2),
    _config(128, 64, num_warps=4, num_stages=2),
)
_forward_fp32 = _tuned(
    _config(32, 32, num_warps=8, num_stages=2),
    _config(32, 32, num_warps=4, num_stages=2),
)

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
WGMMA = ("sm_90", "sm_100", "sm_103")


def forward(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention, (B, N, H, D), and the base-2 logarithm of the sum of its weights, (B, H, N) fp32.

    That logarithm is 0 for a sample without keys.
    """
    batch, queries, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_(), lse.zero_()
    if scale < 0:  # the kernel takes the largest product for that of the largest score
        q, scale = -q, -scale
    if scale == 0:  # all keys have the same weight; the kernel would multiply a masked score by 0
        q, scale = torch.zeros_like(q), 1.0
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    lengths = None if kv_lengths is None else kv_lengths.contiguous()
    with launch.on(q.device):
        _launch_kernel(q, k, v, lengths, scale * math.log2(math.e), out, lse)
    return out, lse


def _launch_kernel(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    batch, queries, heads, head_dim = q.shape
    main, tail = split(head_dim)
    divisor = stride_divisor(q, k, v)
    arch = launch.architecture(q.device)
    v_tail = _value_tail(head_dim, arch)
    boxes = _boxes(arch, k, v, main, tail, v_tail)
    bound = limit(q.dtype, queries, k.shape[1])

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(queries, meta["BLOCK_Q"]) * batch * heads,)

    _kernel(q.dtype, arch)[grid](
        q,
        strides_of(q, divisor),
        k,
        strides_of(k, divisor),
        v,
        strides_of(v, divisor),
        *boxes,
        out,
        lse,
        longest_queries(q, divisor) if bound else None,
        longest_keys(k, lengths, divisor) if bound else None,
        lengths,
        scale,
        heads,
        queries,
        k.shape[1],
        HEAD_DIM=head_dim,
        MAIN=main,
        TAIL=tail,
        V_TAIL=v_tail,
        DIVISOR=divisor,
        PRECISION=launch.precision(q.dtype),
        LIMIT=bound,
        enable_fp_fusion=True,
    )


def _kernel(dtype: torch.dtype, arch: str) -> Any:
    if dtype == torch.float32:
        return _forward_fp32(arch)
    if arch in WGMMA:
        return (_forward_wgmma if arch == "sm_90" else _forward_tcgen05)(arch)
    if arch == "sm_120":
        return _forward_120(arch)
    return _forward_amd(arch) if arch.startswith("gfx") else _forward_mma(arch)


def _value_tail(head_dim: int, arch: str) -> int:
    """Columns of the tail of V: 8 where that is enough and the tensor cores take so few."""
    main, tail = split(head_dim)
    if head_dim - main > 8 or not arch.startswith("sm_"):
        return tail
    # tcgen05 wants 16, and so does what Triton before 3.8 makes of such a product for wgmma.
    wide = arch in WGMMA and (arch != "sm_90" or TRITON < (3, 8))
    return tail if wide else min(tail, 8)


def _boxes(
    arch: str, k: Tensor, v: Tensor, main: int, tail: int, v_tail: int
) -> list[TensorDescriptor | None]:
    """Descriptors of the main and tail columns of K and of V for the copy engine of sm_90 and
    later, or four None where it is not there or cannot read these tensors."""
    usable = arch in WGMMA and _copyable(k) and _copyable(v)
    if not usable:
        return [None] * 4
    columns = ((k, main), (k, tail), (v, main), (v, v_tail))
    return [_box(x, width) if width else None for x, width in columns]


def _copyable(x: Tensor) -> bool:
    strides = [s for s, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1]
    aligned = all(s > 0 and s % 8 == 0 for s in strides)
    return x.element_size() == 2 and x.data_ptr() % 16 == 0 and aligned


def _box(x: Tensor, columns: int) -> TensorDescriptor:
    x = x.transpose(1, 2)  # (B, H, M, D): a block of tokens is a matrix
    # The stride of a dimension of size 1 may be anything, and must be a multiple of 16 bytes.
    strides = [s if size > 1 else 8 for s, size in zip(x.stride()[:3], x.shape, strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, 1, columns])
