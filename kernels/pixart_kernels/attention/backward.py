"""The backward kernels of attention, bit-identical from run to run.

For one head, with s = scale · log2(e),

    P = exp2(s · Q Kᵀ - lse)        δ = Σ_d dO ∘ O          dS = P ∘ (dO Vᵀ - δ)
    dQ = scale · dS K               dK = scale · dSᵀ Q      dV = Pᵀ dO

One kernel sums over keys (dQ) and one over queries (dK, dV): a single pass would have to add up dQ
with atomics, whose order changes from run to run. That is 14 · B · N · M · H · D FLOP where one
pass has 10. The first kernel also writes δ for the second. Neither keeps anything of size N × M.
P and dS are fp32 and are rounded to the inputs' dtype for the products that they enter; all sums
are fp32, rounded once when they are stored.

B batch, N queries, M keys, H heads, D head channels, cut as tiles.py says. G is dO.
"""

import triton
import triton.language as tl

from pixart_kernels.attention.tiles import head_of, length_of


@triton.jit
def _tile(
    ptr,
    stride,
    start,
    tokens,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pointers to channels from FIRST on of ROWS tokens from start on, and which of them exist."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, COLUMNS)[None, :]
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (rows * stride + columns)
    mask = rows < tokens - start
    if FIRST + COLUMNS > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)
    return ptrs, mask


