"""Bodies of requests: read whole, within bounds of size and time, before anybody acts on them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Receive

from pixart.serving.guarding.heads import Head
from pixart.serving.refusal import Refusal

SECONDS = 120.0  # for a body, however it trickles in
AT_ONCE = 8  # bodies of the largest size that all clients together may have in memory
MOST_VALUES = (
    100_000  # of JSON, as its commas tell: millions keep a server busy for seconds before any check
)
JSON = "application/json"  # which no form of another page can send
_FILES = ("multipart/form-data", JSON)
KINDS = {
    "/v1/images/edits": _FILES,
    "/v1/jobs": _FILES,
    "/login": ("application/x-www-form-urlencoded",),
    "/logout": ("application/x-www-form-urlencoded",),
}


class Gone(Exception):
    """The client has left before it had said everything."""


class Bodies:
    """most: bytes of one body. held: bytes of all that are in memory."""

    def __init__(self, most: int, seconds: float = SECONDS) -> None:
        self._most, self._seconds, self.held = most, seconds, 0

    @asynccontextmanager
    async def whole(self, head: Head, receive: Receive) -> AsyncIterator[Receive]:
        """See `given_again`. Refusal: 400 for lengths that contradict, 408, 413, 415 for a kind that is not
        taken, 503 while too much is held for others. Gone."""
        length = _declared(head)
        if not head.changes_something:
            if length or head.get("transfer-encoding"):
                raise Refusal(400, f"{head.method} must have no body")
            yield receive
            return
        if length is not None and length > self._most:
            raise self._too_large(f"this has {length:,}")
        if length:
            _check_kind(head)
        with _Share(self) as share:
            content = await self._read(receive, share)
            if length is not None and length != len(content):
                reason = f"content-length must be that of the body, {len(content):,} bytes, got {length:,}"
                raise Refusal(400, reason)
            if content and _check_kind(head) == JSON and content.count(b",") > MOST_VALUES:
                reason = f"a body must have {MOST_VALUES:,} values at most"
                raise Refusal(413, reason, code="too_large")
            yield given_again(content, receive)

    async def _read(self, receive: Receive, share: "_Share") -> bytes:
        try:
            return b"".join(await asyncio.wait_for(self._parts(receive, share), self._seconds))
        except (asyncio.TimeoutError, TimeoutError):
            reason = f"the body must come within {self._seconds:g} seconds"
            raise Refusal(408, reason, further={"Connection": "close"}) from None

    async def _parts(self, receive: Receive, share: "_Share") -> list[bytes]:
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Gone
            part, more = message.get("body", b""), message.get("more_body", False)
            share.add(len(part))
            if share.size > self._most:
                raise self._too_large("this has more")
            if self.held > AT_ONCE * self._most:
                reason = "too much is being sent at once; try again"
                raise Refusal(503, reason, code="busy", retry_after=2)
            parts.append(part)
        return parts

    def _too_large(self, got: str) -> Refusal:
        return Refusal(
            413, f"a body must have {self._most:,} bytes at most, {got}", code="too_large"
        )


class _Share:
    """What one body has of all that is held, until it is answered."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self.size = bodies, 0

    def add(self, size: int) -> None:
        self.size += size
        self._bodies.held += size

    def __enter__(self) -> "_Share":
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.held -= self.size


def _declared(head: Head) -> int | None:
    text = head.values.get("content-length")
    if text is None:
        return None
    if head.get("transfer-encoding"):
        raise Refusal(400, "content-length must be given without transfer-encoding, got both")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Refusal(400, f"content-length must be a number of bytes, got {text[:40]!r}")
    return int(text)


def _check_kind(head: Head) -> str:
    kind = head.get("content-type").partition(";")[0].strip().lower()
    kinds = KINDS.get(head.path, (JSON,))
    if kind not in kinds:
        reason = f"the body must be sent as {' or '.join(kinds)}, got {kind[:80]!r}"
        raise Refusal(415, reason, code="media_type")
    return kind


def given_again(content: bytes, receive: Receive) -> Receive:
    """What gives a body that was read already, in one message, and then what comes after it."""
    is_given = False

    async def give() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()  # that the client has left
        is_given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return give
