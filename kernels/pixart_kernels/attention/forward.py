"""The forward kernels of attention: softmax over blocks of keys.

For one head and BLOCK_Q queries, m running over BLOCK_K keys at a time, with s = scale · log2(e):

    P = exp2(s · Q Kᵀ - peak)      total = Σ_m P      O = P V / total      lse = peak + log2(total)

where peak is the largest s · q·k so far; when it grows, total and O so far shrink by exp2(old - new).
Where s · |q| |k| is small for all these queries and all keys, no score can leave the range of fp32
and peak is 0 throughout: no maximum, nothing to shrink, a quarter less instructions.
Scores, total and O are fp32; P is rounded to the dtype of V, and O once more when it is stored. Total
is the sum of what P was rounded to: where one key has nearly all the weight, the output is then its
row of V whatever the peak, and not off by the rounding of that weight.
4 · B · N · M · H · D FLOP; Q and O pass through memory once, K and V once for each BLOCK_Q queries
(from L2: the programs of one head run side by side).

B batch, N queries, M keys, H heads, D head channels, cut in two as tiles.py says.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from pixart_kernels.dispatch import configurations, launch
from pixart_kernels.dispatch.bypass import Compute


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
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, longest_q_ptr, longest_k_ptr, lengths_ptr,
    k_box, k_tail_box, v_box, v_tail_box,
    q_strides, k_strides, v_strides, scale, heads, queries, keys,
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
    v = load_tile(v_ptr, v_stride, short, 0, HEAD_DIM, BLOCK_K, MAIN, True)
    weights = weights.to(v.dtype)
    total = tl.sum(weights.to(tl.float32), 1)
    acc = tl.dot(weights, v, input_precision=PRECISION)
    acc_tail = 0.0
    if TAIL:
        v_tail = load_tile(v_ptr, v_stride, short, MAIN, HEAD_DIM, BLOCK_K, V_TAIL, True)
        acc_tail = tl.dot(weights, v_tail, input_precision=PRECISION)

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
            weights = weights.to(v.dtype)
            total += tl.sum(weights.to(tl.float32), 1)
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
    if lse_ptr is not None:
        rows = tl.arange(0, BLOCK_Q)
        lse_ptr += row.to(tl.int64) * queries + first
        tl.store(lse_ptr + rows, peak + tl.math.log2(total), mask=rows < left)


TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
COPY_ENGINES = ("sm_90", "sm_100", "sm_103")  # architectures whose TMA reads K and V
KERNEL = "attention.forward"


def prepare(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float | None, with_lse: bool
) -> Compute:
    """What gives attention, (B, N, H, D), and, with_lse, the base-2 logarithm of the sum of its weights,
    (B, H, N) fp32, which is 0 for a sample without keys."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if q.numel() == 0 or keys == 0:
        return _nothing
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0 or not all(x.stride(3) == 1 for x in (q, k, v)) or not _is_dense(kv_lengths):
        return _prepare_fitted(q, k, v, kv_lengths, scale, with_lse)
    launch_all = _launches(q, k, v, kv_lengths, scale * math.log2(math.e), with_lse)

    def compute(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *_: object
    ) -> tuple[Tensor, Tensor | None]:
        out = q.new_empty(q.shape)
        lse = q.new_empty((batch, heads, queries), dtype=torch.float32) if with_lse else None
        launch_all(q, k, v, out, lse, lengths)
        return out, lse

    return compute


def _nothing(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, queries, heads, _ = q.shape
    lse = q.new_zeros((batch, heads, queries), dtype=torch.float32) if with_lse else None
    return q.new_zeros(q.shape), lse


def _is_dense(lengths: Tensor | None) -> bool:
    return lengths is None or lengths.is_contiguous()


def _prepare_fitted(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float, with_lse: bool
) -> Compute:
    """For what the kernel does not take as it is."""
    # The kernel takes the largest product for that of the largest score; and where all keys have the
    # same weight, it would multiply a masked score by 0.
    sign, fitted_scale = (0.0, 1.0) if scale == 0 else (math.copysign(1.0, scale), abs(scale))

    def fit(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Any, ...]:
        q = torch.zeros_like(q) if sign == 0 else -q if sign < 0 else q
        tokens = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)]
        lengths = None if lengths is None else lengths.contiguous()
        return *tokens, lengths, fitted_scale, with_lse

    inner = prepare(*fit(q, k, v, kv_lengths))
    return lambda q, k, v, lengths, *_: inner(*fit(q, k, v, lengths))


