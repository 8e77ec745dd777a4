"""Read machine code that nothing here can run: what a compiled kernel asks of an SM, from its text.

NVIDIA's is SASS, taken apart by the cuobjdump in Triton's wheel; AMD's is the assembly that Triton
keeps. Counts are per warp (AMD: wave) and iteration of the inner loop, which is the innermost loop
with the most tensor-core work, or the longest if there is none; a kernel without a loop is counted
whole.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

_SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)[ \t]*([^;&?\n]*)", re.M
)
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_HMMA_SHAPES = {"16816": "16x8x16", "1688": "16x8x8", "1684": "16x8x4"}
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


class Instruction(NamedTuple):
    name: str
    operands: str
    target: int | None  # index of the instruction that a branch goes to
    falls_through: bool


def disassemble(kernel: Any) -> str:
    """The SASS of a CompiledKernel for NVIDIA, the assembly of one for AMD."""
    if "amdgcn" in kernel.asm:
        return kernel.asm["amdgcn"]
    return _cuobjdump("-sass", kernel.asm["cubin"])


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def registers_and_spills(kernel: Any) -> tuple[int, int]:
    """Registers per thread, and bytes per thread that did not fit into them."""
    if "amdgcn" in kernel.asm:
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", disassemble(kernel)))
        return int(counts["vgpr_count"]), 4 * int(counts["vgpr_spill_count"])
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return int(counts["REG"]), int(counts["STACK"]) + int(counts["LOCAL"])


def parse(text: str) -> list[Instruction]:
    return _parse_amd(text) if "s_endpgm" in text else _parse_nvidia(text)


def _parse_nvidia(text: str) -> list[Instruction]:
    lines = _SASS.findall(text)
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    program = []
    for _, predicate, name, operands in lines:
        target = None
        if name.startswith("BRA") and (address := re.search(r"0x([0-9a-f]+)\s*$", operands)):
            target = index.get(int(address[1], 16))
        # BRA.U UP0, 0x210 has its condition among the operands.
        leaves = name.startswith(("BRA", "EXIT", "RET")) and not predicate and "," not in operands
        program.append(Instruction(name, operands, target, not leaves))
    return program


def _parse_amd(text: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.split("s_endpgm")[0].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\t([a-z]\w+)\s*([^;]*)", line):
            lines.append((instruction[1], instruction[2].strip()))
    return [
        Instruction(
            name,
            operands,
            labels.get(operands) if "branch" in name else None,
            name != "s_branch",
        )
        for name, operands in lines
    ]


def loops(program: Sequence[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as sets of indices into the program, but for the branch to itself that
    ptxas ends every program with.

    Not simply the stretch that a backward branch spans: ptxas moves the slow side of a wait to the
    end of the program, from where it jumps back into the middle of a loop.
    """
    successors = [
        {n for n in ((i + 1) if op.falls_through else None, op.target) if n is not None}
        & set(range(len(program)))
        for i, op in enumerate(program)
    ]
    predecessors: list[set[int]] = [set() for _ in program]
    for i, following in enumerate(successors):
        for n in following:
            predecessors[n].add(i)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for i, following in enumerate(successors):
        for header in following:
            if header != i and dominators[i] >> header & 1:
                bodies.setdefault(header, {header}).update(_reaching(i, header, predecessors))
    return [frozenset(body) for body in bodies.values()]


def _dominators(predecessors: Sequence[set[int]]) -> list[int]:
    """Per instruction, the bit set of those that every way to it passes, itself among them."""
    everything = (1 << len(predecessors)) - 1
    dominators = [everything if before and i else 1 << i for i, before in enumerate(predecessors)]
    changed = True
    while changed:
        changed = False
        for i, before in enumerate(predecessors):
            if not before or i == 0:
                continue
            common = everything
            for n in before:
                common &= dominators[n]
            if (common | 1 << i) != dominators[i]:
                dominators[i] = common | 1 << i
                changed = True
    return dominators


def _reaching(end: int, header: int, predecessors: Sequence[set[int]]) -> set[int]:
    body, waiting = {header}, [end]
    while waiting:
        i = waiting.pop()
        if i not in body:
            body.add(i)
            waiting.extend(predecessors[i])
    return body


def inner_loops(program: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops, the one that counts first; the whole program if it has no loop."""
    every = loops(program)
    tensor = [loop for loop in every if _tensor_work(program, loop)]
    candidates = tensor or every
    innermost = [loop for loop in candidates if not any(other < loop for other in candidates)]
    # Of two loops with the same products, the shorter is the one without masks.
    sign = -1 if tensor else 1
    innermost.sort(key=lambda loop: (_tensor_work(program, loop), sign * len(loop)), reverse=True)
    return [[program[i] for i in sorted(loop)] for loop in innermost] or [list(program)]


def _tensor_work(program: Sequence[Instruction], indices: Iterable[int]) -> int:
    return sum(multiplies(tensor_shape(program[i].name)) for i in indices)


def tensor_shape(name: str) -> str | None:
    """ "64x128x16" of a tensor-core instruction, per warpgroup for wgmma and else per warp.

    Blackwell's UTCHMMA does not say: its shape is in a register.
    """
    if name.startswith("UTC") and "MMA" in name:
        return "?"
    if name.startswith("v_mfma"):
        shape = _SHAPE.search(name)
        return shape[0] if shape else None
    base, *parts = name.split(".")
    if base in ("HGMMA", "QGMMA", "IGMMA"):
        return parts[0]
    if base in ("HMMA", "QMMA", "IMMA"):
        return _HMMA_SHAPES.get(parts[0], parts[0])
    return None


def multiplies(shape: str | None) -> int:
    """Multiply-adds of one instruction of this shape; 1 where the shape is not known."""
    if shape is None:
        return 0
    match = _SHAPE.fullmatch(shape)
    return int(match[1]) * int(match[2]) * int(match[3]) if match else 1


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
    bodies = [[op.name for op in loop] for loop in inner_loops(program)]
    names = bodies[0]
    wgmma, waits = _wgmma_and_waits(names)
    if not wgmma:
        others = ("DEPBAR", "SYNCS.PHASECHK", "s_waitcnt")
        waits = sum(name.startswith(others) for name in names)
    return {
        "tensor": dict(Counter(shape for name in names if (shape := tensor_shape(name)))),
        "exp": sum(name.startswith(_EXP) for name in names),
        "fma": sum(name.startswith(_FMA) for name in names),
        "alu": sum(name.startswith(_ALU) and not _is_elsewhere(name) for name in names),
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


def _is_elsewhere(name: str) -> bool:
    return name.startswith((*_FMA, *_EXP, "v_mfma"))
