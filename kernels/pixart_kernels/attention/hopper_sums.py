"""Attention backward on Hopper in one launch: hopper_backward.py's over keys, and dQ by a third warpgroup.

That warpgroup gets dSᵀ of each block of queries through shared memory, multiplies it by its program's
keys, and adds the product to dQ, in fp32 and in global memory. Other programs add to the same block:
always in the order of their keys, so that bits do not change from run to run. done[block] says how
many programs have added; a program waits until that is as many as there are before it.

A program waits for those of smaller keys only, and so must not start before them: its place is a ticket
taken when it starts, not its index, which promises no order. So the program with the smallest
ticket of those that run waits for none, whatever else is on the GPU, and all come to their end.
Neighbouring tickets are of different heads: programs of one head would all begin at the same block,
and each wait for all before it. So few of them run together, and each follows one block behind.

That is 10 · B · N · M · H · D FLOP where two launches have 14, and takes dQ in fp32, zeros before,
and its cast (hopper_columns.py).
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pixart_kernels.attention.hopper_backward import (
    copy_blocks,
    length_and_factor,
    operand_tiles,
    sum_blocks,
    tail_of_sums,
)
from pixart_kernels.attention.hopper_tiles import MAIN, ROWS, barriers, matrix

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the second is 3.6's name


@gluon.jit
def _add_up(
    task, order, BLOCK: gl.constexpr, OUT_TAIL: gl.constexpr, HEAD_DIM: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """dS K of each block of queries into its sum, when it is this program's turn there."""
    operands, _, _, left_full, _, _, _, _, blocks, passed = task
    keys = operands[0]
    ds_tiles, full, empty = passed
    ptr, done_ptr, before = order
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    OUT_TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT_TAIL, 16])
    zeros = gl.full([BLOCK, MAIN], 0.0, gl.float32, OUT)
    zeros_tail = gl.full([BLOCK, OUT_TAIL], 0.0, gl.float32, OUT_TAIL_LAYOUT)
    for i in gl.static_range(CONSUMERS):
        mbarrier.wait(left_full.index(2 * i), 0)
    for j in range(blocks):
        mbarrier.wait(full.index(j % 2), j // 2 & 1)
        dq = zeros
        dq_tail = zeros_tail
        for i in gl.static_range(CONSUMERS):
            # From shared memory: of an operand in registers ptxas would serialise the whole kernel.
            ds = ds_tiles.index(j % 2 * CONSUMERS + i).permute((1, 0))
            main = matrix(keys[0].index(i), ROWS, MAIN)
            dq = warpgroup_mma(ds, main, dq, use_acc=i > 0, is_async=True)
            tail = tail_of_sums(keys, i, OUT_TAIL, ROWS)
            dq_tail = warpgroup_mma(ds, tail, dq_tail, use_acc=i > 0, is_async=True)
        dq, dq_tail = warpgroup_mma_wait(0, deps=[dq, dq_tail])
        mbarrier.arrive(empty.index(j % 2), count=1)

        while gl.atomic_add(done_ptr + j, 0, sem="acquire") < before:
            pass
        block_ptr = ptr + j * (BLOCK * HEAD_DIM)
        _add(block_ptr, dq, 0, HEAD_DIM, OUT)
        _add(block_ptr, dq_tail, MAIN, HEAD_DIM, OUT_TAIL_LAYOUT)
        barrier()
        gl.atomic_add(done_ptr + j, 1, sem="release")


@gluon.jit
def _add(ptr, acc, FIRST: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Whole blocks: a mask of rows would cost a branch for each sum, 90 instructions."""
    row = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = FIRST + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    ptr += row * HEAD_DIM + column
    if FIRST + acc.shape[1] > HEAD_DIM:
        gl.atomic_add(ptr, acc, mask=column < HEAD_DIM, sem="relaxed")
    else:
        gl.atomic_add(ptr, acc, sem="relaxed")


@gluon.jit
def hopper_sums_kernel(
    dk_ptr, dv_ptr, dq_ptr, done_ptr, ticket_ptr, lengths_ptr,
    k_ptr, k_columns_ptr, v_ptr, v_columns_ptr, q_ptr, q_columns_ptr, grad_ptr, grad_columns_ptr,
    k_box, k_tail_box, k_columns_box, v_box, v_tail_box, v_columns_box,
    q_box, q_tail_box, q_columns_box, grad_box, grad_tail_box, grad_columns_box,
    scale, factor, heads, keys, queries,
    HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
    TURNS: gl.constexpr, OUT_TAIL: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, ADD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK, dV and the sums of dQ.

    Grid: a program of 128 keys for each sample and head. dk_ptr, dv_ptr: (B, keys, H, HEAD_DIM)
    contiguous. dq_ptr: fp32, (B · H, blocks, BLOCK, HEAD_DIM), where blocks = ⌈queries / BLOCK⌉; still to
    be multiplied by factor. done_ptr: int32, (B · H, blocks); ticket_ptr: int32, (1,). These three hold
    zeros before. Boxes and lengths_ptr as of hopper_backward_kernel.
    """
    gl.static_assert(STAGES >= 3)
    CONSUMERS: gl.constexpr = 2
    per_program: gl.constexpr = ROWS * CONSUMERS
    programs = gl.cdiv(keys, per_program)
    number = gl.atomic_add(ticket_ptr, 1, sem="relaxed")
    of_head = gl.num_programs(0) // programs
    before = number // of_head  # programs of this head
    row = number % of_head
    b = row // heads
    h = row % heads
    first = before * per_program
    all_blocks = gl.cdiv(queries, BLOCK)
    blocks = all_blocks
    live = keys
    length, factor = length_and_factor(lengths_ptr, b, keys, factor)
    if lengths_ptr is not None:
        blocks = gl.where(first < length, all_blocks, 1)  # what that one adds is zeros
        live = length

    k_tiles = operand_tiles(k_box, k_tail_box, CONSUMERS)
    v_tiles = operand_tiles(v_box, v_tail_box, CONSUMERS)
    q_tiles = operand_tiles(q_box, q_tail_box, STAGES)
    grad_tiles = operand_tiles(grad_box, grad_tail_box, STAGES)
    left_full = barriers(2 * CONSUMERS, 1)
    turns = barriers(CONSUMERS, 1)
    s_full = barriers(STAGES, 1)
    d_full = barriers(STAGES, 1)
    empty = barriers(STAGES, CONSUMERS)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    ds_tiles = gl.allocate_shared_memory(k_box.dtype, [2 * CONSUMERS, ROWS, BLOCK], ds_layout)
    passed = (ds_tiles, barriers(2, CONSUMERS), barriers(2, 1))

    boxes = (
        (k_box, k_tail_box, k_columns_box),
        (v_box, v_tail_box, v_columns_box),
        (q_box, q_tail_box, q_columns_box),
        (grad_box, grad_tail_box, grad_columns_box),
    )
    operands = (k_tiles, v_tiles, q_tiles, grad_tiles)
    full = (s_full, d_full)
    offset = ((b.to(gl.int64) * keys + first) * heads + h) * HEAD_DIM
    place = (dk_ptr + offset, dv_ptr + offset, heads * HEAD_DIM, keys - first, live - first)
    task = (operands, full, empty, left_full, turns, place, scale, factor, blocks, passed)
    where = (b, h, first, 0, blocks)
    dq_ptr += row.to(gl.int64) * all_blocks * (BLOCK * HEAD_DIM)
    order = (dq_ptr, done_ptr + row * all_blocks, before)
    MASKED: gl.constexpr = lengths_ptr is not None
    A: gl.constexpr = 0
    B: gl.constexpr = 1
    gl.warp_specialize(
        [
            (sum_blocks, (task, A, True, True, SCALED, TURNS, MASKED, OUT_TAIL, HEAD_DIM,
                          BLOCK, STAGES, CONSUMERS)),
            (sum_blocks, (task, B, True, True, SCALED, TURNS, MASKED, OUT_TAIL, HEAD_DIM,
                          BLOCK, STAGES, CONSUMERS)),
            (_add_up, (task, order, BLOCK, OUT_TAIL, HEAD_DIM, CONSUMERS)),
            (copy_blocks, (boxes, operands, full, empty, left_full, where, True, BLOCK, STAGES, CONSUMERS)),
        ],
        [4, 4, 1],
        [REGISTERS, ADD_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
