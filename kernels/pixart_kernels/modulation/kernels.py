"""Triton kernels of modulation: one for all three operators, one for their gradients.

With A = B·N·C elements of a tensor, forward reads and writes 2A (modulate), 3A (gate_add) or 4A
(gate_add_modulate), backward 3A, 3A and 6A (4A without a gate): each tensor once. Nothing is saved
for the backward but tensors that exist anyway; it computes the LayerNorm's statistics again.

The gradients of shift, scale and gate are sums over tokens. Each program adds up its own in fp32 and
a second step adds those in a fixed order, so that the result is the same every time.

Tokens are contiguous: N rows of C channels for each sample. The row (C,) of shift, scale or gate for
token n of sample b is at b · its stride + n · its step; where all tokens share it, there is no step.
A gradient with a row for each token is no sum, and takes a pass of its own over A.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixart_kernels.dispatch import configurations, launch, row_blocks
from pixart_kernels.dispatch.bypass import Compute

FORWARD, BACKWARD = "modulation.forward", "modulation.backward"  # in the table of configurations

MAX_BATCH = 65_535  # programs along a grid's second axis
MOST_PROGRAMS = 512  # of a backward: a few for each multiprocessor, and few sums to add up
FEWEST_TOKENS = 8  # for each of them, or sums outweigh tokens


@triton.jit
def _load_vector(
    pointer, stride, step, sample, tokens, mask, ROWS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The rows of shift, scale or gate for some tokens of a sample."""
    if step is None:
        return row_blocks.load_for_all(pointer + sample * stride, ROWS, C)
    else:
        starts = sample * stride + tokens.to(tl.int64) * step
        return row_blocks.load(pointer, starts[:, None], mask, C)


@triton.jit
def _modulation_forward(
    x,
    branch,
    gate,
    shift,
    scale,
    y,
    out,
    strides,  # of gate, shift and scale
    gate_step,  # None or from token to token
    shift_step,
    scale_step,
    N,
    eps,
    C: tl.constexpr,
    MOST_ROWS: tl.constexpr,
):
    """y = x + gate · branch and out = LayerNorm(y) · (1 + scale) + shift, without what is None."""
    ROWS: tl.constexpr = row_blocks.rows_of(MOST_ROWS, C)
    sample = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    starts, mask = (sample * N + tokens)[:, None] * C, (tokens < N)[:, None]
    values = row_blocks.load(x, starts, mask, C)
    if branch is not None:
        added = row_blocks.load(branch, starts, mask, C)
        if gate is not None:
            opening = _load_vector(gate, strides[0], gate_step, sample, tokens, mask, ROWS, C)
            added = row_blocks.multiply(added, opening)
        # Rounded: y is what the LayerNorm sees, mask and in the backward.
        values = row_blocks.rounded(row_blocks.add(values, added), y.dtype.element_ty)
        row_blocks.store(y, starts, mask, values, C)
    if out is not None:
        normed, _ = row_blocks.layer_norm(values, eps, C)
        offset = _load_vector(shift, strides[1], shift_step, sample, tokens, mask, ROWS, C)
        factor = _load_vector(scale, strides[2], scale_step, sample, tokens, mask, ROWS, C)
        modulated = row_blocks.add(
            row_blocks.add(normed, row_blocks.multiply(normed, factor)), offset
        )
        row_blocks.store(out, starts, mask, modulated, C)


def prepare_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> Compute:
    """What gives y if there is a branch, out if there is a scale, of tensors in these places."""
    batch, tokens, channels = x.shape
    if batch > MAX_BATCH:
        raise ValueError(
            f"batch must be at most {MAX_BATCH} on a GPU, got {batch}; cut it in parts"
        )
    given = (x, branch, gate, shift, scale)
    if not all(_is_fit(tensor, place < 2) for place, tensor in enumerate(given)):
        again: Callable[..., Compute] = prepare_forward
        inner = again(*_fit(given), eps)
        return lambda *tensors: inner(*_fit(tensors))
    has_y, has_out = branch is not None, scale is not None
    dtype = x.dtype
    if x.numel() == 0:
        return lambda x, *_: tuple(
            x.new_empty(x.shape) if has else None for has in (has_y, has_out)
        )
    choice = configurations.choose(
        FORWARD, launch.architecture(x.device), dtype.itemsize * 8, channels
    )
    tuned, options = configurations.split(choice)
    launch_all = launch.Launch(
        _modulation_forward,
        x.device,
        (triton.cdiv(tokens, row_blocks.rows_of(tuned["MOST_ROWS"], channels)), batch),
        (*_places(gate, shift, scale), tokens, eps),
        {"C": channels, **tuned},
        options,
    )

    def compute(
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        y = torch.empty_like(x) if has_y else None
        out = torch.empty_like(x) if has_out else None
        launch_all(x, branch, gate, shift, scale, y, out)
        return y, out

    return compute


def _is_fit(tensor: Tensor | None, are_tokens: bool) -> bool:
    """Whether the kernels take it: tokens contiguous, the channels of a row side by side."""
    if tensor is None or tensor.is_contiguous():
        return True
    return not are_tokens and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)


def _fit(given: Sequence[Tensor | None], tokens: int = 2) -> list[Tensor | None]:
    return [
        tensor if tensor is None or _is_fit(tensor, place < tokens) else tensor.contiguous()
        for place, tensor in enumerate(given)
    ]


