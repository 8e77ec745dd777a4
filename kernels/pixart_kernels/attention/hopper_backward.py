"""Attention backward for head dimensions of 65 to 72 on Hopper, in Gluon, bit-identical from run to run.

    P = exp2(S)    S = scale · Q Kᵀ - lse    D = dO Vᵀ - δ    dS = P ∘ D
    dQ = factor · dS K       dK = factor · dSᵀ Q       dV = Pᵀ dO

One kernel, launched twice. For queries, left is (Q, dO) and right (K, V), and sums of dS · right are dQ;
for keys (KEYS), left is (K, V) and right (Q, dO), and sums of dSᵀ · right and Pᵀ · right are dK and dV.
hopper_sums.py does all in one launch, with the same loop over keys.

One warp copies by TMA, CONSUMERS warpgroups multiply. A warpgroup owns ROWS rows of the left and meets
the right BLOCK rows at a time. It starts both products of block j, then the sums over block j - 1, and
computes P and dS of block j meanwhile. P and dS are the left operands of its sums and stay in
registers. Where TURNS, warpgroups take turns at starting products.

72 columns are 64 + 8, and the product of depth 16 that the 8 need has 8 columns to spare: these subtract
lse and δ and hide masked keys (hopper_columns.py). The copy engine puts them beside the 8, which are
zeros beyond HEAD_DIM. Beyond the last query or key all is zeros, so that P is 1 there and dS 0. Halves
of a tail lie one behind the other, without a swizzle, so that the 8 columns on their own are what the
sums multiply; OUT_TAIL is 8, or 16 for a Triton whose wgmma has no 8 columns (the sums of the others
are not stored).

scale holds log2(e); it is 1, and not multiplied, where Q is scaled already (SCALED).

Blocks of keys beyond a sample's length are not visited; of queries, one, by keys beyond it. Keys there
must hold numbers, which do not matter, and be hidden by their columns.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pixart_kernels.attention.hopper_tiles import (
    HALF,
    MAIN,
    ROWS,
    TAIL,
    barriers,
    copy,
    matrix,
    rounded,
    store_rows,
    tiles,
    tiles_of_two_halves,
)


@gluon.jit
def _copy_tile(boxes, operand, i, bar, b, h, columns_h, start, COUNT: gl.constexpr):
    """COUNT rows of a head from start on, and their columns, into the i-th of tiles."""
    box, tail_box, columns_box = boxes
    main, halves, _ = operand
    mbarrier.expect(bar, COUNT * (MAIN + TAIL) * 2)
    copy(box, [b, h, start, 0], bar, main.index(i))
    copy(tail_box, [b, h, start, MAIN], bar, halves.index(2 * i))
    copy(columns_box, [b, columns_h, start, 0], bar, halves.index(2 * i + 1))


@gluon.jit
def copy_blocks(
    boxes, operands, full, empty, left_full, where,
    KEYS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """The copying warp: the left of each consumer, and all blocks of the right as room is given back."""
    left_s_boxes, left_d_boxes, right_s_boxes, right_d_boxes = boxes
    left_s, left_d, right_s, right_d = operands
    s_full, d_full = full
    b, h, first, start, blocks = where
    left_h = 0 if KEYS else h  # all heads share keys' columns
    right_h = h if KEYS else 0
    for i in gl.static_range(CONSUMERS):
        at = first + i * ROWS
        _copy_tile(left_s_boxes, left_s, i, left_full.index(2 * i), b, h, left_h, at, ROWS)
        _copy_tile(left_d_boxes, left_d, i, left_full.index(2 * i + 1), b, h, left_h, at, ROWS)
    for j in range(blocks):
        slot = j % STAGES
        at = start + j * BLOCK
        free = (j // STAGES & 1) ^ 1  # a barrier is born with phase 1 behind it
        mbarrier.wait(empty.index(slot), free)
        _copy_tile(right_s_boxes, right_s, slot, s_full.index(slot), b, h, right_h, at, BLOCK)
        _copy_tile(right_d_boxes, right_d, slot, d_full.index(slot), b, h, right_h, at, BLOCK)
    # And a block of nothing, so that consumers may always wait for the next.
    slot = blocks % STAGES
    mbarrier.wait(empty.index(slot), (blocks // STAGES & 1) ^ 1)
    mbarrier.arrive(s_full.index(slot), count=1)
    mbarrier.arrive(d_full.index(slot), count=1)


@gluon.jit
def _start_product(left, left_tail, right, slot, zeros, BLOCK: gl.constexpr):
    """left · rightᵀ, of 64 + 16 columns."""
    main, _, tails = right
    tail = tails.index(slot).permute((1, 0))
    out = warpgroup_mma(left_tail, tail, zeros, use_acc=False, is_async=True)
    main = matrix(main.index(slot), BLOCK, MAIN)
    return warpgroup_mma(left, main.permute((1, 0)), out, is_async=True)


@gluon.jit
def tail_of_sums(operand, i, OUT_TAIL: gl.constexpr, COUNT: gl.constexpr):
    """The i-th tile's tail as the right operand of sums."""
    _, halves, tails = operand
    if OUT_TAIL == HALF:
        return matrix(halves.index(2 * i), COUNT, HALF)
    else:
        return tails.index(i)


