"""WebDataset shards: what is grouped, what breaks off, and what is read over http and s3."""

import gzip
import http.server
import importlib.util
import io
import os
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


def bad(items: list[Item]) -> dict[str, str]:
    return {
        item.path.rpartition("/")[2]: item.reason for item in items if isinstance(item, Rejected)
    }


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_wherever_a_shard_is_cut_it_is_said_and_whole_samples_stay(
    tmp_path: Path, suffix: str
) -> None:
    whole = good(tmp_path / "whole.tar", "0", "1", "2").read_bytes()
    ends = [whole.index(f"{key}.txt".encode()) + 512 + 1 for key in "012"]  # of their contents
    last = ends[-1] + 511
    if suffix == ".tar.gz":
        whole = gzip.compress(whole, 1)
    kept = set()
    for length in range(0, len(whole), 256 if suffix == ".tar" else 400):
        (tmp_path / f"cut{suffix}").write_bytes(whole[:length])
        items = list(open_source(tmp_path / f"cut{suffix}"))
        found = prompts([item for item in items if isinstance(item, Sample) and item.captions])
        kept.add(len(found))
        assert found == ["0", "1", "2"][: len(found)]
        if suffix == ".tar":  # all that lie before the cut
            assert len(found) == sum(end <= length for end in ends)
        if suffix == ".tar.gz" or length < last + 1024:  # two blocks of zeros
            assert "is cut off" in bad(items)[f"cut{suffix}"], length
    assert kept >= {0, 1, 2}