def _places(*rows: Tensor | None) -> tuple[Any, ...]:
    """Of rows, the strides from sample to sample, as one tuple, and the steps from token to token."""
    strides = tuple(0 if row is None else row.stride(0) for row in rows)
    return strides, *(None if row is None or row.dim() == 2 else row.stride(1) for row in rows)


@triton.jit
def _modulation_backward(
    grad_y,
    grad_out,
    y,
    branch,
    scale,
    gate,
    dx,
    dbranch,
    shift_sums,  # (B, programs, C)
    scale_sums,
    gate_sums,
    dscale,  # (B, N, C) where there is a step
    dgate,
    strides,  # of scale and gate
    scale_step,  # None or from token to token
    gate_step,
    N,
    span,  # tokens of a program
    eps,
    C: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = grad_y + LayerNorm'(grad_out · (1 + scale)), dbranch = gate · dx; nothing for None."""
    ROWS: tl.constexpr = row_blocks.rows_of(MOST_ROWS, C)
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, N)
    none = row_blocks.zeros(ROWS, C)
    shift_sum, scale_sum, gate_sum = none, none, none
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        tokens = start + tl.arange(0, ROWS)
        starts, mask = (sample * N + tokens)[:, None] * C, (tokens < last)[:, None]
        if grad_out is None:
            grads = row_blocks.load(grad_y, starts, mask, C)
        else:
            normed, deviation = row_blocks.layer_norm(row_blocks.load(y, starts, mask, C), eps, C)
            grads = row_blocks.load(grad_out, starts, mask, C)
            shift_sum = row_blocks.add(shift_sum, grads)
            slopes = row_blocks.multiply(grads, normed)
            if scale_step is None:
                scale_sum = row_blocks.add(scale_sum, slopes)
            else:
                row_blocks.store(dscale, starts, mask, slopes, C)
            # Loaded again for each row: over the loop it would take registers that there are not.
            factor = _load_vector(scale, strides[0], scale_step, sample, tokens, mask, ROWS, C)
            grads = row_blocks.add(grads, row_blocks.multiply(grads, factor))
            grads = row_blocks.layer_norm_backward(grads, normed, deviation, C)
            if grad_y is not None:
                grads = row_blocks.add(grads, row_blocks.load(grad_y, starts, mask, C))
            row_blocks.store(dx, starts, mask, grads, C)
        if gate is not None:
            added = row_blocks.load(branch, starts, mask, C)
            slopes = row_blocks.multiply(grads, added)
            if gate_step is None:
                gate_sum = row_blocks.add(gate_sum, slopes)
            else:
                row_blocks.store(dgate, starts, mask, slopes, C)
            opening = _load_vector(gate, strides[1], gate_step, sample, tokens, mask, ROWS, C)
            row_blocks.store(dbranch, starts, mask, row_blocks.multiply(grads, opening), C)
    program = (sample * tl.num_programs(0) + tl.program_id(0)) * C
    if grad_out is not None:
        row_blocks.store_sum(shift_sums + program, shift_sum, C)
        if scale_step is None:
            row_blocks.store_sum(scale_sums + program, scale_sum, C)
    if gate is not None and gate_step is None:
        row_blocks.store_sum(gate_sums + program, gate_sum, C)


def prepare_backward(
    grad_y: Tensor | None,
    grad_out: Tensor | None,
    y: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> Compute:
    """What gives dx, dbranch, the gradients of the rows (0 to 3, B, C) and those of tokens as in
    operator.py."""
    grad = grad_y if grad_out is None else grad_out
    assert grad is not None
    given = (grad_y, grad_out, y, branch, gate, scale)
    if not all(_is_fit(tensor, place < 4) for place, tensor in enumerate(given)):
        again: Callable[..., Compute] = prepare_backward
        inner = again(*_fit(given, tokens=4), eps)
        return lambda *arguments: inner(*_fit(arguments[:-1], tokens=4), eps)
    batch, tokens, channels = shape = grad.shape
    span = max(FEWEST_TOKENS, triton.cdiv(batch * tokens, MOST_PROGRAMS))
    programs = triton.cdiv(tokens, span)
    count = (0 if scale is None else 2) + (0 if gate is None else 1)
    places = _places(scale, gate)
    strides, scale_step, gate_step = places
    launch_all = None
    if grad.numel() > 0:
        arch = launch.architecture(grad.device)
        choice = configurations.choose(BACKWARD, arch, grad.element_size() * 8, channels)
        tuned, options = configurations.split(choice)
        launch_all = launch.Launch(
            _modulation_backward,
            grad.device,
            (programs, batch),
            (*places, tokens, span, eps),
            {"C": channels, **tuned},
            options,
        )

    def compute(
        grad_y: Tensor | None,
        grad_out: Tensor | None,
        y: Tensor | None,
        branch: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        _: float,
    ) -> tuple[Tensor | None, ...]:
        grad = grad_y if grad_out is None else grad_out
        assert grad is not None
        dx = None if y is None else torch.empty_like(y)
        dbranch = None if branch is None else torch.empty_like(branch)
        dscale = None if scale is None or scale_step is None else scale.new_empty(shape)
        dgate = None if gate is None or gate_step is None else gate.new_empty(shape)
        sums = grad.new_empty((count, batch, programs, channels), dtype=torch.float32)
        if launch_all is not None:
            shift_sums, scale_sums = (None, None) if scale is None else (sums[0], sums[1])
            launch_all(
                grad_y, grad_out, y, branch, scale, gate, dx, dbranch,
                shift_sums, scale_sums, None if gate is None else sums[-1], dscale, dgate,
            )  # fmt: skip
        return dx, dbranch, sums.sum(2), dscale, dgate

    return compute
