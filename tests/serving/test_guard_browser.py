"""What Chromium makes of the guard: logging in, cookies, and links from other sites."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from browser import Browser, browser  # noqa: F401  # a fixture
from selenium.webdriver.common.by import By
from serving import Running, running_service

from pixart.serving.guarding.clients import Clients

pytestmark = pytest.mark.slow
ANN, BOB = "ann's-token-0123456789", "bob's-token-0123456789"


@pytest.fixture
def running() -> Iterator[Running]:
    with running_service(clients=Clients({"ann": ANN, "bob": BOB})) as running:
        yield running


def log_in(window: Browser, token: str) -> None:
    window.driver.find_element(By.NAME, "token").send_keys(token)
    window.follow("button")


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_one_logs_in_and_leaves(
    running: Running,
    browser: Browser,  # noqa: F811
    width: int,
    dark: bool,
) -> None:
    browser.show(f"{running.url}/v1/jobs", width=width, dark=dark, scripts=False)
    assert browser.driver.current_url.endswith("/login")
    assert browser.faults() == []
    browser.screenshot(f"login-{width}")
    log_in(browser, "wrong")
    assert (
        "no token of this server"
        in browser.driver.find_element(By.CSS_SELECTOR, "[role=alert]").text
    )
    browser.screenshot(f"login-wrong-{width}")
    log_in(browser, ANN)
    browser.show(f"{running.url}/v1/jobs")
    assert '"data":[]' in browser.driver.page_source.replace(" ", "")
    assert browser.driver.execute_script("return document.cookie") == ""
    browser.show(f"{running.url}/login")
    assert "You are logged in" in browser.driver.page_source
    browser.show(f"{running.url}/logout", width=width)
    browser.follow("button")
    assert browser.driver.current_url.endswith("/login")
    browser.show(f"{running.url}/v1/jobs")
    assert browser.driver.current_url.endswith("/login")


class _Page(BaseHTTPRequestHandler):
    content = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.content.encode())

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def other_site(content: str) -> Iterator[str]:
    """A page of somebody else's, under another name of this machine."""
    handler = type("Handler", (_Page,), {"content": content})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def cookies(window: Browser, running: Running) -> list[dict[str, Any]]:
    """Those of one service: a browser keeps them by host, whatever the port."""
    _, _, port = running.url.rpartition(":")
    return [one for one in window.driver.get_cookies() if one["name"].endswith(f"-{port}")]


def text_of(window: Browser) -> str:
    return str(window.driver.execute_script("return document.body.innerText"))


def test_a_link_from_another_site_finds_the_same_visitor(browser: Browser) -> None:  # noqa: F811
    with running_service() as running, other_site(f'<a href="{running.url}/">x</a>') as site:
        browser.show(f"{running.url}/openapi.json")
        first = cookies(browser, running)
        assert len(first) == 1 and first[0]["httpOnly"] and first[0]["sameSite"] == "Strict"
        browser.show(site)
        browser.follow("a")
        browser.show(f"{running.url}/openapi.json")
        assert [one["value"] for one in cookies(browser, running)] == [first[0]["value"]]


ATTACK = """<body><form id="form" method="post" action="URL/v1/jobs" enctype="text/plain">
<input name='{"prompt":"a","x":"' value='"}'></form><img id="image" src="URL/v1/jobs">
<script>
window.seen = [];
const note = name => value => window.seen.push(name + ":" + value);
fetch("URL/v1/jobs").then(() => note("read")(1), () => note("read")("refused"));
fetch("URL/v1/jobs", {method: "POST", mode: "no-cors", headers: {"Content-Type": "text/plain"},
  body: '{"prompt":"a"}'}).then(() => note("sent")(1), () => note("sent")(0));
fetch("URL/v1/jobs", {method: "POST", headers: {"Content-Type": "application/json"}, credentials: "include",
  body: '{"prompt":"a"}'}).then(() => note("asked")(1), () => note("asked")("refused"));
</script></body>"""


def test_another_page_reads_nothing_and_orders_nothing(browser: Browser) -> None:  # noqa: F811
    with running_service() as running:
        browser.show(f"{running.url}/openapi.json")  # a visitor, with a cookie
        with other_site(ATTACK.replace("URL", running.url)) as site:
            browser.show(site)
            browser.wait(lambda: browser.driver.execute_script("return window.seen.length") == 3)
            seen = browser.driver.execute_script("return window.seen")
            assert "read:refused" in seen and "asked:refused" in seen
            browser.driver.execute_script("document.getElementById('form').submit()")
            browser.wait(lambda: browser.driver.current_url.startswith(running.url))
            assert "another page" in text_of(browser)
        assert running.painter.drawn == [] and running.service.queue.figures().waiting == 0
