"""How attention cuts the head dimension into tiles, forward and backward.

Triton's tiles have powers of two on each side. 72 channels in a tile of 128 would make 44 % of the
tensor cores' work zeros; as 64 + 16 it is 10 %. Each product is then two: one with the main
columns and one with the tail's, whose missing columns are loaded as zeros.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST = 16  # columns that a product may sum over


def split(head_dim: int, smallest: int = SMALLEST) -> tuple[int, int]:
    """(main, tail) columns, powers of two that hold head_dim; a tail of 0 is no tail.

    64 -> (64, 0), 72 and 80 -> (64, 16), 96 -> (64, 32), 112 -> (128, 0), 40 -> (32, 16). smallest: of
    either; products of 8-bit numbers sum over 32.
    """
    main = max(smallest, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    if rest <= 0:
        return main, 0
    tail = max(smallest, 1 << (rest - 1).bit_length())
    return (main, tail) if tail < main else (2 * main, 0)


def stride_divisor(*tensors: Tensor) -> int:
    """8 if it divides every stride but the last of all tensors, else 1.

    Triton looks for 16 by itself, which a head stride of 72 elements is not divisible by; without
    a hint every load of such a tensor is 2 bytes wide. 8 elements of 16 bits are one 16-byte load.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def strides_of(x: Tensor, divisor: int) -> tuple[int, ...]:
    """All but the last, divided by what divides them: kernels multiply again."""
    return tuple(stride // divisor for stride in x.stride()[:3])


def without_data(x: Tensor) -> Tensor:
    """A tensor of that dtype, shape and strides, which is nowhere."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def is_one(scale: float) -> bool:
    """Whether queries came scaled: with SCALE_OF_SCALED, only rounding is left of scale · log2(e)."""
    return math.isclose(scale, 1.0, rel_tol=1e-12)


@triton.jit
def head_of(ptr, strides, b, h, DIVISOR: tl.constexpr):
    """The pointer to a head's first token. Strides come divided by DIVISOR, so that the compiler
    sees what divides them."""
    return ptr + (b * strides[0] + h * strides[2]) * DIVISOR


@triton.jit
def load_tile(
    ptr,
    stride,
    tokens,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Channels from FIRST on of ROWS tokens; zeros beyond HEAD_DIM and, if MASKED, `tokens`."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, COLUMNS)[None, :]
    ptrs = ptr + rows * stride + columns
    if MASKED and FIRST + COLUMNS > HEAD_DIM:
        return tl.load(ptrs, mask=(rows < tokens) & (columns < HEAD_DIM), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=rows < tokens, other=0.0)
    elif FIRST + COLUMNS > HEAD_DIM:
        return tl.load(ptrs, mask=columns < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def length_of(lengths_ptr, b, keys):
    if lengths_ptr is not None:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), keys).to(tl.int32)
    else:
        return keys
