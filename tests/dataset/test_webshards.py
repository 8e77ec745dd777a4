"""WebDataset shards: what is grouped, what breaks off, and what is read over http and s3."""

import http.server
import importlib.util
import io
import shutil
import stat
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pictures
import pytest

from pixart.dataset.samples import Item, Rejected, Sample
from pixart.dataset.sources import open_source

needs_webdataset = pytest.mark.skipif(
    importlib.util.find_spec("webdataset") is None, reason="needs pip install webdataset"
)


def shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def good(file: Path, *keys: str) -> Path:
    members = {}
    for seed, key in enumerate(keys):
        members |= {f"{key}.png": pictures.png(seed=seed), f"{key}.txt": key.encode()}
    return shard(file, members)


def prompts(items: list[Item]) -> list[str]:
    return [item.captions["prompt"] for item in items if isinstance(item, Sample)]


def test_members_with_one_key_are_one_sample(tmp_path: Path) -> None:
    file = shard(
        tmp_path / "s.tar",
        {
            "a/0.png": pictures.png(seed=1),
            "a/0.txt": b"raw",
            "a/0.Long.txt": b"a long one",
            "a/0.json": b'{"sharegpt4v": "share", "width": 80}',
            "a/1.jpg": pictures.png(seed=2),
            "a/1.txt": b" ",
            "a/2.txt": b"no picture",
            "a/3.png": pictures.png(),
            "a/4.png": pictures.png(),
            "a/4.json": b"{",
        },
    )
    first, blank, alone, bare, bad = open_source(file)
    assert isinstance(first, Sample) and first.read() == pictures.png(seed=1)
    assert dict(first.captions) == {"prompt": "raw", "long": "a long one", "sharegpt4v": "share"}
    assert first.key == f"{file}#a/0"
    assert isinstance(blank, Sample) and blank.uncaptioned == "empty caption"
    assert isinstance(alone, Rejected) and alone.reason.startswith("missing file: no picture")
    assert isinstance(bare, Sample) and bare.uncaptioned.startswith("missing file")
    assert isinstance(bad, Rejected) and bad.reason.startswith("unreadable caption")


def test_a_folder_of_shards_is_read_in_order(tmp_path: Path) -> None:
    good(tmp_path / "b.tar", "2", "3")
    good(tmp_path / "a.tar", "0", "1")
    assert prompts(list(open_source(tmp_path))) == ["0", "1", "2", "3"]


def test_a_shard_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    content = good(tmp_path / "a.tar", "0", "1", "2").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: content.index(b"2.txt") + 512])
    good(tmp_path / "b.tar", "3")
    items = list(open_source(tmp_path))
    assert prompts(items) == ["0", "1", "3"]
    torn, broken = (item for item in items if isinstance(item, Rejected))
    assert torn.path.endswith("a.tar#2") and torn.reason.startswith("truncated shard")
    assert broken.path.endswith("a.tar") and broken.reason.startswith("unreadable shard")


def test_a_shard_that_is_none_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    for source in (tmp_path / "a.tar", tmp_path / "absent.tar"):
        (item,) = open_source(source)
        assert isinstance(item, Rejected) and item.reason.startswith("unreadable shard")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@needs_webdataset
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_braces_and_http_go_through_webdataset(tmp_path: Path, server: str) -> None:
    for number in range(3):
        good(tmp_path / f"s-{number}.tar", str(number))
    assert prompts(list(open_source(f"{tmp_path}/s-{{0..2}}.tar"))) == ["0", "1", "2"]
    assert prompts(list(open_source(f"{server}/s-{{1..2}}.tar"))) == ["1", "2"]
    (absent,) = open_source(f"{server}/absent.tar")
    assert isinstance(absent, Rejected) and absent.path == f"{server}/absent.tar"


@needs_webdataset
def test_s3_goes_through_the_aws_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = good(tmp_path / "data" / "s.tar", "0")
    aws = tmp_path / "bin" / "aws"
    aws.parent.mkdir()
    aws.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "s3 cp s3://b/s.tar -" ] && cat {file}\n')
    aws.chmod(aws.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(aws.parent), prepend=":")
    assert prompts(list(open_source("s3://b/s.tar"))) == ["0"]


def test_without_webdataset_a_url_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install webdataset"):
        list(open_source("http://localhost/a.tar"))
