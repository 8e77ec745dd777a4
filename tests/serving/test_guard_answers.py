"""How answers leave: headers that bind a browser, and errors as one line."""

from base64 import b64encode
from hashlib import sha256
from typing import Any

import pytest
from guarded import PAGE, TOKENS, asking, guard, raw, reason_of, run


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/me",
        "/v1/refused",
        "/v1/broken",
        "/nothing",
        "/login",
        "/assets/a.js",
        "/healthz",
        "/a/..",
    ],
)
@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_every_answer_binds_the_browser(path: str, tokens: Any) -> None:
    headers = asking(guard(tokens))("GET", path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "same-origin"
    assert (
        headers["cross-origin-opener-policy"]
        == headers["cross-origin-resource-policy"]
        == "same-origin"
    )
    assert "camera=()" in headers["permissions-policy"]
    policies = headers.get_list("content-security-policy")
    assert len(policies) == 1 and "frame-ancestors 'none'" in policies[0]
    assert "http" not in policies[0] and "*" not in policies[0]
    assert "server" not in headers and "access-control-allow-origin" not in headers
    assert path == "/assets/a.js" or headers.get_list("cache-control") == ["no-store"]


def test_of_scripts_within_the_page_those_run_that_were_sent() -> None:
    def allowed(script: str) -> str:
        return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"

    answer = asking(guard())("GET", "/")
    policy = answer.headers["content-security-policy"]
    (scripts,) = [part for part in policy.split("; ") if part.startswith("script-src")]
    assert answer.text == PAGE and "'unsafe-inline'" not in scripts
    assert allowed("first()") in scripts and allowed("\n2\n") in scripts
    assert allowed("alert(1)") not in scripts and scripts.count("sha256-") == 2


def test_what_is_the_same_for_everybody_may_be_kept() -> None:
    assert asking(guard())("GET", "/assets/a.js").headers["cache-control"] == "max-age=9"


def test_a_refusal_is_one_line_in_the_shape_of_the_clients() -> None:
    ask = asking(guard())
    answer = ask("GET", "/v1/refused")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "2"
    assert answer.json() == {
        "error": {"message": "the queue is  [31mfull",
                  "type": "rate_limit_error", "param": "n", "code": "queue_full"}
    }  # fmt: skip
    other = ask("GET", "/sdapi/v1/refused").json()
    assert other["error"] == "queue_full" and other["detail"].startswith("the queue is")


@pytest.mark.parametrize("path", ["/v1/broken", "/v1/page-of-others"])
def test_a_fault_of_ours_is_one_line_without_what_is_inside(path: str, capsys: Any) -> None:
    answer = asking(guard())("GET", path)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "server failed" in reason_of(answer)


def test_a_fault_of_ours_is_a_line_on_standard_error(capsys: Any) -> None:
    asking(guard())("GET", "/v1/broken")
    assert (
        capsys.readouterr().err == "pixart.serve: /v1/broken: KeyError: 'a secret of the inside'\n"
    )


def test_what_the_application_says_in_json_stays() -> None:
    answer = asking(guard())("GET", "/v1/own-error")
    assert answer.status_code == 500 and answer.json() == {"error": "said on purpose"}


def test_a_client_that_leaves_is_no_fault(capsys: Any) -> None:
    assert run(raw(guard(), [], {}, "GET", "/v1/gone")) == (0, b"")
    assert capsys.readouterr().err == ""


def test_an_answer_that_breaks_off_is_said_and_not_answered_twice(capsys: Any) -> None:
    status, body = run(raw(guard(), [], {}, "GET", "/v1/stream"))
    assert (status, body) == (200, b"data: 1\n\n")
    assert capsys.readouterr().err == "pixart.serve: /v1/stream: RuntimeError: broke off\n"


def test_the_head_of_an_error_has_no_body() -> None:
    answer = asking(guard(TOKENS))("HEAD", "/v1/me")
    assert answer.status_code == 401 and answer.content == b""


def test_the_applications_own_beginning_and_end_pass() -> None:
    seen: list[str] = []
    guarded = guard()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    guarded._app = app
    run(guarded({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
