"""Streams of events: they end with their client, at whatever moment it goes."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from pixart.serving.calls.events import Events, event


@pytest.mark.parametrize("goes_after", [0, 1, 2])
def test_what_is_to_be_done_at_the_end_is_done_when_the_client_goes(goes_after: int) -> None:
    sent: list[bytes] = []
    ends: list[str] = []

    async def run() -> None:
        gone = asyncio.Event()
        if not goes_after:
            gone.set()

        async def events() -> AsyncGenerator[bytes, None]:
            while True:
                yield event("job", {"n": len(sent)}, len(sent))

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                sent.append(message["body"])
            if len(sent) >= goes_after:
                gone.set()
            await asyncio.sleep(0)

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await Events(events(), lambda: ends.append("end"))(scope, receive, send)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert ends == ["end"] and len(sent) >= goes_after


def test_an_event_is_a_name_an_id_and_a_line_of_json() -> None:
    assert event("job", {"a": "x\ny"}, 3) == b'id: 3\nevent: job\ndata: {"a": "x\\ny"}\n\n'
    assert event("end", {}) == b"event: end\ndata: {}\n\n"
