"""Connections on which nothing is asked keep nobody out."""

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from serving import SIDE, SOON, StubPainter, eventually

from pixart.config import EMBEDDED
from pixart.serving import server
from pixart.serving.app import make_app
from pixart.serving.drawing.queue import Queue
from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits
from pixart.serving.listening import Port
from pixart.serving.service import Offer, Service

MOST = 6


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server that takes so many connections."""
    monkeypatch.setattr(server, "CONNECTIONS", MOST)
    queue = Queue(StubPainter())
    service = Service(queue, Offer(EMBEDDED, SIDE, 16), Clients(), Limits())
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        running = server.Server(make_app(service, ui=False), Port(bound, "127.0.0.1"), queue.close)
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        eventually(lambda: running.started)
        yield bound.getsockname()[1]
        running.should_exit = True
        thread.join(SOON)


@pytest.mark.parametrize(
    "begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: 127"], ids=["none", "half"]
)
def test_idle_connections_make_room(port: int, begun: bytes) -> None:
    idle = []
    for _ in range(5 * MOST):
        idle.append(socket.create_connection(("127.0.0.1", port)))
        idle[-1].sendall(begun)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    for one in idle:
        one.close()


def test_connections_in_use_are_not_closed(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    body = b'{"prompt": "x"}'
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert httpx.get(f"{url}/healthz").status_code == 200  # by now it has been read
        others = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MOST)]
        assert httpx.get(f"{url}/healthz").status_code == 200
        slow.sendall(body)
        assert slow.recv(100).startswith(b"HTTP/1.1 202 ")
    for one in others:
        one.close()
