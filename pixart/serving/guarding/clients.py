"""Who asks: a token's name, a browser's cookie, or whoever is on this machine.

Tokens and cookies are compared by their digests, over all that there are, so that the time of an answer
tells nothing of them. What a cookie holds is random and stands for nothing outside of this process.
"""

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import HTTPConnection

from pixart.files import printable

LEAST_TOKEN, MOST_TOKEN = 16, 512  # characters
MAX_FILE = 2**20  # bytes
SESSION_SECONDS = 30 * 24 * 3600
MAX_SESSIONS = 4096
LOCAL = "local"  # whoever is on this machine and says no more
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COOKIE = re.compile(r"[0-9a-f]{64}")


def owner_of(connection: HTTPConnection) -> str:
    """The client of a request that has passed the guard: what its jobs belong to. For `Depends`."""
    return str(connection.state.owner)


class Clients:
    """tokens: by the names of their clients; none where everybody on this machine is served.

    Any thread may use it.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self._names = [(_digest(token), name) for name, token in (tokens or {}).items()]
        self._secret = secrets.token_bytes(32)
        self._sessions: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def read(cls, token_file: Path | None) -> "Clients":
        """Those of a file of NAME:TOKEN lines, or everybody on this machine. ValueError, one line that shows
        no token, for a file that is not fit."""
        return cls(None if token_file is None else read_tokens(token_file))

    @property
    def has_tokens(self) -> bool:
        """Whether nobody is served without one."""
        return bool(self._names)

    def named(self, token: str) -> str | None:
        """The client whose token this is, None for nobody's."""
        digest, found = _digest(token), None
        for known, name in self._names:  # all of them, whichever it is
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def bearer(self, credentials: str) -> str:
        """Whoever is on this machine and sends these credentials, which nobody has given them."""
        return f"bearer-{self.sign(credentials)}"

    def sign(self, *parts: str) -> str:
        """A word that this process alone makes of the parts."""
        # Each with its length, so that no two lists of parts read alike.
        text = b"".join(b"%d:%b" % (len(raw), raw) for raw in map(_raw, parts))
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[:40]

    def new_visitor(self) -> str:
        """The cookie of a browser that comes without one."""
        nonce = secrets.token_hex(12)
        return nonce + self.sign("visitor", nonce)

    def visitor(self, cookie: str) -> str | None:
        """The client whose cookie this is, None if it is none of `new_visitor`."""
        if not _COOKIE.fullmatch(cookie):
            return None
        is_ours = hmac.compare_digest(cookie[24:], self.sign("visitor", cookie[:24]))
        return f"visitor-{cookie[:24]}" if is_ours else None

    def open_session(self, name: str) -> str:
        """The cookie of a browser in which the client of this name has logged in."""
        cookie = secrets.token_hex(32)
        with self._lock:
            self._sessions[_digest(cookie)] = (name, time.monotonic() + SESSION_SECONDS)
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return cookie

    def session(self, cookie: str) -> str | None:
        """The client that has logged in under this cookie, None for nobody."""
        if not _COOKIE.fullmatch(cookie):
            return None
        with self._lock:  # by digests: how long it takes to find one says nothing of a cookie
            name, until = self._sessions.get(_digest(cookie), (None, 0.0))
        return name if time.monotonic() < until else None

    def close_session(self, cookie: str) -> None:
        """The cookie stands for nobody from now on."""
        with self._lock:
            self._sessions.pop(_digest(cookie), None)


def token_of(authorization: str) -> str | None:
    """The token in an Authorization header: a bearer, or the password of Basic, with any user. None for
    anything else."""
    scheme, _, credentials = authorization.strip().partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return credentials or None
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return password if colon and password else None


def read_tokens(path: Path) -> Mapping[str, str]:
    """The tokens of a file by their names. ValueError, one line that shows no token, for a file that is not
    fit: one that others may read too."""
    tokens: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, token = (part.strip() for part in line.partition(":"))
        place = f"--token-file {path} line {number}"
        if not colon or not _NAME.fullmatch(name):
            raise ValueError(
                f"{place} must be NAME:TOKEN, the name of 1 to 64 letters, digits, dots, _ and -"
            )
        _check_token(token, place)
        if name in tokens:
            raise ValueError(f"{place} gives the name {name} again; each client has one token")
        if token in tokens.values():
            raise ValueError(f"{place} gives a token again; each client needs one of its own")
        tokens[name] = token
    if not tokens:
        raise ValueError(f"--token-file {path} must have a line NAME:TOKEN, it has none")
    return tokens


def _check_token(token: str, place: str) -> None:
    if not LEAST_TOKEN <= len(token) <= MOST_TOKEN:
        raise ValueError(
            f"{place}: a token must have {LEAST_TOKEN} to {MOST_TOKEN} characters, this has {len(token)}; "
            "`openssl rand -hex 32` makes one"
        )
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(f"{place}: a token must be of ASCII characters, without spaces")


def _lines(path: Path) -> list[str]:
    try:
        # A named pipe to which nobody writes would be waited for.
        with open(path, "rb", opener=_at_once) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"--token-file {path} must be a file, it is none")
            if os.name == "posix" and status.st_mode & 0o077:
                raise ValueError(
                    f"--token-file {path} must be readable by its owner alone; chmod 600 {path}"
                )
            content = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise ValueError(f"--token-file {path} cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE:
        raise ValueError(f"--token-file {path} must have {MAX_FILE:,} bytes at most")
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--token-file {printable(str(path), 200)} must be UTF-8 text") from error


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _digest(text: str) -> bytes:
    return hashlib.sha256(_raw(text)).digest()


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
