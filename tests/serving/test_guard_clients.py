"""Tokens of a file, cookies of browsers, and whom each stands for."""

import base64
import os
from pathlib import Path

import pytest

from pixart.serving.guarding import clients
from pixart.serving.guarding.clients import Clients, read_tokens, token_of

ANN, BOB = "ann's-token-0123456789", "bob's-token-0123456789"


def file_of(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_tokens_are_read_by_name_past_comments(tmp_path: Path) -> None:
    path = file_of(tmp_path, f"# who may draw\n\nann:{ANN}\n  bob : {BOB}  \n")
    assert read_tokens(path) == {"ann": ANN, "bob": BOB}


def test_a_token_may_have_colons(tmp_path: Path) -> None:
    assert read_tokens(file_of(tmp_path, "ann:a:b:c:d:e:f:g:h:i")) == {"ann": "a:b:c:d:e:f:g:h:i"}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "must have a line NAME:TOKEN"),
        ("# nobody\n\n", "must have a line NAME:TOKEN"),
        ("ann\n", "line 1 must be NAME:TOKEN"),
        (f":{ANN}\n", "line 1 must be NAME:TOKEN"),
        (f"an n:{ANN}\n", "line 1 must be NAME:TOKEN"),
        (f"{'a' * 65}:{ANN}\n", "line 1 must be NAME:TOKEN"),
        ("ann:fifteen-letters\n", "line 1: a token must have 16 to 512 characters, this has 15"),
        (f"ann:{'a' * 513}\n", "line 1: a token must have 16 to 512 characters, this has 513"),
        ("ann:sixteen letters and more\n", "line 1: a token must be of ASCII characters, without"),
        ("ann:sechzehn-Zeichen-ä\n", "line 1: a token must be of ASCII characters"),
        (f"ann:{ANN}\nann:{BOB}\n", "line 2 gives the name ann again"),
        (f"ann:{ANN}\n#\nbob:{ANN}\n", "line 3 gives a token again"),
    ],
)
def test_a_file_that_is_not_fit_is_one_line_that_shows_no_token(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = file_of(tmp_path, text)
    with pytest.raises(ValueError, match=f"^--token-file {path}:? ?{reason}") as refused:
        read_tokens(path)
    assert "\n" not in str(refused.value)
    for secret in (ANN, BOB, "sechzehn", "fifteen", "sixteen", "a" * 20):
        assert secret not in str(refused.value).replace(str(path), "")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = file_of(tmp_path, f"ann:{ANN}\n", mode)
    with pytest.raises(ValueError, match="its owner alone; chmod 600"):
        read_tokens(path)


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_tokens(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot be read|must be a file"):
        read_tokens(tmp_path)
    path = file_of(tmp_path, "")
    path.write_bytes(b"ann:\xff\xfe" + ANN.encode())
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_tokens(path)
    path.write_bytes(b"#" * (clients.MAX_FILE + 1))
    with pytest.raises(ValueError, match="bytes at most"):
        read_tokens(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes of files")
def test_a_pipe_to_which_nobody_writes_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ValueError, match="must be a file, it is none"):
        read_tokens(tmp_path / "pipe")


def test_a_token_names_its_client_and_no_other_text_does() -> None:
    known = Clients({"ann": ANN, "bob": BOB})
    assert known.has_tokens
    assert known.named(ANN) == "ann" and known.named(BOB) == "bob"
    for other in ("", ANN[:-1], ANN + " ", ANN.upper(), "ann", "\ud800"):
        assert known.named(other) is None


def test_every_token_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an answer's time could tell is which one it was, or how much of it was right."""
    compared: list[int] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(len(left))
        assert len(left) == len(right)
        return left == right

    known = Clients({"ann": ANN, "bob": BOB, "eve": "eve's-token-0123456789"})
    monkeypatch.setattr(clients.hmac, "compare_digest", compare)
    for token in (ANN, BOB, "", "a" * 1000):
        known.named(token)
    assert compared == [32] * 12


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "header, token",
    [
        (f"Bearer {ANN}", ANN),
        (f"bearer   {ANN} ", ANN),
        (basic(f"anybody:{ANN}"), ANN),
        (basic(f":{ANN}"), ANN),
        (basic("ann:a:b"), "a:b"),
        (basic(ANN), None),
        (basic("ann:"), None),
        ("Basic !!!", None),
        ("Basic " + base64.b64encode(b"a:\xff").decode(), None),
        ("Bearer", None),
        (ANN, None),
        (f"Digest {ANN}", None),
        ("", None),
    ],
)
def test_a_token_is_sent_as_a_bearer_or_as_the_password_of_basic(
    header: str, token: str | None
) -> None:
    assert token_of(header) == token


def test_a_session_is_not_the_token_and_ends_when_it_is_closed() -> None:
    known = Clients({"ann": ANN})
    cookie, other = known.open_session("ann"), known.open_session("ann")
    assert ANN not in cookie and cookie != other
    assert known.session(cookie) == "ann"
    known.close_session(cookie)
    assert known.session(cookie) is None and known.session(other) == "ann"


def test_a_session_of_another_process_is_nobodys() -> None:
    assert Clients({"ann": ANN}).session(Clients({"ann": ANN}).open_session("ann")) is None


def test_a_session_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Clients({"ann": ANN})
    cookie = known.open_session("ann")
    later = clients.time.monotonic() + clients.SESSION_SECONDS + 1
    monkeypatch.setattr(clients.time, "monotonic", lambda: later)
    assert known.session(cookie) is None


def test_sessions_are_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_SESSIONS", 3)
    known = Clients({"ann": ANN})
    cookies = [known.open_session("ann") for _ in range(5)]
    assert [known.session(cookie) for cookie in cookies] == [None, None, "ann", "ann", "ann"]


def test_visitors_are_those_to_whom_a_cookie_was_given() -> None:
    known = Clients()
    assert not known.has_tokens
    one, other = known.new_visitor(), known.new_visitor()
    assert known.visitor(one) is not None and known.visitor(one) != known.visitor(other)
    forged = ("0" * 24 if one[:24] != "0" * 24 else "1" * 24) + one[24:]
    for cookie in ("", forged, one[:-1], one + "0", one.upper(), "x" * 64, "é" * 64):
        assert known.visitor(cookie) is None or cookie == one
    assert Clients().visitor(one) is None  # of another process


def test_credentials_of_nobody_stand_for_whoever_sends_them_and_are_not_kept() -> None:
    known = Clients()
    assert known.bearer("Bearer one") == known.bearer("Bearer one") != known.bearer("Bearer two")
    assert "one" not in known.bearer("Bearer one")


def test_lists_of_words_are_signed_apart() -> None:
    known = Clients()
    assert (
        len(
            {
                known.sign("ab", "c"),
                known.sign("a", "bc"),
                known.sign("abc"),
                known.sign("a", "b", "c"),
            }
        )
        == 4
    )