def test_a_shard_that_is_damaged_within_is_said(tmp_path: Path) -> None:
    whole = good(tmp_path / "a.tar", "0", "1", "2").read_bytes()
    place = whole.index(b"1.png")
    for content, reason in (
        (whole[: place + 148] + b"zzzz" + whole[place + 152 :], "damaged header"),
        (whole[: place + 124] + b"\xff" * 12 + whole[place + 136 :], "damaged header"),
        (whole + whole, "goes on behind the end"),
        (whole[:place] + bytes(2 << 20), "zeros"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        items = list(open_source(tmp_path / "a.tar"))
        assert prompts(items)[:1] == ["0"] and reason in bad(items)["a.tar"], reason


def test_a_negative_size_is_refused_at_once(tmp_path: Path) -> None:
    """tarfile of Python before 3.13.6 read some such members for ever."""
    info = tarfile.TarInfo("0.png")
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info.type, info.size = kind, -512
        header = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(header + bytes(4096))
        assert "a size of -512" in bad(list(open_source(tmp_path / "a.tar")))["a.tar"]


@pytest.mark.parametrize("size", [2**62, 2**40])
def test_a_size_beyond_all_bounds_is_refused_at_once(tmp_path: Path, size: int) -> None:
    """tarfile skips such a member by reading at the end of the file, again and again."""
    in_pax, plain = tarfile.TarInfo("0.png"), tarfile.TarInfo("0.png")
    in_pax.pax_headers = {"size": str(size)}
    plain.size = size
    for header in (in_pax.tobuf(tarfile.PAX_FORMAT), plain.tobuf(tarfile.GNU_FORMAT)):
        (tmp_path / "a.tar").write_bytes(header + bytes(4096))
        assert f"a size of {size}" in bad(list(open_source(tmp_path / "a.tar")))["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_of_megabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    """Packed, some kilobytes would take all memory."""
    header = tarfile.TarInfo("0.png")
    header.type, header.size = kind, 2**21
    with gzip.open(tmp_path / "a.tar", "w") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(2**22))
    assert "a size of 2097152" in bad(list(open_source(tmp_path / "a.tar")))["a.tar"]


def test_members_that_claim_to_be_huge_are_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": str(2**50),
    }
    info.size = 1
    content = info.tobuf(tarfile.PAX_FORMAT) + b"x" + bytes(2048)
    (tmp_path / "a.tar").write_bytes(content)
    (found,) = bad(list(open_source(tmp_path / "a.tar"))).values()
    assert "sparse" in found


def test_members_of_one_name_are_no_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.png", "0.txt", "0.TXT"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert bad(list(open_source(tmp_path / "a.tar"))) == {"a.tar#0": "two members end in .txt"}


def of_macos(file: Path, *keys: str) -> Path:
    """What the tar of macOS makes of a folder: before each file one with its attributes."""
    members = {"./.DS_Store": b"x", "./._.DS_Store": b"x"}
    for seed, key in enumerate(keys):
        folder, _, name = f"./{key}".rpartition("/")
        for extension, content in (("png", pictures.png(seed=seed)), ("txt", key.encode())):
            members |= {
                f"{folder}/._{name}.{extension}": b"\0\5\x16\7" + bytes(100),
                f"./{key}.{extension}": content,
            }
    return shard(file, members)


def test_what_macos_puts_beside_files_is_passed_over(tmp_path: Path) -> None:
    keys = ["0001", "a/0002", "a.b/0003"]
    assert prompts(list(open_source(of_macos(tmp_path / "a.tar", *keys)))) == keys
    again = shard(
        tmp_path / "b.tar", {"PaxHeader/0.png": b"mtime", "__MACOSX/0.txt": b"x", "0.txt": b""}
    )
    assert bad(list(open_source(again))) == {"b.tar#0": "missing file: no picture among txt"}


@needs_webdataset
def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    from webdataset import WebDataset

    # In folders the library takes ._0.png for a part of a sample, which tears the sample in two.
    file = of_macos(tmp_path / "a.tar", "0001", "0002")
    theirs = {
        sample["__key__"]: (sample["png"], sample["txt"].decode())
        for sample in WebDataset(str(file), shardshuffle=False)
        if "png" in sample
    }
    ours = {
        item.key.partition("#")[2]: (item.read(), item.captions["prompt"])
        for item in open_source(file)
        if isinstance(item, Sample)
    }
    assert ours == theirs and len(ours) == 2


def test_pictures_that_are_not_read_and_names_that_are_no_utf8_are_rejected(tmp_path: Path) -> None:
    info = tarfile.TarInfo("caf\udce9.png")
    with tarfile.open(shard(tmp_path / "a.tar", {"0.jxl": b"x", "0.txt": b"a"}), "a") as tar:
        info.size = len(pictures.png())
        tar.addfile(info, io.BytesIO(pictures.png()))
    found = bad(list(open_source(tmp_path / "a.tar")))
    assert "pictures in .jxl are not read" in found["a.tar#0"]
    assert "must be UTF-8" in found["a.tar#caf\\xe9"]


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "not a file" in bad(list(open_source(tmp_path)))["a.tar"]


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
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_what_a_url_has_of_passwords_and_keys_is_told_to_nobody(
    tmp_path: Path, server: str
) -> None:
    good(tmp_path / "s.tar", "0")
    (tmp_path / "torn.tar").write_bytes(b"nonsense" * 99)
    address = server.replace("//", "//me:p4ssword@")
    (sample,) = open_source(f"{address}/s.tar?token=abcdef&v=1")
    assert isinstance(sample, Sample) and sample.path.startswith(server.replace("//", "//***@"))
    for name in ("absent", "torn"):
        (rejected,) = open_source(f"{address}/{name}.tar?token=abcdef&v=1")
        assert isinstance(rejected, Rejected) and f"{name}.tar?***" in rejected.path
        for secret in ("p4ssword", "abcdef", "me:"):
            assert secret not in sample.path + str(rejected)


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


@needs_webdataset
@pytest.mark.parametrize(
    "source",
    [
        "pipe:touch {}; echo ://a.tar",
        "PIPE:touch {}://a.tar",
        "http://a.invalid/a.tar::pipe:touch {} #://a.tar",
        "http://a.invalid/';touch {};'.tar",
        "{{http://a.invalid/,pipe:touch {} #://}}a.tar",
        "file://{}",
        "unknown://{}",
    ],
)
def test_no_source_is_a_command(tmp_path: Path, source: str) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ValueError, match="source must (be a path|have %27)"):
        list(open_source(source.format(mark)))
    assert not mark.exists()


def test_names_in_a_folder_are_no_patterns(tmp_path: Path) -> None:
    """What a folder holds may be named by anybody."""
    good(tmp_path / "a{1..999999999}.tar", "0")
    good(tmp_path / "pipe:b.tar", "1")
    assert prompts(list(open_source(tmp_path))) == ["0", "1"]
    assert prompts(list(open_source(tmp_path / "a{1..999999999}.tar"))) == ["0"]


@pytest.mark.parametrize("braces", ["{1..999999999}", "{a,b}" * 40, "{1..9}{{1..9999},{1..9999}}"])
def test_a_pattern_of_too_many_shards_is_refused_at_once(braces: str) -> None:
    with pytest.raises(ValueError, match="at most 100,000 shards"):
        list(open_source(f"a-{braces}.tar"))


@needs_webdataset
def test_braces_that_are_none_are_said_in_one_line() -> None:
    for source in ("a{.tar", "${PIXART_ABSENT}.tar"):
        with pytest.raises(ValueError, match="^a{|^..PIXART"):
            list(open_source(source))
