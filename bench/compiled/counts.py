"""What the loops of a compiled kernel ask of an SM's pipes.

Counts are per warp (AMD: wave) and iteration of the inner loop, which is the innermost loop
with the most tensor-core work, or the longest if there is none; a kernel without a loop is counted
whole.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.compiled.flow import Flow
from bench.compiled.sass import Instruction, tensor_shape

_FMA = (
    *("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2"),
    *("v_fma", "v_add_f", "v_sub_f", "v_mul_f", "v_pk_fma", "v_pk_mul", "v_pk_add", "v_mad"),
)
_ALU = (
    *("FMNMX", "FSEL", "FSET", "IADD", "ISETP", "IMNMX", "IABS", "LOP", "PLOP3", "SHF", "LEA"),
    *("SEL", "PRMT", "MOV", "SGXT", "VIADD", "VIMNMX", "F2FP", "I2FP", "R2P", "P2R"),
    "v_",
)
_EXP = ("MUFU", "v_exp")
_MOVES = {
    "load": ("UTMALDG", "LDG.", "LDGSTS", "global_load", "buffer_load"),
    "store": ("UTMASTG", "UTMAREDG", "STG.", "global_store", "buffer_store"),
}
_BYTES = {"128": "16", "64": "8", "U16": "2", "S16": "2", "U8": "1", "S8": "1"}
_BYTES |= {"dwordx4": "16", "dwordx3": "12", "dwordx2": "8", "dword": "4"}
_BYTES |= {"short": "2", "ushort": "2", "ubyte": "1", "byte": "1"}


def transfers(program: Iterable[Instruction], kind: str) -> dict[str, int]:
    """How global memory is read (kind "load") or written ("store"): counts by bytes per thread."""
    return dict(Counter(_width(op.name) for op in program if op.name.startswith(_MOVES[kind])))


def _width(name: str) -> str:
    if name.startswith("UTM"):
        return "TMA"
    unnamed = "4" if name.isupper() else "2"  # of NVIDIA's and of AMD's
    return next((_BYTES[part] for part in re.split(r"[._]", name) if part in _BYTES), unnamed)


def count(program: Sequence[Instruction]) -> dict[str, Any]:
    """Instructions of the inner loop, by what executes them."""
    inner = [loop.indices for loop in Flow(program).inner_loops()]
    bodies = [[program[i].name for i in sorted(indices)] for indices in inner]
    bodies = bodies or [[op.name for op in program]]
    names = bodies[0]
    wgmma, waits = _wgmma_and_waits(names)
    if not wgmma:
        others = ("DEPBAR", "SYNCS.PHASECHK", "s_waitcnt")
        waits = sum(name.startswith(others) for name in names)
    return {
        "tensor": dict(Counter(shape for name in names if (shape := tensor_shape(name)))),
        **{pipe: sum(_pipe(name) == pipe for name in names) for pipe in ("exp", "fma", "alu")},
        "instructions": len(names),
        "waits": waits,
        "wgmma": wgmma,
        # ptxas puts a wait after each wgmma whose operands it could not leave alone.
        "serialised": any(0 < a <= b for a, b in map(_wgmma_and_waits, bodies)),
    }


def _wgmma_and_waits(names: Sequence[str]) -> tuple[int, int]:
    return (
        sum("GMMA" in name for name in names),
        sum(name.startswith("WARPGROUP.DEPBAR") for name in names),
    )


def on(pipe: str, ops: Iterable[Instruction]) -> int:
    """Instructions that "exp", "fma" or "alu" executes."""
    return sum(_pipe(op.name) == pipe for op in ops)


def _pipe(name: str) -> str:
    for pipe, names in (("exp", _EXP), ("fma", _FMA), ("tensor", "v_mfma"), ("alu", _ALU)):
        if name.startswith(names):
            return pipe
    return ""
