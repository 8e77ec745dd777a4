"""Which of Gradio's routes are open: those that this page is made of, and none that knows files or URLs.

Gradio serves uploads, its cache, other Spaces and more beside a page. The page here needs none of that:
pictures come as text within an event and go out through our own routes, which know whose they are.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixart.serving.refusal import Refusal

_OPEN = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|pwa_icon(/\d+)?|(assets|static|svelte)/.+"
    r"|gradio_api/(info|startup-events|app_id|theme\.css|heartbeat/\w+|queue/(join|data)|cancel|reset"
    r"|call/draw(/\w+)?))?/?"
)


class Doors:
    """Around Gradio's app. Refusal: 404 for a route that is closed, 400 for values that are no plain ones."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if not _OPEN.fullmatch(path):
                raise Refusal(404, f"there is nothing at {path[:200]}", code="not_found")
            if scope["method"] == "POST":
                body = await _body(receive)
                check_values(body)
                receive = _again(body, receive)
        await self.app(scope, receive, send)


def check_values(body: bytes) -> None:
    """Refusal (400) unless the inputs of an event are texts, numbers and lists of them: an object there is
    how Gradio is told of a file or a URL."""
    try:
        asked = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise Refusal(400, "the body must be JSON") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "the body must be an object of JSON")
    if any(isinstance(one, dict) for one in _parts(asked.get("data"))):
        raise Refusal(400, "data must be texts, numbers and lists of them; it has an object")


def _parts(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, list):
        for one in value:
            yield from _parts(one)


async def _body(receive: Receive) -> bytes:
    """All of it; the guard has bounded it."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once
