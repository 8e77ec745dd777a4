"""Cycles of a turn by an in-order model of one quarter of an sm_90 SM, from machine code alone.

Each warpgroup has one of its four warps in each quarter. The quarter issues one instruction a cycle, of
its warps in turn, when ptxas' own stall counts and scoreboards allow it and the pipe is free:

    FMA 1 cycle a warp instruction, ALU 2, uniform 2, shared memory 4, MUFU 8
    wgmma m64nNk16    N/2 cycles of the tensor core, which all warps share, or as long as shared memory
                      takes to deliver the operands at 128 bytes a cycle

Copies are taken to be in time. What the model does not know is a setting of `Machine`: how many wgmma a
warp may have queued and how long the shortest takes; predictions are given for all of SETTINGS. Against
published speeds it is right to 6-25 % for kernels without partitions, and up to 440 cycles a unit too
optimistic for kernels with them: neither L2 nor what waiting for a turn costs is in it.
"""

import math
import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.compiled.sass import Instruction
from bench.compiled.turns import is_wait, left_by

TURNS = 30  # that are run; the later half counts
BANDWIDTH = 128  # bytes that shared memory delivers a cycle
_PIPES = {
    # pipe: cycles of a warp instruction, cycles until its result is there, names
    "mufu": (8, 18, ("MUFU",)),
    "fma": (1, 3, ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2")),
    "alu": (
        *(2, 3),
        ("FMNMX", "IADD3", "LOP3", "SEL", "FSEL", "PRMT", "ISETP", "FSETP", "SHF", "LEA", "VIADD")
        + ("PLOP3", "F2FP", "IMNMX", "MOV", "VIMNMX"),
    ),
    "shared": (4, 22, ("SHFL", "LDS", "STS", "LDSM")),
}
_PIPE_OF = {name: pipe for pipe, (_, _, names) in _PIPES.items() for name in names}
_UNIFORM = (2, 8)
_GLOBAL = 35  # cycles until something is there that was loaded from L1
_READ = 12  # cycles after which operands have been read at the latest


class Machine(NamedTuple):
    """queue: wgmma that a warp may have waiting for the tensor core. shortest: cycles of a wgmma at
    least. The rest: cycles beyond the tensor core's until a wgmma's result is there, of a barrier, and of
    a wait for a copy that has come."""

    queue: int = 64
    shortest: int = 4
    latency: int = 30
    barrier: int = 20
    check: int = 20


SETTINGS = (Machine(64, 4), Machine(64, 16), Machine(2, 16), Machine(1, 16))


def wgmma_cycles(op: Instruction, shortest: int = 4) -> float:
    """Of the tensor core, for one warpgroup."""
    shape = re.search(r"(\d+)x(\d+)x(\d+)", op.name)
    if shape is None:
        raise ValueError(
            f"{op.name} {op.operands}: a wgmma names its shape, as HGMMA.64x64x16 does"
        )
    m, n, k = map(int, shape.groups())
    size = 1 if k == 32 else 2  # bytes of an element
    left_in_memory = op.operands.split(",")[1].strip().startswith("gdesc")
    read = (m * left_in_memory + n) * k * size
    return max(n / 2, read / BANDWIDTH, shortest)


def cycles(
    bodies: Sequence[Sequence[Instruction]],
    programs: int,
    machine: Machine,
    taking_turns: int = 0,
) -> float:
    """For one turn of every warp of the quarter.

    bodies: of a turn, for each warpgroup of a program. programs: on an SM at once. taking_turns: how
    many of the first warpgroups start their products one after another.
    """
    code = [[_Step.of(op, machine) for op in body] for body in bodies]
    quarter = _Quarter(code, programs, machine, taking_turns)
    finished = quarter.run()
    half = len(finished) // 2
    warps = len(bodies) * programs
    return (finished[-1] - finished[half]) / (len(finished) - 1 - half) * warps


class _Step(NamedTuple):
    """An instruction, as far as the model knows it."""

    stall: int
    writes: int
    reads: int
    boards: tuple[int, ...]  # that it waits for
    pipe: str
    busy: float  # of its pipe
    latency: int  # beyond that
    closes: bool  # a group of wgmma
    left: int | None  # groups that may be under way after it, of a wait
    joins: bool  # all warps of the program

    @classmethod
    def of(cls, op: Instruction, machine: Machine) -> "_Step":
        control = op.control
        pipe, busy, latency = "", 0.0, 4
        if op.base in _PIPE_OF:
            pipe = _PIPE_OF[op.base]
            busy, latency, _ = _PIPES[pipe]
        elif "GMMA" in op.name:
            pipe, busy = "tensor", wgmma_cycles(op, machine.shortest)
        elif op.base.startswith("U") or op.base == "R2UR":
            pipe, (busy, latency) = "uniform", _UNIFORM
        elif op.base == "SYNCS":
            latency = machine.check
        elif op.base in ("LDG", "LDL", "LD"):
            latency = _GLOBAL
        # A barrier that names how many threads it joins is one of a warpgroup, which runs as one warp.
        barrier = op.base == "BAR"
        joins = barrier and "," not in op.operands
        return cls(
            machine.barrier if barrier and not joins else max(1, control.stall),
            control.writes,
            control.reads,
            tuple(board for board in range(6) if control.waits >> board & 1),
            pipe,
            busy,
            latency,
            pipe == "tensor" and "gsb0" in op.operands,
            left_by(op) if is_wait(op) else None,
            joins,
        )


@dataclass
class _Warp:
    code: Sequence[_Step]
    program: int
    ready: float
    place: int = 0
    done: int = 0
    is_waiting: bool = False  # for the other warps of its program
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)  # when each is free
    queued: deque[float] = field(default_factory=deque)  # when wgmma of it start
    groups: deque[float] = field(default_factory=deque)  # when groups of wgmma are complete


