"""Under which names this machine is reached, and whether a request came by one of them.

A page of somebody else's whose name is made to lead here (DNS rebinding) reads nothing: its name is in the
Host header, and is not ours.
"""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_NAME = re.compile(r"[\w.-]+", re.ASCII)
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Hosts:
    """listened: the address that is listened at, as `--host` has it. names: further ones, such as
    draw.example.org, or the address of the machine around a container. https: clients come through a
    proxy that speaks https, so that cookies are for https alone. ValueError for a name that is none."""

    listened: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    https: bool = False

    def __post_init__(self) -> None:
        for name in self.names:
            is_name = _NAME.fullmatch(name) and _split(name, 80) == (_plain(name), 80)
            if _is_unspecified(_plain(name)) or not (_is_address(_plain(name)) or is_name):
                raise ValueError(
                    f"--name must be a host without scheme, port and path, such as draw.example.org, got {name!r}"
                )

    def knows(self, host: str, reached: str | None = None) -> bool:
        """Whether a Host header is ours. reached: the address of ours that the connection came in at."""
        split = _split(host, 80)
        if split is None:
            return False
        name = split[0]
        given = {_plain(one) for one in (self.listened, *self.names) if one}
        if name in given or name == "localhost":
            return not _is_unspecified(name)
        # A bare address is in no one's hands but ours where the connection has come in at it.
        return _is_loopback(name) or (reached is not None and name == _plain(reached))

    def is_same_origin(self, origin: str, host: str) -> bool:
        """Whether an Origin header is of the page at this Host header. Its scheme is not compared: a proxy
        may have taken https off."""
        scheme, separator, rest = origin.partition("://")
        port = DEFAULT_PORTS.get(scheme.lower())
        if not separator or port is None:
            return False
        theirs, ours = _split(rest, port), _split(host, port)
        return theirs is not None and theirs == ours


def _split(host: str, port: int) -> tuple[str, int] | None:
    """Name and port of a Host header, None for what is none."""
    if (
        not host
        or any(c in host for c in "/\\?#@%, \t")
        or not host.isascii()
        or not host.isprintable()
    ):
        return None
    try:
        parts = urlsplit(f"//{host}")
        name, given = parts.hostname, parts.port
    except ValueError:
        return None
    return (_plain(name), port if given is None else given) if name else None


def _plain(name: str) -> str:
    """One way to write each name."""
    name = name.lower().strip("[]").removesuffix(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(_plain(name)).is_loopback
    except ValueError:
        return _plain(name) == "localhost"


def _is_unspecified(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return False
