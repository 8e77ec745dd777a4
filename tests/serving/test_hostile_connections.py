"""What no client library sends: bytes that are no request, or two in one. The server closes, and goes on."""

import socket
from collections.abc import Iterator

import httpx
import pytest
from serving import Running, running_service

SECONDS = 10.0


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_service() as running:
        yield running


@pytest.fixture(autouse=True)
def lives(running: Running) -> Iterator[None]:
    yield
    assert httpx.get(f"{running.url}/healthz", timeout=60).status_code == 200


def said(running: Running, content: bytes) -> bytes:
    """All that comes back until the connection is closed, or nothing more comes."""
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        parts = []
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)  # it may be closed by now
            while part := connection.recv(65536):
                parts.append(part)
        except OSError:
            pass
        return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.")]


@pytest.mark.parametrize(
    "content",
    [b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), b"GET\r\n\r\n",
     b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nHost 127.0.0.1\r\n\r\n", b"\x00" * 1000, b"A" * 200_000,
     b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
     b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nBad\x00Name: 1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n folded: 1\r\n\r\n",
     b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
     b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
     b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
     b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_request_is_refused_or_closed(running: Running, content: bytes) -> None:
    answer = said(running, content)
    assert all(400 <= status <= 501 for status in statuses(answer)), answer[:300]
    assert b"Traceback" not in answer


@pytest.mark.parametrize(
    "head, status",
    [
        (b"GET http://evil.example/v1/jobs HTTP/1.1\r\nHost: evil.example", 421),
        (b"GET http://evil.example/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1", 404),
        (b"GET /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example", 400),
        (b"GET /v1/jobs HTTP/1.1", 400),
        (b"GET /v1/jobs HTTP/1.0", 421),
        (b"GET * HTTP/1.1\r\nHost: 127.0.0.1", 404),
        (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: 127.0.0.1", 405),
        (b"GET /v1/jobs#a/../.. HTTP/1.1\r\nHost: 127.0.0.1", 404),
    ],
)
def test_requests_under_two_names_or_none_are_refused(
    running: Running, head: bytes, status: int
) -> None:
    answer = said(running, head + b"\r\nConnection: close\r\n\r\n")
    assert statuses(answer)[:1] == [status], answer[:300]


def test_no_second_request_hides_in_a_body(running: Running) -> None:
    """A length and chunks: whoever stands before us may believe the one, and we the other."""
    hidden = b"GET /v1/hidden HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    head = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (len(hidden) + 5)
    )
    answer = said(running, head + hidden)
    assert statuses(answer)[0] == 400 and b"hidden" not in answer


def test_a_refused_body_is_answered_before_it_has_come(running: Running) -> None:
    head = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 999999999\r\nExpect: 100-continue\r\n\r\n"
    )
    assert statuses(said(running, head)) == [413]


def test_a_client_that_leaves_in_the_middle_of_a_body_is_nothing(running: Running) -> None:
    head = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    assert all(400 <= status < 500 for status in statuses(said(running, head)))


def test_sockets_are_not_opened(running: Running) -> None:
    head = (
        b"GET /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Origin: http://evil.example\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    )
    assert 101 not in statuses(said(running, head))
