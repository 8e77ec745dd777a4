"""In which order things happen: partitions as threads, of which one runs at a time.

Which one goes on is drawn from a seed at everything that others can see, and so is when a copy
lands: as late as that order says. Some partitions and programs are fast, others slow, since orders
that treat all alike hardly ever let one fall far behind.
"""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from gluon_simulator.tiles import Barrier, Clock, Region
from gluon_simulator.values import Fault

LANDS = 0.3  # how likely a copy that is under way is to land between two steps


class Partition:
    """A function that warp_specialize starts, or `main`, a program before that."""

    def __init__(self, name: str, program: int = 0, parent: "Partition | None" = None) -> None:
        self.name = name
        self.program = program
        self.clock: Clock = dict(parent.clock) if parent else {}
        self.copies: set[int] = set(parent.copies) if parent else set()  # that it has waited for
        self.groups = 0  # products that it has started
        self.reads: list[tuple[int, list[Region]]] = []  # what those read that may be under way
        self.unfenced: list[Region] = []  # what it has stored since its last fence
        self.polled: object = None  # the number in global memory that it has just read, and when
        self.speed = 1.0
        self.may_go_on: Callable[[], bool] | None = None  # None: it may
        self.over = False
        self.turn = threading.Lock()
        self.turn.acquire()

    def tick(self) -> int:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]


class Copy:
    """A box under way into shared memory."""

    def __init__(self, number: int, region: Region, values: Any, barrier: Barrier) -> None:
        self.number = number
        self.region = region
        self.values = values
        self.barrier = barrier

    def land(self) -> None:
        self.region.data[...] = self.values
        self.barrier.copies.add(self.number)
        self.barrier.bytes -= self.region.bytes
        self.barrier.settle()


class Schedule:
    def __init__(self, seed: int, resident: int | None = None) -> None:
        self.random = random.Random(seed)
        self.resident = resident  # how many programs run together, if not all
        self.under_way: list[Copy] = []
        self.partitions: list[Partition] = []
        self._bodies: list[tuple[Partition, Callable[..., None], Sequence[Any]]] = []
        self.me = self.main = Partition("main")
        self.fault: Exception | None = None

    def start(self, program: int) -> None:
        """Run as the program of that number, of which nothing has happened yet."""
        self.me = self.main = Partition(f"main of {program}", program)

    def add_partitions(
        self, functions: Sequence[tuple[Callable[..., None], Sequence[Any]]]
    ) -> None:
        """Partitions of the program that runs, to be run by `run`."""
        speed = 10 ** self.random.uniform(-1.5, 0)
        for i, (function, arguments) in enumerate(functions):
            name = f"{function.__name__}[{i}] of {self.main.program}"
            partition = Partition(name, self.main.program, self.main)
            partition.speed = speed * 10 ** self.random.uniform(-0.7, 0)
            self.partitions.append(partition)
            self._bodies.append((partition, function, arguments))

    def run(self) -> None:
        """All partitions, until each is over. Raises Fault, or what they raise."""
        for body in self._bodies:
            threading.Thread(target=self._run_one, args=body, daemon=True).start()
        if self._hand_over():
            self.main.turn.acquire()
        if self.fault:
            raise self.fault
        if self.under_way:
            raise Fault("a copy is under way when the kernel ends")
        for partition in self.partitions:
            if partition.reads:
                raise Fault(f"{partition.name} ends with products under way")

    def _run_one(
        self, partition: Partition, function: Callable[..., None], arguments: Sequence[Any]
    ) -> None:
        partition.turn.acquire()
        try:
            if not self.fault:
                function(*arguments)
            partition.over = True
            if not self.fault:
                self._hand_over()
        except Exception as error:
            partition.over = True
            if not self.fault:
                name = f"{partition.name}: {error}"
                self.fault = Fault(name) if isinstance(error, Fault) else error
                for other in [*self.partitions, self.main]:
                    if other is not partition and not other.over:
                        other.turn.release()

    def switch(self) -> None:
        """Let another partition go on, or this one."""
        if self.me is self.main:
            return
        mine = self.me
        if self._hand_over():
            mine.turn.acquire()
            if self.fault:
                raise self.fault

    def wait_until(self, condition: Callable[[], bool]) -> None:
        self.me.may_go_on = condition
        self.switch()
        self.me.may_go_on = None

    def _hand_over(self) -> bool:
        """Whether it is another's turn now: from then on that one runs."""
        before, chosen = self.me, self._next()
        self.me = chosen
        if chosen is not before:
            chosen.turn.release()
        return chosen is not before

    def _next(self) -> Partition:
        """Who goes on: main when all partitions are over."""
        while True:
            while self.under_way and self.random.random() < LANDS:
                self._land()
            left = [partition for partition in self.partitions if not partition.over]
            if not left:
                return self.main
            there = sorted({partition.program for partition in left})[: self.resident]
            ready = [
                partition
                for partition in left
                if partition.program in there
                and (partition.may_go_on is None or partition.may_go_on())
            ]
            if ready:
                return self.random.choices(ready, [one.speed for one in ready])[0]
            if not self.under_way:
                raise Fault("deadlock: every partition waits")
            self._land()

    def _land(self) -> None:
        self.under_way.pop(self.random.randrange(len(self.under_way))).land()
