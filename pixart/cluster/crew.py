"""The workers of a run, and the loop that gives them items and takes what they make of them."""

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import pixart
from pixart.cluster.connection import Cluster, joined
from pixart.cluster.room import Room, fitting, machines_of, room_for
from pixart.cluster.worker import Answer, Trace, Worker, library
from pixart.files import printable

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 4  # for an item whose workers die, and for opening a worker
LOOK = 10.0  # seconds between two looks at a cluster that does nothing
PATIENCE = 300.0  # seconds without a machine that has room for a worker

_LOG = logging.getLogger("pixart.cluster")


class LostItem(RuntimeError):
    """An item every worker of which died."""


def run_on_ray(
    items: Iterable[Item],
    open_worker: Callable[[], Callable[[Item], Result]],
    cluster: Cluster,
    *,
    named: Callable[[Item], str] = str,
    window: int | None = None,
) -> Iterator[Result]:
    """What the workers make of the items, each as it ends, in any order.

    items: small and picklable; taken as workers become free. open_worker: picklable; called once in each
    worker, and what it returns does one item after the other. named: an item in messages. window: no
    further item is taken while the oldest unfinished one is so many back. An item whose worker or machine
    is lost is done again elsewhere, ATTEMPTS times in all. What logs and warnings of ours say in a worker is
    logged here, once. Where there are no items, no cluster is joined.

    Raises what a worker raised for an item, as it would without Ray; ModuleNotFoundError without Ray;
    ValueError for a cluster that does not answer, has not what is asked for, or has another version of
    this library; LostItem; RuntimeError for a cluster that lost all its machines. However it ends, no worker
    is left: close it (contextlib.closing) where it may be left in the middle. A Ray that this process has
    joined already is used as it is, and left running.
    """
    iterator = iter(items)
    first = [*islice(iterator, 1)]
    if not first:
        return
    with joined(cluster) as ray:
        crew = _Crew[Item, Result](ray, open_worker, room_for(ray, cluster), named)
        try:
            yield from crew.work(chain(first, iterator), window)
        finally:
            crew.dismiss()


@dataclass
class _Errand(Generic[Item]):
    """An item, and how often it went out."""

    number: int
    item: Item
    attempts: int = 0


class _Queue(Generic[Item]):
    """What is to be done: what came back first, then further items, as far as `window` lets them."""

    def __init__(self, items: Iterable[Item], window: int | None) -> None:
        self._items, self._window = enumerate(items), window
        self._again: deque[_Errand[Item]] = deque()
        self._out: dict[int, None] = {}  # numbers of items that are not done, in order
        self._taken, self._is_over = 0, False

    @property
    def is_done(self) -> bool:
        return self._is_over and not self._out

    def next(self) -> _Errand[Item] | None:
        """None where there is nothing, or nothing yet."""
        if self._again:
            return self._again.popleft()
        oldest = next(iter(self._out), self._taken)
        if self._is_over or (self._window is not None and self._taken - oldest >= self._window):
            return None
        for number, item in self._items:
            self._taken += 1
            self._out[number] = None
            return _Errand(number, item)
        self._is_over = True
        return None

    def give_back(self, errand: _Errand[Item]) -> None:
        self._again.append(errand)

    def finish(self, errand: _Errand[Item]) -> None:
        del self._out[errand.number]


@dataclass(eq=False)
class _Member:
    """A worker. asked: what it is asked now, "" for nothing. host: where it is, once that is known."""

    actor: Any
    asked: str = ""
    errand: Any = None
    host: str = ""
    is_open: bool = False


