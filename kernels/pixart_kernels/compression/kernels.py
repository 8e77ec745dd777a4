"""Triton kernels of compress_kv, forward and backward, for keys and values in one launch.

With A = B·N·C elements of k (or of v), forward reads 2A and writes 2A/R², backward reads 2A + 2A/R²
and writes 2A: tokens come straight out of a packed projection, each once. The merged tokens and the
LayerNorm's statistics are not saved; the backward computes them again from tokens that the gradient
of the weights needs anyway, and finds them in L1 the second time.

Gradients of the weights are sums over tokens: each program adds up its own in fp32, and a second
step adds those in a fixed order, so that the result is the same every time.

Weights are (R·R, C), taps in row-major order. Patches of all samples are counted through: patch
n = (sample · ⌈H/R⌉ + i) · ⌈W/R⌉ + j. program_id(1) is 0 for keys and 1 for values.
"""

# Tuples that grow block by block change their type.
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.dispatch import launch, row_blocks

MOST_PROGRAMS = 256  # of a backward, for keys and as many for values
FEWEST_PATCHES = 8  # for each of them, or sums outweigh tokens


@triton.jit
def _corner(patches, sides, R: tl.constexpr):
    """Sample, row and column of the first token of each patch."""
    line = patches // sides[3]
    return line // sides[2], line % sides[2] * R, patches % sides[3] * R


@triton.jit
def _token(patches, tap, strides, sides, R: tl.constexpr):
    """The start of the token under a tap of each patch, and whether the grid has it or repeats it."""
    sample, row, col = _corner(patches, sides, R)
    row += tap // R
    col += tap % R
    token = tl.minimum(row, sides[0] - 1) * sides[1] + tl.minimum(col, sides[1] - 1)
    starts = sample.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1]
    return starts[:, None], ((row < sides[0]) & (col < sides[1]))[:, None]


