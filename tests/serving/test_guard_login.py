"""A browser gives its token, gets a cookie that is not the token, and leaves."""

import re
from typing import Any

import pytest
from guarded import ANN, TOKENS, asking, guard, raw, run

from pixart.serving.guarding import login

FORM = {"content-type": "application/x-www-form-urlencoded"}


def test_a_token_opens_a_session_under_a_cookie_that_is_not_the_token() -> None:
    ask = asking(guard(TOKENS))
    answer = ask("POST", "/login", data={"token": f" {ANN} "})
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"]
    assert re.match(
        r"pixart-\d+=[0-9a-f]{64}; Path=/; Max-Age=\d+; HttpOnly; SameSite=Strict$", cookie
    )
    assert ANN not in cookie
    assert ask("GET", "/v1/me").json()["owner"] == "ann"


def test_a_wrong_token_is_told_on_the_page_and_opens_nothing() -> None:
    ask = asking(guard(TOKENS))
    for token in ("wrong", "", ANN[:-1], "<script>alert(1)</script>"):
        answer = ask("POST", "/login", data={"token": token})
        assert answer.status_code == 403 and 'role="alert"' in answer.text
        assert "set-cookie" not in answer.headers and "<script" not in answer.text
    assert ask("GET", "/v1/me").status_code == 401


def test_tries_are_counted_right_ones_too() -> None:
    ask = asking(guard(TOKENS))
    for _ in range(login.A_MINUTE):
        assert ask("POST", "/login", data={"token": "wrong"}).status_code == 403
    answer = ask("POST", "/login", data={"token": ANN})
    assert answer.status_code == 429 and "wait" in answer.text
    assert int(answer.headers["retry-after"]) >= 1 and "set-cookie" not in answer.headers


def test_leaving_ends_the_session_and_takes_the_cookie_away() -> None:
    guarded = guard(TOKENS)
    ask, thief = asking(guarded), asking(guarded)
    cookie = ask("POST", "/login", data={"token": ANN}).headers["set-cookie"].partition(";")[0]
    assert thief("GET", "/v1/me", headers={"Cookie": cookie}).status_code == 200
    assert "Log out" in ask("GET", "/logout").text
    assert ask("GET", "/v1/me").status_code == 200  # a link to it ends nothing
    answer = ask("POST", "/logout")
    assert answer.headers["location"] == "/login" and "Max-Age=0" in answer.headers["set-cookie"]
    assert ask("GET", "/v1/me").status_code == 401
    assert thief("GET", "/v1/me", headers={"Cookie": cookie}).status_code == 401


def test_logging_in_again_ends_the_session_before() -> None:
    guarded = guard(TOKENS)
    ask = asking(guarded)
    before = ask("POST", "/login", data={"token": ANN}).headers["set-cookie"].partition(";")[0]
    ask("POST", "/login", data={"token": ANN})
    assert asking(guarded)("GET", "/v1/me", headers={"Cookie": before}).status_code == 401


@pytest.mark.parametrize("path", ["/login", "/logout"])
def test_without_tokens_there_is_nothing_to_log_in_to(path: str) -> None:
    for method in ("GET", "POST"):
        answer = asking(guard())(method, path)
        assert answer.status_code == 303 and answer.headers["location"] == "/"


@pytest.mark.parametrize(
    "query", ["?next=//evil.example", "?next=https://evil.example", "?token=x"]
)
def test_where_it_leads_to_is_nobodys_choice(query: str) -> None:
    ask = asking(guard(TOKENS))
    answer = ask("POST", f"/login{query}", data={"token": ANN, "next": "//evil.example"})
    assert answer.headers["location"] == "/"
    assert "evil" not in ask("GET", f"/login{query}").text


@pytest.mark.parametrize(
    "body, headers, status",
    [
        (b"{}", {"content-type": "application/json"}, 415),
        (b"token=" + b"a" * login.MOST_FORM, FORM, 413),
        (b"a=1&b=2&c=3&d=4&e=5&f=6", FORM, 400),
        (b"token=\xff\xfe", FORM, 400),
        (b"token=%ff%fe", FORM, 403),
        (b"", FORM, 403),
    ],
)
def test_what_is_no_form_of_ours_is_refused(body: bytes, headers: Any, status: int) -> None:
    assert run(raw(guard(TOKENS), [body], headers, "POST", "/login"))[0] == status


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(method: str) -> None:
    assert asking(guard(TOKENS))(method, "/login").status_code == 405


def test_another_page_logs_nobody_in_or_out() -> None:
    ask = asking(guard(TOKENS))
    for path in ("/login", "/logout"):
        answer = ask("POST", path, data={"token": ANN}, headers={"Origin": "http://evil.example"})
        assert answer.status_code == 403 and "set-cookie" not in answer.headers


def test_the_page_needs_no_script_and_allows_none() -> None:
    answer = asking(guard(TOKENS))("GET", "/login")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script" not in policy and "unsafe" not in policy
    assert "<script" not in answer.text and 'name="viewport"' in answer.text
    assert "<label" in answer.text and 'type="password"' in answer.text
    assert not re.search(r"https?:|//", answer.text)
