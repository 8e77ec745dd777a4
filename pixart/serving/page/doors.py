"""Which of Gradio's routes are open: those that this page is made of, and none that knows files or URLs.

Gradio serves uploads, its cache, other Spaces and more beside a page. The page here needs none of that:
pictures come as text within an event and go out through our own routes, which know whose they are.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pixart.files import parse_json, printable, short
from pixart.serving.guarding.bodies import given_again
from pixart.serving.guarding.clients import Clients
from pixart.serving.refusal import Refusal

_HEARTBEAT = re.compile(r"/heartbeat/(\w+)/?$")
_CALL, _CALLED = re.compile(r"/call/draw/?$"), re.compile(r"/call/draw/(\w+)/?$")
_OPEN = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|pwa_icon(/\d+)?|(assets|static|svelte)/.+"
    r"|gradio_api/(info|startup-events|app_id|theme\.css|heartbeat/\w+|queue/(join|data)|cancel|reset"
    r"|call/draw(/\w+)?))?/?"
)


class Doors:
    """Around Gradio's app. Refusal: 404 for a route that is closed, 400 for values that are no plain ones, or
    are not as many as an event has. events: how many each has, by its number. session_of: the session
    of an event that was called, "" for none that is known.

    A browser makes up the name of its session. Gradio is given another one, made of that and of the client:
    so nobody hears of the session of another, whose name he may have learnt.
    """

    def __init__(
        self,
        app: ASGIApp,
        clients: Clients,
        events: Mapping[int, int],
        session_of: Callable[[str], str],
    ) -> None:
        self._app, self._clients, self._events = app, clients, events
        self._session_of = session_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if not _OPEN.fullmatch(path):
                raise Refusal(404, f"there is nothing at {path[:200]}", code="not_found")
            owner = scope["state"]["owner"]
            called = _CALLED.search(path)
            if called and not self._session_of(called[1]).startswith(self._mark(owner)):
                raise Refusal(404, f"event {called[1][:64]} is not there", code="not_found")
            scope = {**scope, **self._named(scope, owner)}
            if scope["method"] == "POST":
                asked = parse_event(await Request(scope, receive).body())
                self._check_event(asked)
                if "session_hash" in asked or _CALL.search(path):
                    asked.setdefault("session_hash", secrets.token_hex(16))
                    asked["session_hash"] = self._name(owner, asked["session_hash"])
                receive = given_again(json.dumps(asked).encode(), receive)
        await self._app(scope, receive, send)

    def _named(self, scope: Scope, owner: str) -> Scope:
        """Path and query with the session's other name."""
        path, query = scope["path"], parse_qsl(scope["query_string"].decode("latin-1"))
        if found := _HEARTBEAT.search(path):
            path = path[: found.start(1)] + self._name(owner, found[1])
        pairs = [
            (key, self._name(owner, value) if key == "session_hash" else value)
            for key, value in query
        ]
        return {
            "path": path,
            "raw_path": quote(path).encode(),
            "query_string": urlencode(pairs).encode(),
        }

    def _check_event(self, asked: Mapping[str, Any]) -> None:
        if (number := asked.get("fn_index")) is None:
            return
        count = self._events.get(number) if type(number) is int else None
        if count is None:
            raise Refusal(404, f"fn_index {short(number)} is no event", code="not_found")
        data = asked.get("data", [])
        if "data" in asked and not (isinstance(data, list) and len(data) == count):
            raise Refusal(400, f"data must be a list of {count} values for this event")

    def _name(self, owner: str, session: object) -> str:
        return self._mark(owner) + self._clients.sign("session", owner, str(session))

    def _mark(self, owner: str) -> str:
        """With which the names of all sessions of a client begin."""
        return self._clients.sign("sessions", owner)


def parse_event(body: bytes) -> dict[str, Any]:
    """What an event sends. Refusal (400) unless its values are texts, numbers and lists of them: an object
    there is how Gradio is told of a file or a URL."""
    try:
        asked = parse_json(body or b"{}", "the body", len(body) + 2, unique=True)
    except ValueError as error:
        raise Refusal(400, printable(str(error)), code="invalid_json") from None
    if not isinstance(asked, dict):
        raise Refusal(400, "the body must be an object of JSON", code="invalid_json")
    try:
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, over which the answers to this client would end
        raise Refusal(400, "the body must be text that UTF-8 can write") from None
    for name in ("data", "event_data"):
        if any(isinstance(one, dict) for one in _parts(asked.get(name))):
            raise Refusal(400, f"{name} must be texts, numbers and lists of them; it has an object")
    return asked


def _parts(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, list):
        for one in value:
            yield from _parts(one)
