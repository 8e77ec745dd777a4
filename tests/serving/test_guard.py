"""Who is let in, by which name, and from where."""

from typing import Any

import pytest
from guarded import ANN, BASE, TOKENS, asking, guard, raw, reason_of, run

from pixart.serving.guarding import guard as guarding
from pixart.serving.guarding.hosts import Hosts


@pytest.mark.parametrize("name, token", TOKENS.items())
def test_a_token_is_its_client_as_a_bearer_and_as_a_password(name: str, token: str) -> None:
    ask = asking(guard(TOKENS))
    assert (
        ask("GET", "/v1/me", headers={"Authorization": f"Bearer {token}"}).json()["owner"] == name
    )
    assert ask("GET", "/v1/me", auth=("whoever", token)).json()["owner"] == name


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Bearer {ANN[:-1]}", f"Token {ANN}"]
)
def test_nobody_is_served_without_a_token_where_there_are_some(header: str | None) -> None:
    answer = asking(guard(TOKENS))(
        "GET", "/v1/me", headers={"Authorization": header} if header else {}
    )
    assert answer.status_code == 401 and "a token must be given" in reason_of(answer)
    assert answer.headers["www-authenticate"] == 'Bearer realm="pixart"'


def test_a_wrong_token_is_refused_whatever_the_cookie() -> None:
    ask = asking(guard(TOKENS))
    ask("POST", "/login", data={"token": ANN})
    assert ask("GET", "/v1/me").json()["owner"] == "ann"
    assert ask("GET", "/v1/me", headers={"Authorization": "Bearer x"}).status_code == 401


def test_tokens_in_the_address_or_in_a_cookie_are_none() -> None:
    ask = asking(guard(TOKENS))
    assert ask("GET", f"/v1/me?token={ANN}&api_key={ANN}").status_code == 401
    assert ask("GET", "/v1/me", headers={"Cookie": f"pixart-7860={ANN}"}).status_code == 401


def test_a_failing_stranger_is_slowed_down_and_clients_of_his_address_are_not() -> None:
    ask = asking(guard(TOKENS))
    statuses = [ask("GET", "/v1/me").status_code for _ in range(guarding.STRANGERS_RATE + 5)]
    assert statuses[:3] == [401] * 3
    last = ask("GET", "/v1/me")
    assert last.status_code == 429 and int(last.headers["retry-after"]) >= 1
    assert ask("GET", "/v1/me", headers={"Authorization": f"Bearer {ANN}"}).status_code == 200


def test_health_is_told_to_everybody_and_nothing_else_is() -> None:
    ask = asking(guard(TOKENS))
    assert ask("GET", "/healthz").json() == {"owner": ""}
    for path in ("/v1/me", "/metrics", "/openapi.json", "/assets/a.js", "/healthz/", "/nothing"):
        assert ask("GET", path).status_code == 401


def test_programs_of_this_machine_are_one_client_unless_they_say_more() -> None:
    ask = asking(guard())
    owners = {
        ask("GET", "/v1/me", headers=headers).json()["owner"]
        for headers in ({}, {"Authorization": "Bearer a"}, {"Authorization": "Bearer b"})
    }
    assert len(owners) == 3 and "local" in owners


def test_each_browser_of_this_machine_is_a_client_of_its_own() -> None:
    guarded = guard()
    one, other = asking(guarded), asking(guarded)
    for ask in (one, other):
        answer = ask("GET", "/", headers={"Accept": "text/html"})
        cookie = answer.headers["set-cookie"]
        assert (
            "HttpOnly; SameSite=Strict" in cookie and "Path=/" in cookie and "Secure" not in cookie
        )
    owners = [ask("GET", "/v1/me").json()["owner"] for ask in (one, other, one)]
    assert owners[0] == owners[2] != owners[1]
    again = one("GET", "/", headers={"Accept": "text/html"})
    assert "set-cookie" not in again.headers


def test_a_cookie_that_we_have_not_given_is_nobody() -> None:
    ask = asking(guard())
    answer = ask("GET", "/v1/me", headers={"Cookie": f"pixart-7860={'0' * 64}; a=;;=b; "})
    assert answer.json()["owner"] == "local"


@pytest.mark.parametrize("path", ["/", "/v1/jobs/1/images/0"])
def test_a_person_without_a_session_is_led_to_the_login(path: str) -> None:
    answer = asking(guard(TOKENS))("GET", path, headers={"Accept": "text/html,*/*"})
    assert answer.status_code == 303 and answer.headers["location"] == "/login"