@gluon.jit
def _start_sums(weights, right, slot, acc, acc_tail, OUT_TAIL: gl.constexpr, BLOCK: gl.constexpr):
    """acc + weights · right, of 64 + OUT_TAIL columns."""
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT_TAIL, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, out, 2)
    acc = warpgroup_mma(weights, matrix(right[0].index(slot), BLOCK, MAIN), acc, is_async=True)
    weights = gl.convert_layout(weights, layout)
    tail = tail_of_sums(right, slot, OUT_TAIL, BLOCK)
    return acc, warpgroup_mma(weights, tail, acc_tail, is_async=True)


@gluon.jit
def _weights(scores, scale, SCALED: gl.constexpr):
    return gl.exp2(scores) if SCALED else gl.exp2(scores * scale)


@gluon.jit
def _left(x, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """x in 16 bits, as sums take it."""
    return gl.convert_layout(rounded(x, DTYPE), LAYOUT)


@gluon.jit
def sum_blocks(
    task, WHICH: gl.constexpr, KEYS: gl.constexpr, PASS_ON: gl.constexpr, SCALED: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr, OUT_TAIL: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """A consuming warpgroup: the sums of its rows of the left over all blocks, stored at the end.

    PASS_ON: dS of each block also goes through shared memory to the warpgroup that adds up dQ.
    """
    operands, full, empty, left_full, turns, place, scale, factor, blocks, passed = task
    left_s, left_d, right_s, right_d = operands
    s_full, d_full = full
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    OUT_TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT_TAIL, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    DTYPE: gl.constexpr = left_s[0].dtype

    zeros = gl.full([ROWS, BLOCK], 0.0, gl.float32, PRODUCT)
    acc = gl.full([ROWS, MAIN], 0.0, gl.float32, OUT)
    acc_tail = gl.full([ROWS, OUT_TAIL], 0.0, gl.float32, OUT_TAIL_LAYOUT)
    acc_2 = acc  # of Pᵀ dO
    acc_2_tail = acc_tail

    mbarrier.wait(left_full.index(2 * WHICH), 0)
    mbarrier.wait(left_full.index(2 * WHICH + 1), 0)
    x = matrix(left_s[0].index(WHICH), ROWS, MAIN)
    y = matrix(left_d[0].index(WHICH), ROWS, MAIN)
    x_tail = left_s[2].index(WHICH)
    y_tail = left_d[2].index(WHICH)

    mbarrier.wait(s_full.index(0), 0)
    mbarrier.wait(d_full.index(0), 0)
    scores = _start_product(x, x_tail, right_s, 0, zeros, BLOCK)
    grads = _start_product(y, y_tail, right_d, 0, zeros, BLOCK)
    scores = warpgroup_mma_wait(2, deps=[scores])
    p = _weights(scores, scale, SCALED)
    mbarrier.wait(s_full.index(1), 0)
    grads = warpgroup_mma_wait(0, deps=[grads])
    ds = _left(p * grads, DTYPE, LEFT)
    if KEYS:
        pr = _left(p, DTYPE, LEFT)
    if PASS_ON:
        _pass_on(passed, ds, WHICH, 0, CONSUMERS)
    mbarrier.wait(d_full.index(1), 0)

    for i in range(blocks - 1):
        j = i + 1
        slot = j % STAGES
        last = i % STAGES
        if TURNS:
            mbarrier.wait(turns.index(WHICH), (j & 1) ^ 1 if WHICH else j & 1)
        scores = _start_product(x, x_tail, right_s, slot, zeros, BLOCK)
        grads = _start_product(y, y_tail, right_d, slot, zeros, BLOCK)
        if KEYS:
            acc_2, acc_2_tail = _start_sums(pr, right_d, last, acc_2, acc_2_tail, OUT_TAIL, BLOCK)
        acc, acc_tail = _start_sums(ds, right_s, last, acc, acc_tail, OUT_TAIL, BLOCK)
        if TURNS:
            mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS), count=1)
        scores = warpgroup_mma_wait(6 if KEYS else 4, deps=[scores])
        p = _weights(scores, scale, SCALED)
        # These waits are branches, which ptxas moves no exponential across: else it would put them
        # all behind the wait for products that are to run meanwhile.
        next_phase = (j + 1) // STAGES & 1
        mbarrier.wait(s_full.index((j + 1) % STAGES), next_phase)
        grads = warpgroup_mma_wait(4 if KEYS else 2, deps=[grads])
        d = p * grads
        mbarrier.wait(d_full.index((j + 1) % STAGES), next_phase)
        if KEYS:
            acc, acc_tail, acc_2, acc_2_tail = warpgroup_mma_wait(
                0, deps=[acc, acc_tail, acc_2, acc_2_tail]
            )
        else:
            acc, acc_tail = warpgroup_mma_wait(0, deps=[acc, acc_tail])
        mbarrier.arrive(empty.index(last), count=1)
        # Not before: what is being multiplied would keep the registers that these go to.
        ds = _left(d, DTYPE, LEFT)
        if KEYS:
            pr = _left(p, DTYPE, LEFT)
        if PASS_ON:
            _pass_on(passed, ds, WHICH, j, CONSUMERS)

    last = (blocks - 1) % STAGES
    ptr, ptr_2, stride, rows, live = place
    ptr += WHICH * ROWS * stride
    rows -= WHICH * ROWS
    live -= WHICH * ROWS
    acc, acc_tail = _start_sums(ds, right_s, last, acc, acc_tail, OUT_TAIL, BLOCK)
    if KEYS:
        acc_2, acc_2_tail = _start_sums(pr, right_d, last, acc_2, acc_2_tail, OUT_TAIL, BLOCK)
        acc_2, acc_2_tail = warpgroup_mma_wait(0, deps=[acc_2, acc_2_tail])
        ptr_2 += WHICH * ROWS * stride
        _store(ptr_2, stride, rows, live, acc_2, 0, HEAD_DIM, MASKED, OUT)
        _store(ptr_2, stride, rows, live, acc_2_tail, MAIN, HEAD_DIM, MASKED, OUT_TAIL_LAYOUT)
    acc, acc_tail = warpgroup_mma_wait(0, deps=[acc, acc_tail])
    _store(ptr, stride, rows, live, acc * factor, 0, HEAD_DIM, MASKED, OUT)
    _store(ptr, stride, rows, live, acc_tail * factor, MAIN, HEAD_DIM, MASKED, OUT_TAIL_LAYOUT)


