"""Folders and stores of objects: whole or not there, and refusals that hold no secrets."""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pixart import storage as module
from pixart.command import exit_code, message_of
from pixart.storage import Folder, Storage, Store, open_storage

SECRET = "wJalrXUtnFEMI%2FK7MDENG"


@pytest.fixture(params=["folder", "store"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    """A folder, and a store whose pyarrow file system writes to one."""
    if request.param == "folder":
        return open_storage(tmp_path / "tars")
    fs = pytest.importorskip("pyarrow.fs")
    (tmp_path / "bucket").mkdir()
    system = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(module, "_file_system", lambda uri: (system, "bucket"))
    return open_storage("s3:/bucket")


def test_what_is_written_is_there(storage: Storage) -> None:
    assert [*storage.names()] == [] and not storage.exists("1.tar")
    storage.write("1.tar", b"first of all")
    with storage.writing("0.tar") as path:
        path.write_bytes(b"second")
        assert not storage.exists("0.tar")
    assert [*storage.names()] == ["0.tar", "1.tar"]
    assert (storage.size("1.tar"), storage.head("1.tar", 5)) == (12, b"first")
    assert storage.read("0.tar") == b"second"


def test_folders_in_a_place_are_not_looked_into(storage: Storage, tmp_path: Path) -> None:
    for place in ("tars", "bucket"):
        (tmp_path / place / "others" / "deep").mkdir(parents=True)
    for name in ("1.tar", "others/2.tar", "others/deep/3.tar"):
        storage.write(name, b"")
    assert [*storage.names()] == ["1.tar"] and storage.exists("others/deep/3.tar")


def test_what_is_not_finished_is_not_there(storage: Storage) -> None:
    with pytest.raises(KeyError), storage.writing("0.tar") as path:
        path.write_bytes(b"half")
        raise KeyError
    assert [*storage.names()] == []
    with pytest.raises(FileNotFoundError):
        storage.read("0.tar")


KILLED = """
import os, sys
from pixart.storage import Folder
folder = Folder(sys.argv[1])
with folder.claimed("0.tar", wait=True), folder.writing("0.tar") as path:
    path.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_goes_with_the_next_claim(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120)
    left = [*tmp_path.glob(".0.tar.*")]
    assert left, "it was to be killed in the middle"
    folder = Folder(str(tmp_path))
    with folder.claimed("1.tar", wait=False) as is_ours:
        assert is_ours and [*tmp_path.glob(".0.tar.*")] == left
    with folder.claimed("0.tar", wait=False) as is_ours:
        assert is_ours and not [*tmp_path.glob(".0.tar.*")]


def test_claims_of_many_that_come_and_go_do_not_trip_over_each_other(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))

    def come_and_go(name: str) -> int:
        count = 0
        for _ in range(100):
            with folder.claimed(name, wait=True) as is_ours:
                count += is_ours
        return count

    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(come_and_go, "abcd")] == [100] * 4
    assert not [*tmp_path.iterdir()]


class _FakeS3(BaseHTTPRequestHandler):
    """Refuses everything, with the code that stands first in a path's key."""

    def _refuse(self) -> None:
        code = self.path.partition("?")[0].split("/")[2]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        )
        self.send_response(404 if code == "NoSuchBucket" else 403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = _refuse

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _FakeS3) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("NoSuchBucket", "there is no such bucket; make it"),
        ("AccessDenied", "the store refuses; give credentials"),
        ("InvalidAccessKeyId", "the store refuses; give credentials"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_refused_without_secrets(
    port: int, code: str, reason: str
) -> None:
    pytest.importorskip("pyarrow.fs")
    uri = f"s3://AKIAIOSFODNN7:{SECRET}@bucket/{code}/tars?region=eu-west-1&scheme=http"
    with pytest.raises(ValueError) as error:
        open_storage(f"{uri}&endpoint_override=127.0.0.1%3A{port}")
    said = str(error.value)
    assert said.startswith(f"s3://bucket/{code}/tars: {reason}") and "\n" not in said
    assert "AKIA" not in said and "wJalr" not in said


def test_credentials_stay_out_of_what_is_printed() -> None:
    store = Store(f"s3://AKIAIOSFODNN7:{SECRET}@bucket/tars?region=eu-west-1")
    assert store.place == "s3://bucket/tars"
    assert "AKIA" not in repr(store) and pickle.loads(pickle.dumps(store)) == store


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://user:word@host/x", "must be a folder, s3://, gs:// or file://, got ftp://..."),
        ("s3://", "must be followed by a bucket"),
        ("s3://key@/tars", "must be followed by a bucket"),
        ("s3://KEY:se/xyzzy@bucket/tars", "percent-encoded"),
        ("file://host/tars", "must be followed by a path of this machine"),
        ("file://word:xyzzy@host/tars", "got another"),
        ("file:///tmp/tars?x=xyzzy", r"\? in it as %3F"),
        ("file:///tmp/%00", "must be the path of a folder"),
        ("s3://KEY:xyzzy?x@bucket/tars", "percent-encoded .*, got another"),
        ("s3://KEY:xyzzy#x@bucket/tars", "percent-encoded .*, got another"),
        ("s3://KEY:xyzzy@x@bucket/tars", "percent-encoded .*, got another"),
        ("s3://KEY:xyz\nxyzzy@bucket/tars", "percent-encoded .*, got another"),
        ("s3://KEY:xyzzy@bucket:80/tars?secret=xyzzy", "percent-encoded .*, got another"),
        ("s3://bucket:99999/tars?secret=xyzzy", "percent-encoded .*, got s3://bucket:99999/tars"),
        ("s3://[bucket/tars", r"percent-encoded .*, got s3://\[bucket/tars"),
        ("s3://bucket/a b#c", "percent-encoded .*, got s3://bucket/a b#c"),
        ("s3://bucket/a/%2e%2e/b", "must have no . and .. in its path"),
        ("/dev/null", "must be a folder, it is a file"),
        ("a" * 5000, "cannot be written .File name too long"),
    ],
)
def test_places_that_cannot_be(place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_storage(place)
    said = str(error.value)
    assert "xyzzy" not in said and "word" not in said and "\n" not in said and len(said) < 1000


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    place = "/proc/nobody/tars" if os.name == "posix" and Path("/proc").is_dir() else None
    if place is None:
        pytest.skip("no folder that even root cannot write to")
    with pytest.raises(ValueError, match="cannot be written"):
        open_storage(place)


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    assert open_storage(f"file://{tmp_path}/a%20b") == Folder(f"{tmp_path}/a b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_neither_waited_for_nor_replaced(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    (tmp_path / "0.tar").mkdir()
    os.mkfifo(tmp_path / "1.tar")
    for name in ("0.tar", "1.tar"):
        with pytest.raises(OSError, match="is a folder, a pipe or a device") as error:
            folder.head(name, 10)
        assert exit_code(error.value) == 2 and name in message_of(error.value)
        with pytest.raises(OSError, match="is a folder, a pipe or a device"):
            folder.write(name, b"new")
    assert not [*folder.names()] and len([*tmp_path.iterdir()]) == 2


def test_folders_within_are_not_gone_through(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.tar").touch()
    (tmp_path / "1.tar").touch()
    assert [*Folder(str(tmp_path)).names()] == ["1.tar"]


def test_without_pyarrow_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.fs", None)
    module._file_system.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"pixart-fast\[ray\]\""):
        open_storage("s3://bucket/tars")
