"""The host's side of attention forward: which kernel, which tiles, and what it is launched with.

`prepare` works that out once for tensors of some dtypes, shapes and strides. Kernels: the plain one
(forward.py) everywhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from pixart_kernels.attention.bound import limit, longest_keys, longest_queries
from pixart_kernels.attention.forward import forward
from pixart_kernels.attention.tiles import split, stride_divisor, strides_of
from pixart_kernels.dispatch import configurations, launch
from pixart_kernels.dispatch.bypass import Compute
from pixart_kernels.dispatch.registration import INTERPRETED

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
COPY_ENGINES = ("sm_90", "sm_100", "sm_103")  # architectures whose TMA reads K and V
KERNEL = "attention.forward"


def prepare(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float | None, with_lse: bool
) -> Compute:
    """What gives attention, (B, N, H, D), and, with_lse, the base-2 logarithm of the sum of its weights,
    (B, H, N) fp32, which is 0 for a sample without keys."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if q.numel() == 0 or keys == 0:
        return _nothing
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0 or not all(x.stride(3) == 1 for x in (q, k, v)) or not _is_dense(kv_lengths):
        return _prepare_fitted(q, k, v, kv_lengths, scale, with_lse)
    launch_all = _launches(q, k, v, kv_lengths, scale * math.log2(math.e), with_lse)

    def compute(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *_: object
    ) -> tuple[Tensor, Tensor | None]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((batch, heads, queries), dtype=torch.float32) if with_lse else None
        launch_all(q, k, v, out, lse, lengths)
        return out, lse

    return compute


def _nothing(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, queries, heads, _ = q.shape
    lse = q.new_zeros((batch, heads, queries), dtype=torch.float32) if with_lse else None
    return q.new_zeros(q.shape), lse


def _is_dense(lengths: Tensor | None) -> bool:
    return lengths is None or lengths.is_contiguous()


def _prepare_fitted(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, scale: float, with_lse: bool
) -> Compute:
    """For what the kernel does not take as it is."""
    # The kernel takes the largest product for that of the largest score; and where all keys have the
    # same weight, it would multiply a masked score by 0.
    sign, fitted_scale = (0.0, 1.0) if scale == 0 else (math.copysign(1.0, scale), abs(scale))

    def fit(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Any, ...]:
        q = torch.zeros_like(q) if sign == 0 else -q if sign < 0 else q
        tokens = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)]
        lengths = None if lengths is None else lengths.contiguous()
        return *tokens, lengths, fitted_scale, with_lse

    inner = prepare(*fit(q, k, v, kv_lengths))
    return lambda q, k, v, lengths, *_: inner(*fit(q, k, v, lengths))


def _launches(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, with_lse: bool
) -> Callable[..., None]:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    main, tail = split(head_dim)
    divisor = stride_divisor(q, k, v)
    arch = launch.architecture(q.device)
    choice = configurations.choose(KERNEL, arch, q.element_size() * 8, head_dim)
    tuned, options = configurations.split(choice)
    v_tail = tuned.pop("V_TAIL", value_tail(head_dim, arch))
    bound = limit(q.dtype, queries, keys, choice.get("bound_from"))
    boxes = None
    if launch.is_switched_on("PIXART_TMA") and choice.get("tma", True):
        boxes = _boxes(arch, k, v, (main, tail), (main, v_tail), tuned["BLOCK_K"])
    constants = {
        "HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail, "V_TAIL": v_tail, "DIVISOR": divisor,
        "PRECISION": launch.precision(q.dtype), "LIMIT": bound,
        "SCALED": math.isclose(scale, 1.0, rel_tol=1e-12),
        "IN_PAIRS": arch.startswith("sm_") and not INTERPRETED, **tuned,
    }  # fmt: skip
    attend = launch.Launch(
        forward,
        q.device,
        (triton.cdiv(queries, tuned["BLOCK_Q"]) * batch * heads,),
        (
            *(strides_of(x, divisor) for x in (q, k, v)),
            scale, heads, queries, keys,
        ),
        constants,
        options,
        boxes,
        box_count=4,
    )  # fmt: skip
    if not bound:
        return lambda q, k, v, out, lse, lengths: attend(q, k, v, out, lse, None, None, lengths)
    find_q, find_k = longest_queries(q, divisor), longest_keys(k, divisor)

    def bounded(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, lengths: Tensor | None
    ) -> None:
        attend(q, k, v, out, lse, find_q(q, None), find_k(k, lengths), lengths)

    return bounded


def value_tail(head_dim: int, arch: str) -> int:
    """Columns of the tail of V: 8 where that is enough and the tensor cores take so few."""
    main, tail = split(head_dim)
    if head_dim - main > 8 or not arch.startswith("sm_"):
        return tail
    # tcgen05 wants 16, and so does what Triton before 3.8 makes of such a product for wgmma.
    wide = arch in COPY_ENGINES and (arch != "sm_90" or TRITON < (3, 8))
    return tail if wide else min(tail, 8)


def _boxes(
    arch: str, k: Tensor, v: Tensor, of_k: tuple[int, int], of_v: tuple[int, int], rows: int
) -> launch.Boxes | None:
    """What makes descriptors of the main and tail columns of K and of V for the copy engine of sm_90
    and later, None where it is not there or cannot read these tensors."""
    if arch not in COPY_ENGINES or not (_copyable(k) and _copyable(v)):
        return None
    shape = [k.shape[0], k.shape[2], k.shape[1], k.shape[3]]  # (B, H, M, D): tokens are a matrix
    blocks = [[1, 1, rows, columns] for columns in (*of_k, *of_v)]
    k_strides, v_strides = _box_strides(k), _box_strides(v)
    has_tail = of_k[1] > 0

    def make(tensors: Sequence[Tensor | None]) -> Sequence[launch.Box | None]:
        _, k, v, *_ = tensors
        return (
            launch.Box(k, shape, k_strides, blocks[0]),
            launch.Box(k, shape, k_strides, blocks[1]) if has_tail else None,
            launch.Box(v, shape, v_strides, blocks[2]),
            launch.Box(v, shape, v_strides, blocks[3]) if has_tail else None,
        )

    return make


def _copyable(x: Tensor) -> bool:
    strides = [s for s, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1]
    return x.element_size() == 2 and all(s > 0 and s % 8 == 0 for s in strides)


def _box_strides(x: Tensor) -> list[int]:
    # The stride of a dimension of size 1 may be anything, and must be a multiple of 16 bytes.
    batch, tokens, heads = (
        s if size > 1 else 8 for s, size in zip(x.stride()[:3], x.shape, strict=False)
    )
    return [batch, heads, tokens, 1]
