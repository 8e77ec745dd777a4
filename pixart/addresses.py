"""Addresses of servers: their parts, their origin, and what of them a message may hold."""

import base64
import json
import re
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from pixart.files import without_controls

MASK = "***"
_USER, _QUERY = r"://([^/?#]*)@", r"\?([^#]+)"  # in addresses of any kind
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """An http(s) address. user, password: those in it, unquoted; None without."""

    scheme: str
    host: str
    port: int
    path: str
    query: str = field(repr=False)
    user: str | None = field(repr=False)
    password: str | None = field(repr=False)

    def __str__(self) -> str:
        """The address as messages may hold it."""
        user = "" if self.user is None else f"{MASK}@"
        return f"{self.origin(user)}{without_controls(self.path)}{f'?{MASK}' if self.query else ''}"

    def origin(self, user: str = "") -> str:
        """Scheme, host and port: an address of another origin is another server's."""
        return f"{self.scheme}://{user}{self.authority}"

    @property
    def authority(self) -> str:
        """Host and port, as the header Host has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """Path and query, as a request has them."""
        # What is quoted already stays so.
        path = quote(self.path or "/", safe="/%:@!$&'()*+,;=~-._")
        return path + (f"?{quote(self.query, safe='/%:@!$&()*+,;=~-._?')}" if self.query else "")

    @property
    def authorization(self) -> str:
        """The header's value for user and password, "" without."""
        return f"Basic {_base64(self._pair)}" if self._pair else ""

    @property
    def secrets(self) -> list[str]:
        """What no message may hold: user, password, and what the query gives."""
        values = [value for _, value in parse_qsl(self.query)]
        found = (self._pair, self.user, self.password, self.query, *values)
        return [text for text in found if text]

    @property
    def _pair(self) -> str:
        return "" if self.user is None else f"{self.user}:{self.password or ''}"


def parse_address(name: str, address: str) -> Address:
    """Raises ValueError, which holds no part of an address that may be a secret."""
    try:
        parts = urlsplit(address.strip())
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
        scheme = parts.scheme
    except ValueError:  # an impossible port, half a bracket, an impossible name
        scheme, host, port = "", "", None
    if scheme not in _PORTS or not re.fullmatch(r"[^\s/\\@?#%<>^|\x00-\x20\x7f]+", host):
        # Where it is wrong, the parts cannot be told from each other.
        shown = "another" if re.search("[@?#]", address) else repr(without_controls(address))
        raise ValueError(
            f"{name} must begin with http:// or https:// and a host, such as "
            f"http://localhost:8000/v1, got {shown}"
        )
    user, password = (
        None if part is None else unquote(part) for part in (parts.username, parts.password)
    )
    port = _PORTS[scheme] if port is None else port
    return Address(scheme, host, port, parts.path, parts.query, user, password)


def proxy_for(address: Address) -> Address | None:
    """The proxy that the environment names for an address. ValueError for one that is not http."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(address.authority):
        return None
    found = parse_address(f"{address.scheme}_proxy", proxy if "://" in proxy else f"http://{proxy}")
    if found.scheme != "http":
        raise ValueError(f"{address.scheme}_proxy must begin with http://, got {found}")
    return found


def without_secrets(address: str) -> str:
    """An address of any kind, as messages may hold it; what is none, as a path, stays as it is."""
    if "://" not in address:
        return address
    # A password may hold / ? and # by mistake: after user: all up to the last @ is taken for one.
    return re.sub(
        _QUERY, f"?{MASK}", re.sub(rf"://[^/?#]*:.*@|{_USER}", f"://{MASK}@", address, flags=re.S)
    )


def masking_of(address: str) -> Callable[[str], str]:
    """A function that takes the secrets of an address of any kind out of a text."""
    found = [re.search(pattern, address) for pattern in (_USER, _QUERY) if "://" in address]
    secrets = [match[1] for match in found if match]
    parts = [part for text in secrets for part in re.split("[:&=]", text)[1:]]
    return masking([*secrets, *(part for part in parts if len(part) > 3)])


def masking(secrets: Iterable[str]) -> Callable[[str], str]:
    """A function that takes secrets out of a text, in the forms that servers and libraries quote."""
    forms = {
        form
        for text in filter(None, secrets)
        for form in (text, quote(text, ""), quote(text), quote_plus(text), _base64(text),
                     json.dumps(text)[1:-1], repr(text)[1:-1])
    }  # fmt: skip
    if not forms:
        return str
    # Short ones as words only: a password "4" would else take the 404 apart.
    patterns = [
        re.escape(form) if len(form) > 5 else rf"(?<!\w){re.escape(form)}(?!\w)"
        for form in sorted(forms, key=len, reverse=True)
    ]
    pattern = re.compile("|".join(patterns), re.IGNORECASE)
    return lambda text: pattern.sub(MASK, text)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogateescape")).decode()
