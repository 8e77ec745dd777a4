"""The loops of machine code: which instructions follow which, and what is repeated.

A kernel whose warps have different work (Gluon's `warp_specialize`) sends its workers through an
indirect branch, whose table the disassembly does not show. It leads to what nothing else leads to: of what
cannot be reached so far, the first instruction is where the next worker begins.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.compiled.sass import Instruction, multiplies, tensor_shape

INDIRECT = ("BRX", "JMX")


class Loop(NamedTuple):
    """header: the instruction that every turn begins with. indices: of all instructions, those that
    were moved out of line among them."""

    header: int
    indices: frozenset[int]
    latches: tuple[int, ...]  # the instructions that go back to the header


class Flow:
    """Ways through a program. Of no instruction that only a call reaches is anything known."""

    def __init__(self, program: Sequence[Instruction]) -> None:
        self.program = program
        self.entries = frozenset[int]()  # of workers
        self._successors = [self._direct(i) for i in range(len(program))]
        indirect = [i for i, op in enumerate(program) if op.name.startswith(INDIRECT)]
        if indirect:
            self.entries = self._unreached()
            for i in indirect:
                self._successors[i] = set(self.entries)
        self._predecessors: list[set[int]] = [set() for _ in program]
        for i, following in enumerate(self._successors):
            for n in following:
                self._predecessors[n].add(i)
        self._dominators = _dominators(self._predecessors)

    def _direct(self, i: int) -> set[int]:
        op = self.program[i]
        following = (i + 1 if op.falls_through else None, op.target)
        return {n for n in following if n is not None and n < len(self.program)}

    def _unreached(self) -> frozenset[int]:
        reached, entries = set[int](), []
        for start in range(len(self.program)):
            if start in reached:
                continue
            entries.append(start)
            waiting = [start]
            while waiting:
                i = waiting.pop()
                if i not in reached:
                    reached.add(i)
                    waiting.extend(self._successors[i])
        return frozenset(entries[1:])

    def passes(self, i: int) -> list[int]:
        """The instructions that every way to i passes, in their order, i the last."""
        found = [n for n in range(len(self.program)) if self._dominators[i] >> n & 1]
        return sorted(found, key=lambda n: self._dominators[n].bit_count())

    def loops(self) -> list[Loop]:
        """The natural loops, but for the branch to itself that ptxas ends every program with.

        Not simply the stretch that a backward branch spans: ptxas moves the slow side of a wait to the
        end of the program, from where it jumps back into the middle of a loop.
        """
        bodies: dict[int, set[int]] = {}
        latches: dict[int, list[int]] = {}
        for i, following in enumerate(self._successors):
            for header in following:
                if header != i and self._dominators[i] >> header & 1:
                    body = bodies.setdefault(header, {header})
                    body.update(_reaching(i, header, self._predecessors))
                    latches.setdefault(header, []).append(i)
        return [
            Loop(header, frozenset(bodies[header]), tuple(latches[header])) for header in bodies
        ]

    def inner_loops(self) -> list[Loop]:
        """The innermost loops, or those with tensor-core work if there are any, the one that counts
        first."""
        every = self.loops()
        work = {loop: _tensor_work(self.program, loop.indices) for loop in every}
        tensor = [loop for loop in every if work[loop]]
        candidates = tensor or every
        innermost = [
            loop
            for loop in candidates
            if not any(other.indices < loop.indices for other in candidates)
        ]
        # Of two loops with the same products, the shorter is the one without masks.
        sign = -1 if tensor else 1
        innermost.sort(key=lambda loop: (work[loop], sign * len(loop.indices)), reverse=True)
        return innermost


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


def _tensor_work(program: Sequence[Instruction], indices: Iterable[int]) -> int:
    return sum(multiplies(tensor_shape(program[i].name)) for i in indices)
