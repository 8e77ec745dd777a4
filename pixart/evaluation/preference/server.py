"""`preference serve`: the pages by which people vote, by Python's own HTTP server.

Made for one machine or a small network, where others may try things: requests under a foreign host name
are refused (a page of somebody else's whose name leads here must read nothing), forms need a token that
only our page has, bodies and times are bounded, and of files nothing is served but pictures of the
study by the names that it lists.
"""

import ipaddress
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pixart.command import one_line
from pixart.evaluation.preference import pages
from pixart.evaluation.preference.booth import Booth, Passes
from pixart.evaluation.preference.log import appending
from pixart.evaluation.preference.options import Serve
from pixart.evaluation.preference.study import (
    QUESTIONS,
    VOTES,
    check_pictures,
    read_key,
    read_study,
)
from pixart.evaluation.preference.votes import read_votes
from pixart.locks import occupied
from pixart.process import write_line

MAX_BODY = 4096  # bytes of a form
MAX_DRAINED = 2**20
MAX_CONNECTIONS = 64
SECONDS = 30.0  # for a request, however it trickles in
YEAR = 365 * 24 * 3600
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def serve(options: Serve) -> str:
    """Serve until Ctrl-C. ValueError for a folder that is no study, that another process holds, or an
    address that cannot be listened at."""
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, got {options.port}")
    study = read_study(options.study)
    check_pictures(study)
    passes = Passes(read_key(study).secret)
    with occupied(study.folder, "serves the study"), appending(study.folder / VOTES) as log:
        booth = Booth(study, log, *read_votes(study))
        with _listening(options, booth, passes) as server:
            print(f"{server.address}  (votes go to {log.path}; Ctrl-C ends)", flush=True)
            try:
                server.serve_forever(poll_interval=0.2)
            finally:
                booth.close()
    raise AssertionError("a server ends by a signal")


def _listening(options: Serve, booth: Booth, passes: Passes) -> "Server":
    try:
        return Server(options, booth, passes)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"--host and --port must be free, {options.host} port {options.port} cannot be listened at "
            f"({reason}); give another --port"
        ) from error


