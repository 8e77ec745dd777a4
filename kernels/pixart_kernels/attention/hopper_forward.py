"""The forward kernel of attention for Hopper, in Gluon: one warp copies, CONSUMERS warpgroups multiply.

    P = exp2(s · Q Kᵀ - peak)      total = Σ_m P      O = P V / total      lse = peak + log2(total)

with s = scale · log2(e), as in forward.py; 64 queries for each warpgroup, BLOCK_K keys at a time. The
copying warp fills a ring of STAGES blocks of K and of V with the copy engine (TMA). A warpgroup that has
its scores of block j starts the products of block j + 1 of K and of block j of V before it turns to the
exponentials of block j + 1 ... so that the tensor cores work while it computes; where TURNS, warpgroups
take turns at starting products, so that their exponentials fall at different times.

65 to 72 columns are 64 + 16 in Q Kᵀ, zeros beyond the last coming from the copy engine, and in P V too:
column 72 of V's tile is 1, so that P V holds the sums of P, of the very numbers that V was multiplied
with. It is written once for each slot of the ring: copies of the 8 columns of a tail do not reach it.

The block that may be short comes first, as in forward.py: keys 0 .. short - 1 count. What a copy brings
beside them is masked in the scores; where it may be padding, V is set to zero there as well, since 0 · NaN
is NaN. Queries beyond the last are computed of zeros and not stored.

Where the bound of bound.py holds for a program, peak is 0 and nothing is shrunk; as there LIMIT is the
bound, 0 for no bound.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pixart_kernels.attention.bound import PARTS as BOUND_PARTS
from pixart_kernels.attention.bound import ROWS as BOUND_ROWS
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
def _copy_blocks(
    boxes, memory, full, empty, q_full, where,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    q_box, q_tail_box, k_box, k_tail_box, v_box, v_tail_box = boxes
    q, q_tail, k, k_tail, v, v_halves, _ = memory
    k_full, v_full = full
    k_empty, v_empty = empty
    b, h, first, short, blocks = where
    for i in gl.static_range(CONSUMERS):
        bar = q_full.index(i)
        mbarrier.expect(bar, ROWS * (MAIN + TAIL) * 2)
        copy(q_box, [b, h, first + i * ROWS, 0], bar, q.index(i))
        copy(q_tail_box, [b, h, first + i * ROWS, MAIN], bar, q_tail.index(i))
    start = 0
    for j in range(blocks):
        slot = j % STAGES
        free = (j // STAGES & 1) ^ 1
        bar = k_full.index(slot)
        mbarrier.wait(k_empty.index(slot), free)
        mbarrier.expect(bar, BLOCK_K * (MAIN + TAIL) * 2)
        copy(k_box, [b, h, start, 0], bar, k.index(slot))
        copy(k_tail_box, [b, h, start, MAIN], bar, k_tail.index(slot))
        bar = v_full.index(slot)
        mbarrier.wait(v_empty.index(slot), free)
        mbarrier.expect(bar, BLOCK_K * (MAIN + HALF) * 2)
        copy(v_box, [b, h, start, 0], bar, v.index(slot))
        copy(v_tail_box, [b, h, start, MAIN], bar, v_halves.index(2 * slot))
        start = gl.where(j == 0, short, start + BLOCK_K)


@gluon.jit
def _start_scores(q, q_tail, memory, slot, zeros, BLOCK_K: gl.constexpr):
    _, _, k, k_tail, _, _, _ = memory
    main = matrix(k.index(slot), BLOCK_K, MAIN)
    tail = matrix(k_tail.index(slot), BLOCK_K, TAIL)
    scores = warpgroup_mma(q_tail, tail.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(q, main.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _start_sums(
    weights, memory, slot, acc, acc_tail, OUT_TAIL: gl.constexpr, BLOCK_K: gl.constexpr
):
    """O + P V for both parts of V, and the sums of P; weights already have V's dtype."""
    _, _, _, _, v, _, v_tails = memory
    acc = warpgroup_mma(weights, matrix(v.index(slot), BLOCK_K, MAIN), acc, is_async=True)
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, OUT_TAIL, 2))
    return acc, warpgroup_mma(weights, v_tails.index(slot), acc_tail, is_async=True)


@gluon.jit
def _scaled(x, scale, SCALED: gl.constexpr):
    return x if SCALED else x * scale


