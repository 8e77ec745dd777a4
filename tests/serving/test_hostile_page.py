"""Gradio's routes that the page does not need are closed, and those that it needs name no file and no URL.

Among them are the ones of Gradio's advisories of 2026: requests to addresses of the server's network, files
by absolute paths and by paths that lead out of a folder, and redirects to wherever one likes.
"""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hostile import ADDRESSES, refused
from serving import Running, running_service

from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits

ANN, BOB = "ann's-token-0123456789", "bob's-token-0123456789"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    clients = Clients({"ann": ANN, "bob": BOB})
    with running_service(ui=True, clients=clients, limits=Limits(rate=1_000_000)) as running:
        yield running
        assert running.painter.drawn == []


def of(running: Running, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=running.url, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def ann(running: Running) -> Iterator[httpx.Client]:
    with of(running, ANN) as client:
        yield client


@pytest.fixture(scope="module")
def bob(running: Running) -> Iterator[httpx.Client]:
    with of(running, BOB) as client:
        yield client


def ask(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """The path as it stands here: httpx would mend it."""
    return client.request(method, client.base_url.copy_with(raw_path=path.encode()), **options)


class Trap:
    """A server that notes whether anybody comes."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/a.png"
        self.visits = 0
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        try:
            while True:
                connection, _ = self._listening.accept()
                self.visits += 1
                connection.close()
        except OSError:
            return

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    assert trap.visits == 0
    trap.close()


CLOSED = (
    "login_check", "token", "user", "dev/reload", "runs", "run-history/buckets", "run-history/connect",
    "openapi.json", "custom_component/x/client/y/z", "stream/x", "stream/x/close", "stream/a/b/1/playlist.m3u8",
    "run/draw", "api/draw", "run/predict", "call/v2/draw", "call/other", "component_server", "upload",
    "upload_progress?upload_id=x", "queue/status", "process_recording", "vibe-edit", "undo-vibe-edit",
    "vibe-code", "vibe-starter-queries", "profiling/traces", "profiling/summary", "profiling/clear",
    "deep_link?session_hash=x", "mcp", "mcp/sse", "mcp/schema", "heartbeat/", "heartbeat/a/b", "file/etc/passwd",
)  # fmt: skip


@pytest.mark.parametrize("route", CLOSED)
def test_routes_that_the_page_does_not_need_are_closed(ann: httpx.Client, route: str) -> None:
    refused(ask(ann, "GET", f"/gradio_api/{route}"), 404, 405)
    refused(ask(ann, "POST", f"/gradio_api/{route}", json={"data": []}), 404, 405)


@pytest.mark.parametrize(
    "path",
    ["/monitoring", "/monitoring/summary", "/login_check", "/token", "/robots.txt", "/upload", "/run/predict",
     "/queue/join", "/api/predict", "/file=/etc/passwd", "/proxy=http://x", "/pwa_icon/../x", "/app_id",
     "/dev/reload", "/gradio_api", "/custom_component/x"],
)  # fmt: skip
def test_older_names_of_routes_are_closed_too(ann: httpx.Client, path: str) -> None:
    refused(ask(ann, "GET", path), 404, 405)
    refused(ask(ann, "POST", path, json={}), 404, 405)


@pytest.mark.parametrize("route", ["file=", "proxy=", "file/", "stream/"])
def test_no_file_and_no_other_server_is_read_through_gradio(
    ann: httpx.Client, trap: Trap, route: str
) -> None:
    """GHSA-j36p and the rest: absolute paths, ways out of a folder, addresses of the server's network."""
    for address in (*ADDRESSES, trap.url, trap.url.replace("//", "/")):
        path = f"/gradio_api/{route}{address}".encode("unicode_escape").decode().replace(" ", "%20")
        for method in ("GET", "HEAD", "POST"):
            answer = ask(ann, method, path)
            assert answer.status_code in (404, 405)
            assert "location" not in answer.headers


@pytest.mark.parametrize("folder", ["assets", "static", "svelte"])
@pytest.mark.parametrize(
    "path",
    ["../../../routes.py", "..%2f..%2froutes.py", "%2e%2e/%2e%2e/routes.py", "%252e%252e/routes.py", "/etc/passwd",
     "%2fetc%2fpasswd", "..\\..\\routes.py", "..%5croutes.py", "C:/windows/win.ini", "%00", "", ".", "a/../../b",
     "http://evil.example/a.js", "//evil.example/a.js"],
)  # fmt: skip
def test_folders_of_the_page_lead_nowhere_else(ann: httpx.Client, folder: str, path: str) -> None:
    answer = ask(ann, "GET", f"/{folder}/{path}")
    refused(answer, 403, 404)
    assert "location" not in answer.headers


@pytest.mark.parametrize("place", ["//evil.example", "//evil.example/..", "/\\evil.example", "/%5cevil.example",
                                   "/.evil.example", "/?deep_link=//evil.example", "/config/?root=//evil.example",
                                   "/login?next=//evil.example", "/gradio_api//evil.example"])  # fmt: skip
def test_no_answer_leads_to_another_server(ann: httpx.Client, place: str) -> None:
    answer = ask(ann, "GET", place, headers={"X-Forwarded-Host": "evil.example"})
    assert "evil.example" not in answer.headers.get("location", "")
    assert answer.status_code == 404 or "//evil.example" not in answer.text


FILES = (
    {"path": "/etc/passwd"},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": "a.png", "url": "TRAP", "meta": {"_type": "gradio.FileData"}},
    {"url": "TRAP"},
    {"path": None, "url": "data:image/png;base64,AAAA"},
    {"image": {"path": "/etc/passwd"}},
    {"background": {"path": "/etc/passwd"}, "layers": [], "composite": None},
)


def with_trap(value: Any, trap: Trap) -> Any:
    return json.loads(json.dumps(value).replace("TRAP", trap.url))


@pytest.mark.parametrize("route", ["queue/join", "call/draw"])
@pytest.mark.parametrize("file", FILES, ids=range(len(FILES)))
def test_no_event_names_a_file_or_a_url(
    ann: httpx.Client, trap: Trap, route: str, file: Any
) -> None:
    for value in (file, [file], [[file]], ["a", [1, [file]]]):
        data = [with_trap(value, trap)]
        body = {"data": data, "fn_index": 0, "session_hash": "abc"}
        refused(ann.post(f"/gradio_api/{route}", json=body), 400)
        body = {"data": [], "event_data": data, "fn_index": 0, "session_hash": "abc"}
        refused(ann.post(f"/gradio_api/{route}", json=body), 400)


@pytest.mark.parametrize("route", ["queue/join", "call/draw", "cancel", "reset"])
def test_what_is_no_event_is_refused(ann: httpx.Client, route: str) -> None:
    for content in (
        b"",
        b"[]",
        b"1",
        b"{",
        b"[" * 50_000,
        b'{"data": 1}',
        b'{"session_hash": {}}',
        b"null",
    ):
        answer = ann.post(
            f"/gradio_api/{route}", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code < 500 and "\n" not in answer.text
        assert route == "reset" or answer.status_code >= 400 or content == b'{"session_hash": {}}'


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/gradio_api/info", "/gradio_api/app_id", "/theme.css", "/assets/x.js", "/page/page.js",
     "/gradio_api/queue/data?session_hash=a"],
)  # fmt: skip
def test_the_page_is_behind_the_guard(running: Running, ann: httpx.Client, path: str) -> None:
    refused(httpx.get(running.url + path, timeout=60), 401)
    refused(ann.get(path, headers={"Host": "evil.example"}), 421)
    site = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    refused(ann.get(path, headers=site), 403)


def test_the_page_asks_nobody_but_this_server(ann: httpx.Client) -> None:
    answer = ann.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "http" not in policy and "*" not in policy
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "access-control-allow-origin" not in answer.headers
    config = ann.get("/config", headers={"X-Forwarded-Host": "evil.example"}).json()
    assert "evil.example" not in json.dumps(config) and config["root"].endswith(
        str(ann.base_url).rstrip("/")
    )
    assert config["analytics_enabled"] is False


def test_nothing_of_the_servers_disk_is_told(ann: httpx.Client) -> None:
    from pathlib import Path

    here = str(Path(__file__).parent.parent.parent)
    for path in ("/", "/config", "/gradio_api/info", "/openapi.json", "/v1/models", "/healthz"):
        text = ann.get(path).text
        assert (
            here not in text and str(Path.home()) + "/" not in text and "site-packages" not in text
        )


def heard(client: httpx.Client, session: str, into: list[str]) -> None:
    try:
        with client.stream(
            "GET", f"/gradio_api/queue/data?session_hash={session}", timeout=5
        ) as stream:
            into.extend(line for line in stream.iter_lines() if line.startswith("data:"))
    except httpx.HTTPError:
        return


def test_no_one_hears_of_another_ones_events(ann: httpx.Client, bob: httpx.Client) -> None:
    """Even where he has learnt the name of the session, which the other's browser has made up."""
    config = ann.get("/config").json()
    first = next(one for one in config["dependencies"] if not one.get("inputs"))
    body = {"data": [], "fn_index": first["id"], "session_hash": "shared"}
    assert ann.post("/gradio_api/queue/join", json=body).status_code == 200
    theirs: list[str] = []
    heard(bob, "shared", theirs)
    assert not any("process_" in line for line in theirs), theirs
    own: list[str] = []
    heard(ann, "shared", own)
    assert any("process_" in line for line in own)


def test_what_one_has_called_nobody_else_hears_of(ann: httpx.Client, bob: httpx.Client) -> None:
    event = ann.post("/gradio_api/call/draw", json={"data": []}).json()["event_id"]
    heard = f"/gradio_api/call/draw/{event}"
    refused, none = bob.get(heard), bob.get("/gradio_api/call/draw/0123")
    assert (refused.status_code, none.status_code) == (404, 404)
    assert refused.text.replace(event, "0123") == none.text
    assert "event: " in ann.get(heard).text
