"""A bound on the scores of attention, from the longest query and the longest key.

    |scale · q·k| ≤ scale · |q| · |k|

A small kernel finds the longest of each ROWS queries and of all keys of a head. Q and K pass through
memory once more: little beside attention when N · M is large.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.attention.tiles import length_of, load_tile, stride_divisor, strides_of
from pixart_kernels.dispatch import launch

# What the bound must not exceed so that exp2 of any score, sums of such and products of those with
# V stay far inside the range of fp32, and the exponentials inside that of their dtype.
LIMITS = {torch.bfloat16: 64, torch.float16: 14}
LOOKED_FOR_FROM = 2**22  # N · M from which the search pays
ROWS = tl.constexpr(128)  # queries of which the longest is looked for together
PARTS = tl.constexpr(8)  # programs that look for the longest key of a head


@triton.jit
def _longest_tokens(
    q_ptr,
    k_ptr,
    longest_q_ptr,
    longest_k_ptr,
    lengths_ptr,
    q_strides,
    k_strides,
    heads,
    queries,
    keys,
    query_programs,
    key_size,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    """The largest |q|² of each ROWS queries of a head, and the largest |k|² of each of its PARTS parts of
    keys, key_size each. One launch: the first programs have queries, the others keys."""
    is_query = tl.program_id(0) < query_programs
    index = tl.where(is_query, tl.program_id(0), tl.program_id(0) - query_programs)
    parts = tl.where(is_query, tl.cdiv(queries, ROWS), PARTS)
    size = tl.where(is_query, ROWS, key_size)
    row, first = index // parts, index % parts * size
    b, h, first_64 = (row // heads).to(tl.int64), (row % heads).to(tl.int64), first.to(tl.int64)
    last = tl.where(is_query, queries, length_of(lengths_ptr, b, keys))
    last = tl.minimum(first + size, last)
    stride = tl.where(is_query, q_strides[1], k_strides[1]) * DIVISOR
    q_ptr += (b * q_strides[0] + h * q_strides[2]) * DIVISOR
    k_ptr += (b * k_strides[0] + h * k_strides[2]) * DIVISOR
    x_ptr = tl.where(is_query, q_ptr, k_ptr) + first_64 * stride
    longest = tl.zeros([ROWS], tl.float32)
    for start in tl.range(first, last, ROWS):
        x = load_tile(x_ptr, stride, last - start, 0, HEAD_DIM, ROWS, COLUMNS, True).to(tl.float32)
        longest = tl.maximum(longest, tl.sum(x * x, 1))
        x_ptr += ROWS * stride
    longest_ptr = tl.where(is_query, longest_q_ptr, longest_k_ptr)
    tl.store(longest_ptr + index, tl.max(longest, 0))


@triton.jit
def is_bounded(
    longest_q_ptr,
    longest_k_ptr,
    row,
    first,
    queries,
    scale,
    LIMIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Whether |scale · q·k| is at most LIMIT for the queries of this program and all keys.

    Numbers are loaded one by one: what comes out of a reduction of a tile, ptxas takes to differ
    between threads, and keeps all that depends on it, loops and copies, out of uniform registers.
    """
    blocks = tl.cdiv(queries, ROWS)
    longest_q = 0.0
    for i in tl.static_range((BLOCK_Q + ROWS - 1) // ROWS):
        block = tl.minimum(first // ROWS + i, blocks - 1)
        longest_q = tl.maximum(longest_q, tl.load(longest_q_ptr + row * blocks + block))
    longest_k = 0.0
    for i in tl.static_range(PARTS):
        longest_k = tl.maximum(longest_k, tl.load(longest_k_ptr + row * PARTS + i))
    return longest_q * longest_k * (scale * scale) <= LIMIT * LIMIT


def limit(dtype: torch.dtype, queries: int, keys: int, search_from: int | None = None) -> int:
    """LIMITS where it is worth looking for the bound, else 0; search_from: N · M from which it is,
    LOOKED_FOR_FROM if None."""
    search_from = LOOKED_FOR_FROM if search_from is None else search_from
    return LIMITS.get(dtype, 0) if queries * keys >= search_from else 0


def prepare(q: Tensor, k: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], list[Tensor]]:
    """What finds the largest |q|² of each ROWS queries of a head and the largest |k|² of each of its PARTS
    parts of keys, of those that count, for tensors like q and k."""
    batch, queries, heads, head_dim = q.shape
    keys, rows, divisor = k.shape[1], batch * heads, stride_divisor(q, k)
    counts = (rows * triton.cdiv(queries, ROWS.value), rows * PARTS.value)
    key_size = triton.cdiv(keys, PARTS.value * ROWS.value) * ROWS.value
    find = launch.Launch(
        _longest_tokens,
        q.device,
        (sum(counts),),
        (
            *(strides_of(x, divisor) for x in (q, k)),
            heads, queries, keys, counts[0], key_size,
        ),
        {
            "HEAD_DIM": head_dim,
            "COLUMNS": triton.next_power_of_2(head_dim),
            "DIVISOR": divisor,
        },
        {},
    )  # fmt: skip

    def compute(q: Tensor, k: Tensor, lengths: Tensor | None) -> list[Tensor]:
        longest = [q.new_empty(count, dtype=torch.float32) for count in counts]
        find(q, k, *longest, lengths)
        return longest

    return compute
