"""Attention backward on Hopper from the host: what is served, by what, and the launches.

Two ways, equal to within rounding, each with the same bits in every run. Two passes: dQ, then dK and dV
(hopper_backward.py). One pass: all three (hopper_sums.py), for less arithmetic and dQ's sums in fp32,
4 · B · H · N · D bytes. Both begin with the operands' columns (hopper_columns.py). Nothing here has run on a
GPU: the kernels run in tests/gluon's simulator, and are compiled.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from pixart_kernels.attention import hopper
from pixart_kernels.attention.hopper import COPY_REGISTERS, box_of
from pixart_kernels.attention.tiles import (
    ENOUGH_PROGRAMS,
    parts_of,
    stride_divisor,
    strides_of,
    without_data,
)
from pixart_kernels.dispatch import configurations
from pixart_kernels.dispatch.launch import ALIGNMENT, Launch

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
OLDEST_TRITON = (3, 6)
HAS_NARROW_WGMMA = TRITON >= (3, 8)  # of 8 columns

HEAD_DIM_OF_MEMORY = 72  # of copies, for whose rows the copy engine wants multiples of 16 bytes
ROWS = 64  # of the left that a warpgroup has
# Registers of a thread that multiplies in one pass, and of one that adds up dQ. With others (192 or 88,
# say) ptxas runs out of them and serialises every wgmma of the kernel.
REGISTERS_OF_ONE_PASS = (200, 80) if TRITON >= (3, 8) else (208, 72)
OPTIONS = {"num_warps": 4}

Candidate = Mapping[str, Any]
Gradients = tuple[Tensor, Tensor, Tensor]


# Two passes, those of dQ and of dK and dV, have constants of their own. TURNS: consumers take turns at
# starting products.
BACKWARD_CANDIDATES = configurations.constants_of("attention.backward", "sm_90", 16, 72, "gluon")
TWO_PASSES = {
    "PASSES": 2,
    "Q_BLOCK": 128,
    "Q_STAGES": 4,
    "Q_CONSUMERS": 2,
    "Q_REGISTERS": 240,
    "Q_TURNS": True,
    "KV_BLOCK": 64,
    "KV_STAGES": 4,
    "KV_CONSUMERS": 2,
    "KV_REGISTERS": 240,
    "KV_TURNS": True,
}


def serves_backward(architecture: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None, or why these kernels have no gradients for q (B, N, H, D), k and v (B, M, H, D): reasons of
    `hopper.serves`, and Triton's age."""
    if TRITON < OLDEST_TRITON:
        return f"they need Triton 3.6 or later, not {triton.__version__}"
    return hopper.serves(architecture, q, k, v)


def _has_strides_for_tma(x: Tensor) -> bool:
    """Whether the copy engine takes x (B, N, H, D) of 16 bits, if it begins at a multiple of 16 bytes."""
    strides = zip(x.stride()[:3], x.shape[:3], strict=True)
    return x.stride(3) == 1 and all(s % 8 == 0 and s > 0 for s, n in strides if n > 1)


def _for_tma(like: Tensor) -> Tensor:
    """Of its shape, empty, with strides that the copy engine takes."""
    return like.new_empty((*like.shape[:3], HEAD_DIM_OF_MEMORY))[..., : like.shape[3]]


