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

from pixart_kernels.dispatch import launch

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
OLDEST_TRITON = (3, 6)
HAS_NARROW_WGMMA = TRITON >= (3, 8)  # of 8 columns

SMALLEST_HEAD_DIM, HEAD_DIM_OF_MEMORY = 65, 72
ROWS = 64  # of the left that a warpgroup has
# Registers of a thread that multiplies in one pass, and of one that adds up dQ. With others (192 or 88,
# say) ptxas runs out of them and serialises every wgmma of the kernel.
REGISTERS_OF_ONE_PASS = (200, 80) if TRITON >= (3, 8) else (208, 72)
COPY_REGISTERS = 24
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}

# Few keys make few programs; they are then given a part of the queries each, down to a smallest.
ENOUGH_PROGRAMS = 264
SMALLEST_PART = 512

Candidate = Mapping[str, Any]
Gradients = tuple[Tensor, Tensor, Tensor]


def _two_passes(q: Candidate, kv: Candidate) -> Candidate:
    named = {f"{which}_{name}": n for which, of in (("Q", q), ("KV", kv)) for name, n in of.items()}
    return {"PASSES": 2, **named}


_Q_2 = {"BLOCK": 128, "STAGES": 4, "CONSUMERS": 2, "REGISTERS": 240}
_Q_3 = {"BLOCK": 64, "STAGES": 4, "CONSUMERS": 3, "REGISTERS": 160}
_KV = {"BLOCK": 64, "STAGES": 4, "CONSUMERS": 2, "REGISTERS": 240}

# What bench.tune measures; the first is the default. In two passes those of dQ and of dK and dV,
# which are independent. TURNS: consumers take turns at starting products.
BACKWARD_CANDIDATES: list[Candidate] = [
    _two_passes({**_Q_2, "TURNS": True}, {**_KV, "TURNS": True}),
    _two_passes({**_Q_2, "TURNS": False}, {**_KV, "TURNS": False}),
    _two_passes({**_Q_3, "TURNS": False}, {**_KV, "STAGES": 6, "TURNS": True}),
    _two_passes({**_Q_3, "TURNS": True}, {**_KV, "STAGES": 6, "TURNS": False}),
    {"PASSES": 1, "BLOCK": 64, "STAGES": 4, "TURNS": True},
    {"PASSES": 1, "BLOCK": 64, "STAGES": 4, "TURNS": False},
]