def test_a_link_from_elsewhere_is_followed_once_more_from_here() -> None:
    """Browsers leave SameSite=Strict cookies out of what another site leads to: without this, its reader
    would be a new visitor and lose the old one's pictures."""
    ask = asking(guard())
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    answer = ask("GET", "/v1/me?a=b", headers=headers)
    assert answer.status_code == 200 and 'content="0; url=/"' in answer.text
    assert "set-cookie" not in answer.headers and "owner" not in answer.text


def test_cookies_are_for_https_alone_where_clients_come_by_it() -> None:
    for ask in (asking(guard(), "https://127.0.0.1:7860"), asking(guard(hosts=Hosts(https=True)))):
        answer = ask("GET", "/", headers={"Accept": "text/html"})
        assert answer.headers["set-cookie"].startswith("__Host-pixart-")
        assert answer.headers["set-cookie"].endswith("; Secure")


def test_nobody_is_believed_about_where_he_comes_from() -> None:
    hearsay = {
        "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example", "X-Forwarded-For": "1.2.3.4",
        "Forwarded": "host=evil.example", "X-Gradio-Server": "http://evil.example", "X-Real-IP": "1.2.3.4",
    }  # fmt: skip
    ask = asking(guard())
    said = ask("GET", "/v1/me", headers=hearsay).json()
    assert said["url"] == f"{BASE}/v1/me"
    assert not {name.lower() for name in hearsay} & said["headers"].keys()
    page = ask("GET", "/", headers={**hearsay, "Accept": "text/html"})
    assert "Secure" not in page.headers["set-cookie"]


def test_the_application_knows_of_https_where_we_are_told() -> None:
    ask = asking(guard(hosts=Hosts(https=True)))
    assert ask("GET", "/v1/me").json()["url"].startswith("https://")


@pytest.mark.parametrize("path", ["/", "/v1/me", "/login", "/healthz", "/nothing"])
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "169.254.169.254", ""])
def test_requests_under_another_name_are_misdirected(path: str, host: str) -> None:
    answer = asking(guard())("GET", path, headers={"Host": host})
    assert answer.status_code == 421 and "not known as" in reason_of(answer)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:8000", "https://127.0.0.1"]
)
def test_nothing_is_done_for_another_page(method: str, origin: str) -> None:
    answer = asking(guard())(method, "/v1/me", headers={"Origin": origin})
    assert answer.status_code == 403 and "another page" in reason_of(answer)
    assert "access-control-allow-origin" not in answer.headers


def test_our_own_page_may_ask() -> None:
    headers = {"Origin": BASE, "Sec-Fetch-Site": "same-origin"}
    assert asking(guard())("POST", "/v1/me", headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "invented"])
@pytest.mark.parametrize(
    "method, mode", [("POST", "navigate"), ("POST", "cors"), ("GET", "no-cors")]
)
def test_what_a_browser_says_another_page_asks_is_refused(
    site: str, method: str, mode: str
) -> None:
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
    assert asking(guard())(method, "/v1/me", headers=headers).status_code == 403


def test_sockets_are_closed_before_they_open() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/", "headers": [(b"host", b"127.0.0.1")]}
    run(guard()(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    "path",
    ["/../etc/passwd", "/v1/../../etc/passwd", "/assets/..\\..\\x", "/v1//me", "//evil.example/", "/v1/./me",
     "/v1/%2e%2e/x", "/v1/me\x00", "/v1/me\n", "/v1/..", "http://evil.example/v1/me", "", "*"],
)  # fmt: skip
def test_crooked_paths_lead_nowhere(path: str) -> None:
    status, body = run(raw(guard(), [], {}, "GET", path))
    assert status == 404 and b"\n" not in body and b"\x00" not in body


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "get", "X" * 50])
def test_methods_of_no_use_are_refused(method: str) -> None:
    assert run(raw(guard(), [], {}, method, "/v1/me"))[0] == 405


@pytest.mark.parametrize(
    "name",
    ["host", "authorization", "content-length", "content-type", "origin", "transfer-encoding"],
)
def test_a_header_that_would_be_read_in_two_ways_is_given_once(name: str) -> None:
    twice = [(name.encode(), b"127.0.0.1"), (name.encode(), b"127.0.0.1")]
    assert run(raw(guard(), [], {}, "GET", "/v1/me", more=twice))[0] == 400


def test_heads_are_bounded() -> None:
    def status(**options: Any) -> int:
        return int(run(raw(guard(), [], {}, "GET", "/v1/me", **options))[0])

    assert status(more=[(b"x-%d" % number, b"1") for number in range(200)]) == 431
    assert status(more=[(b"cookie", b"a" * 40_000)]) == 431
    assert status(query=b"a" * 9000) == 414