@triton.jit
def _load(
    ptr,
    stride,
    start,
    tokens,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ptrs, mask = _tile(ptr, stride, start, tokens, FIRST, HEAD_DIM, ROWS, COLUMNS)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store(
    ptr,
    stride,
    start,
    tokens,
    tile,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    ptrs, mask = _tile(ptr, stride, start, tokens, FIRST, HEAD_DIM, tile.shape[0], tile.shape[1])
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head(ptr, strides, b, h, DIVISOR: tl.constexpr):
    """Where a head's first token is, and the distance of the next."""
    return head_of(ptr, strides, b, h, DIVISOR), strides[1] * DIVISOR


@triton.jit
def _place(tokens, heads, BLOCK: tl.constexpr):
    """The row of (B, H), first token, sample and head that this program works on."""
    tiles = tl.cdiv(tokens, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    return row, tl.program_id(0) % tiles * BLOCK, row // heads, row % heads


@triton.jit
def _length_and_scale(lengths_ptr, b, keys, scale):
    """The weight of an only key is 1: no rounding error of dO Vᵀ - δ may change that."""
    length = length_of(lengths_ptr, b, keys)
    return length, tl.where(length > 1, scale, 0.0)


@triton.jit
def backward_q_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, dq_ptr, lse_ptr, delta_ptr, lengths_ptr,
    grad_strides, q_strides, k_strides, v_strides, out_strides,
    scale, score_scale, heads, queries, keys,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, start, b, h = _place(queries, heads, BLOCK_Q)
    length, scale = _length_and_scale(lengths_ptr, b, keys, scale)
    g_ptr, stride_g = _head(grad_ptr, grad_strides, b, h, DIVISOR)
    q_ptr, stride_q = _head(q_ptr, q_strides, b, h, DIVISOR)
    k_ptr, stride_k = _head(k_ptr, k_strides, b, h, DIVISOR)
    v_ptr, stride_v = _head(v_ptr, v_strides, b, h, DIVISOR)
    out_ptr, stride_out = _head(out_ptr, out_strides, b, h, DIVISOR)
    dq_ptr, stride_dq = _head(dq_ptr, out_strides, b, h, DIVISOR)

    g = _load(g_ptr, stride_g, start, queries, 0, HEAD_DIM, BLOCK_Q, MAIN)
    out = _load(out_ptr, stride_out, start, queries, 0, HEAD_DIM, BLOCK_Q, MAIN)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    q = _load(q_ptr, stride_q, start, queries, 0, HEAD_DIM, BLOCK_Q, MAIN)
    acc = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    q_tail, g_tail, acc_tail = q, g, 0.0
    if TAIL:
        g_tail = _load(g_ptr, stride_g, start, queries, MAIN, HEAD_DIM, BLOCK_Q, TAIL)
        out = _load(out_ptr, stride_out, start, queries, MAIN, HEAD_DIM, BLOCK_Q, TAIL)
        delta += tl.sum(g_tail.to(tl.float32) * out.to(tl.float32), 1)
        q_tail = _load(q_ptr, stride_q, start, queries, MAIN, HEAD_DIM, BLOCK_Q, TAIL)
        acc_tail = tl.zeros([BLOCK_Q, TAIL], tl.float32)
    rows = start + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + row * queries + rows, delta, mask=rows < queries)
    lse = tl.load(lse_ptr + row * queries + rows, mask=rows < queries, other=0.0)

    for first in tl.range(0, length, BLOCK_K):
        k = _load(k_ptr, stride_k, first, length, 0, HEAD_DIM, BLOCK_K, MAIN)
        v = _load(v_ptr, stride_v, first, length, 0, HEAD_DIM, BLOCK_K, MAIN)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        grad = tl.dot(g, v.T, input_precision=PRECISION)
        if TAIL:
            k_tail = _load(k_ptr, stride_k, first, length, MAIN, HEAD_DIM, BLOCK_K, TAIL)
            v_tail = _load(v_ptr, stride_v, first, length, MAIN, HEAD_DIM, BLOCK_K, TAIL)
            scores = tl.dot(q_tail, k_tail.T, scores, input_precision=PRECISION)
            grad = tl.dot(g_tail, v_tail.T, grad, input_precision=PRECISION)
        # Keys beyond length are zeros, and so is what they add, if exp2(0 - lse) is kept finite.
        # To mask them in a last block of their own would cost registers: 255, not 186, on sm_80.
        weights = tl.math.exp2(tl.minimum(scores * score_scale - lse[:, None], 0.0))
        grad = (weights * (grad - delta[:, None])).to(k.dtype)
        acc = tl.dot(grad, k, acc, input_precision=PRECISION)
        if TAIL:
            acc_tail = tl.dot(grad, k_tail, acc_tail, input_precision=PRECISION)
    _store(dq_ptr, stride_dq, start, queries, acc * scale, 0, HEAD_DIM)
    if TAIL:
        _store(dq_ptr, stride_dq, start, queries, acc_tail * scale, MAIN, HEAD_DIM)


@triton.jit
def backward_kv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, lengths_ptr,
    grad_strides, q_strides, k_strides, v_strides, sum_strides,
    scale, score_scale, batch, heads, queries, keys, share,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, start, b, h = _place(keys, heads, BLOCK_K)
    length, scale = _length_and_scale(lengths_ptr, b, keys, scale)
    g_ptr, stride_g = _head(grad_ptr, grad_strides, b, h, DIVISOR)
    q_ptr, stride_q = _head(q_ptr, q_strides, b, h, DIVISOR)
    k_ptr, stride_k = _head(k_ptr, k_strides, b, h, DIVISOR)
    v_ptr, stride_v = _head(v_ptr, v_strides, b, h, DIVISOR)
    part = tl.program_id(1) * batch + b
    dk_ptr, stride_sum = _head(dk_ptr, sum_strides, part, h, DIVISOR)
    dv_ptr, stride_sum = _head(dv_ptr, sum_strides, part, h, DIVISOR)

    k = _load(k_ptr, stride_k, start, length, 0, HEAD_DIM, BLOCK_K, MAIN)
    v = _load(v_ptr, stride_v, start, length, 0, HEAD_DIM, BLOCK_K, MAIN)
    dk = tl.zeros([BLOCK_K, MAIN], tl.float32)
    dv = tl.zeros([BLOCK_K, MAIN], tl.float32)
    if TAIL:
        k_tail = _load(k_ptr, stride_k, start, length, MAIN, HEAD_DIM, BLOCK_K, TAIL)
        v_tail = _load(v_ptr, stride_v, start, length, MAIN, HEAD_DIM, BLOCK_K, TAIL)
        dk_tail = tl.zeros([BLOCK_K, TAIL], tl.float32)
        dv_tail = tl.zeros([BLOCK_K, TAIL], tl.float32)

    lse_ptr += row * queries
    delta_ptr += row * queries
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, queries)
    if start >= length:
        last = first
    for first_row in tl.range(first, last, BLOCK_Q):
        rows = first_row + tl.arange(0, BLOCK_Q)
        # Missing queries add nothing, as q and g are zeros, whatever finite weight they get. With 0
        # for infinity, Triton 3.9 has every wgmma of the 32 × 128 tile serialised.
        lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
        q = _load(q_ptr, stride_q, first_row, queries, 0, HEAD_DIM, BLOCK_Q, MAIN)
        g = _load(g_ptr, stride_g, first_row, queries, 0, HEAD_DIM, BLOCK_Q, MAIN)
        scores = tl.dot(k, q.T, input_precision=PRECISION)
        grad = tl.dot(v, g.T, input_precision=PRECISION)
        if TAIL:
            q_tail = _load(q_ptr, stride_q, first_row, queries, MAIN, HEAD_DIM, BLOCK_Q, TAIL)
            g_tail = _load(g_ptr, stride_g, first_row, queries, MAIN, HEAD_DIM, BLOCK_Q, TAIL)
            scores = tl.dot(k_tail, q_tail.T, scores, input_precision=PRECISION)
            grad = tl.dot(v_tail, g_tail.T, grad, input_precision=PRECISION)
        weights = tl.math.exp2(scores * score_scale - lse[None, :])
        grad = (weights * (grad - delta[None, :])).to(q.dtype)
        weights = weights.to(g.dtype)
        dv = tl.dot(weights, g, dv, input_precision=PRECISION)
        dk = tl.dot(grad, q, dk, input_precision=PRECISION)
        if TAIL:
            dv_tail = tl.dot(weights, g_tail, dv_tail, input_precision=PRECISION)
            dk_tail = tl.dot(grad, q_tail, dk_tail, input_precision=PRECISION)

    # Keys beyond length met exp2(-lse), which may be infinite, in their own rows only. These are
    # overwritten, not selected away: tl.where on a sum makes ptxas serialise every wgmma.
    _store(dk_ptr, stride_sum, start, length, dk * scale, 0, HEAD_DIM)
    _store(dv_ptr, stride_sum, start, length, dv, 0, HEAD_DIM)
    if TAIL:
        _store(dk_ptr, stride_sum, start, length, dk_tail * scale, MAIN, HEAD_DIM)
        _store(dv_ptr, stride_sum, start, length, dv_tail, MAIN, HEAD_DIM)
    if lengths_ptr is not None:
        zeros = tl.zeros([BLOCK_K, 2 * MAIN if TAIL else MAIN], tl.float32)
        start, end = tl.maximum(start, length), tl.minimum(start + BLOCK_K, keys)
        _store(dk_ptr, stride_sum, start, end, zeros, 0, HEAD_DIM)
        _store(dv_ptr, stride_sum, start, end, zeros, 0, HEAD_DIM)
