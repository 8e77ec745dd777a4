"""The host's side of attention backward: which kernels, which tiles, and what they are launched with.

`prepare` works that out once for tensors of some dtypes, shapes and strides. There are kernels in Triton
(backward.py), for every architecture, and in Gluon for Hopper (hopper_gradients.py), where the table of
configurations has these first, or PIXART_ATTENTION=gluon asks for them, and they can take the tensors.
"""

import math
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from pixart_kernels.attention import hopper_gradients
from pixart_kernels.attention.backward import backward_kv_kernel, backward_q_kernel
from pixart_kernels.attention.tiles import (
    has_dense_channels,
    is_one,
    parts_of,
    split,
    stride_divisor,
    strides_of,
    without_data,
)
from pixart_kernels.dispatch import configurations, launch
from pixart_kernels.dispatch.bypass import Compute

KERNEL = "attention.backward"
Choose = Callable[[str, str, int, int], configurations.Candidate]
Q_KERNEL, KV_KERNEL = "attention.backward_q", "attention.backward_kv"


def prepare(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lengths: Tensor | None,
    scale: float | None,
) -> Compute:
    """What gives dQ (B, N, H, D), dK and dV (B, M, H, D), contiguous, for what the forward returned."""
    if q.numel() == 0 or k.numel() == 0:
        return lambda grad_out, q, k, v, *_: tuple(x.new_zeros(x.shape) for x in (q, k, v))
    if lse.numel() == 0:
        raise RuntimeError(
            "flash_attention was told to keep no sum of weights, and has no gradient"
        )
    given = (grad_out, q, k, v, out, lse, kv_lengths)
    if not all(_is_fit(x, place) for place, x in enumerate(given)):
        again: Callable[..., Compute] = prepare
        inner = again(*_fit(given), scale)
        return lambda *arguments: inner(*_fit(arguments[:-1]), scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    candidate = _gluon_candidate(q, k, v, scale)
    if candidate is None:
        return _prepare_triton(grad_out, q, k, v, scale, configurations.choose)
    in_triton = _prepare_triton(grad_out, q, k, v, scale, configurations.first)
    in_gluon = hopper_gradients.prepare_backward(
        grad_out, q, k, v, kv_lengths, scale,
        scaled=is_one(scale * math.log2(math.e)), candidate=candidate,
    )  # fmt: skip

    def compute(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The copy engine begins at multiples of 16 bytes, and views begin anywhere.
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % launch.ALIGNMENT:
            return in_triton(grad_out, q, k, v, *rest)
        return in_gluon(grad_out, q, k, v, *rest[:-1])

    return compute


def _gluon_candidate(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> configurations.Candidate | None:
    """The Gluon kernels' candidate, if these are what is launched."""
    arch = launch.architecture(q.device)
    # Sizes of 1 are constants to the compiler, which these kernels count with; and they divide by scale.
    if arch != "sm_90" or scale <= 0 or 1 in (q.shape[1], k.shape[1], q.shape[2]):
        return None
    serves = hopper_gradients.serves_backward(arch, *(without_data(x) for x in (q, k, v))) is None

    def admits(candidate: configurations.Candidate) -> bool:
        return serves or configurations.language(candidate) == "triton"

    key = (KERNEL, arch, q.element_size() * 8, q.shape[3])
    choice = configurations.choose(*key, admits, launch.wanted_language())
    if configurations.language(choice) == "triton":
        return None
    return configurations.split(choice)[0]


def _prepare_triton(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, choose: Choose
) -> Compute:
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    parts, share = parts_of(queries, keys, batch * heads)
    launch_q, launch_kv = _launches(grad_out, q, k, v, scale, parts, share, choose)

    def compute(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Tensor | None,
        _: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        delta = torch.empty_like(lse)
        launch_q(grad_out, q, k, v, out, dq, lse, delta, lengths)
        if parts == 1:
            launch_kv(grad_out, q, k, v, dk, dv, lse, delta, lengths)
            return dq, dk, dv
        sums = lse.new_empty((2, parts, *k.shape))
        launch_kv(grad_out, q, k, v, sums[0], sums[1], lse, delta, lengths)
        dk.copy_(sums[0].sum(0))
        dv.copy_(sums[1].sum(0))
        return dq, dk, dv

    return compute


def _is_fit(x: Tensor | None, place: int) -> bool:
    """Whether the kernels take it: tokens (the first four) with any strides but the last."""
    return x is None or x.is_contiguous() or (place < 4 and has_dense_channels(x))


def _fit(given: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        x if x is None or _is_fit(x, place) else x.contiguous() for place, x in enumerate(given)
    ]


def _launches(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    parts: int,
    share: int,
    choose: Choose,
) -> tuple[launch.Launch, launch.Launch]:
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    tensors = (grad_out, q, k, v)
    divisor = 1 if head_dim % 8 else stride_divisor(*tensors)  # dQ, dK and dV are contiguous
    strides = tuple(strides_of(x, divisor) for x in tensors)
    scales = (scale, scale * math.log2(math.e))
    main, tail = split(head_dim)
    constants = {
        "HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail, "DIVISOR": divisor,
        "PRECISION": launch.precision(q.dtype),
    }  # fmt: skip

    def dense(tokens: int) -> tuple[int, ...]:
        return tuple(
            stride // divisor for stride in (tokens * heads * head_dim, heads * head_dim, head_dim)
        )

    arch, bits = launch.architecture(q.device), q.element_size() * 8
    tuned, options = configurations.split(choose(Q_KERNEL, arch, bits, head_dim))
    of_q = launch.Launch(
        backward_q_kernel,
        q.device,
        (triton.cdiv(queries, tuned["BLOCK_Q"]) * batch * heads,),
        (*strides, dense(queries), *scales, heads, queries, keys),
        constants | tuned,
        options,
    )
    tuned, options = configurations.split(choose(KV_KERNEL, arch, bits, head_dim))
    of_kv = launch.Launch(
        backward_kv_kernel,
        q.device,
        (triton.cdiv(keys, tuned["BLOCK_K"]) * batch * heads, parts),
        (*strides, dense(keys), *scales, batch, heads, queries, keys, share),
        constants | tuned,
        options,
    )
    return of_q, of_kv
