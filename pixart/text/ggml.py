"""The packed numbers of GGUF files, and the dense ones that they stand for.

A row of a matrix is cut into blocks of 32 or 256 numbers. A block holds small whole numbers and a scale of 16
bits; the K types besides give each 16 or 32 of the 256 numbers a small scale, and some a minimum, of their own.
The layouts are those of ggml (ggml-common.h, ggml-quants.c, MIT licence), as the package `gguf` reads them too.
All is computed in fp32, in that package's order of operations: the values are the same to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Type:
    """numbers: of a block. size: its bytes. dtype: of what is not packed, read as it is."""

    name: str
    numbers: int
    size: int
    unpack: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None


def dequantise(blocks: Tensor, name: str) -> Tensor:
    """(N, size) uint8 blocks of a packed type to (N, numbers) fp32, on the same device."""
    unpack = NAMES[name].unpack
    assert unpack is not None
    return unpack(blocks)


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at a byte of each block, (N, 1) fp32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(N, ..., B) bytes to (N, ..., 2, B): all low halves, then all high ones."""
    return torch.stack([packed & 15, packed >> 4], -2)


def _bits(packed: Tensor) -> Tensor:
    """(N, 4) bytes of 32 bits to (N, 32), the lowest first."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * (_nibbles(blocks[:, 2:]).flatten(1).to(torch.int8) - 8).float()


def _q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]).flatten(1).float() + _halves(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 6:]).flatten(1) | (_bits(blocks[:, 2:6]) << 4)
    return _halves(blocks, 0) * (numbers.to(torch.int8) - 16).float()


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 8:]).flatten(1) | (_bits(blocks[:, 4:8]) << 4)
    return _halves(blocks, 0) * numbers.float() + _halves(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _halves(blocks, 0)


def _pairs(packed: Tensor) -> Tensor:
    """(N, 64) bytes of four numbers of 2 bits to (N, 2, 4, 32), in their order: a half of the bytes holds 128
    numbers, the lowest bits of all its bytes first."""
    halves = packed.view(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], device=packed.device, dtype=torch.uint8).view(1, 1, 4, 1)
    return (halves >> shifts) & 3


def _q2_k(blocks: Tensor) -> Tensor:
    scales, numbers = blocks[:, :16], _pairs(blocks[:, 16:80]).reshape(-1, 16, 16)
    scale = (_halves(blocks, 80) * (scales & 15).float())[..., None]
    least = (_halves(blocks, 82) * (scales >> 4).float())[..., None]
    return (scale * numbers.float() - least).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    high, packed, scales = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    # 16 scales of 6 bits: four of them in 8 bytes of nibbles, two in 4 bytes of pairs.
    low = _nibbles(scales[:, :8]).flatten(1)
    shifts = torch.tensor([0, 2, 4, 6], device=blocks.device, dtype=torch.uint8).view(1, 4, 1)
    top = ((scales[:, None, 8:] >> shifts) & 3).flatten(1)
    scale = (low | (top << 4)).to(torch.int8) - 32
    # A bit that is not set takes 4 away; bit k of all 32 bytes belongs to the k-th 32 numbers.
    places = torch.arange(8, device=blocks.device, dtype=torch.uint8).view(1, 8, 1)
    missing = ((high[:, None, :] >> places) & 1) ^ 1
    numbers = _pairs(packed).reshape(-1, 8, 32).to(torch.int8) - (missing << 2).to(torch.int8)
    scaled = (_halves(blocks, 108) * scale.float())[..., None]
    return (scaled * numbers.reshape(-1, 16, 16).float()).flatten(1)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 12) bytes of eight scales and eight minima, 6 bits each, to two of (N, 8) uint8."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    least = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scale, least


def _scaled_by_eighths(blocks: Tensor, numbers: Tensor) -> Tensor:
    """numbers: (N, 8, 32), of a block that begins with scale, minimum, and their 12 bytes."""
    scale, least = _scales_and_minima(blocks[:, 4:16])
    factor = (_halves(blocks, 0) * scale.float())[..., None]
    offset = (_halves(blocks, 2) * least.float())[..., None]
    return (factor * numbers.float() - offset).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 16:].view(-1, 4, 32)).reshape(-1, 8, 32)
    return _scaled_by_eighths(blocks, numbers)


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].view(-1, 4, 32)).reshape(-1, 8, 32)
    places = torch.arange(8, device=blocks.device, dtype=torch.uint8).view(1, 8, 1)
    high = (blocks[:, None, 16:48] >> places) & 1
    return _scaled_by_eighths(blocks, low | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).reshape(-1, 8, 32)
    high = _pairs(blocks[:, 128:192]).reshape(-1, 8, 32)
    numbers = (low | (high << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    scale = (_halves(blocks, 208) * scales)[..., None]
    return (scale * numbers.reshape(-1, 16, 16).float()).flatten(1)


TYPES = {
    0: Type("F32", 1, 4, dtype=torch.float32),
    1: Type("F16", 1, 2, dtype=torch.float16),
    2: Type("Q4_0", 32, 18, _q4_0),
    3: Type("Q4_1", 32, 20, _q4_1),
    6: Type("Q5_0", 32, 22, _q5_0),
    7: Type("Q5_1", 32, 24, _q5_1),
    8: Type("Q8_0", 32, 34, _q8_0),
    10: Type("Q2_K", 256, 84, _q2_k),
    11: Type("Q3_K", 256, 110, _q3_k),
    12: Type("Q4_K", 256, 144, _q4_k),
    13: Type("Q5_K", 256, 176, _q5_k),
    14: Type("Q6_K", 256, 210, _q6_k),
    30: Type("BF16", 1, 2, dtype=torch.bfloat16),
}
NAMES = {one.name: one for one in TYPES.values()}
