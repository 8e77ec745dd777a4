"""The GPUs that kernels are compiled for: limits of an SM, and what it does per clock."""

import math
from typing import NamedTuple


class Architecture(NamedTuple):
    """Limits of an SM (AMD: CU) and what it does per clock."""

    shared: int  # bytes, of one program
    shared_total: int
    warps: int
    programs: int
    multiplies: int  # 16-bit tensor-core multiply-adds, summed in fp32
    fma: int  # lanes
    alu: int
    exp: int
    registers: int = 65536
    warp_size: int = 32


_KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(163 * _KIB, 164 * _KIB, 64, 32, 1024, 64, 64, 16),
    # 86, 89 and 120: the GeForce rate, which is half of the workstation cards'.
    "sm_86": Architecture(99 * _KIB, 100 * _KIB, 48, 16, 256, 128, 64, 16),
    "sm_89": Architecture(99 * _KIB, 100 * _KIB, 48, 24, 256, 128, 64, 16),
    "sm_90": Architecture(227 * _KIB, 228 * _KIB, 64, 32, 2048, 128, 64, 16),
    "sm_100": Architecture(227 * _KIB, 228 * _KIB, 64, 32, 4096, 128, 64, 16),
    "sm_120": Architecture(99 * _KIB, 100 * _KIB, 48, 24, 256, 128, 64, 16),
    "gfx942": Architecture(64 * _KIB, 64 * _KIB, 32, 32, 1024, 64, 64, 16, 4 * 512 * 64, 64),
}
TENSOR_MEMORY = 512  # columns, of sm_100


def resident_warps(limits: Architecture, registers: int, shared: int, warps: int) -> int:
    """How many warps an SM holds at once."""
    per_warp = math.ceil(registers / 8) * 8 * limits.warp_size
    fitting = limits.registers // per_warp // 4 * 4  # registers belong to quarters of an SM
    reserved = 0 if limits.warp_size == 64 else _KIB
    programs = min(
        limits.programs,
        limits.warps // warps,
        fitting // warps,
        limits.shared_total // max(1, shared + reserved),
    )
    return programs * warps
