"""Questions to a server that speaks OpenAI's chat completions, with pictures, by Python's own HTTP client.

What the server does harms nobody: it is asked at its own address alone (a redirect to another origin is
refused: the key would travel along), a whole answer has a size and a time at most, and messages
hold neither secrets nor control characters. No client of others bounds the time of a whole answer.
"""

import base64
import email.utils
import gzip
import http.client
import io
import json
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from pixart.addresses import masking, parse_address, proxy_for
from pixart.files import parse_json, without_controls

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 1536  # px of a picture that is sent: models see no more
WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
LONGEST_WAIT = 60.0  # seconds that a server may put the next try off by Retry-After
TIMEOUT = 300.0  # seconds for a whole answer, however it trickles in
CONNECT_TIMEOUT = 30.0  # seconds for each address that a name has
MAX_ANSWER = 16 * 2**20  # bytes, packed or unpacked
MAX_REDIRECTS = 5


class EndpointError(RuntimeError):
    """The endpoint answers nobody; there is no use in going on."""


class Refused(ValueError):
    """The endpoint refuses this question; the next one may pass."""


def data_url(image: "Image", most: int = MAX_SIDE, quality: int = 92) -> str:
    """An RGB picture as a question holds it: JPEG, nothing of the file it came from, at most so many
    pixels a side."""
    image = image.copy()  # thumbnail works in place, and the picture is the caller's
    image.thumbnail((most, most))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