@gluon.jit
def _weigh_first(
    scores, scale, short, ONLINE: gl.constexpr, SCALED: gl.constexpr, LAYOUT: gl.constexpr
):
    """Of the block of which the first `short` keys count: exp2(scores - peak), and the peak."""
    key = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    scores = _scaled(gl.where((key < short)[None, :], scores, float("-inf")), scale, SCALED)
    if ONLINE:
        peak = gl.where(short == 0, 0.0, gl.max(scores, 1))
        return gl.exp2(scores - peak[:, None]), peak
    else:
        return gl.exp2(scores), gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))


@gluon.jit
def _weigh(scores, scale, peak, ONLINE: gl.constexpr, SCALED: gl.constexpr):
    """exp2(scores - peak), the peak, and what earlier sums shrink by."""
    if ONLINE:
        highest = gl.maximum(peak, _scaled(gl.max(scores, 1), scale, SCALED))
        weights = gl.exp2(_scaled(scores, scale, SCALED) - highest[:, None])
        return weights, highest, gl.exp2(peak - highest)
    else:
        return gl.exp2(_scaled(scores, scale, SCALED)), peak, peak


@gluon.jit
def _clear_padding(memory, length, BLOCK_K: gl.constexpr):
    """Zeros for the rows of the first V that lie beyond a sample's keys, whatever they held."""
    _, _, _, _, v, v_halves, _ = memory
    _clear_rows(matrix(v.index(0), BLOCK_K, MAIN), length, BLOCK_K, MAIN)
    _clear_rows(matrix(v_halves.index(0), BLOCK_K, HALF), length, BLOCK_K, HALF)
    fence_async_shared()


@gluon.jit
def _clear_rows(tile, length, BLOCK_K: gl.constexpr, COLUMNS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, HALF], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0]
    )
    row = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    x = tile.load(LAYOUT)
    tile.store(gl.where(row < length, x, 0.0).to(x.dtype))