def _empty(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def prepare_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    *,
    scaled: bool = False,
    candidate: Candidate | None = None,
) -> Callable[..., Gradients]:
    """compute(grad_out, q, k, v, out, lse, kv_lengths) -> dq, dk, dv, for tensors of these shapes and strides.

    Reads no values. grad_out, q: (B, N, H, D); k, v: (B, M, H, D), all that `serves_backward` has no
    reason against, in each call, as addresses differ; grad_out may have any strides and address, and is
    copied where the copy engine does not take them. kv_lengths: (B,) integers or None. out: (B, N, H, D)
    and lse: (B, H, N) fp32 to base 2, -inf or 0 for a query without keys, are contiguous. Where scaled, q
    was multiplied by scale · log2(e) before, and dq is with respect to that; scale is then not used.
    candidate: of BACKWARD_CANDIDATES, TWO_PASSES unless given; with too few keys for one pass to fill a
    GPU, the row's first of two passes serves in its place. Gradients are contiguous, in the inputs' dtype.
    """
    candidate = TWO_PASSES if candidate is None else candidate
    (batch, _, heads, _), keys, device = q.shape, k.shape[1], q.device
    if q.numel() == 0 or k.numel() == 0:
        return _zeros
    few_keys = triton.cdiv(keys, 2 * ROWS) * batch * heads < ENOUGH_PROGRAMS
    if candidate["PASSES"] == 1 and few_keys:
        row = configurations.constants_of("attention.backward", "sm_90", 16, 72, "gluon")
        candidate = next((one for one in row if one["PASSES"] == 2), TWO_PASSES)
    # By what S is multiplied, and dS K and dSᵀ Q.
    scales = (1.0, math.log(2)) if scaled else (scale * math.log2(math.e), scale)
    # What kernels see: tensors of a call, or copies, here without data.
    seen_grad, seen_q, seen_k, seen_v = (without_data(x) for x in (grad_out, q, k, v))
    if not _has_strides_for_tma(grad_out):
        seen_grad = _for_tma(seen_grad)
    has_lengths = kv_lengths is not None
    columns = _prepare_columns(device, seen_grad, seen_q, seen_k, seen_v, has_lengths, scales[0])
    if has_lengths:
        seen_k, seen_v = _for_tma(seen_k), _for_tma(seen_v)
    prepare = _prepare_one_pass if candidate["PASSES"] == 1 else _prepare_two_passes
    constants = {
        "HEAD_DIM": q.shape[3],
        "SCALED": scaled,
        "OUT_TAIL": 8 if HAS_NARROW_WGMMA else 16,
        "COPY_REGISTERS": COPY_REGISTERS,
    }
    compute = prepare(device, (seen_grad, seen_q, seen_k, seen_v), candidate, scales, constants)
    copies_grad = seen_grad.stride() != grad_out.stride()

    def run(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Tensor | None,
    ) -> Gradients:
        if copies_grad or grad_out.data_ptr() % ALIGNMENT:
            grad_out = _empty(seen_grad, device).copy_(grad_out)
        if lengths is not None and lengths.data_ptr() % ALIGNMENT:
            lengths = lengths.clone()  # launches with boxes want all addresses so
        k, v, *of = columns(grad_out, k, v, out, lse, lengths)
        return compute(grad_out, q, k, v, lengths, *of)

    return run