@gluon.jit
def _pass_on(passed, ds, WHICH: gl.constexpr, j, CONSUMERS: gl.constexpr):
    """dSᵀ of block j to the warpgroup that adds up dQ."""
    ds_tiles, full, empty = passed
    mbarrier.wait(empty.index(j % 2), (j // 2 & 1) ^ 1)
    ds_tiles.index(j % 2 * CONSUMERS + WHICH).store(ds)
    fence_async_shared()
    mbarrier.arrive(full.index(j % 2), count=1)


@gluon.jit
def _store(
    ptr, stride, rows, live, acc,
    FIRST: gl.constexpr, HEAD_DIM: gl.constexpr, MASKED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """acc into the rows that there are, and zeros from row `live` on, whatever acc holds there."""
    store_rows(ptr, stride, rows, acc, FIRST, HEAD_DIM, LAYOUT)
    if MASKED:  # overwritten: a choice between the two could have ptxas serialise products
        row = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT))[:, None]
        column = FIRST + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
        mask = (row >= live) & (row < rows) & (column < HEAD_DIM)
        zeros = gl.full(acc.shape, 0.0, gl.float32, LAYOUT)
        gl.store(ptr + row * stride + column, zeros.to(ptr.dtype.element_ty), mask=mask)


@gluon.jit
def operand_tiles(box, tail_box, COUNT: gl.constexpr):
    """COUNT tiles: their 64 columns; the halves of their tails, and the tails of two halves."""
    halves, tails = tiles_of_two_halves(tail_box, COUNT)
    return tiles(box, COUNT), halves, tails


@gluon.jit
def length_and_factor(lengths_ptr, b, keys, factor):
    """The keys of a sample, and the gradients' factor: of an only key the weight is 1 and moves with
    nothing, whatever rounding leaves of dO Vᵀ - δ."""
    length = keys
    if lengths_ptr is not None:
        length = gl.maximum(gl.minimum(gl.load(lengths_ptr + b).to(gl.int32), keys), 0)
    return length, gl.where(length > 1, factor, 0.0)


@gluon.jit
def hopper_backward_kernel(
    ptr, ptr_2, lengths_ptr,
    left_s_ptr, left_s_columns_ptr, left_d_ptr, left_d_columns_ptr,
    right_s_ptr, right_s_columns_ptr, right_d_ptr, right_d_columns_ptr,
    left_s_box, left_s_tail_box, left_s_columns_box, left_d_box, left_d_tail_box, left_d_columns_box,
    right_s_box, right_s_tail_box, right_s_columns_box, right_d_box, right_d_tail_box, right_d_columns_box,
    scale, factor, heads, left_rows, right_rows, share,
    KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, SCALED: gl.constexpr, TURNS: gl.constexpr, OUT_TAIL: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sums over the right's rows [part · share:][:share] into ptr[part], and ptr_2[part] where KEYS.

    Grid: programs of 64 · CONSUMERS rows of the left for each sample and head; parts. ptr and ptr_2:
    (parts, B, left_rows, H, HEAD_DIM) contiguous; ptr_2 unused unless KEYS. lengths_ptr: (B,) integers
    or None. Boxes, [1, 1, 64 or BLOCK, 64 or 8] of (B, H, rows, D), are of the pointers that follow, which
    are not used themselves: (B, rows, H, D) of any strides, and their columns by hopper_columns.py.
    """
    # A block is given back after the next but one is waited for.
    gl.static_assert(STAGES >= 3)
    per_program: gl.constexpr = ROWS * CONSUMERS
    programs = gl.cdiv(left_rows, per_program)
    number = gl.program_id(0)
    row = number // programs
    b = row // heads
    h = row % heads
    first = number % programs * per_program
    start = gl.program_id(1) * share
    end = right_rows
    live = left_rows
    if KEYS:
        length, factor = length_and_factor(lengths_ptr, b, left_rows, factor)
        if lengths_ptr is not None:
            end = gl.where(first < length, right_rows, 0)
            live = length
    else:
        length, factor = length_and_factor(lengths_ptr, b, right_rows, factor)
        if lengths_ptr is not None:
            end = length
            live = gl.where(length > 0, left_rows, 0)
    # One where there is nothing to sum over: what it adds is hidden.
    blocks = gl.maximum(gl.cdiv(gl.minimum(end - start, share), BLOCK), 1)

    left_s = operand_tiles(left_s_box, left_s_tail_box, CONSUMERS)
    left_d = operand_tiles(left_d_box, left_d_tail_box, CONSUMERS)
    right_s = operand_tiles(right_s_box, right_s_tail_box, STAGES)
    right_d = operand_tiles(right_d_box, right_d_tail_box, STAGES)
    left_full = barriers(2 * CONSUMERS, 1)
    turns = barriers(CONSUMERS, 1)
    s_full = barriers(STAGES, 1)
    d_full = barriers(STAGES, 1)
    empty = barriers(STAGES, CONSUMERS)

    boxes = (
        (left_s_box, left_s_tail_box, left_s_columns_box),
        (left_d_box, left_d_tail_box, left_d_columns_box),
        (right_s_box, right_s_tail_box, right_s_columns_box),
        (right_d_box, right_d_tail_box, right_d_columns_box),
    )
    operands = (left_s, left_d, right_s, right_d)
    full = (s_full, d_full)
    part = gl.program_id(1) * (gl.num_programs(0) // programs // heads) + b
    offset = ((part.to(gl.int64) * left_rows + first) * heads + h) * HEAD_DIM
    place = (ptr + offset, ptr_2 + offset, heads * HEAD_DIM, left_rows - first, live - first)
    task = (operands, full, empty, left_full, turns, place, scale, factor, blocks, (0,))
    where = (b, h, first, start, blocks)
    MASKED: gl.constexpr = lengths_ptr is not None
    A: gl.constexpr = 0
    B: gl.constexpr = 1
    C: gl.constexpr = 2
    # Numbers known at compile time must be written inside the list: in a tuple with a name they
    # become values.
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (sum_blocks, (task, A, KEYS, False, SCALED, TURNS, MASKED, OUT_TAIL, HEAD_DIM,
                              BLOCK, STAGES, CONSUMERS)),
                (sum_blocks, (task, B, KEYS, False, SCALED, TURNS, MASKED, OUT_TAIL, HEAD_DIM,
                              BLOCK, STAGES, CONSUMERS)),
                (sum_blocks, (task, C, KEYS, False, SCALED, TURNS, MASKED, OUT_TAIL, HEAD_DIM,
                              BLOCK, STAGES, CONSUMERS)),
                (copy_blocks, (boxes, operands, full, empty, left_full, where, KEYS, BLOCK, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize(
            [
                (sum_blocks, (task, A, KEYS, False, SCALED, TURNS, MASKED, OUT_TAIL, HEAD_DIM,
                              BLOCK, STAGES, CONSUMERS)),
                (sum_blocks, (task, B, KEYS, False, SCALED, TURNS, MASKED, OUT_TAIL, HEAD_DIM,
                              BLOCK, STAGES, CONSUMERS)),
                (copy_blocks, (boxes, operands, full, empty, left_full, where, KEYS, BLOCK, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
