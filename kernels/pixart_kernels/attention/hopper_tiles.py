"""What Gluon kernels for Hopper are made of: tiles in shared memory, barriers, rounding, storing.

72 columns are MAIN + HALF. Where a product is over columns, the tail must have 16, TAIL; HALF of these
are to spare, and a kernel may put there what it likes: tiles of two halves lie one half behind the
other, each a tile of HALF columns of its own, and no copy need touch the second.

Triton's names differ: those of 3.6 are found where the newest are not.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # else _reinterpret

ROWS = gl.constexpr(64)  # of a product that a warpgroup starts
MAIN = gl.constexpr(64)
TAIL = gl.constexpr(16)
HALF = gl.constexpr(8)


@gluon.jit
def matrix(tile, COUNT: gl.constexpr, COLUMNS: gl.constexpr):
    """COUNT rows of a head: what is copied has the batch and the head in front."""
    return tile.reshape([COUNT, COLUMNS])


@gluon.jit
def tiles(box, COUNT: gl.constexpr):
    """Shared memory for COUNT copies of a box."""
    return gl.allocate_shared_memory(box.dtype, [COUNT] + box.block_type.shape, box.layout)


@gluon.constexpr_function
def _one_half_behind_the_other(rows):
    bases = [[0, 1], [0, 2], [0, 4]] + [[2**i, 0] for i in range(rows.bit_length() - 1)] + [[0, 8]]
    return gl.SharedLinearLayout(bases)


@gluon.jit
def tiles_of_two_halves(box, COUNT: gl.constexpr):
    """For COUNT copies of a box of HALF columns: its halves, two for each, and both as one tile.

    The first half of tile i is 2 i, the second 2 i + 1, both as boxes; the tiles are (rows, TAIL).
    """
    rows: gl.constexpr = box.block_type.shape[2]
    layout: gl.constexpr = _one_half_behind_the_other(rows)
    halves = tiles(box, 2 * COUNT)
    if RENAMED:
        whole = halves.reinterpret(box.dtype, [COUNT, rows, TAIL], layout)
    else:
        whole = halves._reinterpret(box.dtype, [COUNT, rows, TAIL], layout)
    return halves, whole


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers whose phases are over after so many arrivals. The first wait for phase 1 passes."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def rounded(x, DTYPE: gl.constexpr):
    """fp32 to bf16 or fp16, where it stands: a cast LLVM would move past the end of a loop, and carry
    32 bits for each number into the next turn."""
    if gl.float16 == DTYPE:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, is_pure=False, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, is_pure=False, pack=2
        )


@gluon.jit
def store_rows(
    ptr, stride, left, x, FIRST: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr
):
    """The columns of x that there are, from FIRST on, of the `left` rows that there are."""
    row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = FIRST + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    mask = (row < left) & (column < HEAD_DIM)
    gl.store(ptr + row * stride + column, x.to(ptr.dtype.element_ty), mask=mask)
