"""What a client may send to the page's events, by hand: of any kind, number and order, at any depth.

Nothing of it is a fault of the server, and nothing that a client writes begins a line of its log.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Running, running_service

from pixart.serving.limits import Limits

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_service(ui=True, limits=Limits(rate=1_000_000)) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def events(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {one["api_name"]: one for one in client.get("/config").json()["dependencies"]}


def join(client: httpx.Client, body: Any) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps({"session_hash": "s", **body})
    return client.post("/gradio_api/queue/join", content=content, headers=JSON)


def outcome(client: httpx.Client, session: str) -> dict[str, Any]:
    """How an event has ended."""
    query = {"session_hash": session}
    with client.stream("GET", "/gradio_api/queue/data", params=query) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:") or "{}") if line else {}
            if message.get("msg") in ("process_completed", "unexpected_error"):
                return message
    raise AssertionError("the event has not ended")


def of(event: dict[str, Any], value: Any) -> dict[str, Any]:
    """The same value in all fields of an event."""
    return {"fn_index": event["id"], "data": [value] * len(event["inputs"]), "event_data": value}


@pytest.mark.parametrize("number", [-1, 2, 10**6, 2**70, "0", 1.5, True, [0]])
def test_there_is_no_such_event(client: httpx.Client, events: Any, number: Any) -> None:
    if number == 2:  # what ends another one in the browser: nothing is called
        assert events["unnamed"]["id"] == 2
    answer = join(client, {"fn_index": number, "data": []})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("event", ["on_open", "on_draw", "on_cancel", "on_size", "on_file", "draw"])
@pytest.mark.parametrize("more", [-1, 1])
def test_an_event_has_so_many_values(
    client: httpx.Client, events: Any, event: str, more: int
) -> None:
    count = len(events[event]["inputs"]) + more
    answer = join(
        client, {"fn_index": events[event]["id"], "data": [""] * count if count >= 0 else None}
    )
    assert (answer.status_code, "data must be" in answer.text) == (400, True)


@pytest.mark.parametrize("depth", [70, 900, 960, 990, 1000, 100_000])
def test_values_are_not_nested_deep(client: httpx.Client, depth: int) -> None:
    body = f'{{"session_hash": "s", "fn_index": 1, "data": {"[" * depth}{"]" * depth}}}'
    assert (join(client, body).status_code, join(client, body).json()["error"]["code"]) == (
        400,
        "invalid_json",
    )


def test_half_a_character_is_no_text(client: httpx.Client, events: Any) -> None:
    answer = join(client, of(events["on_draw"], "\ud800"))
    assert (answer.status_code, "UTF-8" in answer.text) == (400, True)


@pytest.mark.parametrize(
    "value",
    [None, 5, -1, 1e999, float("nan"), True, "x", [], [1], [[["a"]]], "9" * 5000, 10**40, "\0"],
    ids=lambda value: repr(value)[:12],
)
@pytest.mark.parametrize(
    "event", ["on_draw", "on_cancel", "on_size", "on_file", "on_again", "draw"]
)
def test_values_of_any_kind_end_an_event_alone(
    running: Running,
    client: httpx.Client,
    events: Any,
    event: str,
    value: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    session = f"{event} {value!r}"[:60]
    body = {**of(events[event], value), "session_hash": session}
    assert join(client, body).status_code == 200
    assert outcome(client, session)["msg"] == "process_completed"
    assert "Traceback" not in capfd.readouterr().err
    assert running.service.queue.figures().is_alive


def test_what_a_client_writes_begins_no_line_of_the_log(
    client: httpx.Client, events: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    value = "x\n2026-01-01 root logged in\x1b[2J"
    assert join(client, {**of(events["on_size"], value), "session_hash": "l"}).status_code == 200
    outcome(client, "l")
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "root logged in" in line] == lines
    assert all(line.startswith("pixart.serve: ") for line in lines)
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("name", ["loras", "controls"])
def test_a_program_hears_what_a_list_is(client: httpx.Client, events: Any, name: str) -> None:
    info = client.get("/gradio_api/info").json()["named_endpoints"]["/draw"]["parameters"]
    names = [one["parameter_name"] for one in info]
    data = [one.get("parameter_default") for one in info]
    data[names.index("prompt")], data[names.index(name)] = "a circle", "x"
    body = {"fn_index": events["draw"]["id"], "data": data, "session_hash": name}
    assert join(client, body).status_code == 200
    assert outcome(client, name)["output"]["error"] == f"{name} must be a list"
