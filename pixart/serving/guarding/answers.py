"""Answers as they leave: with the headers that bind a browser, and errors as one line of JSON."""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from starlette.types import Message, Send

from pixart.serving.refusal import Refusal

Header = tuple[bytes, bytes]
# Our own answers are shown, never run.
POLICY = "default-src 'none'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Gradio's page compiles templates, styles its elements one by one, and has its settings in scripts within
# the page, each of which is allowed by its hash: one that somebody brings in is none of them. Nothing of it,
# and nothing that it is led to, leaves this server.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
PAGE = "/"
_SCRIPT = re.compile(rb"<script(?:\s[^>]*)?>(.*?)</script>", re.DOTALL)
_NOT_NEEDED = ("accelerometer", "camera", "display-capture", "geolocation", "gyroscope", "magnetometer",
               "microphone", "midi", "payment", "usb")  # fmt: skip
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with none at all, forms would come from nowhere
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": ", ".join(f"{name}=()" for name in _NOT_NEEDED),
}
# The same for everybody: browsers may keep them.
_PUBLIC = ("/assets/", "/static/", "/svelte/", "/favicon.ico")
# What the application says of these is not heard: they are decided here.
_DECIDED = {name.lower() for name in HEADERS} | {
    "content-security-policy", "content-security-policy-report-only", "server", "x-powered-by",
}  # fmt: skip
_INTERNAL = "the server failed; its standard error says why"


class Answer:
    """Sends to one client what the application sends. cookies: Set-Cookie values that go along."""

    def __init__(self, send: Send, method: str, path: str) -> None:
        self._send, self._method, self._path = send, method, path
        self.cookies: Sequence[str] = ()
        self.has_begun = self._is_broken = False
        self._held: tuple[Message, list[bytes]] | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # A page of somebody else's for a fault of ours is not shown: `end` says it instead.
            self._is_broken = message["status"] >= 500 and not _is_of(message, b"application/json")
            if not self._is_broken:
                await self._begin(message)
        elif self._held is not None:
            await self._hold(message)
        elif not self._is_broken:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        self.has_begun = True
        if self._path == PAGE and _is_of(message, b"text/html"):
            self._held = message, []  # until all its scripts are known
        else:
            await self._send_head(message, POLICY)

    async def _hold(self, message: Message) -> None:
        assert self._held is not None
        start, parts = self._held
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            self._held = None
            page = b"".join(parts)
            await self._send_head(start, page_policy(page))
            await self._send({"type": "http.response.body", "body": page})

    async def _send_head(self, message: Message, policy: str) -> None:
        headers = self._headers(message.get("headers", ()), policy)
        await self._send({**message, "headers": headers})

    async def end(self) -> None:
        """Nothing more comes from the application."""
        if self._is_broken and not self.has_begun:
            await self.fail()

    async def refuse(self, refusal: Refusal) -> None:
        await self.whole(
            refusal.status, refusal.body(self._path), "application/json", refusal.headers
        )

    async def fail(self) -> None:
        """That it is our fault, and no more."""
        await self.refuse(Refusal(500, _INTERNAL, code="internal_error"))

    async def whole(
        self,
        status: int,
        body: bytes,
        kind: str,
        further: Mapping[str, str] | None = None,
        policy: str = POLICY,
    ) -> None:
        """An answer of the guard's own, unless another one has begun."""
        if self.has_begun:
            return
        self.has_begun, self._is_broken = True, False
        given = {"Content-Type": kind, "Content-Length": str(len(body)), **(further or {})}
        headers = self._headers(_raw(given), policy)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send(
            {"type": "http.response.body", "body": b"" if self._method == "HEAD" else body}
        )

    def _headers(self, given: Iterable[Header], policy: str) -> list[Header]:
        is_public = self._path.startswith(_PUBLIC)
        kept = [one for one in given if _is_kept(one[0].decode("latin-1").lower(), is_public)]
        decided = {**HEADERS, "Content-Security-Policy": policy}
        if not is_public:
            decided["Cache-Control"] = "no-store"
        return [*kept, *_raw(decided), *((b"set-cookie", one.encode()) for one in self.cookies)]


def _raw(headers: Mapping[str, str]) -> list[Header]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


def _is_kept(name: str, is_public: bool) -> bool:
    """Whether a header of the application goes along. Nobody else's page may read what is here."""
    if name in _DECIDED or name.startswith("access-control-"):
        return False
    return is_public or name != "cache-control"


def page_policy(page: bytes) -> str:
    """The policy of a page of HTML: of scripts within it those that are there now."""
    scripts = dict.fromkeys(filter(None, _SCRIPT.findall(page)))
    hashes = (base64.b64encode(hashlib.sha256(one).digest()).decode() for one in scripts)
    return PAGE_POLICY.format(scripts="".join(f" 'sha256-{one}'" for one in hashes))


def _is_of(message: Message, kind: bytes) -> bool:
    kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return any(value.startswith(kind) for value in kinds)