class Server(ThreadingHTTPServer):
    daemon_threads = True  # a browser that holds a connection open does not hold up the end
    request_queue_size = 64

    def __init__(self, options: Serve, booth: Booth, passes: Passes) -> None:
        self.booth, self.passes = booth, passes
        self.names = {name.lower() for name in ("localhost", options.host, *options.name) if name}
        self.cookie = f"pixart_{booth.study.id}"
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in options.host:
            self.address_family = socket.AF_INET6
        super().__init__((options.host, options.port), Handler)

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        host = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{host}:{port}/"

    def knows(self, host: str) -> bool:
        """Whether a request's Host is one of ours. Addresses are: only a name can be led here by others."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)  # the browser tries again
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # those are clients that went away
            write_line(one_line(f"pixart.preference: {type(error).__name__}: {error}"))


class Refusal(Exception):
    """A request that is answered with an error. reason: for the page."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def _parts(address: str, reason: str) -> Any:
    """Of an address that a request names. Refusal for what is none."""
    try:
        return urlsplit(address)
    except ValueError:
        raise Refusal(400, reason) from None


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Server
    timeout = SECONDS
    server_version, sys_version = "pixart", ""

    def setup(self) -> None:
        super().setup()
        # A timeout of the socket begins again with every byte.
        self._timer = threading.Timer(2 * SECONDS, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def finish(self) -> None:
        self._timer.cancel()
        super().finish()

    def _expire(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, work: Any) -> None:
        try:
            hosts = self.headers.get_all("Host", [])
            if len(hosts) != 1 or not self.server.knows(hosts[0]):
                raise Refusal(421, "This server is not known by that name. Give it with --name.")
            work(_parts(self.path, "There is no such page."))
        except Refusal as refusal:
            self._send_page(pages.error(refusal.reason), refusal.status)
            self._drain()
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            write_line(one_line(f"pixart.preference: a vote was not kept ({error})"))
            self._send_page(pages.error("Your vote could not be kept. Please try again."), 503)

    def _drain(self) -> None:
        """What is left of a form that was refused: closed with bytes unread, a connection is reset, and the
        answer is lost with it."""
        if self.command == "POST":
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            for _ in range(MAX_DRAINED // 4096):
                if not self.rfile.read1(4096):
                    return

    def _get(self, url: Any) -> None:
        place = url.path
        if place.startswith("/picture/"):
            self._send_picture(place.removeprefix("/picture/"))
        elif place in pages.FILES:
            self._send(pages.file(place), pages.FILES[place], "no-cache")
        elif place == "/":
            new = self._ticket() or secrets.token_hex(16)
            done = self.server.booth.done(self.server.passes.voter(new))
            content = pages.welcome(done, len(self.server.booth.study.pairs))
            self._send_page(content, headers={"Set-Cookie": self._cookie(new)})
        elif place == "/vote":
            self._send_ballot(parse_qs(url.query).get("pair", [""])[0])
        elif place == "/progress":
            ticket = self._ticket()
            done = self.server.booth.done(self.server.passes.voter(ticket)) if ticket else 0
            study = self.server.booth.study
            self._send_page(pages.progress(done, len(study.pairs), *self.server.booth.tally()))
        else:
            raise Refusal(404, "There is no such page.")

    def _post(self, url: Any) -> None:
        if url.path not in ("/vote", "/undo"):
            raise Refusal(404, "There is no such page.")
        form = self._form()
        origin, other = self.headers.get("Origin"), "This form came from another page."
        if origin is not None and _parts(origin, other).netloc != self.headers.get("Host"):
            raise Refusal(403, other)
        ticket = self._ticket()
        if ticket is None:
            raise Refusal(403, "Votes need a cookie. Allow cookies for this page, and begin again.")
        if not self.server.passes.is_token(ticket, form.get("token", "")):
            raise Refusal(403, "This form is out of date. Please begin again.")
        voter, booth = self.server.passes.voter(ticket), self.server.booth
        if url.path == "/undo":
            pair = booth.undo(voter)
            self._redirect(f"/vote?pair={pair.id}" if pair else "/vote")
            return
        try:
            answers = {question: form.get(question, "") for question in QUESTIONS}
            booth.vote(voter, form.get("pair", ""), answers, self._agent(form))
        except ValueError as error:
            raise Refusal(400, f"This is no vote: {error}.") from error
        self._redirect("/vote")

    def _form(self) -> Mapping[str, str]:
        kind = self.headers.get_content_type()
        if kind != "application/x-www-form-urlencoded":
            raise Refusal(415, "Only forms are taken.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(411, "The length of the form must be given.")
        if len(length) > 6 or int(length) > MAX_BODY:
            raise Refusal(413, f"A form has {MAX_BODY} bytes at most.")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise Refusal(400, "The form broke off.")
        try:
            fields = parse_qs(content.decode("ascii"), max_num_fields=10)
        except ValueError:
            raise Refusal(400, "The form cannot be read.") from None
        return {name: values[0] for name, values in fields.items()}

    def _ticket(self) -> str | None:
        """The pass that the browser has; None if it has none of ours."""
        # Cookies of all programs of a machine come along, whatever they hold: one that no standard allows
        # must not hide ours, as it does from http.cookies.
        given = [one.partition("=") for one in self.headers.get("Cookie", "").split(";")]
        values = [value.strip() for name, _, value in given if name.strip() == self.server.cookie]
        value = values[0] if values else ""
        is_ours = len(value) == 32 and set(value) <= set("0123456789abcdef")
        return value if is_ours else None

    def _cookie(self, ticket: str) -> str:
        return f"{self.server.cookie}={ticket}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Lax"

    def _agent(self, form: Mapping[str, str]) -> str:
        """As little of the browser as tells phones from desks."""
        device = "phone" if "Mobi" in self.headers.get("User-Agent", "") else "desk"
        return f"server {device} {'keys' if form.get('by') == 'keys' else 'form'}"

    def _send_ballot(self, wanted: str) -> None:
        ticket = self._ticket()
        if ticket is None:  # a first visit, or cookies are refused: the welcome says what is needed
            self._redirect("/")
            return
        booth, passes = self.server.booth, self.server.passes
        voter = passes.voter(ticket)
        done, total = booth.done(voter), len(booth.study.pairs)
        pair = booth.study.by_id.get(wanted) or booth.next_pair(voter)
        token = passes.token(ticket)
        if pair is None:
            self._send_page(pages.finished(total, token))
            return
        if self.command == "GET":
            booth.show(voter, pair)
        self._send_page(pages.ballot(pair, done, total, token))

    def _send_picture(self, name: str) -> None:
        study = self.server.booth.study
        if name not in study.pictures:  # whatever else a path may say
            raise Refusal(404, "There is no such picture.")
        try:
            content = study.picture(name).read_bytes()
        except OSError:
            write_line(f"pixart.preference: {study.picture(name)} cannot be read")
            raise Refusal(404, "There is no such picture.") from None
        self._send(content, "image/jpeg", "private, max-age=3600")

    def _send_page(
        self, content: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self._send(content.encode(), "text/html; charset=utf-8", "no-store", status, headers)

    def _redirect(self, place: str) -> None:
        self._send(b"", "text/plain", "no-store", 303, {"Location": place})

    def _send(
        self,
        content: bytes,
        kind: str,
        keep: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        given = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": keep}
        for name, value in {**given, **HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: addresses of voters are nobody's business."""