def serves_backward(architecture: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None, or why these kernels have no gradients for q (B, N, H, D), k and v (B, M, H, D).

    Reads shapes, strides, dtypes and pointers.
    """
    if architecture != "sm_90":
        return f"the Gluon kernels are for sm_90, not {architecture}"
    if TRITON < OLDEST_TRITON:
        return f"the Gluon kernels need Triton 3.6 or later, not {triton.__version__}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the Gluon kernels are for bfloat16 and float16, not {q.dtype}"
    if not SMALLEST_HEAD_DIM <= q.shape[3] <= HEAD_DIM_OF_MEMORY:
        return f"the Gluon kernels are for head dimensions of 65 to 72, not {q.shape[3]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _is_for_tma(x):
            return (
                f"the copy engine does not take {name}, strides {x.stride()}: it needs its channels "
                "side by side and everything else at multiples of 16 bytes"
            )
    return None


def _is_for_tma(x: Tensor) -> bool:
    """Whether the copy engine takes x (B, N, H, D) of 16 bits: multiples of 16 bytes all around.

    A stride over an axis of one element is not used, but checked: descriptors hold it.
    """
    strides = x.stride()
    aligned = x.data_ptr() % 16 == 0
    return aligned and strides[3] == 1 and all(s % 8 == 0 and s > 0 for s in strides[:3])


def _for_tma(shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty (B, N, H, D) that the copy engine takes: with 72 channels in memory."""
    return like.new_empty((*shape[:3], HEAD_DIM_OF_MEMORY))[..., : shape[3]]


def parts_of(queries: int, keys: int, batch_heads: int) -> tuple[int, int]:
    """How many parts the kernel of dK and dV cuts the queries into, and the size of one.

    From the shape alone: if it followed the device, so would the order of the sums.
    """
    programs = triton.cdiv(keys, 128) * batch_heads
    parts = max(1, min(ENOUGH_PROGRAMS // programs, queries // SMALLEST_PART))
    share = triton.cdiv(triton.cdiv(queries, parts), 128) * 128
    return triton.cdiv(queries, share), share


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
    reason against; grad_out may have any strides, and is copied where the copy engine does not take
    them. kv_lengths: (B,) integers or None. out: (B, N, H, D), lse: (B, H, N) fp32 to base 2, -inf or 0
    for a query without keys. Where scaled, q was multiplied by scale · log2(e) before, and dq is with
    respect to that; scale is then not used. candidate: of BACKWARD_CANDIDATES, the first unless given;
    with too few keys for one pass to fill a GPU, the first serves in its place. Gradients are contiguous,
    in the inputs' dtype.
    """
    candidate = BACKWARD_CANDIDATES[0] if candidate is None else candidate
    (batch, _, heads, _), keys = q.shape, k.shape[1]
    if q.numel() == 0 or k.numel() == 0:
        return _zeros
    few_keys = triton.cdiv(keys, 2 * ROWS) * batch * heads < ENOUGH_PROGRAMS
    if candidate["PASSES"] == 1 and few_keys:
        candidate = BACKWARD_CANDIDATES[0]
    # By what S is multiplied, and dS K and dSᵀ Q.
    numbers = (1.0, math.log(2)) if scaled else (scale * math.log2(math.e), scale)
    common = {"HEAD_DIM": q.shape[3], "SCALED": scaled, "OUT_TAIL": 8 if HAS_NARROW_WGMMA else 16}
    columns = _prepare_columns(q, k, numbers[0])
    prepare = _prepare_one_pass if candidate["PASSES"] == 1 else _prepare_two_passes
    compute = prepare(q, k, candidate, numbers, common)

    def run(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        kv_lengths: Tensor | None,
    ) -> Gradients:
        if not _is_for_tma(grad_out):
            grad_out = _for_tma(grad_out.shape, grad_out).copy_(grad_out)
        lengths = None if kv_lengths is None else kv_lengths.contiguous()
        with launch.on(q.device):
            k, v, *of = columns(grad_out, k, v, out.contiguous(), lse.contiguous(), lengths)
            return compute(grad_out, q, k, v, lengths, *of)

    return run


def _zeros(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> Gradients:
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _prepare_columns(q: Tensor, k: Tensor, scale: float) -> Callable[..., tuple[Tensor, ...]]:
    from pixart_kernels.attention.hopper_columns import BLOCK, COLUMNS, columns_kernel

    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    grid = (triton.cdiv(queries, BLOCK) + triton.cdiv(keys, BLOCK), batch * heads)
    constants = {
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "BLOCK": BLOCK,
        **LAUNCH,
    }

    def columns(
        grad: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, ...]:
        """k and v, with zeros beyond lengths, and the columns of q, grad, and k and v."""
        of_q, of_grad = grad.new_empty((2, batch, heads, queries, COLUMNS)).unbind(0)
        of_keys = grad.new_empty((batch, 1, keys, COLUMNS))
        k_copy, v_copy = (k, v) if lengths is None else (_for_tma(k.shape, k) for _ in range(2))
        columns_kernel[grid](
            grad, out, lse, k, v, lengths, of_q, of_grad, of_keys, k_copy, v_copy,
            *(x.stride()[:3] for x in (grad, out, k, v, k_copy)), 1 / scale, heads, queries, keys,
            **constants,
        )  # fmt: skip
        return k_copy, v_copy, of_q, of_grad, of_keys

    return columns


def _boxes(rows: int, *operands: tuple[Tensor, Tensor]) -> list[Any]:
    """Of each (B, N, H, D) and its columns (B, H or 1, N, 8): boxes of 64 columns, of the 8 that follow,
    and of the columns."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    wide, narrow = (NVMMASharedLayout(swizzle, 16, rank=4) for swizzle in (128, 0))
    boxes = []
    for x, columns in operands:
        (batch, tokens, heads, dim), (by_batch, by_token, by_head, _) = x.shape, x.stride()
        shape, strides = [batch, heads, tokens, dim], [by_batch, by_head, by_token, 1]
        boxes += [
            TensorDescriptor(x, shape, strides, [1, 1, rows, 64], wide),
            TensorDescriptor(x, shape, strides, [1, 1, rows, 8], narrow),
            TensorDescriptor.from_tensor(columns, [1, 1, rows, 8], narrow),
        ]
    return boxes


def _prepare_two_passes(
    q: Tensor, k: Tensor, candidate: Candidate, numbers: Sequence[float], common: Candidate
) -> Callable[..., Gradients]:
    from pixart_kernels.attention.hopper_backward import hopper_backward_kernel as kernel

    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    of_q, of_kv = (
        {
            name[len(f"{which}_") :]: n
            for name, n in candidate.items()
            if name.startswith(f"{which}_")
        }
        for which in ("Q", "KV")
    )
    fixed = {**common, "COPY_REGISTERS": COPY_REGISTERS, **LAUNCH}
    parts, share = parts_of(queries, keys, batch * heads)
    q_grid = (triton.cdiv(queries, ROWS * of_q["CONSUMERS"]) * batch * heads, 1)
    kv_grid = (triton.cdiv(keys, ROWS * of_kv["CONSUMERS"]) * batch * heads, parts)

    def compute(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
        of_queries: Tensor, of_grad: Tensor, of_keys: Tensor,
    ) -> Gradients:  # fmt: skip
        by_query = (q, of_queries), (grad, of_grad)
        by_key = (k, of_keys), (v, of_keys)
        dq = q.new_empty(q.shape)
        kernel[q_grid](
            dq, dq, lengths, *_boxes(ROWS, *by_query), *_boxes(of_q["BLOCK"], *by_key),
            *numbers, heads, queries, keys, keys, KEYS=False, **of_q, **fixed,
        )  # fmt: skip
        dtype = k.dtype if parts == 1 else torch.float32
        sums = k.new_empty((2, parts, *k.shape), dtype=dtype)
        kernel[kv_grid](
            sums[0], sums[1], lengths, *_boxes(ROWS, *by_key), *_boxes(of_kv["BLOCK"], *by_query),
            *numbers, heads, keys, queries, share, KEYS=True, **of_kv, **fixed,
        )  # fmt: skip
        dk, dv = (sums[:, 0] if parts == 1 else sums.sum(1).to(k.dtype)).unbind(0)
        return dq, dk, dv

    return compute


def _prepare_one_pass(
    q: Tensor, k: Tensor, candidate: Candidate, numbers: Sequence[float], common: Candidate
) -> Callable[..., Gradients]:
    from pixart_kernels.attention.hopper_columns import BLOCK, cast_kernel
    from pixart_kernels.attention.hopper_sums import hopper_sums_kernel as kernel

    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    blocks = triton.cdiv(queries, candidate["BLOCK"])
    pairs, rows = batch * heads, blocks * candidate["BLOCK"]
    grid = (triton.cdiv(keys, 2 * ROWS) * pairs,)
    registers, add_registers = REGISTERS_OF_ONE_PASS
    fixed = {name: n for name, n in candidate.items() if name != "PASSES"}
    fixed |= {**common, "COPY_REGISTERS": COPY_REGISTERS, "REGISTERS": registers}
    fixed |= {"ADD_REGISTERS": add_registers, **LAUNCH}
    cast_grid = (triton.cdiv(queries, BLOCK), pairs)
    cast_constants = {
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "BLOCK": BLOCK,
        **LAUNCH,
    }
    sizes = (pairs * rows * head_dim, pairs * blocks, 1)

    def compute(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
        of_queries: Tensor, of_grad: Tensor, of_keys: Tensor,
    ) -> Gradients:  # fmt: skip
        # Sums, how many programs have added to each block, and the ticket, zeroed together.
        sums, done, ticket = q.new_zeros(sum(sizes), dtype=torch.int32).split(sizes)
        sums = sums.view(torch.float32)
        dk, dv = k.new_empty((2, *k.shape)).unbind(0)
        kernel[grid](
            dk, dv, sums, done, ticket, lengths,
            *_boxes(ROWS, (k, of_keys), (v, of_keys)),
            *_boxes(candidate["BLOCK"], (q, of_queries), (grad, of_grad)),
            *numbers, heads, keys, queries, **fixed,
        )  # fmt: skip
        dq = q.new_empty(q.shape)
        cast_kernel[cast_grid](
            sums, dq, lengths, numbers[1], heads, queries, keys, rows, **cast_constants
        )
        return dq, dk, dv

    return compute
