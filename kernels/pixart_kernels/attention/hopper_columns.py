"""What surrounds the backward on Hopper: the columns beside its operands, and the cast of dQ's sums.

A product of depth 80 over 72 columns has 8 to spare, into which lse, δ and the mask of keys go:

    beside Q    (x₁, x₂, x₃, HIDE, 0, 0, 0, 0)     x = -lse / scale     beside dO    the same with x = -δ
    beside K and V    (FACTOR, 1, 1, m, 0, 0, 0, 0)     m = -HIDE for a masked key, else 0

where x = FACTOR · x₁ + x₂ + x₃ to 24 bits or more, δ = Σ_d dO ∘ O, and beside dO there is 0 for HIDE. So
products of the operands with their columns are Q Kᵀ - lse / scale, at most -HIDE² for a masked key, and
dO Vᵀ - δ. FACTOR gives fp16, which ends at 65504, the range that lse / scale needs; in its other parts it
still resolves what fp16 resolves of dO.

B batch, N queries, M keys, H heads, D head channels; lse is to base 2, scale holds log2(e).
"""

import triton
import triton.language as tl

from pixart_kernels.attention.tiles import head_of

FACTOR = tl.constexpr(2048.0)
HIDE = tl.constexpr(32768.0)
COLUMNS = 8
BLOCK = 64


@triton.jit
def _columns(x, last, column, dtype: tl.constexpr):
    """(rows, 8) of an x and a last for each row."""
    x = x[:, None]
    first = (x / FACTOR).to(dtype)
    rest = x - first.to(tl.float32) * FACTOR
    second = rest.to(dtype)
    third = (rest - second.to(tl.float32)).to(dtype)
    fourth = (tl.zeros_like(x) + last[:, None]).to(dtype)
    rest = tl.where(column == 2, third, tl.where(column == 3, fourth, tl.zeros_like(third)))
    return tl.where(column == 0, first, tl.where(column == 1, second, rest))


@triton.jit
def _rows(ptr, strides, b, h, row, d, DIVISOR: tl.constexpr):
    stride = strides[1] * DIVISOR
    return head_of(ptr, strides, b, h, DIVISOR) + row.to(tl.int64)[:, None] * stride + d[None, :]


@triton.jit
def columns_kernel(
    grad_ptr, out_ptr, lse_ptr, k_ptr, v_ptr, lengths_ptr,
    of_q_ptr, of_grad_ptr, of_keys_ptr, k_copy_ptr, v_copy_ptr,
    grad_strides, out_strides, k_strides, v_strides, copy_strides, inverse_scale, heads, queries, keys,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Columns of queries by the first ⌈queries / BLOCK⌉ programs of a head, of keys by the others."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    blocks = tl.cdiv(queries, BLOCK)
    d = tl.arange(0, WIDTH)
    column = tl.arange(0, 8)[None, :]
    dtype: tl.constexpr = of_q_ptr.dtype.element_ty
    if tl.program_id(0) < blocks:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = (at < queries)[:, None] & (d < HEAD_DIM)[None, :]
        grad = tl.load(_rows(grad_ptr, grad_strides, b, h, at, d, DIVISOR), mask=there, other=0.0)
        out = tl.load(_rows(out_ptr, out_strides, b, h, at, d, DIVISOR), mask=there, other=0.0)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        lse = tl.load(lse_ptr + row * queries + at, mask=at < queries, other=0.0)
        lse = tl.where(
            lse == float("-inf"), 0.0, lse
        )  # a query without keys, all of which are hidden
        offsets = (row * queries + at[:, None]) * 8 + column
        there = (at < queries)[:, None] & (column < 8)
        hide = tl.full([BLOCK], HIDE, tl.float32)
        tl.store(
            of_q_ptr + offsets, _columns(-lse * inverse_scale, hide, column, dtype), mask=there
        )
        tl.store(of_grad_ptr + offsets, _columns(-delta, hide * 0, column, dtype), mask=there)
    else:
        at = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        hidden = tl.zeros([BLOCK, 1], tl.float32)
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b)
            hidden = tl.where(at >= length, -HIDE, 0.0)[:, None]
            there = (at < keys)[:, None] & (d < HEAD_DIM)[None, :]
            counts = (at < tl.minimum(length, keys))[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(_rows(k_ptr, k_strides, b, h, at, d, DIVISOR), mask=counts, other=0.0)
            v = tl.load(_rows(v_ptr, v_strides, b, h, at, d, DIVISOR), mask=counts, other=0.0)
            tl.store(_rows(k_copy_ptr, copy_strides, b, h, at, d, DIVISOR), k, mask=there)
            tl.store(_rows(v_copy_ptr, copy_strides, b, h, at, d, DIVISOR), v, mask=there)
        numbers = tl.where(column == 0, FACTOR, tl.where(column < 3, 1.0, 0.0))
        numbers = tl.where(column == 3, hidden, numbers + hidden * 0).to(dtype)
        there = (at < tl.where(h == 0, keys, 0))[:, None] & (column < 8)  # all heads share them
        tl.store(of_keys_ptr + (b * keys + at[:, None]) * 8 + column, numbers, mask=there)


@triton.jit
def cast_kernel(
    sums_ptr, dq_ptr, lengths_ptr, factor, heads, queries, keys, rows,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dQ (B, N, H, D) contiguous: factor times sums (B, H, rows, D) in fp32, of rows >= N."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    length = keys
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
    factor = tl.where(length > 1, factor, 0.0)  # an only key's weight is 1, and moves with nothing
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    there = (at < queries) & (d < HEAD_DIM)
    sums = tl.load(sums_ptr + (row * rows + at) * HEAD_DIM + d, mask=there, other=0.0)
    dq = (sums * factor).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + ((b * queries + at) * heads + h) * HEAD_DIM + d, dq, mask=there)
