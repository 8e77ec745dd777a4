"""Read machine code that nothing here can run.

NVIDIA's is SASS, taken apart by the cuobjdump in Triton's wheel; AMD's is the assembly that Triton
keeps.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# Address, predicate, name, operands, and, where it is shown, the upper half of the 128 bits.
_SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)[ \t]*([^;&?\n]*)"
    r"(?:[^\n]*/\* 0x[0-9a-f]{16} \*/\n\s+/\* 0x([0-9a-f]{16}) \*/)?",
    re.M,
)
_LEAVES = ("BRA", "BRX", "JMX", "EXIT", "RET")
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_HMMA_SHAPES = {"16816": "16x8x16", "1688": "16x8x8", "1684": "16x8x4"}


class Control(NamedTuple):
    """What ptxas tells the hardware about an instruction, since that finds out nothing by itself.

    A scoreboard is one of six counters of a warp; 7 is none. (Jia et al., arXiv 1804.06826, 2.1; the bits
    are where they were on Volta.)
    """

    stall: int = 1  # cycles until the warp may issue again
    writes: int = 7  # the scoreboard that is held until the result is there
    reads: int = 7  # the one that is held until the operands have been read
    waits: int = 0  # a mask of those that must be free before it issues


class Instruction(NamedTuple):
    name: str
    operands: str
    target: int | None  # index of the instruction that a branch goes to
    falls_through: bool
    control: Control = Control()

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


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
    for _, predicate, name, operands, upper in lines:
        target = None
        if name.startswith("BRA") and (address := re.search(r"0x([0-9a-f]+)\s*$", operands)):
            target = index.get(int(address[1], 16))
        # BRA.U UP0, 0x210 has its condition among the operands.
        leaves = name.startswith(_LEAVES) and not predicate and "," not in operands
        program.append(Instruction(name, operands, target, not leaves, _control(upper)))
    return program


def _control(upper: str) -> Control:
    if not upper:
        return Control()
    bits = int(upper, 16) >> 41
    return Control(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


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
