"""What the head of a request says, and whether one of that kind is looked at."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from starlette.types import Scope

from pixart.serving.guarding.hosts import Hosts
from pixart.serving.refusal import Refusal

MOST_HEADERS, MOST_HEAD, MOST_TARGET = 100, 32_768, 8192  # the latter two in bytes
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# What two of would be read differently by us and by whoever stands before us.
_SINGLE = frozenset((
    "host", "authorization", "content-length", "content-type", "origin", "transfer-encoding",
    "sec-fetch-site", "sec-fetch-mode",
))  # fmt: skip
# By which those who ask would tell what they are reached by; nobody has told us to believe them.
_HEARSAY = re.compile(rb"forwarded|x-forwarded-.*|x-gradio-.*|x-real-ip|x-original-.*|x-rewrite-.*")
# What leads out of a folder, or is written so that it might be read as something else.
_CROOKED = re.compile(r"[\x00-\x1f\x7f\\%\ufffd]|//|(^|/)\.\.?(/|$)")


@dataclass(frozen=True)
class Head:
    """values: by the names in small letters. address: of who asks. reached: the address of ours that the
    connection came in at, with its port."""

    method: str
    path: str
    values: Mapping[str, str]
    scheme: str
    address: str
    reached: tuple[str, int | None]

    @classmethod
    def of(cls, scope: Scope) -> "Head":
        """Refusal for one that is too long (414, 431) or ambiguous (400)."""
        headers: Iterable[tuple[bytes, bytes]] = list(scope["headers"])
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string", b"")) > MOST_TARGET:
            raise Refusal(414, f"an address must have {MOST_TARGET:,} bytes at most")
        if sum(len(name) + len(value) for name, value in headers) > MOST_HEAD:
            raise Refusal(431, f"headers must have {MOST_HEAD:,} bytes at most")
        values: dict[str, list[str]] = {}
        for number, (name, value) in enumerate(headers):
            if number == MOST_HEADERS:
                raise Refusal(431, f"a request must have {MOST_HEADERS} headers at most")
            values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        for once in _SINGLE & values.keys():
            if len(values[once]) > 1:
                raise Refusal(400, f"{once} must be given once, got it {len(values[once])} times")
        client, server = scope.get("client"), scope.get("server")
        return cls(
            scope["method"],
            scope["path"],
            {key: "; ".join(given) for key, given in values.items()},
            scope.get("scheme", "http"),
            client[0] if client else "",
            (server[0], server[1]) if server else ("", None),
        )

    def get(self, name: str) -> str:
        """The value of a header, "" where it is not given."""
        return self.values.get(name, "").strip()

    @property
    def changes_something(self) -> bool:
        return self.method not in ("GET", "HEAD")

    @property
    def is_visit(self) -> bool:
        """Whether a person is to see the answer as a page."""
        mode = self.get("sec-fetch-mode")
        wants_page = "text/html" in self.get("accept")
        return self.method == "GET" and (mode == "navigate" if mode else wants_page)

    @property
    def comes_from_elsewhere(self) -> bool:
        """Whether the browser says that another page has made it."""
        return self.get("sec-fetch-site") not in ("", "same-origin", "none")

    def cookie(self, name: str) -> str:
        """The value of a cookie, "" where there is none."""
        # Cookies of all programs of a machine come along, whatever they hold: one that no standard allows
        # must not hide ours, as it does from http.cookies.
        for one in self.get("cookie").split(";"):
            key, _, value = one.partition("=")
            if key.strip() == name:
                return value.strip()
        return ""


def check(head: Head, hosts: Hosts) -> None:
    """Refusal for a method or path that nobody has, a host that is not ours (421), and what another page
    has made its reader's browser ask (403)."""
    if head.method not in METHODS:
        raise Refusal(405, f"the method must be one of {', '.join(METHODS)}", code="bad_method")
    host = head.get("host")
    if not hosts.knows(host, head.reached[0]):
        raise Refusal(
            421,
            f"this server is not known as {host[:100]!r}; start it with --name to allow that",
            code="unknown_host",
        )
    if not head.path.startswith("/") or _CROOKED.search(head.path):
        raise Refusal(404, f"there is nothing at {head.path[:200]!r}", code="not_found")
    origin = head.values.get("origin")
    is_foreign = origin is not None and not hosts.is_same_origin(origin.strip(), host)
    if is_foreign and head.changes_something:
        raise Refusal(403, "this request was made by another page", code="other_origin")
    if head.comes_from_elsewhere and not head.is_visit:
        raise Refusal(403, "this request was made by another page", code="other_origin")


def heard(scope: Scope, *, is_packed: bool) -> list[tuple[bytes, bytes]]:
    """The headers but for those by which a client would tell where it is, and what we are called. is_packed:
    whether the answer may be compressed."""
    return [
        (name, value)
        for name, value in scope["headers"]
        if not _HEARSAY.fullmatch(name.lower())
        and (is_packed or name.lower() != b"accept-encoding")
    ]
