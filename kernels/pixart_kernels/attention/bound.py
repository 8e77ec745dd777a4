"""A bound on the scores of attention, from the longest query and the longest key.

    |scale · q·k| ≤ scale · |q| · |k|

Two small kernels find the longest of each ROWS queries and of all keys of a head. Q and K pass
through memory once more: little beside attention when N · M is large.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.attention.tiles import length_of, load_tile, strides_of
from pixart_kernels.dispatch import launch

# What the bound must not exceed so that exp2 of any score, sums of such and products of those with
# V stay far inside the range of fp32, and the exponentials inside that of their dtype.
LIMITS = {torch.bfloat16: 64, torch.float16: 14}
LOOKED_FOR_FROM = 2**22  # N · M from which the search pays
ROWS = tl.constexpr(128)  # queries of which the longest is looked for together
PARTS = tl.constexpr(8)  # programs that look for the longest key of a head


@triton.jit
def _longest_tokens(
    x_ptr,
    longest_ptr,
    lengths_ptr,
    x_strides,
    heads,
    tokens,
    parts,
    size,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    """The largest |x|² among each of the parts of a head, `size` tokens each."""
    row = tl.program_id(0) // parts
    first = tl.program_id(0) % parts * size
    b, h, first_64 = (row // heads).to(tl.int64), (row % heads).to(tl.int64), first.to(tl.int64)
    x_ptr += (b * x_strides[0] + first_64 * x_strides[1] + h * x_strides[2]) * DIVISOR
    stride = x_strides[1] * DIVISOR
    last = tl.minimum(first + size, length_of(lengths_ptr, b, tokens))
    longest = tl.zeros([ROWS], tl.float32)
    for start in tl.range(first, last, ROWS):
        x = load_tile(x_ptr, stride, last - start, 0, HEAD_DIM, ROWS, COLUMNS, True).to(tl.float32)
        longest = tl.maximum(longest, tl.sum(x * x, 1))
        x_ptr += ROWS * stride
    tl.store(longest_ptr + tl.program_id(0), tl.max(longest, 0))


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


def longest_queries(q: Tensor, divisor: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What finds the largest |q|² of each ROWS queries of a head, for tensors like q."""
    return _longest(q, divisor, triton.cdiv(q.shape[1], ROWS.value))


def longest_keys(k: Tensor, divisor: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What finds the largest |k|² of each of PARTS parts of a head's keys, for tensors like k."""
    return _longest(k, divisor, PARTS.value)


def _longest(x: Tensor, divisor: int, parts: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    batch, tokens, heads, head_dim = x.shape
    count = batch * heads * parts
    find = launch.Launch(
        _longest_tokens,
        x.device,
        (count,),
        (
            strides_of(x, divisor),
            heads,
            tokens,
            parts,
            triton.cdiv(tokens, parts * ROWS.value) * ROWS.value,
        ),
        {
            "HEAD_DIM": head_dim,
            "COLUMNS": triton.next_power_of_2(head_dim),
            "DIVISOR": divisor,
        },
        {},
    )

    def compute(x: Tensor, lengths: Tensor | None) -> Tensor:
        longest = x.new_empty(count, dtype=torch.float32)
        find(x, longest, lengths)
        return longest

    return compute