@gluon.jit
def _attend(
    task, WHICH: gl.constexpr, LIMIT: gl.constexpr, LENGTHS: gl.constexpr, WITH_LSE: gl.constexpr,
    SCALED: gl.constexpr, TURNS: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """All keys for the queries of a warpgroup, the WHICH-th."""
    # All of it twice: what came out of either of two loops would be moved in registers in each turn.
    if LIMIT:
        if task[-1]:
            _attend_with(
                task, False, WHICH, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
                BLOCK_K, STAGES, CONSUMERS,
            )  # fmt: skip
        else:
            _attend_with(
                task, True, WHICH, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
                BLOCK_K, STAGES, CONSUMERS,
            )  # fmt: skip
    else:
        _attend_with(
            task, True, WHICH, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
            BLOCK_K, STAGES, CONSUMERS,
        )  # fmt: skip


@gluon.jit
def _attend_with(
    task, ONLINE: gl.constexpr, WHICH: gl.constexpr, LENGTHS: gl.constexpr, WITH_LSE: gl.constexpr,
    SCALED: gl.constexpr, TURNS: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    memory, full, empty, q_full, turns, cleared, place, scale, short, blocks, is_padded, _ = task
    k_full, v_full = full
    k_empty, v_empty = empty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    OUT_TAIL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    dtype: gl.constexpr = memory[4].dtype

    zeros = gl.full([ROWS, BLOCK_K], 0.0, gl.float32, SCORES)
    acc = gl.full([ROWS, MAIN], 0.0, gl.float32, OUT)
    acc_tail = gl.full([ROWS, TAIL], 0.0, gl.float32, OUT_TAIL)
    q = matrix(memory[0].index(WHICH), ROWS, MAIN)
    q_tail = matrix(memory[1].index(WHICH), ROWS, TAIL)

    mbarrier.wait(q_full.index(WHICH), 0)
    mbarrier.wait(k_full.index(0), 0)
    if Q_IN_REGISTERS:  # shared memory has less to deliver: 128 bytes a cycle are all of it
        q = q.load(gl.DotOperandLayout(0, SCORES, 2))
        q_tail = q_tail.load(gl.DotOperandLayout(0, SCORES, 2))
    scores = _start_scores(q, q_tail, memory, 0, zeros, BLOCK_K)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    weights, peak = _weigh_first(scores, scale, short, ONLINE, SCALED, SCORES)
    weights = gl.convert_layout(rounded(weights, dtype), LEFT)
    mbarrier.wait(k_full.index(1), 0, pred=blocks > 1)
    mbarrier.wait(v_full.index(0), 0)
    if LENGTHS:
        if WHICH == 0:
            if is_padded:
                _clear_padding(memory, short, BLOCK_K)
            mbarrier.arrive(cleared.index(0), count=1)
        mbarrier.wait(cleared.index(0), 0)

    for j in range(1, blocks):
        slot = j % STAGES
        if TURNS:
            mbarrier.wait(turns.index(WHICH), (j & 1) ^ 1 if WHICH else j & 1)
        scores = _start_scores(q, q_tail, memory, slot, zeros, BLOCK_K)
        acc, acc_tail = _start_sums(
            weights, memory, (j - 1) % STAGES, acc, acc_tail, OUT_TAIL, BLOCK_K
        )
        if TURNS:
            mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS), count=1)
        scores = warpgroup_mma_wait(2, deps=[scores])
        mbarrier.arrive(k_empty.index(slot), count=1)
        unrounded, peak, shrink = _weigh(scores, scale, peak, ONLINE, SCALED)
        # These waits are branches, which ptxas moves no exponential across: else it would put them
        # all behind the wait for the products that are to run meanwhile.
        mbarrier.wait(k_full.index((j + 1) % STAGES), (j + 1) // STAGES & 1, pred=j + 1 < blocks)
        mbarrier.wait(v_full.index(slot), j // STAGES & 1)
        acc, acc_tail = warpgroup_mma_wait(0, deps=[acc, acc_tail])
        mbarrier.arrive(v_empty.index((j - 1) % STAGES), count=1)
        # Not before: what is being multiplied would keep the registers that these go to.
        weights = gl.convert_layout(rounded(unrounded, dtype), LEFT)
        if ONLINE:
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
            acc_tail = acc_tail * gl.convert_layout(shrink, gl.SliceLayout(1, OUT_TAIL))[:, None]

    last = (blocks - 1) % STAGES
    acc, acc_tail = _start_sums(weights, memory, last, acc, acc_tail, OUT_TAIL, BLOCK_K)
    acc, acc_tail = warpgroup_mma_wait(0, deps=[acc, acc_tail])
    _store(place, acc, acc_tail, peak, WHICH, WITH_LSE, HEAD_DIM, OUT, OUT_TAIL)


@gluon.jit
def _store(
    place, acc, acc_tail, peak, WHICH: gl.constexpr, WITH_LSE: gl.constexpr, HEAD_DIM: gl.constexpr,
    OUT: gl.constexpr, OUT_TAIL: gl.constexpr,
):  # fmt: skip
    out_ptr, lse_ptr, stride, left = place
    out_ptr += WHICH * ROWS * stride
    left -= WHICH * ROWS
    column = gl.arange(0, TAIL, layout=gl.SliceLayout(0, OUT_TAIL))[None, :]
    total = gl.sum(gl.where(column == HALF, acc_tail, 0.0), 1)
    total = gl.where(total == 0.0, 1.0, total)  # no key: O and peak are 0
    main_total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    store_rows(out_ptr, stride, left, acc / main_total[:, None], 0, HEAD_DIM, OUT)
    store_rows(out_ptr, stride, left, acc_tail / total[:, None], MAIN, HEAD_DIM, OUT_TAIL)
    if WITH_LSE:
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT_TAIL))
        lse = gl.convert_layout(peak, gl.SliceLayout(1, OUT_TAIL)) + gl.log2(total)
        gl.store(lse_ptr + WHICH * ROWS + row, lse, mask=row < left)


