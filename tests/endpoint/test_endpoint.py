"""What a captioning server may do: lead elsewhere, repeat secrets, answer without end."""

import gzip
import json
import logging
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pictures
import pytest
from caption_server import Server
from caption_server import server as server  # a fixture

from pixart import data, endpoint
from pixart.endpoint import Endpoint, EndpointError, Refused

KEY = "sk-proj-Zz9+secret/key"
QUESTION = {"model": "vlm"}


def fine(_: object = None) -> Any:
    return 200, Server.completion("fine")


def redirected(place: str, status: int = 307) -> Callable[[Any], Any]:
    return lambda _: (status, b"", {"Location": place})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "place",
    [
        "http://localhost:{port}/v1/chat/completions",  # another name of the same machine
        "http://127.0.0.1:{other}/v1/chat/completions",
        "https://127.0.0.1:{port}/v1/chat/completions",
        "//localhost:{port}/take",
        "http://user:pw@127.0.0.1:{other}/",
        "file:///etc/passwd",
        "http://[::1",
    ],
)
def test_no_redirect_leads_to_another_origin(server: Server, place: str, status: int) -> None:
    server.answer = redirected(place.format(port=server.port, other=server.port + 1), status)
    with pytest.raises(EndpointError, match="must not lead elsewhere|303 See Other"):
        Endpoint(server.address, KEY).ask(QUESTION)
    assert len(server.asked) == 1


def test_redirects_within_the_origin_are_followed_and_counted(server: Server) -> None:
    answers = iter([redirected("/v1/chat/completions/")(0), fine()])
    server.answer = lambda _: next(answers)
    assert Endpoint(server.address, KEY).ask(QUESTION) == fine()[1]
    assert [body["path"] for body in server.asked][1] == "/v1/chat/completions/"
    assert server.headers[1]["Authorization"] == f"Bearer {KEY}"
    server.answer = redirected("/v1/chat/completions")
    with pytest.raises(EndpointError, match="leads on more than 5 times"):
        Endpoint(server.address, KEY).ask(QUESTION)


def test_an_address_keeps_its_query_and_its_password_is_sent_as_one(server: Server) -> None:
    address = server.address.replace("//", "//me:p%40ss@") + "/?key=abc%2Fdef"
    Endpoint(address, KEY).ask(QUESTION)
    assert server.asked[0]["path"] == "/v1/chat/completions?key=abc%2Fdef"
    assert server.headers[0]["Authorization"] == "Basic bWU6cEBzcw=="


