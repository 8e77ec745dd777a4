"""How attention cuts the head dimension into tiles, forward and backward.

Triton's tiles have powers of two on each side. 72 channels in a tile of 128 would make 44 % of the
tensor cores' work zeros; as 64 + 16 it is 10 %. Each product is then two: one with the main
columns and one with the tail's, whose missing columns are loaded as zeros.
"""

from torch import Tensor

SMALLEST = 16  # columns that a product may sum over


def split(head_dim: int) -> tuple[int, int]:
    """(main, tail) columns, powers of two that hold head_dim; a tail of 0 is no tail.

    64 -> (64, 0), 72 and 80 -> (64, 16), 96 -> (64, 32), 112 -> (128, 0), 40 -> (32, 16).
    """
    main = max(SMALLEST, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    if rest <= 0:
        return main, 0
    tail = max(SMALLEST, 1 << (rest - 1).bit_length())
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