class Endpoint:
    """`ask` may be called from several threads. When one of them finds that there is no use in going
    on, the others try no further either.

    key: None is none; an address with user:password has its own. kept: what is not lost when there is
    no use in going on, in words for the message.
    """

    def __init__(
        self, address: str, key: str | None, kept: str = "captions so far are kept"
    ) -> None:
        self._kept = kept
        key = (key or "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError("OPENAI_API_KEY must be of ASCII without spaces, it is not")
        found = parse_address("endpoint", address)
        self.address = replace(found, path=f"{found.path.rstrip('/')}/chat/completions")
        bearer = f"Bearer {key}" if key else ""
        self._authorization = self.address.authorization or bearer
        self._proxy = proxy_for(self.address)
        self._masked = masking(
            (key, *self.address.secrets, *(self._proxy.secrets if self._proxy else ()))
        )
        self._over = threading.Event()
        self._open: set[_Connection] = set()

    def ask(self, question: Mapping[str, Any]) -> Any:
        """The answer, parsed. Tries again while the server is busy or away. Refused if it refuses this
        question, EndpointError if it refuses all."""
        content = json.dumps(question).encode()
        reason = ""
        for wait in (*WAITS, None):
            pause = 0.0
            try:
                status, headers, answer = self._post(content)
                if 200 <= status < 300:
                    return parse_json(answer, "the answer")
                words = http.client.responses.get(status, "")
                reason = f"{status} {words}: {self.said(answer.decode(errors='replace'))}"
                pause = _retry_after(headers)
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                status, reason = 0, self.said(str(error) or type(error).__name__)
                if isinstance(error, ssl.SSLCertVerificationError):  # it stays wrong
                    break
            # These are about what was sent: the next picture may pass.
            if status in (400, 413, 415, 422):
                raise Refused(f"the endpoint refuses this picture: {reason}")
            # A wrong address or key stays wrong; too slow (408) and too often (429) pass.
            if 300 <= status < 500 and status not in (408, 429):
                break
            if wait is None or self._over.wait(max(wait, pause)):
                break
        raise self.failure(f"must answer, it does not ({reason})")

    def text(self, question: Mapping[str, Any]) -> str:
        """The words of the first choice. Null, which the protocol allows, counts as no words. Raises what
        `ask` raises."""
        return self.text_of(self.ask(question))

    def text_of(self, answer: Any) -> str:
        """The words of the first choice of an answer, as `text` gives them."""
        try:
            text = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            got = self.said(str(answer), 200)
            raise self.failure(f"must answer with choices[0].message.content, got {got}") from None
        return text if isinstance(text, str) else ""

    def failure(self, what: str) -> EndpointError:
        """An error that ends the work of all threads."""
        self._over.set()
        for connection in list(self._open):
            connection.expire()
        return EndpointError(f"{self._masked(str(self.address))} {what}; {self._kept}")

    def said(self, text: str, most: int = 300) -> str:
        """Words of a server, as a message may hold them."""
        # Masked between the two: a control character or the end may fall into a secret.
        return self._masked(" ".join(without_controls(text).split()))[:most]

    def _post(self, content: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and content of an answer, after redirects within the origin."""
        target = self.address.target
        for _ in range(MAX_REDIRECTS + 1):
            status, headers, answer = self._exchange(target, content)
            place = headers.get("Location")
            if status not in (301, 302, 307, 308) or place is None:
                return status, headers, answer
            origin = self.address.origin()
            try:
                led_to = parse_address("Location", urljoin(f"{origin}{target}", place))
                elsewhere, target = led_to.origin(), led_to.target
            except ValueError:
                elsewhere = "no address"
            if elsewhere != origin:
                raise self.failure(
                    f"must not lead elsewhere, it does (to {self.said(elsewhere)}); "
                    "if you trust that server, give its address as --endpoint"
                )
        raise self.failure(f"must answer, it leads on more than {MAX_REDIRECTS} times")

    def _exchange(self, target: str, content: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {
            "Host": self.address.authority,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if self._authorization:
            headers["Authorization"] = self._authorization
        connection, target = self._connection(target, headers)
        # Closes the connection from outside: a timeout of a socket begins again with every byte.
        timer = threading.Timer(TIMEOUT, connection.expire)
        timer.daemon = True
        timer.start()
        self._open.add(connection)
        try:
            # A server may refuse before it has read all, and close: its answer is there all the same.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", target, content, headers)
            if connection.sock is None:
                raise ConnectionResetError("the server closed the connection")
            with connection.getresponse() as response:
                answer = self._read(response)
            if connection.is_expired:
                raise TimeoutError
            return response.status, response.headers, answer
        except (OSError, http.client.HTTPException, ValueError):
            if connection.is_expired:
                raise TimeoutError(f"no whole answer in {TIMEOUT:g} s") from None
            raise
        finally:
            timer.cancel()
            self._open.discard(connection)
            connection.close()

    def _connection(self, target: str, headers: dict[str, str]) -> tuple["_Connection", str]:
        """A connection, through the proxy if the environment names one, and what to ask it for."""
        host, port = self.address.host, self.address.port
        context = ssl.create_default_context() if self.address.scheme == "https" else None
        if self._proxy is None:
            return _Connection(host, port, context, host), target
        connection = _Connection(self._proxy.host, self._proxy.port, context, host)
        permit = self._proxy.authorization
        permits = {"Proxy-Authorization": permit} if permit else {}
        if context is None:
            headers |= permits
            return connection, f"{self.address.origin()}{target}"
        connection.set_tunnel(host, port, permits)
        return connection, target

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        limit = MAX_ANSWER
        content = bytearray()
        while chunk := response.read(2**16):
            content += chunk
            if len(content) > limit:
                raise self._too_large()
        if response.length:  # bytes that it had promised
            raise ConnectionResetError("the answer broke off")
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding in ("", "identity"):
            return bytes(content)
        if encoding not in ("gzip", "x-gzip"):
            encoding = self.said(encoding, 40)
            raise self.failure(f"must answer unpacked or in gzip, it answers in {encoding!r}")
        try:
            with gzip.open(io.BytesIO(content)) as packed:
                unpacked = packed.read(limit + 1)
        except (EOFError, zlib.error) as error:
            raise ValueError(f"the answer is no gzip ({error})") from error
        if len(unpacked) > limit:
            raise self._too_large()
        return unpacked

    def _too_large(self) -> EndpointError:
        return self.failure(f"must answer in at most {MAX_ANSWER >> 20} MiB, it answers in more")


def _retry_after(headers: http.client.HTTPMessage) -> float:
    """Seconds that the server wants to be left alone, LONGEST_WAIT at most."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return min(float(value), LONGEST_WAIT)
    try:
        until = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(until - time.time(), 0.0), LONGEST_WAIT)


class _Connection(http.client.HTTPConnection):
    """To a host, in TLS where there is a context; `expire` ends it from another thread."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, name: str) -> None:
        super().__init__(host, port, timeout=CONNECT_TIMEOUT)
        self.sock: Any = None
        self._kept: Any = None  # http.client forgets its own once an answer has begun
        self.context, self.name = context, name
        self.is_expired = False

    def connect(self) -> None:
        super().connect()
        if self.context is not None:
            # The handshake apart, so that `expire` finds the socket that waits for it.
            self.sock = self.context.wrap_socket(
                self.sock, server_hostname=self.name, do_handshake_on_connect=False
            )
            self.sock.do_handshake()
        self._kept = self.sock
        self.sock.settimeout(TIMEOUT)
        if self.is_expired:
            raise TimeoutError

    def expire(self) -> None:
        self.is_expired = True
        if sock := self.sock or self._kept:
            with suppress(OSError):  # it may just have been closed
                # Of the class: what TLS adds here must not run beside a thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
