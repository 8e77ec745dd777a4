"""Triton kernels of compress_kv, forward and backward, for keys and values in one launch.

With A = B·N·C elements of k (or of v), forward reads 2A and writes 2A/R², backward reads 2A + 2A/R²
and writes 2A: tokens come straight out of a packed projection, each once. The merged tokens and the
LayerNorm's statistics are not saved; the backward computes them again from tokens that the gradient
of the weights needs anyway, and finds them in L1 the second time.

Gradients of the weights are sums over tokens: each program adds up its own in fp32, and a second
step adds those in a fixed order, so that the result is the same every time.

Weights are (C, R·R), taps in row-major order, read with a stride: few, and in L1 from then on.
Patches of all samples are counted through: patch n = (sample · ⌈H/R⌉ + i) · ⌈W/R⌉ + j.
program_id(1) is 0 for keys and 1 for values.
"""

# Tuples that grow block by block change their type.
# mypy: disable-error-code="assignment"

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.dispatch import configurations, launch, row_blocks
from pixart_kernels.dispatch.bypass import Compute

FORWARD, BACKWARD = "compression.forward", "compression.backward"  # in the table of configurations

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
def _tap(weight, tap, taps, ROWS: tl.constexpr, C: tl.constexpr):
    """The weights of a tap for all channels, out of (C, R·R) as a convolution keeps them."""
    blocks = ()
    for block in tl.static_range(row_blocks.count(C)):
        cols = row_blocks.columns(block, C) + tl.full([ROWS, 1], 0, tl.int32)
        pointers = weight + cols * taps[0] + tap * taps[1]
        blocks += (tl.load(pointers, cols < C, 0.0).to(tl.float32),)
    return blocks


@triton.jit
def _of(is_key, k_strides, v_strides):
    return (
        tl.where(is_key, k_strides[0], v_strides[0]),
        tl.where(is_key, k_strides[1], v_strides[1]),
    )


