"""What has ended: kept for a time and up to so many bytes, then remembered, then forgotten."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING

from pixart.serving.limits import Limits
from pixart.serving.orders import Job, Order

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_KEPT = 1024  # jobs, however small
MOST_REMEMBERED = (
    256  # jobs whose pictures are gone: so that a client hears that, and no "not found"
)
_OF_A_JOB = 2048  # bytes, without its texts and pictures


class Shelf:
    """Jobs that have ended, in the order in which they did. Not locked: its queue is."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: dict[str, Job] = {}
        self._remembered: dict[str, Job] = {}
        self.bytes = 0  # of those that are kept

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, job: Job) -> None:
        """One that has just ended."""
        self._kept[job.id] = job
        self.bytes += bytes_of(job)

    def get(self, id: str) -> Job | None:
        return self._kept.get(id) or self._remembered.get(id)

    def of(self, owner: str) -> list[Job]:
        jobs = [*self._remembered.values(), *self._kept.values()]
        return [job for job in jobs if job.owner == owner]

    def remove(self, id: str) -> None:
        if job := self._kept.pop(id, None):
            self.bytes -= bytes_of(job)
        self._remembered.pop(id, None)

    def sweep(self, now: float) -> None:
        """Let go of what is too old, and of what is too much: the oldest of the client that has most, so that
        nobody's pictures go for another's. The last one to end stays until it is too old, so that no limit
        is too small for a picture."""
        seconds = self._limits.keep_seconds
        while (job := self._next_to_go(now)) is not None:
            del self._kept[job.id]
            self.bytes -= bytes_of(job)
            bare = replace(job, version=job.version + 1, results=(), preview=None, is_kept=False)
            self._remembered[job.id] = bare
        while self._remembered:
            id, job = next(iter(self._remembered.items()))
            if len(self._remembered) <= MOST_REMEMBERED and _age(job, now) < 2 * seconds:
                break
            del self._remembered[id]

    def _next_to_go(self, now: float) -> Job | None:
        jobs = [*self._kept.values()]
        if jobs and _age(jobs[0], now) >= self._limits.keep_seconds:
            return jobs[0]
        if self.bytes > self._limits.keep_bytes:
            return _oldest_of_most(jobs[:-1], bytes_of)
        if len(jobs) > MOST_KEPT:  # orders that came to nothing are had for nothing
            bare = next((job for job in jobs[:-1] if not job.results), None)
            return bare or _oldest_of_most(jobs[:-1], lambda _: 1)
        return None

    def seconds_left(self, now: float) -> float | None:
        """Until there is something to let go of, None for never."""
        seconds = self._limits.keep_seconds
        left = [
            *(seconds - _age(job, now) for job in [*self._kept.values()][:1]),
            *(2 * seconds - _age(job, now) for job in [*self._remembered.values()][:1]),
        ]
        return min(max(0.0, min(left)), TIMEOUT_MAX) if left else None


def _oldest_of_most(jobs: list[Job], size: Callable[[Job], int]) -> Job | None:
    """Of the client whose jobs come to the largest size; None where there are none."""
    shares: Counter[str] = Counter()
    for job in jobs:
        shares[job.owner] += size(job)
    most = max(shares.values(), default=0)
    return next((job for job in jobs if shares[job.owner] == most), None)


def _age(job: Job, now: float) -> float:
    return now - (job.ended or now)


def bytes_of(job: Job) -> int:
    """What a job takes in memory, about."""
    texts = sum(len(one.prompt) + len(one.negative) for one in job.order.requests)
    pictures = sum(len(result.content) for result in job.results)
    preview = len(job.preview.content) if job.preview else 0
    return _OF_A_JOB * len(job.order.requests) + texts + pictures + preview + bytes_sent(job.order)


def bytes_sent(order: Order) -> int:
    """Of the pictures that came with an order, as they lie in memory."""
    return sum(map(_bytes_of_picture, order.pictures.values()))


def _bytes_of_picture(image: "Image") -> int:
    return image.width * image.height * len(image.getbands())
