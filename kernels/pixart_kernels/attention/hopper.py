"""The host's side of the Gluon kernels for Hopper: what they serve, and what they are launched with.

Nothing here imports Gluon before a kernel is prepared: Triton need not have it.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pixart_kernels.dispatch import configurations

HEAD_DIMS = range(65, 73)  # 64 columns and a tail of 8
DTYPES = (torch.bfloat16, torch.float16)
QUERIES = 64  # of a warpgroup
COPY_REGISTERS = 24

# A GPU has to choose. Two consumers of 128 keys a turn, or three of 64 with Q in registers.
FORWARD_CANDIDATES = configurations.constants_of("attention.forward", "sm_90", 16, 72, "gluon")


class Prepared(NamedTuple):
    """What a launch takes beside tensors: as dispatch.launch.Launch does, for tensors of one shape."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]  # in the kernel's order
    options: dict[str, int]
    boxes: Callable[[Sequence[Tensor | None]], list[Any]]  # of the same tensors as the kernel
    box_count: int


def serves(architecture: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take q (B, N, H, D), k and v (B, M, H, D), or None where they can.

    Addresses are looked at too, which may differ between calls of the same shapes and strides.
    """
    if architecture != "sm_90":
        return f"they are for sm_90 (Hopper), not {architecture}"
    if not _has_gluon():
        return f"Triton {triton.__version__} has no Gluon"
    if q.dtype not in DTYPES:
        return f"they take bf16 and fp16, not {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"they take head dimensions from 65 to 72, not {q.shape[3]}"
    if q.numel() == 0 or k.numel() == 0:
        return "there is nothing to attend to"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            return f"the channels of {name} are {x.stride(3)} apart"
        if x.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes"
        strides = [s for s, n in zip(x.stride(), x.shape[:3], strict=False) if n > 1]
        if any(s <= 0 or s % 8 for s in strides):
            return f"the strides of {name}, {tuple(x.stride())}, are no multiples of 16 bytes"
    return None


@cache
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def prepare_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_log2: float,
    candidate: Mapping[str, Any],
    *,
    limit: int = 0,
    scaled: bool = False,
) -> Prepared:
    """The forward kernel for tensors of these dtypes, shapes and strides, which `serves` lets pass.

    scale_log2: scale · log2(e), more than 0, or scaled: q is multiplied by that already. candidate:
    one of FORWARD_CANDIDATES. limit: of attention.bound, 0 where its kernels are not run.

    The kernel's tensors are q, k, v, out (B, N, H, D) contiguous, lse (B, H, N) fp32 or None, the
    longest queries and keys of attention.bound, both None without a limit, and lengths (B,) or None.
    """
    from pixart_kernels.attention import hopper_forward

    if scale_log2 <= 0 and not scaled:
        raise ValueError(f"scale_log2 must be more than 0, got {scale_log2}: turn q around")
    batch, queries, heads, head_dim = q.shape
    constants = {"HEAD_DIM": head_dim, "LIMIT": limit, "SCALED": scaled, **candidate}
    constants["COPY_REGISTERS"] = COPY_REGISTERS
    return Prepared(
        kernel=hopper_forward.forward,
        grid=(triton.cdiv(queries, QUERIES * candidate["CONSUMERS"]) * batch * heads,),
        numbers=(1.0 if scaled else scale_log2, heads, queries, k.shape[1]),
        constants=constants,
        options={"num_warps": 4},
        boxes=forward_boxes(q, k, v, candidate["BLOCK_K"]),
        box_count=6,
    )


def forward_boxes(
    q: Tensor, k: Tensor, v: Tensor, block_k: int
) -> Callable[[Sequence[Tensor | None]], list[Any]]:
    """A function that makes the copy engine's descriptors of q, k, v, the first of its tensors, which
    have the shapes and strides of those given here: 64 + 16 columns of q and of k, 64 + 8 of v."""
    parts = [
        (i, box_of(x, rows, columns))
        for i, (x, rows, tail) in enumerate(((q, QUERIES, 16), (k, block_k, 16), (v, block_k, 8)))
        for columns in (64, tail)
    ]

    def make(tensors: Sequence[Tensor | None]) -> list[Any]:
        return [box(tensors[i]) for i, box in parts]

    return make


def box_of(x: Tensor, rows: int, columns: int) -> Callable[[Tensor | None], Any]:
    """Of `rows` tokens of a head: x (B, N, H, D) is (B, H, N, D) to the copy engine."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    box = _box_type()
    shape = [x.shape[i] for i in (0, 2, 1, 3)]
    # The stride of a dimension of size 1 may be anything, and must be a multiple of 16 bytes.
    strides = [x.stride(i) if x.shape[i] > 1 else 8 for i in (0, 2, 1)] + [1]
    swizzle = 0 if columns == 8 else 2 * columns  # bytes; of 8 columns, as hopper_tiles.py has them
    layout = NVMMASharedLayout(swizzle, element_bitwidth=16, rank=4)
    return lambda tensor: box(tensor, shape, strides, [1, 1, rows, columns], layout)


@cache
def _box_type() -> Any:
    """Gluon's descriptor without its checks, which `serves` has done."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    class Box(TensorDescriptor):
        def __post_init__(self) -> None:
            pass

    return Box