class _Quarter:
    def __init__(
        self, code: Sequence[Sequence[_Step]], programs: int, machine: Machine, taking_turns: int
    ) -> None:
        self.machine, self.groups, self.taking_turns = machine, len(code), taking_turns
        self.warps = [
            _Warp(code[n % len(code)], n // len(code), 37.0 * n)
            for n in range(len(code) * programs)
        ]
        self.free: Counter[str] = Counter()  # pipe: the cycle from which it is
        self.turn = [0] * programs  # whose it is
        self.waiting: dict[int, list[_Warp]] = {}
        # A warp has its turn from its first wgmma of a loop to the last.
        products = [[i for i, step in enumerate(body) if step.pipe == "tensor"] for body in code]
        self.products = [(found[0], found[-1]) if found else (-1, -1) for found in products]

    def run(self) -> list[float]:
        """The cycles in which warps came to the end of a turn."""
        finished: list[float] = []
        now, last, count = 0.0, -1, len(self.warps)
        while any(warp.done < TURNS for warp in self.warps):
            earliest = math.inf
            for step in range(1, count + 1):
                n = (last + step) % count
                warp = self.warps[n]
                if warp.done >= TURNS or warp.is_waiting:
                    continue
                may_issue = self._from(n, now)
                if may_issue > now:
                    earliest = min(earliest, may_issue)
                    continue
                self._issue(n, now)
                last = n
                if warp.place == 0:
                    finished.append(now)
                earliest = now + 1
                break
            if earliest == math.inf:
                raise RuntimeError("the loop waits for a barrier that nobody reaches")
            now = max(now + 1, earliest)
        return finished

    def _from(self, n: int, now: float) -> float:
        """The cycle from which a warp may issue, as far as that is known now."""
        warp = self.warps[n]
        step = warp.code[warp.place]
        group = n % self.groups
        begins = group < self.taking_turns and warp.place == self.products[group][0]
        if begins and self.turn[warp.program] != group:
            return now + 1
        time = max([warp.ready, *(warp.boards[board] for board in step.boards)])
        if step.left is not None and len(warp.groups) > step.left:
            time = max(time, warp.groups[len(warp.groups) - step.left - 1])
        if step.pipe == "tensor":
            while warp.queued and warp.queued[0] <= now:
                warp.queued.popleft()
            if len(warp.queued) >= self.machine.queue:
                time = max(time, warp.queued[len(warp.queued) - self.machine.queue])
        elif step.pipe:
            # A pipe has a short queue: a warp may issue while the pipe still works.
            time = max(time, self.free[step.pipe] - step.busy)
        return time

    def _issue(self, n: int, now: float) -> None:
        warp = self.warps[n]
        step, group = warp.code[warp.place], n % self.groups
        end = now + step.latency
        if step.pipe:
            start = max(now + 4 * (step.pipe == "tensor"), self.free[step.pipe])
            self.free[step.pipe] = start + step.busy  # type: ignore[assignment]
            end = start + step.busy + step.latency
            if step.pipe == "tensor":
                warp.queued.append(start)
                if step.closes:
                    warp.groups.append(start + step.busy + self.machine.latency)
                end = start + 8
        if step.left is not None:
            while len(warp.groups) > step.left:
                warp.groups.popleft()
        if step.writes < 6:
            warp.boards[step.writes] = max(warp.boards[step.writes], end)
        if step.reads < 6:
            warp.boards[step.reads] = max(warp.boards[step.reads], min(end, now + _READ))
        warp.ready = now + step.stall
        if group < self.taking_turns and warp.place == self.products[group][1]:
            self.turn[warp.program] = (self.turn[warp.program] + 1) % self.taking_turns
        if step.joins:
            self._join(warp, now)
        warp.place = (warp.place + 1) % len(warp.code)
        warp.done += warp.place == 0

    def _join(self, warp: _Warp, now: float) -> None:
        waiting = self.waiting.setdefault(warp.program, [])
        waiting.append(warp)
        warp.is_waiting = True
        if len(waiting) == self.groups:
            for other in self.waiting.pop(warp.program):
                other.is_waiting = False
                other.ready = now + self.machine.barrier