def _launches(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, with_lse: bool
) -> Callable[..., None]:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    main, tail = split(head_dim)
    divisor = stride_divisor(q, k, v)
    arch = launch.architecture(q.device)
    choice = configurations.choose(KERNEL, arch, q.element_size() * 8, head_dim)
    tuned, options = configurations.split(choice)
    v_tail = tuned.pop("V_TAIL", value_tail(head_dim, arch))
    bound = limit(q.dtype, queries, keys, choice.get("bound_from"))
    boxes = None
    if launch.is_switched_on("PIXART_TMA") and choice.get("tma", True):
        boxes = _boxes(arch, k, v, (main, tail), (main, v_tail), tuned["BLOCK_K"])
    constants = {
        "HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail, "V_TAIL": v_tail, "DIVISOR": divisor,
        "PRECISION": launch.precision(q.dtype), "LIMIT": bound, **tuned,
    }  # fmt: skip
    attend = launch.Launch(
        _forward,
        q.device,
        (triton.cdiv(queries, tuned["BLOCK_Q"]) * batch * heads,),
        (
            *(strides_of(x, divisor) for x in (q, k, v)),
            scale, heads, queries, keys,
        ),
        constants,
        options,
        boxes,
        box_count=4,
    )  # fmt: skip
    if not bound:
        return lambda q, k, v, out, lse, lengths: attend(q, k, v, out, lse, None, None, lengths)
    find_q, find_k = longest_queries(q, divisor), longest_keys(k, divisor)

    def bounded(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, lengths: Tensor | None
    ) -> None:
        attend(q, k, v, out, lse, find_q(q, None), find_k(k, lengths), lengths)

    return bounded


def value_tail(head_dim: int, arch: str) -> int:
    """Columns of the tail of V: 8 where that is enough and the tensor cores take so few."""
    main, tail = split(head_dim)
    if head_dim - main > 8 or not arch.startswith("sm_"):
        return tail
    # tcgen05 wants 16, and so does what Triton before 3.8 makes of such a product for wgmma.
    wide = arch in COPY_ENGINES and (arch != "sm_90" or TRITON < (3, 8))
    return tail if wide else min(tail, 8)


def _boxes(
    arch: str, k: Tensor, v: Tensor, of_k: tuple[int, int], of_v: tuple[int, int], rows: int
) -> launch.Boxes | None:
    """What makes descriptors of the main and tail columns of K and of V for the copy engine of sm_90
    and later, None where it is not there or cannot read these tensors."""
    if arch not in COPY_ENGINES or not (_copyable(k) and _copyable(v)):
        return None
    shape = [k.shape[0], k.shape[2], k.shape[1], k.shape[3]]  # (B, H, M, D): tokens are a matrix
    blocks = [[1, 1, rows, columns] for columns in (*of_k, *of_v)]
    k_strides, v_strides = _box_strides(k), _box_strides(v)
    has_tail = of_k[1] > 0

    def make(tensors: Sequence[Tensor | None]) -> Sequence[launch.Box | None]:
        _, k, v, *_ = tensors
        return (
            launch.Box(k, shape, k_strides, blocks[0]),
            launch.Box(k, shape, k_strides, blocks[1]) if has_tail else None,
            launch.Box(v, shape, v_strides, blocks[2]),
            launch.Box(v, shape, v_strides, blocks[3]) if has_tail else None,
        )

    return make


def _copyable(x: Tensor) -> bool:
    strides = [s for s, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1]
    return x.element_size() == 2 and all(s > 0 and s % 8 == 0 for s in strides)


def _box_strides(x: Tensor) -> list[int]:
    # The stride of a dimension of size 1 may be anything, and must be a multiple of 16 bytes.
    batch, tokens, heads = (
        s if size > 1 else 8 for s, size in zip(x.stride()[:3], x.shape, strict=False)
    )
    return [batch, heads, tokens, 1]
