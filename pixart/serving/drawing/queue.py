"""The queue before the one pipeline: what waits, what is drawn, and who hears of it."""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pixart.command import message_of, one_line
from pixart.files import CheckpointError
from pixart.serving.drawing.results import Shelf, bytes_sent
from pixart.serving.drawing.turns import Turns
from pixart.serving.limits import Limits, check_asked, check_resolved
from pixart.serving.orders import ENDED, Figures, Hooks, Job, Order, Painter, Preview, Result, State
from pixart.serving.refusal import Refusal

logger = logging.getLogger("pixart")
_FIRST_GUESS = 5.0  # seconds a picture, until there has been one


@dataclass(eq=False)
class _Entry:
    """An order that has not ended. wakes: of those that wait for the next version."""

    job: Job
    wakes: set[Callable[[], object]] = field(default_factory=set)


class Queue:
    """A `JobQueue`: one thread draws with `painter`, which is the queue's from now on and closed with it.

    One lock guards everything, and is never held while something is drawn, checked or waited for. Jobs are
    snapshots: whoever has one may read it at leisure.
    """

    def __init__(
        self,
        painter: Painter,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._painter, self._limits, self._clock = painter, limits or Limits(), clock
        self._changed = threading.Condition()
        self._entries: dict[str, _Entry] = {}
        self._turns, self._shelf = Turns(), Shelf(self._limits)
        self._drawn: _Entry | None = None
        self._is_closing = False
        self._ended: Counter[State] = Counter()
        self._seconds: dict[str, float] = {}
        self._pictures, self._refused, self._a_picture = 0, 0, _FIRST_GUESS
        self._thread = threading.Thread(target=self._work, name="pixart-queue", daemon=True)
        self._thread.start()

    def submit(self, order: Order, owner: str) -> Job:
        """See `JobQueue`."""
        if not order.requests:
            raise ValueError("order must be of one picture at least, got none")
        with self._changed:
            self._check_room(order, owner)  # before the work of looking at it
        check_asked(order.requests, self._limits)
        check_resolved(self._painter.check(order), self._limits)
        with self._changed:
            self._check_room(order, owner)
            job = Job(secrets.token_hex(16), owner, order, 1, "waiting", self._clock())
            entry = self._entries[job.id] = _Entry(job)
            self._turns.add(job.id, owner, len(order.requests))
            self._place()
            self._changed.notify_all()
            return entry.job

    def get(self, id: str, owner: str) -> Job:
        """See `JobQueue`."""
        with self._changed:
            return self._find(id, owner)

    def list(self, owner: str) -> list[Job]:
        """See `JobQueue`."""
        with self._changed:
            self._shelf.sweep(self._clock())
            active = [entry.job for entry in self._entries.values() if entry.job.owner == owner]
            return sorted([*self._shelf.of(owner), *active], key=lambda job: job.created)

    def cancel(self, id: str, owner: str) -> Job:
        """See `JobQueue`."""
        with self._changed:
            job = self._find(id, owner)
            return job if job.has_ended else self._end(self._entries[id], "cancelled")

    def delete(self, id: str, owner: str) -> None:
        """See `JobQueue`."""
        with self._changed:
            if not self._find(id, owner).has_ended:
                self._end(self._entries[id], "cancelled")
            self._shelf.remove(id)

    async def wait(self, id: str, owner: str, version: int, seconds: float) -> Job:
        """See `JobQueue`."""
        loop, has_changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended without its waiters
                loop.call_soon_threadsafe(has_changed.set)

        with self._changed:
            job = self._find(id, owner)
            if job.has_ended or job.version != version:
                return job
            entry = self._entries[id]
            entry.wakes.add(wake)
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(has_changed.wait(), seconds)
        finally:
            with self._changed:
                entry.wakes.discard(wake)
        return entry.job

    def figures(self) -> Figures:
        """See `JobQueue`."""
        with self._changed:
            self._shelf.sweep(self._clock())
            return Figures(
                is_alive=self._thread.is_alive() and not self._is_closing,
                waiting=self._waiting(),
                is_drawing=self._drawn is not None,
                kept_jobs=len(self._shelf),
                kept_bytes=self._shelf.bytes,
                ended={state: self._ended[state] for state in ENDED},
                refused=self._refused,
                pictures=self._pictures,
                seconds=dict(self._seconds),
            )

    def close(self) -> None:
        """See `JobQueue`. Returns when what is drawn has stopped and the painter is closed."""
        with self._changed:
            self._is_closing = True
            for entry in [*self._entries.values()]:
                self._end(entry, "cancelled")
            self._changed.notify_all()
        self._thread.join()

    def _find(self, id: str, owner: str) -> Job:
        self._shelf.sweep(self._clock())
        entry = self._entries.get(id)
        job = self._shelf.get(id) if entry is None else entry.job
        if job is None or job.owner != owner:
            raise Refusal(404, f"job {id[:64]!r} is not there", code="not_found", field="id")
        return job

    def _check_room(self, order: Order, owner: str) -> None:
        """Refusal for an order that there is no room for. No client takes more than it leaves for others, so
        that a few do not fill the queue before the rest."""
        if self._is_closing:
            raise Refusal(503, "the service ends; try again later", code="closing", retry_after=60)
        limits, seconds, sent = self._limits, self._a_picture, bytes_sent(order)
        own, free = self._waiting(owner), limits.queue - self._waiting()
        held, own_held = self._bytes_held(), self._bytes_held(owner)
        if own >= limits.queue_of_client:
            reason = f"{own} of your orders wait, {limits.queue_of_client} may"
        elif free <= 0:
            reason = f"{limits.queue} orders wait, no more may"
        elif own and own >= free:
            reason = (
                f"{own} of your orders wait, and the {free} places that are left are for others"
            )
        elif sent and own_held and own_held + sent > limits.keep_bytes // 2:
            reason = f"the pictures of your orders that wait take {own_held:,} bytes"
        elif held and held + sent > limits.keep_bytes:
            reason = f"the pictures of the orders that wait take {held:,} bytes"
        else:
            return
        self._refused += 1
        raise Refusal(
            429, f"{reason}; try again when one is done", code="queue_full", retry_after=seconds
        )

    def _waiting(self, owner: str | None = None) -> int:
        """Orders, of one client or all, that are not drawn at this moment."""
        return sum(
            entry is not self._drawn and owner in (None, entry.job.owner)
            for entry in self._entries.values()
        )

    def _bytes_held(self, owner: str | None = None) -> int:
        """By the pictures of orders that have not ended, of one client or all."""
        jobs = [entry.job for entry in self._entries.values()]
        return sum(_bytes_held(job) for job in jobs if owner in (None, job.owner))

    def _tell(self, entry: _Entry, **changes: Any) -> Job:
        """Another version of a job, and word of it to those that wait."""
        entry.job = replace(entry.job, version=entry.job.version + 1, **changes)
        for wake in entry.wakes:
            wake()
        entry.wakes.clear()
        return entry.job

    def _end(self, entry: _Entry, state: State, **changes: Any) -> Job:
        changes |= {"order": replace(entry.job.order, pictures={}), "position": 0}
        job = self._tell(entry, state=state, stage=state, ended=self._clock(), **changes)
        self._ended[state] += 1
        del self._entries[job.id]
        self._turns.remove(job.id)
        self._shelf.put(job)
        self._shelf.sweep(self._clock())
        self._place()
        return job

    def _place(self) -> None:
        """Tell each order its position, where that is another than before."""
        for id, position in self._turns.positions().items():
            entry = self._entries[id]
            if entry.job.position != position:
                self._tell(entry, position=position)

    def _work(self) -> None:
        try:
            while (turn := self._next()) is not None:
                self._draw(*turn)
        finally:
            self._painter.close()

    def _next(self) -> tuple[_Entry, Job] | None:
        """The order whose picture is drawn next, as soon as there is one; None when the queue is closed."""
        with self._changed:
            while not self._is_closing:
                now = self._clock()
                self._shelf.sweep(now)
                if (id := self._turns.take()) is not None:
                    entry = self._drawn = self._entries[id]
                    job = entry.job
                    self._place()
                    return entry, self._tell(
                        entry, state="drawing", started=job.started or now,
                        picture=len(job.results), step=0, steps=0,
                    )  # fmt: skip
                self._changed.wait(self._shelf.seconds_left(now))
        return None

    def _draw(self, entry: _Entry, job: Job) -> None:
        """One picture. Whatever goes wrong is this order's alone; of one that has ended meanwhile nothing is
        of interest."""
        result, reason = None, ""
        started = time.monotonic()
        try:
            result = self._paint(entry, job)
        except BaseException as error:  # SystemExit too: this thread is the only one
            if not entry.job.has_ended:
                reason = _reason(error)
        with self._changed:
            self._drawn = None
            self._turns.give_back()
            if result is not None:
                self._count(result, time.monotonic() - started)
            if entry.job.has_ended:
                self._place()
            elif result is None:
                self._end(entry, "failed", error=reason)
            else:
                self._add(entry, result)

    def _paint(self, entry: _Entry, job: Job) -> Result:
        def tell(**changes: Any) -> None:
            with self._changed:
                if not entry.job.has_ended:
                    self._tell(entry, **changes)

        def step(step: int, steps: int, preview: Preview | None) -> None:
            tell(step=step, steps=steps, preview=preview or entry.job.preview)

        hooks = Hooks(lambda stage: tell(stage=stage), step, lambda: entry.job.has_ended)
        hooks.stage("text")
        self._prepare(entry, job.order, hooks)
        return self._painter.draw(job.order, job.picture, hooks)

    def _prepare(self, entry: _Entry, own: Order, hooks: Hooks) -> None:
        """Encode the prompts of all who wait, those of this order first."""
        with self._changed:
            others = sorted(self._entries.values(), key=lambda one: one.job.position)
            orders = [one.job.order for one in others if one is not entry]
        try:
            self._painter.prepare((own, *orders), hooks.cancel)
        except Exception:
            if hooks.cancel() or not orders:
                raise
            self._painter.prepare((own,), hooks.cancel)  # another's fault is no fault of this one

    def _count(self, result: Result, seconds: float) -> None:
        self._pictures += 1
        for stage, taken in result.seconds.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + taken
        self._a_picture = seconds if self._pictures == 1 else (self._a_picture * 3 + seconds) / 4

    def _add(self, entry: _Entry, result: Result) -> None:
        results = (*entry.job.results, result)
        if len(results) == len(entry.job.order.requests):
            self._end(entry, "done", results=results)
        else:
            self._tell(entry, stage="waiting", results=results, step=0, steps=0)
            self._place()


def _bytes_held(job: Job) -> int:
    """By the pictures that it was sent with and those that are finished."""
    return bytes_sent(job.order) + sum(len(result.content) for result in job.results)


def _reason(error: BaseException) -> str:
    """For the client: what it can mend, and of all else that the log has it."""
    if isinstance(error, ValueError) and not isinstance(error, CheckpointError):  # it has a path
        return one_line(message_of(error))
    if isinstance(error, MemoryError):
        return "out of memory; ask for a smaller picture, or try again later"
    logger.error("a picture could not be drawn", exc_info=error)
    return f"the service could not draw it ({type(error).__name__}); its log tells why"
