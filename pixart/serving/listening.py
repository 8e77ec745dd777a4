"""The port: taken before a model is opened, so that one which is not free is said at once."""

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ADVICE = {
    errno.EADDRINUSE: "it is taken; give another --port, or 0 for a free one",
    errno.EACCES: "it needs rights that this process lacks; give a --port above 1023",
    errno.EADDRNOTAVAIL: "no such address is this machine's; give another --host",
}


@dataclass(frozen=True)
class Port:
    """A bound socket, at which nobody is answered before it listens."""

    socket: socket.socket
    host: str

    @property
    def number(self) -> int:
        return int(self.socket.getsockname()[1])

    @property
    def address(self) -> str:
        """For a browser on this machine."""
        bound = ipaddress.ip_address(self.socket.getsockname()[0].partition("%")[0])
        host = f"[{bound}]" if bound.version == 6 else str(bound)
        if bound.is_unspecified:
            host = "localhost"
        return f"http://{host}:{self.number}/"


@contextmanager
def bound(host: str, port: int, token_file: Path | None) -> Iterator[Port]:
    """Take the port. ValueError where it cannot be had, and for an address that others reach without
    tokens."""
    family, address = _resolve(host, port)
    if token_file is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise ValueError(
            f"--host {host} is reached from other machines: give --token-file, or a loopback address such "
            "as 127.0.0.1"
        )
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        try:
            if hasattr(socket, "SO_REUSEPORT"):  # not Windows, where it takes a port from others
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError as error:
            raise refused(host, port, error) from error
        yield Port(taken, host)


def refused(host: str, port: int, error: OSError) -> ValueError:
    """Of a port that cannot be had."""
    advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    return ValueError(f"port {port} of {host} cannot be listened at: {advice}")


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """IPv4 before IPv6: what a browser takes for localhost is the first anywhere."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--host {host!r} is no address of this machine: {reason}") from error
    family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, address  # type: ignore[return-value]  # addresses of a family have its form