@triton.jit
def _merge(
    tokens,
    weight,
    bias,
    patches,
    mask,
    strides,
    taps,
    sides,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    merged = row_blocks.load_for_all(bias, ROWS, C)
    for tap in tl.static_range(R * R):
        starts, exists = _token(patches, tap, strides, sides, R)
        values = row_blocks.load(tokens, starts, mask, C)
        factors = _tap(weight, tap, taps, ROWS, C)
        merged = row_blocks.add(merged, row_blocks.multiply(values, factors))
    return merged


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
    k_strides,  # from sample to sample and from token to token
    v_strides,
    taps,  # strides of the weights, from channel to channel and from tap to tap
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
    is_key = tl.program_id(1) == 0
    tokens = tl.where(is_key, k, v)
    strides = _of(is_key, k_strides, v_strides)
    merged = _merge(tokens, weight, bias, patches, mask, strides, taps, sides, ROWS, C, R)
    if norm_weight is not None:
        normed, deviation = row_blocks.layer_norm(merged, eps, C)
        normed = row_blocks.multiply(normed, row_blocks.load_for_all(norm_weight, ROWS, C))
        merged = row_blocks.add(normed, row_blocks.load_for_all(norm_bias, ROWS, C))
    out = tl.where(is_key, merged_k, merged_v)
    row_blocks.store(out, patches.to(tl.int64)[:, None] * C, mask, merged, C)


def prepare_forward(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    height: int,
    width: int,
    ratio: int,
    eps: float,
) -> Compute:
    """What gives the merged keys and values, (B, ⌈H/R⌉·⌈W/R⌉, C) each."""
    rest = height, width, ratio, eps
    given = (k, v, weight, bias, norm_weight, norm_bias)
    if not _are_fit(given):
        again: Callable[..., Compute] = prepare_forward
        inner = again(*_fit(given), *rest)
        return lambda *arguments: inner(*_fit(arguments[:6]), *rest)
    batch, _, channels = k.shape
    merged = (triton.cdiv(height, ratio), triton.cdiv(width, ratio))
    shape = (batch, merged[0] * merged[1], channels)
    patches = shape[0] * shape[1]
    if patches * channels == 0:
        return lambda k, v, *_: (k.new_empty(shape), v.new_empty(shape))
    tuned, options = _configuration(FORWARD, k)
    launch_all = launch.Launch(
        _compress_forward,
        k.device,
        (triton.cdiv(patches, row_blocks.rows_of(tuned["MOST_ROWS"], channels)), 2),
        (*_strides(k, v, weight), patches, (height, width, *merged), eps),
        {"C": channels, "R": ratio, **tuned},
        options,
    )

    def compute(
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        *_: float,
    ) -> tuple[Tensor, Tensor]:
        merged_k, merged_v = k.new_empty(shape), v.new_empty(shape)
        launch_all(k, v, weight, bias, norm_weight, norm_bias, merged_k, merged_v)
        return merged_k, merged_v

    return compute


def _configuration(kernel: str, k: Tensor) -> tuple[dict[str, Any], dict[str, int]]:
    arch = launch.architecture(k.device)
    choice = configurations.choose(kernel, arch, k.element_size() * 8, k.shape[2])
    return configurations.split(choice)


def _is_fit(tensor: Tensor | None, place: int) -> bool:
    """Whether the kernels take it: keys, values and rows with their channels side by side, weights
    whose two last dimensions are one."""
    if place == 2:
        weight = tensor
        return (
            weight is None
            or weight.is_contiguous()
            or weight.stride(2) == weight.shape[3] * weight.stride(3)
        )
    return tensor is None or tensor.stride(-1) == 1 or tensor.is_contiguous()


def _are_fit(given: Sequence[Tensor | None]) -> bool:
    return all(_is_fit(tensor, place) for place, tensor in enumerate(given))


def _fit(given: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        tensor if tensor is None or _is_fit(tensor, place) else tensor.contiguous()
        for place, tensor in enumerate(given)
    ]


def _strides(k: Tensor, v: Tensor, weight: Tensor) -> tuple[tuple[int, int], ...]:
    """Of k and v from sample to sample and from token to token, of weights from channel to channel and
    from tap to tap."""
    tokens = ((x.stride(0), x.stride(1)) for x in (k, v))
    return *tokens, (weight.stride(0), weight.stride(3))


@triton.jit
def _factors(
    weight, patches, tap, taps, sides, ROWS: tl.constexpr, C: tl.constexpr, R: tl.constexpr
):
    """The factor of the token under a tap: the sum of the weights of all taps that are on it, which
    are several at the end of a row or column."""
    _, row, col = _corner(patches, sides, R)
    factors = row_blocks.zeros(ROWS, C)
    for other in range(tap, R * R):
        same_row = tl.minimum(row + other // R, sides[0] - 1) == row + tap // R
        same_col = tl.minimum(col + other % R, sides[1] - 1) == col + tap % R
        counts = (same_row & same_col).to(tl.float32)[:, None]
        factors = row_blocks.add(
            factors, row_blocks.times(_tap(weight, other, taps, ROWS, C), counts)
        )
    return factors


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
    k_strides,
    v_strides,
    taps,
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
    strides = _of(is_key, k_strides, v_strides)
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, patch_count)
    none = row_blocks.zeros(ROWS, C)
    dbias, dnorm_weight, dnorm_bias, dweight = none, none, none, ()
    for _place in tl.static_range(R * R):
        dweight += (none,)
    for start in range(first, last, ROWS):
        patches = start + tl.arange(0, ROWS)
        mask = (patches < last)[:, None]
        own = patches.to(tl.int64)[:, None] * C
        if norm_weight is None:
            grads = row_blocks.load(grad, own, mask, C)
        else:
            merged = _merge(tokens, weight, bias, patches, mask, strides, taps, sides, ROWS, C, R)
            normed, deviation = row_blocks.layer_norm(merged, eps, C)
            grads = row_blocks.load(grad, own, mask, C)
            dnorm_bias = row_blocks.add(dnorm_bias, grads)
            dnorm_weight = row_blocks.add(dnorm_weight, row_blocks.multiply(grads, normed))
            grads = row_blocks.multiply(grads, row_blocks.load_for_all(norm_weight, ROWS, C))
            grads = row_blocks.layer_norm_backward(grads, normed, deviation, C)
        dbias = row_blocks.add(dbias, grads)
        dweights = ()
        for tap in tl.static_range(R * R):
            starts, exists = _token(patches, tap, strides, sides, R)
            values = row_blocks.load(tokens, starts, mask, C)
            dweights += (row_blocks.add(dweight[tap], row_blocks.multiply(grads, values)),)
            if IS_WHOLE:
                factors = _tap(weight, tap, taps, ROWS, C)
            else:
                factors = _factors(weight, patches, tap, taps, sides, ROWS, C, R)
            starts, exists = _token(patches, tap, gradient_strides, sides, R)
            row_blocks.store(dtokens, starts, mask & exists, row_blocks.multiply(grads, factors), C)
        dweight = dweights
    row_count: tl.constexpr = R * R + (1 if norm_weight is None else 3)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    row = sums + program.to(tl.int64) * row_count * C
    for tap in tl.static_range(R * R):
        row_blocks.store_sum(row + tap * C, dweight[tap], C)
    row_blocks.store_sum(row + R * R * C, dbias, C)
    if norm_weight is not None:
        row_blocks.store_sum(row + (R * R + 1) * C, dnorm_weight, C)
        row_blocks.store_sum(row + (R * R + 2) * C, dnorm_bias, C)


def prepare_backward(
    grad_k: Tensor,
    grad_v: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    height: int,
    width: int,
    ratio: int,
    eps: float,
) -> Compute:
    """What gives dk, dv and, as (R·R + 1 or 3, C) in fp32, the gradients of the weights."""
    rest = height, width, ratio, eps
    given = (k, v, weight, bias, norm_weight)
    if not (_are_fit(given) and grad_k.is_contiguous() and grad_v.is_contiguous()):

        def fit(*arguments: Any) -> list[Any]:
            grads = [grad.contiguous() for grad in arguments[:2]]
            return [*grads, *_fit(arguments[2:7]), *rest]

        inner = prepare_backward(*fit(grad_k, grad_v, *given))
        return lambda *arguments: inner(*fit(*arguments))
    batch, tokens, channels = shape = k.shape
    patches = grad_k.shape[0] * grad_k.shape[1]
    span = max(FEWEST_PATCHES, triton.cdiv(patches, MOST_PROGRAMS))
    programs = triton.cdiv(patches, span)
    rows = ratio**2 + (1 if norm_weight is None else 3)
    launch_all = None
    if k.numel() > 0:
        tuned, options = _configuration(BACKWARD, k)
        merged = (triton.cdiv(height, ratio), triton.cdiv(width, ratio))
        launch_all = launch.Launch(
            _compress_backward,
            k.device,
            (programs, 2),
            (
                *_strides(k, v, weight), (tokens * channels, channels),
                patches, span, (height, width, *merged), eps,
            ),
            {
                "C": channels,
                "R": ratio,
                "IS_WHOLE": height % ratio == 0 and width % ratio == 0,
                **tuned,
            },
            options,
        )  # fmt: skip

    def compute(
        grad_k: Tensor,
        grad_v: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor | None,
        *_: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dk, dv = k.new_empty(shape), v.new_empty(shape)
        sums = k.new_empty((2, programs, rows, channels), dtype=torch.float32)
        if launch_all is not None:
            launch_all(grad_k, grad_v, k, v, weight, bias, norm_weight, dk, dv, sums)
        return dk, dv, sums.flatten(0, 1).sum(0)

    return compute
