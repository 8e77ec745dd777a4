"""The host's side of attention forward: which kernel, which tiles, and what it is launched with.

`prepare` works that out once for tensors of some dtypes, shapes and strides. There are two kernels: in
Triton (forward.py), for every architecture, and in Gluon for Hopper (hopper.py), where the table of
configurations has it first, or PIXART_ATTENTION=gluon asks for it, and it can take the tensors.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from pixart_kernels.attention import hopper
from pixart_kernels.attention.bound import limit, longest_keys, longest_queries
from pixart_kernels.attention.forward import forward
from pixart_kernels.attention.tiles import is_one, split, stride_divisor, strides_of, without_data
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
    launch_all = _launches(q, k, v, kv_lengths, scale * math.log2(math.e))

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
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
) -> Callable[..., None]:
    arch, head_dim = launch.architecture(q.device), q.shape[3]
    can_be_gluon = hopper.serves(arch, *(without_data(x) for x in (q, k, v))) is None

    def admits(candidate: configurations.Candidate) -> bool:
        return can_be_gluon or not is_gluon(candidate)

    key = (KERNEL, arch, q.element_size() * 8, head_dim)
    choice = configurations.choose(*key, admits, launch.wanted_language())
    if not is_gluon(choice):
        return _triton_launches(arch, q, k, v, scale, choice)
    plain = next(filter(_admits_triton, configurations.find(*key).candidates))
    in_triton = _triton_launches(arch, q, k, v, scale, plain)
    in_gluon = _gluon_launches(q, k, v, scale, choice)

    def compute(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> None:
        # The copy engine begins at multiples of 16 bytes, and views begin anywhere.
        is_aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % launch.ALIGNMENT == 0
        (in_gluon if is_aligned else in_triton)(q, k, v, *rest)

    return compute


def _triton_launches(
    arch: str, q: Tensor, k: Tensor, v: Tensor, scale: float, choice: configurations.Candidate
) -> Callable[..., None]:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    main, tail = split(head_dim)
    divisor = stride_divisor(q, k, v)
    tuned, options = configurations.split(choice)
    v_tail = tuned.pop("V_TAIL", value_tail(head_dim, arch))
    bound = limit(q.dtype, queries, keys, choice.get("bound_from"))
    boxes = None
    if launch.is_switched_on("PIXART_TMA") and choice.get("tma", True):
        boxes = _boxes(arch, k, v, (main, tail), (main, v_tail), tuned["BLOCK_K"])
    attend = launch.Launch(
        forward,
        q.device,
        (triton.cdiv(queries, tuned["BLOCK_Q"]) * batch * heads,),
        (*(strides_of(x, divisor) for x in (q, k, v)), scale, heads, queries, keys),
        {
            "HEAD_DIM": head_dim,
            "MAIN": main,
            "TAIL": tail,
            "V_TAIL": v_tail,
            "DIVISOR": divisor,
            "PRECISION": launch.precision(q.dtype),
            "LIMIT": bound,
            "SCALED": is_one(scale),
            "IN_PAIRS": arch.startswith("sm_") and not INTERPRETED,
            **tuned,
        },
        options,
        boxes,
        box_count=4,
    )
    return _with_bound(attend, q, k, bool(bound))


def _gluon_launches(
    q: Tensor, k: Tensor, v: Tensor, scale: float, choice: configurations.Candidate
) -> Callable[..., None]:
    bound = limit(q.dtype, q.shape[1], k.shape[1], choice.get("bound_from"))
    tuned, _ = configurations.split(choice)
    made = hopper.prepare_forward(q, k, v, scale, tuned, limit=bound, scaled=is_one(scale))
    attend = launch.Launch(
        made.kernel, q.device, made.grid, made.numbers, made.constants, made.options, made.boxes
    )
    return _with_bound(attend, q, k, bool(bound))


def _with_bound(
    attend: Callable[..., None], q: Tensor, k: Tensor, is_bounded: bool
) -> Callable[..., None]:
    """attend with the longest queries and keys before the lengths, found if scores may have a bound."""
    if not is_bounded:
        return lambda q, k, v, out, lse, lengths: attend(q, k, v, out, lse, None, None, lengths)
    divisor = stride_divisor(q, k)
    find_q, find_k = longest_queries(q, divisor), longest_keys(k, divisor)

    def bounded(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, lengths: Tensor | None
    ) -> None:
        attend(q, k, v, out, lse, find_q(q, None), find_k(k, lengths), lengths)

    return bounded


def takes_scaled_queries(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a Gluon kernel, to which a multiplication for each score matters, is what is launched."""
    arch = launch.architecture(device)
    if arch != "sm_90":
        return False
    tokens = torch.empty((1, 1, 1, head_dim), dtype=dtype, device="meta")
    if hopper.serves(arch, tokens, tokens, tokens) is not None:
        return False
    key = (KERNEL, arch, dtype.itemsize * 8, head_dim)
    return is_gluon(configurations.choose(*key, wanted=launch.wanted_language()))


def is_gluon(candidate: configurations.Candidate) -> bool:
    return configurations.language(candidate) == "gluon"


def _admits_triton(candidate: configurations.Candidate) -> bool:
    return not is_gluon(candidate)


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