@gluon.jit
def _is_bounded(
    longest_q_ptr, longest_k_ptr, row, first, queries, scale,
    LIMIT: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """bound.is_bounded, in Gluon."""
    blocks = gl.cdiv(queries, BOUND_ROWS)
    longest_q = 0.0
    for i in gl.static_range((QUERIES + BOUND_ROWS - 1) // BOUND_ROWS):
        block = gl.minimum(first // BOUND_ROWS + i, blocks - 1)
        longest_q = gl.maximum(longest_q, gl.load(longest_q_ptr + row * blocks + block))
    longest_k = 0.0
    for i in gl.static_range(BOUND_PARTS):
        longest_k = gl.maximum(longest_k, gl.load(longest_k_ptr + row * BOUND_PARTS + i))
    return longest_q * longest_k * (scale * scale) <= LIMIT * LIMIT


@gluon.jit
def _write_ones(halves, STAGES: gl.constexpr, BLOCK_K: gl.constexpr):
    """Into the second half of each tile of V's tail, which no copy goes to."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, HALF], [32, 1], [4, 1], [1, 0])
    ones = gl.full([BLOCK_K, HALF], 1.0, halves.dtype, LAYOUT)
    for i in gl.static_range(STAGES):
        matrix(halves.index(2 * i + 1), BLOCK_K, HALF).store(ones)
    fence_async_shared()


@gluon.jit(do_not_specialize=["heads", "queries", "keys"])  # a 1 would not be a number any more
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, longest_q_ptr, longest_k_ptr, lengths_ptr,
    q_box, q_tail_box, k_box, k_tail_box, v_box, v_tail_box,
    scale, heads, queries, keys,
    HEAD_DIM: gl.constexpr, LIMIT: gl.constexpr, SCALED: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, TURNS: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES >= 2)  # a block is waited for before the one before it is given back
    per_program: gl.constexpr = ROWS * CONSUMERS
    programs = gl.cdiv(queries, per_program)
    row = gl.program_id(0) // programs
    b = row // heads
    h = row % heads
    first = gl.program_id(0) % programs * per_program
    LENGTHS: gl.constexpr = lengths_ptr is not None
    WITH_LSE: gl.constexpr = lse_ptr is not None
    length = keys
    if LENGTHS:
        length = gl.minimum(gl.maximum(gl.load(lengths_ptr + b), 0), keys).to(gl.int32)
    short = length - gl.maximum(length - 1, 0) // BLOCK_K * BLOCK_K  # 0 without keys only
    blocks = gl.maximum(gl.cdiv(length, BLOCK_K), 1)
    bounded = False
    if LIMIT:
        bounded = _is_bounded(
            longest_q_ptr, longest_k_ptr, row, first, queries, scale, LIMIT, per_program
        )

    v_halves, v_tails = tiles_of_two_halves(v_tail_box, STAGES)
    _write_ones(v_halves, STAGES, BLOCK_K)
    memory = (
        tiles(q_box, CONSUMERS), tiles(q_tail_box, CONSUMERS),
        tiles(k_box, STAGES), tiles(k_tail_box, STAGES), tiles(v_box, STAGES), v_halves, v_tails,
    )  # fmt: skip
    q_full = barriers(CONSUMERS, 1)
    turns = barriers(CONSUMERS, 1)
    cleared = barriers(1, 1)
    full = (barriers(STAGES, 1), barriers(STAGES, 1))
    empty = (barriers(STAGES, CONSUMERS), barriers(STAGES, CONSUMERS))

    out_ptr += ((b.to(gl.int64) * queries + first) * heads + h) * HEAD_DIM
    if WITH_LSE:
        lse_ptr += row.to(gl.int64) * queries + first
        place = (out_ptr, lse_ptr, heads * HEAD_DIM, queries - first)
    else:
        place = (out_ptr, out_ptr, heads * HEAD_DIM, queries - first)
    is_padded = (length < BLOCK_K) & (length < keys)
    task = (
        memory, full, empty, q_full, turns, cleared, place, scale, short, blocks, is_padded, bounded,
    )  # fmt: skip
    boxes = (q_box, q_tail_box, k_box, k_tail_box, v_box, v_tail_box)
    where = (b, h, first, short, blocks)
    A: gl.constexpr = 0
    B: gl.constexpr = 1
    C: gl.constexpr = 2
    # Constexprs stay what they are in a tuple only if it stands here.
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_attend, (
                    task, A, LIMIT, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
                    BLOCK_K, STAGES, CONSUMERS,
                )),
                (_attend, (
                    task, B, LIMIT, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
                    BLOCK_K, STAGES, CONSUMERS,
                )),
                (_attend, (
                    task, C, LIMIT, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
                    BLOCK_K, STAGES, CONSUMERS,
                )),
                (_copy_blocks, (
                    boxes, memory, full, empty, q_full, where, BLOCK_K, STAGES, CONSUMERS,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    task, A, LIMIT, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
                    BLOCK_K, STAGES, CONSUMERS,
                )),
                (_attend, (
                    task, B, LIMIT, LENGTHS, WITH_LSE, SCALED, TURNS, Q_IN_REGISTERS, HEAD_DIM,
                    BLOCK_K, STAGES, CONSUMERS,
                )),
                (_copy_blocks, (
                    boxes, memory, full, empty, q_full, where, BLOCK_K, STAGES, CONSUMERS,
                )),
            ],
            [4, 1],
            [REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