def _zeros(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> Gradients:
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _prepare_columns(
    device: torch.device,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    has_lengths: bool,
    scale: float,
) -> Callable[..., tuple[Tensor, ...]]:
    from pixart_kernels.attention.hopper_columns import BLOCK, columns_kernel

    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    copies = _for_tma(k)
    of_queries, of_keys = _columns_of(q, k)
    tensors = (grad, q.new_empty(q.shape), k, v, copies)
    divisor = stride_divisor(*tensors)
    strides = (strides_of(x, divisor) for x in tensors)
    launch = Launch(
        columns_kernel,
        device,
        (triton.cdiv(queries, BLOCK) + triton.cdiv(keys, BLOCK), batch * heads),
        (*strides, 1 / scale, heads, queries, keys),
        {
            "HEAD_DIM": head_dim,
            "WIDTH": triton.next_power_of_2(head_dim),
            "BLOCK": BLOCK,
            "DIVISOR": divisor,
        },
        OPTIONS,
    )

    def columns(
        grad: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, ...]:
        """k and v, with zeros beyond lengths, and the columns of q, grad, and k and v."""
        made = [_empty(like, device) for like in (of_queries, of_queries, of_keys)]
        copied = [_empty(copies, device) for _ in range(2)] if has_lengths else [None, None]
        launch(grad, out, lse, k, v, lengths, *made, *copied)
        return *(copied if has_lengths else (k, v)), *made

    return columns


def _columns_of(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """What columns_kernel fills, without data, with tokens before heads: of queries, and of keys."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    of_queries = q.new_empty(batch, heads, queries, 8)
    return of_queries.transpose(1, 2), q.new_empty(batch, 1, keys, 8).transpose(1, 2)


def _boxes(
    first: int, *operands: tuple[Tensor, Tensor, int]
) -> Callable[[Sequence[Tensor | None]], list[Any]]:
    """Makes the boxes of operands: tokens, their columns and the rows of a box, all (B, N, H, D). From
    the kernel's tensors, of which the first-th and second-th are the first operand's, and so on: boxes
    of 64 columns, of the 8 that follow, and of the columns beside them."""
    parts = []
    for i, (tokens, columns, rows) in enumerate(operands):
        of_tokens = [(first + 2 * i, box_of(tokens, rows, width)) for width in (64, 8)]
        parts += [*of_tokens, (first + 2 * i + 1, box_of(columns, rows, 8))]
    return lambda tensors: [box(tensors[i]) for i, box in parts]


def _in_order(kernel: Any, constants: Mapping[str, Any]) -> dict[str, Any]:
    return {name: constants[name] for name in kernel.arg_names if name in constants}


Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def _prepare_two_passes(
    device: torch.device,
    operands: Operands,
    candidate: Candidate,
    scales: Sequence[float],
    constants: Candidate,
) -> Callable[..., Gradients]:
    from pixart_kernels.attention.hopper_backward import hopper_backward_kernel as kernel

    grad, q, k, v = operands
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    parts, share = parts_of(queries, keys, batch * heads)
    of_queries, of_keys = _columns_of(q, k)

    def launch(which: str, rows: int, others: int, share: int, parts: int) -> Launch:
        own = {
            name.removeprefix(f"{which}_"): n
            for name, n in candidate.items()
            if name.startswith(f"{which}_")
        }
        by_query, by_key = [(q, of_queries), (grad, of_queries)], [(k, of_keys), (v, of_keys)]
        left, right = (by_key, by_query) if which == "KV" else (by_query, by_key)
        sides = [(*x, ROWS) for x in left] + [(*x, own["BLOCK"]) for x in right]
        return Launch(
            kernel,
            device,
            (triton.cdiv(rows, ROWS * own["CONSUMERS"]) * batch * heads, parts),
            (*scales, heads, rows, others, share),
            _in_order(kernel, {**constants, **own, "KEYS": which == "KV"}),
            OPTIONS,
            _boxes(3, *sides),
            12,
        )

    q_launch = launch("Q", queries, keys, keys, 1)
    kv_launch = launch("KV", keys, queries, share, parts)

    def compute(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
        of_queries: Tensor, of_grad: Tensor, of_keys: Tensor,
    ) -> Gradients:  # fmt: skip
        by_query, by_key = (q, of_queries, grad, of_grad), (k, of_keys, v, of_keys)
        dq = q.new_empty(q.shape)
        q_launch(dq, dq, lengths, *by_query, *by_key)
        if parts == 1:
            dk, dv = k.new_empty(k.shape), k.new_empty(k.shape)
            kv_launch(dk, dv, lengths, *by_key, *by_query)
            return dq, dk, dv
        sums = [k.new_empty((parts, *k.shape), dtype=torch.float32) for _ in range(2)]
        kv_launch(*sums, lengths, *by_key, *by_query)
        dk, dv = (x.sum(0).to(k.dtype) for x in sums)
        return dq, dk, dv

    return compute


def _prepare_one_pass(
    device: torch.device,
    operands: Operands,
    candidate: Candidate,
    scales: Sequence[float],
    constants: Candidate,
) -> Callable[..., Gradients]:
    from pixart_kernels.attention.hopper_columns import BLOCK, cast_kernel
    from pixart_kernels.attention.hopper_sums import hopper_sums_kernel as kernel

    grad, q, k, v = operands
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    block = candidate["BLOCK"]
    blocks, pairs = triton.cdiv(queries, block), batch * heads
    rows = blocks * block
    of_queries, of_keys = _columns_of(q, k)
    registers, add_registers = REGISTERS_OF_ONE_PASS
    own = {name: n for name, n in candidate.items() if name != "PASSES"}
    own |= {"REGISTERS": registers, "ADD_REGISTERS": add_registers}
    launch = Launch(
        kernel,
        device,
        (triton.cdiv(keys, 2 * ROWS) * pairs,),
        (*scales, heads, keys, queries),
        _in_order(kernel, {**constants, **own}),
        OPTIONS,
        _boxes(
            6,
            *((k, of_keys, ROWS), (v, of_keys, ROWS)),
            *((q, of_queries, block), (grad, of_queries, block)),
        ),
        12,
    )
    cast = Launch(
        cast_kernel,
        device,
        (triton.cdiv(queries, BLOCK), pairs),
        (scales[1], heads, queries, keys, rows),
        {"HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim), "BLOCK": BLOCK},
        OPTIONS,
    )
    # Sums, how many programs have added to each block, and the ticket, each at a multiple of 16 bytes.
    sizes = (pairs * rows * head_dim, triton.cdiv(pairs * blocks, 4) * 4, 4)

    def compute(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
        of_queries: Tensor, of_grad: Tensor, of_keys: Tensor,
    ) -> Gradients:  # fmt: skip
        zeros, done, ticket = q.new_zeros(sum(sizes), dtype=torch.int32).split(sizes)
        sums = zeros.view(torch.float32)
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        by_query, by_key = (q, of_queries, grad, of_grad), (k, of_keys, v, of_keys)
        launch(dk, dv, sums, done, ticket, lengths, *by_key, *by_query)
        cast(sums, dq, lengths)
        return dq, dk, dv

    return compute