ECHOES: dict[str, Callable[[Any], Any]] = {
    "refused": lambda h: (401, f"no {h['Authorization']} {KEY}, of me:p@ss, abc/def".encode()),
    "cut": lambda h: (401, ("x" * 280 + " " + KEY).encode()),
    "hidden by a control character": lambda h: (401, f"{KEY[:5]}\x1b[0m\0{KEY[5:]}".encode()),
    "quoted": lambda h: (403, json.dumps({"k": KEY, "p": "p%40ss", "q": "abc%2fdef"}).encode()),
    "of a picture": lambda h: (400, f"bad {KEY} p@ss abc/def".encode()),
    "led elsewhere": lambda h: (302, b"", {"Location": f"http://evil.{KEY[:7]}.x/{KEY}"}),
    "in the answer": lambda h: (200, {"error": f"{KEY} p@ss abc/def"}),
    "packed": lambda h: (200, b"", {"Content-Encoding": f"br {KEY} p@ss"}),
    "in the status": lambda h: lambda c: c.wfile.write(f"HTTP/9 x {KEY} p@ss\r\n\r\n".encode()),
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("with_password", [True, False])
def test_no_message_report_log_or_traceback_holds_a_secret(
    server: Server,
    echo: str,
    with_password: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server.answer = lambda _: ECHOES[echo](server.headers[-1])
    address = server.address
    if with_password:
        address = address.replace("//", "//me:p%40ss@") + "?key=abc%2Fdef"
    source = pictures.folder(tmp_path / "s", 1)
    output = tmp_path / "o.jsonl"
    code = data.main(
        [
            "caption",
            str(source),
            str(output),
            "--model",
            "m",
            "--endpoint",
            address,
            "--workers",
            "1",
        ]
    )
    assert code == (0 if echo == "of a picture" else 1)
    said = "".join(capsys.readouterr()) + caplog.text
    said += "".join(file.read_text() for file in tmp_path.glob("o*"))
    try:
        question = Endpoint(address, KEY)
        question.ask(QUESTION)
    except (EndpointError, Refused):
        said += traceback.format_exc() + repr(question) + repr(question.address)
    for secret in (KEY, KEY[:9], "p@ss", "p%40ss", "abc/def", "abc%2", "bWU6"):
        secret_here = with_password or secret.startswith("sk")
        assert secret not in said or not secret_here, (secret, said)
    assert "\x1b" not in said and "\0" not in said


@pytest.mark.parametrize(
    "address",
    [
        "htps://me:p@ss@host/v1",
        "me:p@ss@host/v1?key=abc",
        "http://me:p@ss@host:99999999/v1",
        "http://me:p@ss@[::1/v1",
        "http://me:p@ss@/v1",
        "http:me:p@ss@host",
        "http://me:p@ss@ho st/",
    ],
)
def test_an_address_that_is_wrong_is_not_shown_with_its_password(address: str) -> None:
    with pytest.raises(ValueError, match="endpoint must begin with http") as caught:
        question = Endpoint(address, None)
        raise AssertionError(question.address)
    assert "p@ss" not in str(caught.value) and "abc" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused_unseen() -> None:
    for key in ("a b", "clé", "a\nb"):
        with pytest.raises(ValueError, match="^OPENAI_API_KEY must be of ASCII") as caught:
            Endpoint("http://localhost/v1", key)
        assert key not in str(caught.value)
    assert Endpoint("http://localhost/v1", " key\r\n")._authorization == "Bearer key"


def trickle(handler: Any, head: bytes) -> None:
    with suppress(OSError):
        handler.wfile.write(head)
        for _ in range(100):
            handler.wfile.write(b"a")
            time.sleep(0.05)


@pytest.mark.parametrize(
    "head",
    [
        b"",  # not even the status ends
        b"HTTP/1.1 200 OK\r\nX-",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_an_answer_that_trickles_in_has_one_deadline(
    server: Server, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.15)
    monkeypatch.setattr(endpoint, "WAITS", (0.0,))
    server.answer = lambda _: lambda handler: trickle(handler, head)
    start = time.monotonic()
    with pytest.raises(EndpointError, match="no whole answer in 0.15 s"):
        Endpoint(server.address, KEY).ask(QUESTION)
    assert time.monotonic() - start < 1.5 and len(server.asked) == 2


def endless(handler: Any, head: bytes, chunk: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
    with suppress(OSError):
        while True:
            handler.wfile.write(chunk)


@pytest.mark.parametrize("kind", ["endless", "chunked", "gzip"])
def test_an_answer_that_is_too_large_is_not_read_to_its_end(
    server: Server, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_ANSWER", 2**20)
    bomb = gzip.compress(bytes(2**24))
    answers: dict[str, Any] = {
        "endless": lambda h: endless(h, b"X: y", bytes(2**16)),
        "chunked": lambda h: endless(
            h, b"Transfer-Encoding: chunked", b"10000\r\n" + bytes(2**16) + b"\r\n"
        ),
        "gzip": (200, bomb, {"Content-Encoding": "gzip"}),
    }
    server.answer = lambda _: answers[kind]
    with pytest.raises(EndpointError, match="must answer in at most 1 MiB"):
        Endpoint(server.address, KEY).ask(QUESTION)
    assert len(server.asked) == 1


def test_an_answer_may_be_packed_with_gzip_and_with_nothing_else(server: Server) -> None:
    packed = gzip.compress(json.dumps(fine()[1]).encode())
    server.answer = lambda _: (200, packed, {"Content-Encoding": "gzip"})
    assert Endpoint(server.address, KEY).ask(QUESTION) == fine()[1]
    assert server.headers[0]["Accept-Encoding"] == "identity"
    server.answer = lambda _: (200, packed, {"Content-Encoding": "gzip, gzip"})
    with pytest.raises(EndpointError, match="unpacked or in gzip, it answers in 'gzip, gzip'"):
        Endpoint(server.address, KEY).ask(QUESTION)


@pytest.mark.parametrize(
    "trouble",
    [
        lambda _: (500, "x"),
        lambda _: (502, "x"),
        lambda _: (429, "x"),
        lambda _: (408, "x"),
        lambda _: lambda handler: handler.connection.close(),
        lambda _: (200, b'{"choices": [', {}),  # broken off where nothing says how long it is
        lambda _: (200, b"{}", {"Content-Length": "9"}),
        lambda _: (200, b"nonsense", {"Content-Encoding": "gzip"}),
        lambda _: (200, b"[" * 10**6),
    ],
)
def test_what_may_pass_is_tried_again_and_not_for_ever(
    server: Server, trouble: Callable[[Any], Any]
) -> None:
    answers = iter([trouble(0), fine()])
    server.answer = lambda _: next(answers)
    assert Endpoint(server.address, KEY).ask(QUESTION) == fine()[1]
    server.answer = trouble
    with pytest.raises(EndpointError, match="must answer, it does not"):
        Endpoint(server.address, KEY).ask(QUESTION)
    assert len(server.asked) == 2 + 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7), ("1.5", 1.5), ("999999", 60), ("1e9", 0), ("-3", 0), ("nan", 0), ("soon", 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 60), ("Thu, 01 Jan 2015 00:00:00 GMT", 0),
    ],
)  # fmt: skip
def test_a_server_may_put_off_the_next_try_within_a_bound(
    server: Server, value: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    answers = iter([(429, "x", {"Retry-After": value}), fine()])
    server.answer = lambda _: next(answers)
    asker = Endpoint(server.address, KEY)
    monkeypatch.setattr(asker._over, "wait", lambda pause: waited.append(pause))
    asker.ask(QUESTION)
    assert waited == [seconds]


def test_a_failure_ends_the_waiting_of_all_threads(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (30.0,))
    statuses = iter([429, 401])
    server.answer = lambda _: (next(statuses, 429), "no")
    asker = Endpoint(server.address, KEY)
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(asker.ask, QUESTION) for _ in range(2)]:
            with pytest.raises(EndpointError):
                future.result()
    assert time.monotonic() - start < 10


def test_captions_hold_no_control_characters(server: Server, tmp_path: Path) -> None:
    said = "\x1b[31mA\x1b]0;title\x07 cat\x00\x9b2J\r\n\u202eon\ud800 a\u2028mat \U0001f469\u200d\U0001f680"
    server.answer = lambda _: (200, server.completion(said))
    source, output = pictures.folder(tmp_path / "s", 1), tmp_path / "o.jsonl"
    options = ["--model", "m", "--endpoint", server.address]
    assert data.main(["caption", str(source), str(output), *options]) == 0
    (line,) = output.read_text().splitlines()
    assert json.loads(line)["captions"]["long"] == "A cat on a mat \U0001f469\u200d\U0001f680"


def test_a_proxy_of_the_environment_is_asked_and_its_password_is_not_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:hunter2@127.0.0.1:{server.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    Endpoint("http://far.example/v1", KEY).ask(QUESTION)
    assert server.asked[0]["path"] == "http://far.example/v1/chat/completions"
    assert server.headers[0]["Host"] == "far.example"
    assert server.headers[0]["Proxy-Authorization"] == "Basic bWU6aHVudGVyMg=="
    server.answer = lambda _: (407, "me:hunter2 bWU6aHVudGVyMg==")
    with pytest.raises(EndpointError, match=r"407 .*\*\*\*") as caught:
        Endpoint("http://far.example/v1", KEY).ask(QUESTION)
    assert "hunter2" not in str(caught.value) and "bWU6" not in str(caught.value)
    monkeypatch.setenv("http_proxy", "socks5://me:hunter2@127.0.0.1")
    with pytest.raises(ValueError, match="^http_proxy must begin with http") as wrong:
        Endpoint("http://far.example/v1", KEY)
    assert "hunter2" not in str(wrong.value)
