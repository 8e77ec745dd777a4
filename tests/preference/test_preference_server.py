"""`preference serve`: what a voter without a browser's help meets, and what others may try."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from preference_study import build_study
from voting import Voter, hidden, served

from pixart.evaluation.preference.server import Server
from pixart.evaluation.preference.study import KEY, STUDY, Key, Study
from pixart.evaluation.preference.votes import read_votes

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Key]:
    return build_study(tmp_path_factory.mktemp("built"), 5, ("ours", "theirs"))


@pytest.fixture
def server(built: tuple[Study, Key]) -> Iterator[Server]:
    votes = built[0].folder / "votes.jsonl"
    votes.unlink(missing_ok=True)
    with served(*built) as server:
        yield server


def lines(server: Server) -> list[dict[str, object]]:
    content = (server.booth.study.folder / "votes.jsonl").read_text()
    return [json.loads(line) for line in content.splitlines()]


def test_a_voter_judges_every_pair_once_by_forms_alone(server: Server) -> None:
    voter = Voter(server)
    total = len(server.booth.study.pairs)
    assert (
        "Begin" in voter.get("/")
        and "HttpOnly; SameSite=Lax" in voter.ask("GET", "/")[1]["Set-Cookie"]
    )
    seen = []
    for number in range(total):
        assert f"Pair {number + 1} of {total}" in voter.get("/vote")
        seen.append(voter.vote("tie", "right"))
    assert sorted(seen) == sorted(server.booth.study.by_id)
    assert f"all {total} pairs" in voter.get("/vote")
    kept = lines(server)
    assert [one["order"] for one in kept] == list(range(1, total + 1))
    assert {one["quality"] for one in kept} == {"tie"} and len({one["voter"] for one in kept}) == 1
    for one in kept:
        assert set(one) == {"pair", "voter", "quality", "alignment", "ms", "order", "agent"}
        assert 0 <= int(str(one["ms"])) < 60_000 and one["agent"] == "server desk form"
    # The cookie opens the voter's ballot: who reads the votes must not have it.
    assert voter.cookie.partition("=")[2][:16] not in json.dumps(kept)
    assert f"{total} votes by 1 voter in all" in voter.get("/progress")


def test_no_page_says_a_word_of_the_models(server: Server, built: tuple[Study, Key]) -> None:
    voter = Voter(server)
    voter.vote()
    pages = [voter.get(path) for path in ("/", "/vote", "/progress", "/vote.js", "/vote.css")]
    _, headers, _ = voter.ask("GET", f"/picture/{built[0].pairs[0].left}")
    text = "\n".join([*pages, str(headers)])
    for word in ("ours", "theirs", built[1].secret, "Last-Modified", "ETag"):
        assert not re.search(rf"\b{word}\b", text)
    for path in (KEY, STUDY, "votes.jsonl", "judgements.jsonl"):
        assert voter.ask("GET", f"/{path}")[0] == 404
        assert voter.ask("GET", f"/picture/{path}")[0] == 404


def test_pairs_with_fewest_votes_come_first(server: Server) -> None:
    # Not all pairs end with equally many: who comes last may have judged those that lack a vote.
    voters = [Voter(server) for _ in range(4)]
    votes = Counter({pair.id: 0 for pair in server.booth.study.pairs})
    judged: list[set[str]] = [set() for _ in voters]
    for number in range(2 * len(votes)):
        mine = judged[number % 4]
        fewest = min(count for pair, count in votes.items() if pair not in mine)
        pair = voters[number % 4].vote()
        assert pair not in mine and votes[pair] == fewest
        mine.add(pair)
        votes[pair] += 1
    assert Counter(str(one["pair"]) for one in lines(server)) == votes


def test_ties_between_pairs_are_broken_otherwise_for_each_voter_and_alike_for_one(
    server: Server,
) -> None:
    first = {Voter(server).begin()["pair"] for _ in range(20)}
    assert len(first) > 2
    voter = Voter(server)
    assert voter.begin()["pair"] == voter.begin()["pair"]


def test_the_same_vote_twice_is_one_and_another_takes_its_place(server: Server) -> None:
    voter = Voter(server)
    fields = voter.begin() | {"quality": "left", "alignment": "left"}
    for _ in range(3):
        assert voter.post("/vote", fields=fields)[0] == 303
    assert len(lines(server)) == 1
    assert voter.post("/vote", fields=fields | {"quality": "tie"})[0] == 303
    standing, orders = read_votes(server.booth.study)
    assert [vote.quality for vote in standing.values()] == ["tie"] and list(orders.values()) == [2]
    assert server.booth.tally()[0] == 1


def test_undoing_goes_back_vote_by_vote(server: Server) -> None:
    voter = Voter(server)
    pairs = [voter.vote() for _ in range(3)]
    token = hidden(voter.get("/vote"))["token"]
    for left in (2, 1):
        status, place = voter.post("/undo", fields={"token": token})
        assert (status, place) == (303, f"/vote?pair={pairs[left]}")
        assert hidden(voter.get(place))["pair"] == pairs[left]
        assert len(read_votes(server.booth.study)[0]) == left
    again = hidden(voter.get(place)) | {"quality": "tie", "alignment": "tie"}
    assert voter.post("/vote", fields=again)[0] == 303
    standing, _ = read_votes(server.booth.study)
    assert [vote.pair for vote in standing.values()] == pairs[:2]
    assert Voter(server).get("/")  # nobody else is asked
    other = Voter(server)
    assert other.post("/undo", fields={"token": other.begin()["token"]}) == (303, "/vote")


def test_votes_and_voters_survive_the_server(built: tuple[Study, Key]) -> None:
    (built[0].folder / "votes.jsonl").unlink(missing_ok=True)
    with served(*built) as server:
        voter = Voter(server)
        voter.vote()
    with served(*built) as server:
        voter.port = int(server.server_address[1])
        assert "You: 1 of" in voter.get("/")
        voter.vote()
        assert [one["order"] for one in lines(server)] == [1, 2]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "a b"]
)
def test_a_foreign_name_reads_nothing(server: Server, host: str) -> None:
    for path in ("/", "/vote", "/vote.css", f"/picture/{server.booth.study.pairs[0].left}"):
        assert Voter(server).ask("GET", path, Host=host)[0] == 421
    assert Voter(server).ask("POST", "/vote", "", Host=host)[0] == 421


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "127.0.0.1", "192.168.1.7:80", "[::1]:8000"]
)
def test_addresses_and_the_own_name_are_known(server: Server, host: str) -> None:
    assert Voter(server).ask("GET", "/", Host=host)[0] == 200


def test_names_that_are_given_are_known(built: tuple[Study, Key]) -> None:
    with served(*built, name=("Study.example.org",)) as server:
        assert Voter(server).ask("GET", "/", Host="study.example.org")[0] == 200


def test_a_form_needs_the_token_of_the_voter_and_comes_from_our_page(server: Server) -> None:
    voter, other = Voter(server), Voter(server)
    fields = voter.begin() | {"quality": "left", "alignment": "left"}
    theirs = other.begin()["token"]
    for token in ("", "0" * 32, theirs):
        assert voter.post("/vote", fields=fields | {"token": token})[0] == 403
    assert voter.post("/vote", fields=fields, Origin="http://evil.example")[0] == 403
    assert voter.post("/vote", fields=fields, Origin="null")[0] == 403
    for cookie in ("", "x=y", f"{server.cookie}=zz", f"{server.cookie}={'0' * 31}"):
        assert voter.post("/vote", fields=fields, Cookie=cookie)[0] == 403
    assert lines(server) == []
    assert voter.post("/vote", fields=fields, Origin=f"http://127.0.0.1:{voter.port}")[0] == 303


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"quality": "first"}, 400),
        ({"quality": ""}, 400),
        ({"alignment": "left\n"}, 400),
        ({"pair": "0" * 16}, 400),
        ({"pair": "../key.json"}, 400),
        ({f"more{k}": "1" for k in range(20)}, 400),
        ({"quality": "x" * 5000}, 413),
    ],
)
def test_bad_votes_are_refused_and_not_kept(
    server: Server, change: dict[str, str], status: int
) -> None:
    voter = Voter(server)
    fields = voter.begin() | {"quality": "left", "alignment": "left"} | change
    assert voter.post("/vote", fields=fields)[0] == status
    assert lines(server) == []


def test_bodies_are_bounded_and_of_forms(server: Server) -> None:
    voter = Voter(server)
    voter.begin()
    form = "application/x-www-form-urlencoded"
    assert voter.ask("POST", "/vote", b"x" * 300_000, Content_Type=form)[0] == 413
    assert voter.ask("POST", "/vote", b"{}", Content_Type="application/json")[0] == 415
    assert voter.ask("POST", "/vote", b"\xff=\xff", Content_Type=form)[0] == 400
    assert voter.ask("POST", "/elsewhere", b"", Content_Type=form)[0] == 404
    assert voter.ask("PUT", "/vote", b"")[0] == 501
    with socket.create_connection(("127.0.0.1", voter.port), timeout=10) as raw:
        raw.sendall(
            b"POST /vote HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            + form.encode()
            + b"\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.0 411")


@pytest.mark.parametrize(
    "path",
    ["/picture/../key.json", "/picture/%2e%2e/key.json", "/picture//etc/passwd", "/../key.json", "/picture/",
     "/vote.css/../key.json", "//evil.example/key.json", "/picture/..%2fkey.json", "http://x/key.json"],
)  # fmt: skip
def test_no_path_leads_out_of_the_pictures(
    server: Server, path: str, built: tuple[Study, Key]
) -> None:
    status, _, text = Voter(server).ask("GET", path)
    assert status in (404, 421) and built[1].secret not in text


def test_pages_may_load_nothing_from_elsewhere_and_run_no_script_but_ours(server: Server) -> None:
    voter = Voter(server)
    voter.begin()
    for path in ("/", "/vote", "/progress", "/no-such-page", "/vote.js"):
        _, headers, text = voter.ask("GET", path)
        policy = headers["Content-Security-Policy"]
        assert (
            "default-src 'none'" in policy
            and "unsafe" not in policy
            and "frame-ancestors 'none'" in policy
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert (
            not re.search(r"<style|<script>|\son\w+=|style=|https?://", text) or path == "/vote.js"
        )


def test_prompts_are_text_and_no_markup(tmp_path: Path) -> None:
    study, key = build_study(tmp_path, 2)
    values = json.loads((study.folder / STUDY).read_text())
    for pair in values["pairs"]:
        pair["prompt"] = '<script>alert(1)</script>"&'
    (study.folder / STUDY).write_text(json.dumps(values))
    from pixart.evaluation.preference.study import read_study

    with served(read_study(study.folder), key) as server:
        text = Voter(server)
        text.get("/")
        assert "&lt;script&gt;alert(1)" in text.get("/vote") and "<script>alert" not in text.get(
            "/vote"
        )


def test_a_vote_that_the_disk_refuses_is_no_vote(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    voter = Voter(server)
    voter.vote()
    before = (server.booth.study.folder / "votes.jsonl").read_bytes()
    fields = voter.begin() | {"quality": "left", "alignment": "left"}

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixart.evaluation.preference.log.os.fsync", refuse)
    assert voter.post("/vote", fields=fields)[0] == 503
    assert (server.booth.study.folder / "votes.jsonl").read_bytes() == before
    assert server.booth.done(server.passes.voter(voter.cookie.partition("=")[2])) == 1
    assert "a vote was not kept" in capsys.readouterr().err
    monkeypatch.undo()
    assert voter.post("/vote", fields=fields)[0] == 303


@pytest.fixture
def command(built: tuple[Study, Key]) -> Iterator[subprocess.Popen[str]]:
    (built[0].folder / "votes.jsonl").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "pixart.preference", "serve", str(built[0].folder), "--port", "0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_ends_the_server_with_130_and_no_vote_lost_and_two_do_not_share_a_study(
    command: subprocess.Popen[str], built: tuple[Study, Key]
) -> None:
    assert command.stdout is not None
    address = re.match(r"http://127\.0\.0\.1:(\d+)/", command.stdout.readline())
    assert address

    class Running:
        server_address = ("127.0.0.1", int(address[1]))

    voter = Voter(Running())  # type: ignore[arg-type]
    voter.vote()
    # A browser that holds a connection open, and one in the middle of a form.
    idle = socket.create_connection(Running.server_address)
    half = socket.create_connection(Running.server_address)
    half.sendall(b"POST /vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
                 b"Content-Type: application/x-www-form-urlencoded\r\n\r\npair=")  # fmt: skip
    for arguments in (
        ["serve", str(built[0].folder), "--port", "0"],
        ["add", str(built[0].folder), "x.json"],
    ):
        (built[0].folder.parent / "x.json").write_text("{}")
        second = subprocess.run(
            [sys.executable, "-m", "pixart.preference", *arguments], cwd=built[0].folder.parent,
            capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        )  # fmt: skip
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        if arguments[0] == "serve":
            assert f"is held by pid {command.pid}" in second.stderr
    command.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = command.communicate(timeout=30)
    assert command.returncode == 130 and time.monotonic() - began < 10
    assert err == "pixart.preference: cancelled; votes and judgements so far are kept\n"
    assert len(read_votes(built[0])[0]) == 1
    idle.close()
    half.close()


def test_a_port_in_use_and_a_folder_that_is_no_study_are_one_line(
    built: tuple[Study, Key], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pixart.preference import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(built[0].folder), "--port", port]) == 2
    err = capsys.readouterr().err
    assert f"port {port} cannot be listened at" in err and "give another --port" in err
    assert main(["serve", str(tmp_path)]) == 2
    assert "must be a study" in capsys.readouterr().err
    assert main(["serve", str(built[0].folder), "--port", "70000"]) == 2


def test_cookies_of_other_programs_hide_no_voter(server: Server) -> None:
    voter = Voter(server)
    fields = voter.begin() | {"quality": "left", "alignment": "tie"}
    own = voter.cookie
    for number, other in enumerate(['a[b]={"c":1}; ', 'a="unended; ', "\x7f=; ;;=; ", "x; "]):
        voter.cookie = f"{other}{own}; =;"
        changed = fields | {"quality": ("right", "left")[number % 2]}
        assert voter.post("/vote", fields=changed) == (303, "/vote")
    assert server.booth.tally()[:2] == (1, 1)


def test_addresses_that_are_none_are_answered(server: Server) -> None:
    voter = Voter(server)
    fields = voter.begin() | {"quality": "left", "alignment": "tie"}
    assert voter.ask("GET", "HTTP://[::1")[0] == 400
    assert voter.post("/vote", fields=fields, Origin="http://[")[0] == 400
    assert server.booth.tally()[0] == 0
