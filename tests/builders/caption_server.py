"""An HTTP server whose answers a test sets, in the place of a vision-language model's."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pixart import endpoint

# From a question to a status and its JSON or bytes, or to what writes the answer itself.
Answer = Callable[[dict[str, Any]], Any]


class Server:
    """`asked` and `headers` hold what was sent."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Answer = lambda _: (200, self.completion("a caption"))
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body | {"path": self.path})
                outer.headers.append(self.headers)
                answer = outer.answer(body)
                if callable(answer):
                    answer(self)
                    return
                status, content, *headers = answer
                self.send_response(status)
                for name, value in dict(*headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(
                    content if isinstance(content, bytes) else json.dumps(content).encode()
                )

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.address = f"http://127.0.0.1:{self.port}/v1"

    @staticmethod
    def completion(text: str | None) -> dict[str, Any]:
        return {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Running; questions are repeated at once, and no key or proxy of the machine is used."""
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0))
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.http.shutdown()
    server.http.server_close()
