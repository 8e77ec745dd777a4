"""Rows of C channels inside a kernel, as a tuple of blocks of the same width.

Triton's tensors have powers of two on each side: 1152 channels in one would be 2048 wide, 44 % of
every instruction for nothing; in 9 blocks of 128 nothing is wasted. With as many rows as warps, each
warp has a row of a block and each lane 4 of its channels, in 16 bits as in 32, so that a sum over a
row takes shuffles within a warp and no barrier. A block is (ROWS, width) in fp32, and zero beyond C.
"""

# Tuples that grow block by block change their type.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl


@triton.constexpr_function
def width(channels: int) -> int:
    """The width of a block: 128, wider where more than 16 blocks would follow, narrower for one."""
    return triton.next_power_of_2(min(channels, max(128, triton.cdiv(channels, 16))))


@triton.constexpr_function
def count(channels: int) -> int:
    return triton.cdiv(channels, width(channels))


@triton.constexpr_function
def rows_of(most: int, channels: int) -> int:
    """The number of rows at a time: fewer than `most` where more channels would not fit registers."""
    return max(1, min(most, most * 2048 // triton.next_power_of_2(channels)))


@triton.jit
def columns(block: tl.constexpr, C: tl.constexpr):
    return block * width(C) + tl.arange(0, width(C))[None, :]


@triton.jit
def load(pointer, starts, mask, C: tl.constexpr):
    """The rows that start at `starts` (ROWS, 1) elements, or zeros where `mask` (ROWS, 1) is false."""
    blocks = ()
    for block in tl.static_range(count(C)):
        cols = columns(block, C)
        blocks += (tl.load(pointer + starts + cols, mask & (cols < C), 0.0).to(tl.float32),)
    return blocks


@triton.jit
def load_for_all(pointer, ROWS: tl.constexpr, C: tl.constexpr):
    """One row (C,) for each of ROWS rows. Every warp loads what it needs: loaded once, as (1, width),
    the row would have another layout and reach them through shared memory."""
    return load(pointer, tl.full([ROWS, 1], 0, tl.int32), tl.full([ROWS, 1], True, tl.int1), C)


@triton.jit
def store(pointer, starts, mask, blocks, C: tl.constexpr):
    for block in tl.static_range(count(C)):
        cols = columns(block, C)
        tl.store(pointer + starts + cols, blocks[block], mask & (cols < C))


@triton.jit
def store_sum(pointer, blocks, C: tl.constexpr):
    """The sum of all rows, as one contiguous row (C,)."""
    for block in tl.static_range(count(C)):
        cols = columns(block, C)
        tl.store(pointer + cols, tl.sum(blocks[block], 0)[None, :], cols < C)


@triton.jit
def zeros(ROWS: tl.constexpr, C: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(count(C)):
        blocks += (tl.full([ROWS, width(C)], 0.0, tl.float32),)
    return blocks


@triton.jit
def add(a, b):
    blocks = ()
    for block in tl.static_range(len(a)):
        blocks += (a[block] + b[block],)
    return blocks


@triton.jit
def multiply(a, b):
    blocks = ()
    for block in tl.static_range(len(a)):
        blocks += (a[block] * b[block],)
    return blocks


@triton.jit
def times(a, factors):
    """Each row times its factor, (ROWS, 1)."""
    blocks = ()
    for block in tl.static_range(len(a)):
        blocks += (a[block] * factors,)
    return blocks


@triton.jit
def rounded(a, DTYPE: tl.constexpr):
    """What is left of a after it has been stored as DTYPE."""
    blocks = ()
    for block in tl.static_range(len(a)):
        blocks += (a[block].to(DTYPE).to(tl.float32),)
    return blocks


@triton.jit
def mean(a, C: tl.constexpr):
    """The mean of each row, (ROWS, 1)."""
    total = a[0]
    for block in tl.static_range(1, len(a)):
        total += a[block]
    return tl.sum(total, 1)[:, None] / C


@triton.jit
def layer_norm(rows, eps, C: tl.constexpr):
    """The rows with mean 0 and variance 1, anything beyond C; and the factors (ROWS, 1) for the
    latter."""
    middle = mean(rows, C)
    centred = ()
    for block in tl.static_range(len(rows)):
        centred += (tl.where(columns(block, C) < C, rows[block] - middle, 0.0),)
    # What rounding leaves of a mean that is large beside the deviation.
    rest = mean(centred, C)
    variance = mean(multiply(centred, centred), C) - rest * rest
    factor = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    normed = ()
    for block in tl.static_range(len(rows)):
        normed += ((centred[block] - rest) * factor,)
    return normed, factor


@triton.jit
def layer_norm_backward(grads, normed, factor, C: tl.constexpr):
    """Gradients of the rows from those of the normed rows. Anything beyond C."""
    middle = mean(grads, C)
    slope = mean(multiply(grads, normed), C)
    rows = ()
    for block in tl.static_range(len(grads)):
        rows += ((grads[block] - middle - normed[block] * slope) * factor,)
    return rows
