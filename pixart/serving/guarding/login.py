"""The pages of the guard: where a browser gives its token, and leaves."""

import base64
import hashlib
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from pixart.serving.guarding.clients import SESSION_SECONDS, Clients
from pixart.serving.guarding.heads import Head
from pixart.serving.guarding.rates import Rates
from pixart.serving.refusal import Refusal

LOGIN, LOGOUT = "/login", "/logout"
MOST_FORM = 4096  # bytes
A_MINUTE = 10  # tokens that one address may try
_STYLE = """
:root { color-scheme: light dark; font: 100%/1.5 system-ui, sans-serif }
body { max-width: 24rem; margin: 12vh auto; padding: 0 1rem }
h1 { font-size: 1.5rem; line-height: 1.2 }
input, button { box-sizing: border-box; width: 100%; min-height: 3rem; padding: 0 .75rem; font: inherit;
  border: 1px solid #767676; border-radius: .5rem }
button { margin-top: .75rem; border: 0; background: #1d4ed8; color: #fff; font-weight: 600; cursor: pointer }
:focus-visible { outline: 3px solid #60a5fa; outline-offset: 2px }
[role=alert] { padding: .5rem .75rem; border-left: 4px solid #dc2626; background: #dc262622 }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Reply:
    """cookie: the value that the browser is to keep from now on, "" for none any more, None for no change.
    headers: further ones."""

    status: int
    content: bytes = b""
    cookie: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Door:
    """Answers for the paths LOGIN and LOGOUT."""

    def __init__(self, clients: Clients) -> None:
        self._clients, self._tries = clients, Rates(A_MINUTE)

    def answer(self, head: Head, cookie: str, body: bytes) -> Reply:
        """cookie: that the browser has sent. body: of a POST. Refusal for a method or body that is not
        taken."""
        if head.method not in ("GET", "HEAD", "POST"):
            raise Refusal(405, f"{head.path} takes GET and POST", code="bad_method")
        if not self._clients.has_tokens:
            return _to("/")
        if head.path == LOGOUT:
            return self._leave(head, cookie)
        if not head.changes_something:
            return Reply(200, _login_page(is_inside=self._clients.session(cookie) is not None))
        return self._enter(head, cookie, body)

    def _enter(self, head: Head, cookie: str, body: bytes) -> Reply:
        if wait := self._tries.take(head.address):
            seconds = max(1, round(wait))
            message = f"Too many tries. Please wait {seconds} seconds."
            return Reply(429, _login_page(message), headers={"Retry-After": str(seconds)})
        name = self._clients.named(_token(body))
        if name is None:
            return Reply(403, _login_page("This is no token of this server."))
        self._clients.close_session(cookie)
        return _to("/", cookie=self._clients.open_session(name))

    def _leave(self, head: Head, cookie: str) -> Reply:
        if not head.changes_something:
            return Reply(200, _LOGOUT_PAGE)
        self._clients.close_session(cookie)
        return _to(LOGIN, cookie="")


def cookie_line(name: str, value: str, *, is_secure: bool) -> str:
    """A Set-Cookie header. An empty value takes the cookie away."""
    seconds = SESSION_SECONDS if value else 0
    secure = "; Secure" if is_secure else ""
    return f"{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"


def once_more() -> Reply:
    """A link of another site has led here: browsers send our cookies only to what our own pages lead to."""
    return Reply(
        200,
        _page(
            '<p><a href="/">Open the page</a></p>', '<meta http-equiv="refresh" content="0; url=/">'
        ),
    )


def _token(body: bytes) -> str:
    try:
        fields = parse_qs(body.decode("ascii"), max_num_fields=4, keep_blank_values=True)
    except ValueError:
        raise Refusal(400, "the form cannot be read") from None
    return fields.get("token", [""])[0].strip()


def _to(place: str, cookie: str | None = None) -> Reply:
    return Reply(303, cookie=cookie, headers={"Location": place})


def _login_page(message: str = "", *, is_inside: bool = False) -> bytes:
    alert = f'<p role="alert">{html.escape(message)}</p>' if message else ""
    inside = '<p>You are logged in: <a href="/">open the page</a>.</p>' if is_inside else ""
    return _page(
        f"""<h1>PixArt</h1>{alert}{inside}
<form method="post" action="{LOGIN}">
<p><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus
 autocapitalize="none" spellcheck="false"><button>Log in</button></p>
</form>"""
    )


def _page(content: str, head: str = "") -> bytes:
    return (
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>PixArt</title>{head}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head>
<body><main>{content}</main></body></html>
"""
    ).encode()


_LOGOUT_PAGE = _page(
    f'<h1>PixArt</h1><form method="post" action="{LOGOUT}"><button>Log out</button></form>'
)
