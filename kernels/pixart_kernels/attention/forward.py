"""The forward kernels of attention: softmax over blocks of keys.

For one head and BLOCK_Q queries, m running over BLOCK_K keys at a time, with s = scale · log2(e):

    P = exp2(s · Q Kᵀ - peak)      total = Σ_m P      O = P V / total      lse = peak + log2(total)

where peak is the largest s · q·k so far; when it grows, total and O so far shrink by exp2(old - new).
Where s · |q| |k| is small for all these queries and all keys, no score can leave the range of fp32
and peak is 0 throughout: no maximum, nothing to shrink, a quarter less instructions.
Scores, total and O are fp32; P is rounded to the dtype of V, and O once more when it is stored. Total
is the sum of what P was rounded to where peak is 0: where one key has nearly all the weight, the
output is then its row of V, and not off by the rounding of that weight.
4 · B · N · M · H · D FLOP; Q and O pass through memory once, K and V once for each BLOCK_Q queries
(from L2: the programs of one head run side by side).

B batch, N queries, M keys, H heads, D head channels, cut in two as tiles.py says.
"""

import triton
import triton.language as tl

from pixart_kernels.attention.bound import is_bounded
from pixart_kernels.attention.tiles import head_of, length_of, load_tile


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


_BF16_PAIR = tl.constexpr("""
cvt.rn.bf16x2.f32 $0, $4, $3;
shl.b32 $1, $0, 16;
and.b32 $2, $0, 0xffff0000;
""")
_FP16_PAIR = tl.constexpr("""
{
.reg .b16 low, high;
cvt.rn.f16x2.f32 $0, $4, $3;
mov.b32 {low, high}, $0;
cvt.f32.f16 $1, low;
cvt.f32.f16 $2, high;
}
""")


@triton.jit
def _rounded(weights, DTYPE: tl.constexpr, IN_PAIRS: tl.constexpr):
    """The weights in DTYPE, and what is left of them in fp32. Two at a time where a GPU can: as two
    casts, LLVM takes them one by one, on the unit that already has the exponentials to do."""
    if IN_PAIRS and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _BF16_PAIR, "=&r,=&r,=r,r,r", [weights], (tl.bfloat16, tl.float32), True, 2
        )
    elif IN_PAIRS and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            _FP16_PAIR, "=&r,=&r,=r,r,r", [weights], (tl.float16, tl.float32), True, 2
        )
    else:
        return weights.to(DTYPE), weights.to(DTYPE).to(tl.float32)


@triton.jit
def _add_values(
    weights, total, acc, acc_tail, box, tail_box, b, h, start, ptr, stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr, ONLINE: tl.constexpr, IN_PAIRS: tl.constexpr,
):  # fmt: skip
    """total + Σ P and acc + P V for a whole block of keys."""
    v = _load_keys(box, b, h, start, ptr, stride, 0, HEAD_DIM, ROWS, MAIN)
    if ONLINE:  # the largest weight so far is 1, which rounding leaves alone
        total += tl.sum(weights, 1)
        weights = weights.to(v.dtype)
    else:
        weights, summands = _rounded(weights, v.dtype, IN_PAIRS)
        total += tl.sum(summands, 1)
    acc = tl.dot(weights, v, acc, input_precision=PRECISION)
    if TAIL:
        v_tail = _load_keys(tail_box, b, h, start, ptr, stride, MAIN, HEAD_DIM, ROWS, TAIL)
        acc_tail = tl.dot(weights, v_tail, acc_tail, input_precision=PRECISION)
    return total, acc, acc_tail


@triton.jit
def _scaled(scores, scale, SCALED: tl.constexpr):
    """The scores to base 2; where the queries came scaled, they are."""
    if SCALED:
        return scores
    else:
        return scores * scale


@triton.jit
def _raise_peak(
    scores, scale, peak, total, acc, acc_tail, SCALED: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """The weights of a block under the larger of its peak and the one before, and what was summed
    before it, shrunk to that."""
    highest = tl.maximum(peak, _scaled(tl.max(scores, 1), scale, SCALED))
    weights = tl.math.exp2(_scaled(scores, scale, SCALED) - highest[:, None])
    shrink = tl.math.exp2(peak - highest)
    total *= shrink
    acc *= shrink[:, None]
    acc_tail = acc_tail * shrink[:, None] if TAIL else acc_tail
    return weights, highest, total, acc, acc_tail


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, longest_q_ptr, longest_k_ptr, lengths_ptr,
    k_box, k_tail_box, v_box, v_tail_box,
    q_strides, k_strides, v_strides, scale, heads, queries, keys,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, V_TAIL: tl.constexpr,
    DIVISOR: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    SCALED: tl.constexpr, IN_PAIRS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
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
    rounded = weights.to(v.dtype)
    summands = weights
    if LIMIT:
        summands = tl.where(bounded, rounded.to(tl.float32), weights)
    total = tl.sum(summands, 1)
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
                    scores, scale, peak, total, acc, acc_tail, SCALED, TAIL
                )
            else:
                weights = tl.math.exp2(_scaled(scores, scale, SCALED))
            total, acc, acc_tail = _add_values(
                weights, total, acc, acc_tail, v_box, v_tail_box, b, h, start, v_block, v_stride,
                HEAD_DIM, BLOCK_K, MAIN, V_TAIL, PRECISION, ONLINE, IN_PAIRS,
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
