"""What the warps of an attention kernel repeat, each kind of them: one turn of its loop over blocks.

A kernel may hand its warps different work (`warp_specialize`): some copy, and each warpgroup that
multiplies has code of its own. Each of those is a partition here; a kernel without such is one.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from bench.compiled.flow import INDIRECT, Flow, Loop
from bench.compiled.sass import Instruction, multiplies, tensor_shape

THREADS = 128  # of a warpgroup
_LOCAL = ("LDL", "STL")  # loads and stores of what does not fit into registers


class Turn(NamedTuple):
    """body: the instructions of a turn that waits for nothing, in order: those that ptxas moved out of
    line, where a wait takes longer, are not among them."""

    partition: int  # 0 is where the kernel begins, others in the order of their code
    registers: int  # of a thread
    spills: int  # loads and stores of registers that were spilled, per turn
    body: tuple[Instruction, ...]

    @property
    def wgmma(self) -> int:
        return sum("GMMA" in op.name for op in self.body)

    @property
    def waits(self) -> int:
        """For wgmma, whether for all or for some."""
        return sum(is_wait(op) for op in self.body)

    @property
    def serialised(self) -> bool:
        """ptxas puts a wait after each wgmma whose operands it could not leave alone."""
        return 0 < self.wgmma <= self.waits

    @property
    def exponentials(self) -> int:
        return sum(op.base == "MUFU" for op in self.body)

    @property
    def scores(self) -> int:
        """Of a warpgroup. Each has an exponential; a few more than a power of two are of rows."""
        return THREADS << self.exponentials.bit_length() - 1 if self.exponentials else 0

    @property
    def online(self) -> bool:
        """Whether it keeps a running maximum: exponentials of rows shrink what was summed before."""
        return self.exponentials * THREADS != self.scores

    @property
    def exposed(self) -> int:
        """Exponentials while no product of the warpgroup is under way: behind the last wait."""
        under_way, found = 0, 0
        for _ in range(2):  # products that the turn before started may be
            found = 0
            for op in self.body:
                if "GMMA" in op.name and "gsb0" in op.operands:
                    under_way += 1
                elif is_wait(op):
                    under_way = min(under_way, left_by(op))
                elif op.base == "MUFU" and not under_way:
                    found += 1
        return found


def is_wait(op: Instruction) -> bool:
    return op.name.startswith("WARPGROUP.DEPBAR")


def left_by(op: Instruction) -> int:
    """How many groups of wgmma may be under way after this wait."""
    number = re.search(r"0x([0-9a-f]+)\s*$", op.operands)
    return int(number[1], 16) if number else 0


def turns(program: Sequence[Instruction], registers: int) -> list[Turn]:
    """The loops with wgmma, of each partition the one that counts first; none without wgmma.

    registers: of a thread of the kernel, where a partition asks for no other number.
    """
    flow = Flow(program)
    loops = [loop for loop in flow.inner_loops() if _has_wgmma(program, loop)]
    found = []
    entries = sorted(flow.entries)
    for loop in loops:
        before = flow.passes(loop.header)
        own = [entries.index(i) + 1 for i in before if i in flow.entries]
        asked = [i for i in before if program[i].name.startswith("USETMAXREG")]
        found.append(
            Turn(
                own[-1] if own else 0,
                _number(program[asked[-1]]) if asked else registers,
                sum(program[i].base in _LOCAL for i in loop.indices),
                tuple(program[i] for i in _straight(program, loop)),
            )
        )
    return found


def loop_spills(program: Sequence[Instruction]) -> int:
    """Loads and stores of spilled registers inside any loop, copying ones among them."""
    flow = Flow(program)
    inside: set[int] = set()
    for loop in flow.loops():
        # Workers wait for work in a loop round all that they do.
        if not any(program[i].name.startswith(INDIRECT) for i in loop.indices):
            inside |= loop.indices
    return sum(program[i].base in _LOCAL for i in inside)


def alternatives(every: Sequence[Turn]) -> list[list[Turn]]:
    """What a program's partitions do at the same time: a turn of each, without a running maximum and
    with one, as far as there are such; of two loops of a kind the one that counts first."""
    found = []
    for online in (False, True):
        chosen: dict[int, Turn] = {}
        for turn in every:
            if not turn.scores or turn.online == online:
                chosen.setdefault(turn.partition, turn)
        if any(turn.scores for turn in chosen.values()):
            found.append([chosen[partition] for partition in sorted(chosen)])
    return found


def are_specialised(every: Sequence[Turn]) -> bool:
    return any(turn.partition for turn in every)


def _has_wgmma(program: Sequence[Instruction], loop: Loop) -> bool:
    return any("GMMA" in program[i].name for i in loop.indices)


def _number(op: Instruction) -> int:
    """Of registers, of USETMAXREG."""
    return int(op.operands.split(",")[-1].strip(), 16)


def _straight(program: Sequence[Instruction], loop: Loop) -> list[int]:
    """From the header to where a turn ends: at the first way back that leaves out no product."""
    last = max(i for i in loop.indices if multiplies(tensor_shape(program[i].name)))
    ends = [i for i in loop.latches if i >= last] or [max(loop.latches)]
    return [i for i in sorted(loop.indices) if loop.header <= i <= min(ends)]