@triton.jit
def _merge(
    tokens,
    weight,
    bias,
    patches,
    mask,
    strides,
    sides,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    merged = row_blocks.load_for_all(bias, ROWS, C)
    for tap in tl.static_range(R * R):
        starts, exists = _token(patches, tap, strides, sides, R)
        values = row_blocks.load(tokens, starts, mask, C)
        factors = row_blocks.load_for_all(weight + tap * C, ROWS, C)
        merged = row_blocks.add(merged, row_blocks.multiply(values, factors))
    return merged


@triton.autotune(
    configs=launch.configurations(
        triton.Config({"MOST_ROWS": 8}, num_warps=4),
        triton.Config({"MOST_ROWS": 4}, num_warps=4),
        triton.Config({"MOST_ROWS": 16}, num_warps=8),
        triton.Config({"MOST_ROWS": 4}, num_warps=2),
    ),
    key=["C", "R"],
)
@triton.jit
def _compress_forward(
    k,
    v,
    weight,
    bias,
    norm_weight,
    norm_bias,
    merged_k,
    merged_v,
    strides,  # of k and v, from sample to sample and from token to token
    patch_count,
    sides,  # of the grids of tokens and of patches: (H, W, ⌈H/R⌉, ⌈W/R⌉)
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    MOST_ROWS: tl.constexpr,
):
    ROWS: tl.constexpr = row_blocks.rows_of(MOST_ROWS, C)
    patches = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (patches < patch_count)[:, None]
    tokens = tl.where(tl.program_id(1) == 0, k, v)
    merged = _merge(tokens, weight, bias, patches, mask, strides, sides, ROWS, C, R)
    if norm_weight is not None:
        normed, deviation = row_blocks.layer_norm(merged, eps, C)
        normed = row_blocks.multiply(normed, row_blocks.load_for_all(norm_weight, ROWS, C))
        merged = row_blocks.add(normed, row_blocks.load_for_all(norm_bias, ROWS, C))
    out = tl.where(tl.program_id(1) == 0, merged_k, merged_v)
    row_blocks.store(out, patches.to(tl.int64)[:, None] * C, mask, merged, C)


def forward(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    grid: tuple[int, int],
    ratio: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = k.shape
    k, v = _same_strides(k, v)
    merged = tuple(triton.cdiv(side, ratio) for side in grid)
    shape = (batch, merged[0] * merged[1], channels)
    merged_k, merged_v = k.new_empty(shape), v.new_empty(shape)
    patches = shape[0] * shape[1]
    if merged_k.numel() > 0:

        def programs(config: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(patches, row_blocks.rows_of(config["MOST_ROWS"], channels)), 2

        with launch.on(k.device):
            _compress_forward[programs](
                k,
                v,
                _taps_first(weight),
                bias.contiguous(),
                None if norm_weight is None else norm_weight.contiguous(),
                None if norm_bias is None else norm_bias.contiguous(),
                merged_k,
                merged_v,
                (k.stride(0), k.stride(1)),
                patches,
                (*grid, *merged),
                eps,
                channels,
                ratio,
                enable_fp_fusion=True,
            )
    return merged_k, merged_v


def _same_strides(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v as one kernel reads them: equal strides, the channels of a token side by side."""
    if k.stride() == v.stride() and k.stride(2) == 1:
        return k, v
    return k.contiguous(), v.contiguous()


def _taps_first(weight: Tensor) -> Tensor:
    """(C, 1, R, R) -> (R·R, C): a row for each tap, to be read like any other."""
    return weight.flatten(1).t().contiguous()


@triton.jit
def _factors(weight, patches, tap, sides, ROWS: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """The factor of the token under a tap: the sum of the weights of all taps that are on it, which
    are several at the end of a row or column."""
    _, row, col = _corner(patches, sides, R)
    factors = row_blocks.zeros(ROWS, C)
    for other in range(tap, R * R):
        same_row = tl.minimum(row + other // R, sides[0] - 1) == row + tap // R
        same_col = tl.minimum(col + other % R, sides[1] - 1) == col + tap % R
        nothing = tl.full([ROWS, 1], 0, tl.int32)
        mask = (same_row & same_col)[:, None]
        factors = row_blocks.add(factors, row_blocks.load(weight + other * C, nothing, mask, C))
    return factors


@triton.autotune(
    configs=launch.configurations(
        # Four warps for a row: at C = 1152 the sums over tokens alone are 63 registers of each lane
        # for R = 2, 108 for R = 3 and 171 for R = 4; with two warps twice that.
        triton.Config({"MOST_ROWS": 1}, num_warps=4),  # the only one without spills everywhere
        triton.Config({"MOST_ROWS": 2}, num_warps=8),
    ),
    key=["C", "R"],
)
@triton.jit
def _compress_backward(
    grad_k,
    grad_v,
    k,
    v,
    weight,
    bias,
    norm_weight,
    dk,
    dv,
    sums,  # (2, programs, R·R + 1 or 3, C): of weight, bias, norm_weight and norm_bias
    strides,  # of k and v
    gradient_strides,  # of dk and dv
    patch_count,
    span,  # patches of a program
    sides,  # of the grids of tokens and of patches: (H, W, ⌈H/R⌉, ⌈W/R⌉)
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # R divides H and W
    MOST_ROWS: tl.constexpr,
):
    ROWS: tl.constexpr = row_blocks.rows_of(MOST_ROWS, C)
    is_key = tl.program_id(1) == 0
    tokens, grad, dtokens = (
        tl.where(is_key, k, v),
        tl.where(is_key, grad_k, grad_v),
        tl.where(is_key, dk, dv),
    )
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, patch_count)
    none = row_blocks.zeros(ROWS, C)
    dbias, dnorm_weight, dnorm_bias, dweight = none, none, none, ()
    for _tap in tl.static_range(R * R):
        dweight += (none,)
    for start in range(first, last, ROWS):
        patches = start + tl.arange(0, ROWS)
        mask = (patches < last)[:, None]
        own = patches.to(tl.int64)[:, None] * C
        if norm_weight is None:
            grads = row_blocks.load(grad, own, mask, C)
        else:
            merged = _merge(tokens, weight, bias, patches, mask, strides, sides, ROWS, C, R)
            normed, deviation = row_blocks.layer_norm(merged, eps, C)
            grads = row_blocks.load(grad, own, mask, C)
            dnorm_bias = row_blocks.add(dnorm_bias, grads)
            dnorm_weight = row_blocks.add(dnorm_weight, row_blocks.multiply(grads, normed))
            grads = row_blocks.multiply(grads, row_blocks.load_for_all(norm_weight, ROWS, C))
            grads = row_blocks.layer_norm_backward(grads, normed, deviation, C)
        dbias = row_blocks.add(dbias, grads)
        taps = ()
        for tap in tl.static_range(R * R):
            starts, exists = _token(patches, tap, strides, sides, R)
            values = row_blocks.load(tokens, starts, mask, C)
            taps += (row_blocks.add(dweight[tap], row_blocks.multiply(grads, values)),)
            if IS_WHOLE:
                factors = row_blocks.load_for_all(weight + tap * C, ROWS, C)
            else:
                factors = _factors(weight, patches, tap, sides, ROWS, C, R)
            starts, exists = _token(patches, tap, gradient_strides, sides, R)
            row_blocks.store(dtokens, starts, mask & exists, row_blocks.multiply(grads, factors), C)
        dweight = taps
    row_count: tl.constexpr = R * R + (1 if norm_weight is None else 3)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    row = sums + program.to(tl.int64) * row_count * C
    for tap in tl.static_range(R * R):
        row_blocks.store_sum(row + tap * C, dweight[tap], C)
    row_blocks.store_sum(row + R * R * C, dbias, C)
    if norm_weight is not None:
        row_blocks.store_sum(row + (R * R + 1) * C, dnorm_weight, C)
        row_blocks.store_sum(row + (R * R + 2) * C, dnorm_bias, C)


def backward(
    grad_k: Tensor,
    grad_v: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    grid: tuple[int, int],
    ratio: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and, as (R·R + 1 or 3, C) in fp32, the gradients of the weights."""
    batch, tokens, channels = k.shape
    k, v = _same_strides(k, v)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    patches = grad_k.shape[0] * grad_k.shape[1]
    span = max(FEWEST_PATCHES, triton.cdiv(patches, MOST_PROGRAMS))
    programs = triton.cdiv(patches, span)
    rows = ratio**2 + (1 if norm_weight is None else 3)
    sums = k.new_empty((2, programs, rows, channels), dtype=torch.float32)
    if k.numel() > 0:
        with launch.on(k.device):
            _compress_backward[(programs, 2)](
                grad_k.contiguous(),
                grad_v.contiguous(),
                k,
                v,
                _taps_first(weight),
                bias.contiguous(),
                None if norm_weight is None else norm_weight.contiguous(),
                dk,
                dv,
                sums,
                (k.stride(0), k.stride(1)),
                (tokens * channels, channels),
                patches,
                span,
                (*grid, *(triton.cdiv(side, ratio) for side in grid)),
                eps,
                channels,
                ratio,
                grid[0] % ratio == 0 and grid[1] % ratio == 0,
                enable_fp_fusion=True,
            )
    return dk, dv, sums.flatten(0, 1).sum(0)
