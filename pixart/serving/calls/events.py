"""Streams of server-sent events about a job."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pixart.serving.orders import Job, JobQueue

KIND = "text/event-stream"
ALIVE = b": still there\n\n"  # a comment, which keeps whoever stands between from hanging up
EVERY = 10.0  # seconds between two of them


def event(name: str, data: Mapping[str, Any], id: int | None = None) -> bytes:
    """One event. id: what a client that comes back sends as Last-Event-ID."""
    first = "" if id is None else f"id: {id}\n"
    return f"{first}event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def follow(
    queue: JobQueue, job: Job, owner: str, seconds: float = EVERY
) -> AsyncIterator[Job | None]:
    """The job, and again at each change until it has ended; None where there was none for so long."""
    yield job
    while not job.has_ended:
        now = await queue.wait(job.id, owner, job.version, seconds)
        if now.version == job.version:
            yield None
        else:
            job = now
            yield job


class Events(StreamingResponse):
    """A stream. at_end: called when it has ended or its client has gone, even before the first event, which
    the generator itself would not hear of."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], at_end: Callable[[], object] | None = None
    ) -> None:
        # Proxies such as nginx hold a stream back unless they are told not to.
        super().__init__(events, media_type=KIND, headers={"X-Accel-Buffering": "no"})
        self._events, self._at_end = events, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._at_end is not None:
                self._at_end()
            await self._events.aclose()
