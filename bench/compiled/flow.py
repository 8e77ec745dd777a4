"""The loops of machine code: which instructions follow which, and what is repeated.

A kernel whose warps have different work (`warp_specialize`) sends its workers through an indirect
branch, whose table the disassembly does not show. Where one leads is what nothing else leads to.
"""

from collections.abc import Iterable, Sequence

from bench.compiled.sass import Instruction, multiplies, tensor_shape


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
    tensor = [loop for loop in every if tensor_work(program, loop)]
    candidates = tensor or every
    innermost = [loop for loop in candidates if not any(other < loop for other in candidates)]
    # Of two loops with the same products, the shorter is the one without masks.
    sign = -1 if tensor else 1
    innermost.sort(key=lambda loop: (tensor_work(program, loop), sign * len(loop)), reverse=True)
    return [[program[i] for i in sorted(loop)] for loop in innermost] or [list(program)]


def tensor_work(program: Sequence[Instruction], indices: Iterable[int]) -> int:
    return sum(multiplies(tensor_shape(program[i].name)) for i in indices)