class _Crew(Generic[Item, Result]):
    """The workers of a run: as many as were asked for, a new one in the place of each that is lost."""

    def __init__(
        self,
        ray: Any,
        open_worker: Callable[[], Callable[[Item], Result]],
        room: Room,
        named: Callable[[Item], str],
    ) -> None:
        self._ray, self._room, self._named = ray, room, named
        self._opener, self._library = ray.put(open_worker), library()
        self._members: list[_Member] = []
        self._asked: dict[Any, _Member] = {}  # by the reference to what they will answer
        self._lost_unopened = 0
        self._said: set[str] = set()
        self._stranded: float | None = None  # since when no machine has room

    def work(self, items: Iterable[Item], window: int | None) -> Iterator[Result]:
        queue = _Queue(items, window)
        for _ in range(self._room.workers):
            self._hire()
        while True:
            self._hand_out(queue)
            if queue.is_done:
                return
            for member, answer in self._answers(queue):
                result = self._result(answer)
                if member.errand is None:
                    member.is_open, self._lost_unopened = True, 0
                    continue
                queue.finish(member.errand)
                member.errand = None
                self._hand_out(queue)  # before the caller takes its time
                yield result

    def dismiss(self) -> None:
        """End all workers, at once."""
        for member in self._members:
            self._kill(member)
        self._members, self._asked = [], {}

    def _hire(self) -> None:
        kind = self._ray.remote(Worker).options(
            num_cpus=self._room.cpus,
            num_gpus=self._room.gpus,
            scheduling_strategy="SPREAD",
            max_restarts=0,  # we see to both, and count
            max_task_retries=0,
        )
        member = _Member(kind.remote(max(1, int(self._room.cpus))))
        self._members.append(member)
        self._ask(member, "version")

    def _ask(self, member: _Member, what: str, *given: Any) -> None:
        member.asked = what
        self._asked[getattr(member.actor, what).remote(*given)] = member

    def _hand_out(self, queue: _Queue[Item]) -> None:
        for member in self._members:
            if member.is_open and not member.asked:
                errand = queue.next()
                if errand is None:
                    return
                member.errand, errand.attempts = errand, errand.attempts + 1
                self._ask(member, "do", errand.item)

    def _answers(self, queue: _Queue[Item]) -> Iterator[tuple[_Member, Answer]]:
        """Of those that have opened or done something. Waits, but not for ever."""
        ready, _ = self._ray.wait(list(self._asked), timeout=LOOK)
        if not ready:
            self._look()
        for reference in ready:
            member = self._asked.pop(reference)
            asked, member.asked = member.asked, ""
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.LocalRayletDiedError as error:
                raise RuntimeError("Ray's process on this machine ended; start again") from error
            except self._ray.exceptions.RayError as error:
                self._check_import(member, asked, error)
                self._replace(member, error, queue)
                continue
            if asked == "version":
                member.host, version = answer
                _check_version(member.host, version, self._library)
                self._ask(member, "open", self._opener)
            else:
                yield member, answer

    def _result(self, answer: Answer) -> Any:
        for level, text in answer.said:
            if text not in self._said:
                self._said.add(text)
                _LOG.log(level, text)
        if answer.error is not None:
            raise answer.error from Trace(answer.trace)
        return answer.result

    def _replace(self, member: _Member, error: Exception, queue: _Queue[Item]) -> None:
        """Another worker for one that was lost, and what that had in hand is given back."""
        self._members.remove(member)
        self._kill(member)  # which may be cut off, and work on
        where, why = f" on {member.host}" if member.host else "", _why(error)
        errand, times = member.errand, self._lost_unopened + 1
        if errand is None:
            self._lost_unopened, again = times, "another one is opened"
            if times >= ATTEMPTS:
                raise RuntimeError(
                    f"workers cannot be opened: {times} were lost, the last{where}: {why}"
                )
        else:
            name = self._named(errand.item)
            if errand.attempts >= ATTEMPTS:
                raise LostItem(
                    f"{name}: {errand.attempts} workers were lost over it, the last{where}: {why}; give "
                    "fewer --workers if memory is short, and look into Ray's logs there"
                )
            again = f"{name} is done again ({errand.attempts + 1} of {ATTEMPTS} attempts)"
            queue.give_back(errand)
        _LOG.warning("a worker%s was lost: %s; %s", where, why, again)
        self._hire()

    def _kill(self, member: _Member) -> None:
        with suppress(Exception):  # it is gone, or Ray is
            self._ray.kill(member.actor, no_restart=True)

    def _look(self) -> None:
        """Nothing has come for a while: RuntimeError where nothing can."""
        if any(member.is_open for member in self._members):
            self._stranded = None
            return
        if fitting(machines_of(self._ray), self._room.cpus, self._room.gpus):
            self._stranded, text = None, "waiting for workers to start"
        else:
            now = time.monotonic()
            self._stranded, text = self._stranded or now, "no machine of the cluster has room"
            if now - self._stranded > PATIENCE:
                raise RuntimeError(f"{text} for a worker since {PATIENCE:.0f} s; start again later")
        if text not in self._said and any(member.asked == "version" for member in self._members):
            self._said.add(text)
            _LOG.info("%s", text)

    def _check_import(self, member: _Member, asked: str, error: Exception) -> None:
        """Raise what a worker could not load, which no other attempt mends."""
        is_of_code = isinstance(error, self._ray.exceptions.RayTaskError) or (
            asked == "version" and "Error: " in str(error) and "import" in str(error)
        )
        if is_of_code:
            lines = str(error).strip().splitlines()
            where = member.host or "a machine of the cluster"
            raise ValueError(
                f"{where} cannot load what is to be done ({printable(lines[-1].strip(), 200)}); it must have "
                f"pixart {pixart.__version__} installed, with what this run needs"
            )


def _check_version(host: str, there: tuple[str, str], here: tuple[str, str]) -> None:
    if there == here:
        return
    which = there[0] if there[0] != here[0] else f"{there[0]} with other code"
    raise ValueError(
        f"pixart must be {here[0]} on all machines, as here, got {which} on {host}; install the same there"
    )


def _why(error: Exception) -> str:
    """Why a worker was lost, in words. Of any that dies Ray says that memory may have been short."""
    text = str(error)
    if re.search(
        "[Nn]ode.{0,20} (has )?died|node was terminated", f"{type(error).__name__} {text}"
    ):
        return "its machine is gone"
    if "OutOfMemory" in type(error).__name__ or re.search("low on memory|memory monitor", text):
        return "Ray ended it, as memory was short"
    return "its process died, or was killed"
