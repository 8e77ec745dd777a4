"""How much a client may send, how often, and how much at once."""

import asyncio
import json
from typing import Any

import pytest
from guarded import ANN, BOB, TOKENS, asking, guard, raw, reason_of, run
from starlette.responses import PlainTextResponse

from pixart.serving.guarding import guard as guarding
from pixart.serving.guarding.bodies import MOST_VALUES


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json",
     "application/jsonp"],
)  # fmt: skip
def test_no_form_of_another_page_is_taken_for_json(kind: str) -> None:
    answer = asking(guard())("POST", "/v1/size", content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415 and "application/json" in reason_of(answer)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"]
)
def test_json_is_taken(kind: str) -> None:
    answer = asking(guard())("POST", "/v1/size", content=b"{}", headers={"Content-Type": kind})
    assert answer.json() == 2


def test_files_are_taken_where_they_belong() -> None:
    ask, files = asking(guard()), {"image": b"1"}
    assert ask("POST", "/v1/images/edits", files=files).status_code == 200
    assert ask("POST", "/v1/size", files=files).status_code == 415


def test_no_body_needs_no_type() -> None:
    assert asking(guard())("POST", "/v1/size").json() == 0


def test_a_body_is_bounded_by_what_comes_and_by_what_is_announced() -> None:
    guarded = guard(body=100)
    ask = asking(guarded)
    json_ = {"Content-Type": "application/json"}
    assert ask("POST", "/v1/size", content=b"1" * 100, headers=json_).json() == 100
    announced = ask("POST", "/v1/size", content=b"1" * 101, headers=json_)
    assert announced.status_code == 413 and "100 bytes at most, this has 101" in reason_of(
        announced
    )
    assert run(raw(guarded, [b"1" * 60, b"1" * 60], {}))[0] == 413
    never_read = run(raw(guarded, [None], {"content-length": "999999999999"}))
    assert never_read[0] == 413


def test_json_has_so_many_values() -> None:
    ask, kind = asking(guard()), {"Content-Type": "application/json"}
    few, many = (b"[1" + b",1" * count + b"]" for count in (MOST_VALUES, MOST_VALUES + 1))
    assert ask("POST", "/v1/size", content=few, headers=kind).json() == len(few)
    refused = ask("POST", "/v1/size", content=many, headers=kind)
    assert refused.status_code == 413 and "100,000 values at most" in reason_of(refused)
    files = {"image": b"," * (MOST_VALUES + 1)}  # of a picture they tell nothing
    assert ask("POST", "/v1/images/edits", files=files).status_code == 200


@pytest.mark.parametrize("length", ["5", "20", "-1", "x", "1e3", "+4", "\xb3", "9" * 19])
def test_a_length_that_lies_is_refused(length: str) -> None:
    assert run(raw(guard(), [b"1234567890"], {"content-length": length}))[0] == 400


def test_a_length_beside_chunks_is_refused() -> None:
    headers = {"content-length": "2", "transfer-encoding": "chunked"}
    assert run(raw(guard(), [b"12"], headers))[0] == 400


def test_a_get_has_no_body() -> None:
    assert run(raw(guard(), [b"12"], {"content-length": "2"}, "GET", "/v1/me"))[0] == 400


def test_a_body_that_trickles_in_is_given_up() -> None:
    guarded = guard()
    guarded._bodies._seconds = 0.05
    status, body = run(raw(guarded, [b"1", ...], {"content-length": "9"}))
    assert status == 408 and b"within 0.05 seconds" in body
    assert guarded._bodies.held == 0


def test_a_slow_answer_is_no_slow_body() -> None:
    guarded = guard()
    guarded._bodies._seconds = 0.05

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)
        raise TimeoutError("of the application")

    guarded._app = app
    assert run(raw(guarded, [b"12"], {}))[0] == 500


def test_bodies_of_all_together_are_bounded() -> None:
    guarded = guard(body=100)
    guarded._bodies.held = 795
    status, body = run(raw(guarded, [b"1" * 10], {}))
    assert status == 503 and json.loads(body)["error"]["code"] == "busy"
    assert guarded._bodies.held == 795
    guarded._bodies.held = 0
    assert run(raw(guarded, [b"1" * 10], {}))[0] == 200
    assert guarded._bodies.held == 0


def test_a_client_that_leaves_while_it_speaks_is_not_answered(capsys: Any) -> None:
    assert run(raw(guard(), [b"1", None], {})) == (0, b"")
    assert capsys.readouterr().err == ""


def test_requests_that_do_something_are_counted_by_client() -> None:
    guarded = guard(TOKENS, rate=3)
    ask = asking(guarded)
    ann, bob = ({"Authorization": f"Bearer {token}"} for token in (ANN, BOB))
    assert [ask("POST", "/v1/me", headers=ann).status_code for _ in range(4)] == [
        200,
        200,
        200,
        429,
    ]
    late = ask("POST", "/v1/me", headers=ann)
    assert (
        "too many requests a minute" in reason_of(late)
        and 1 <= int(late.headers["retry-after"]) <= 20
    )
    assert ask("GET", "/v1/me", headers=ann).status_code == 200
    assert ask("POST", "/v1/me", headers=bob).status_code == 200


def test_new_names_of_one_address_are_counted_together() -> None:
    """Where names are not given out, one who changes his is not a new client each time."""
    ask = asking(guard(rate=5))
    statuses = [
        ask("POST", "/v1/me", headers={"Authorization": f"Bearer {number}"}).status_code
        for number in range(8)
    ]
    assert statuses == [200] * 5 + [429] * 3


def test_requests_at_once_are_bounded_by_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "AT_ONCE", 2)
    guarded, open_ = guard(TOKENS), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await open_.wait()
        await PlainTextResponse("done")(scope, receive, send)

    guarded._app = app
    ann, bob = ({"authorization": f"Bearer {token}"} for token in (ANN, BOB))

    async def all_of_them() -> list[int]:
        waiting = [asyncio.create_task(raw(guarded, [], ann, "GET", "/v1/me")) for _ in range(2)]
        other = asyncio.create_task(raw(guarded, [], bob, "GET", "/v1/me"))
        await asyncio.sleep(0)
        third = await raw(guarded, [], ann, "GET", "/v1/me")
        open_.set()
        done = [await one for one in (*waiting, other)]
        after = await raw(guarded, [], ann, "GET", "/v1/me")
        return [status for status, _ in (third, *done, after)]

    assert run(all_of_them()) == [429, 200, 200, 200, 200]
