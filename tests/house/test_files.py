"""pixart.files: what is written is whole or not there, whatever interrupts the writing."""

import ast
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pixart import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_folder_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    files.write_bytes(tmp_path / "a", b"new")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with files.written_aside(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "file").write_text("new")
    assert (tmp_path / "a").read_bytes() == b"new" and names(tmp_path / "folder") == ["file"]
    assert names(tmp_path) == ["a", "folder"]


def test_a_failed_writer_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.written_aside(tmp_path / "a") as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_replaced_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"), files.written_aside(tmp_path / "folder") as aside:
        aside.mkdir()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["old"]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_a_new_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.write_bytes(tmp_path / "ours", b"")
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert rights[0] == rights[1]


def test_a_planted_temporary_name_is_never_followed(tmp_path: Path) -> None:
    """Two writers, or somebody else in a shared folder, cannot guess where a file is written."""
    seen = set()
    for _ in range(8):
        with files.written_aside(tmp_path / "a") as aside:
            seen.add(aside)
            assert stat.S_IMODE(aside.parent.stat().st_mode) == 0o700
            aside.touch()
    assert len(seen) == 8


def test_json_is_read_back_and_refused_with_the_reason(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"é": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"é": [1, None]}
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.json").write_bytes(b"\xff{")
    for name, reason in (("b", "got a list"), ("c", "is not JSON"), ("d", "cannot be read")):
        with pytest.raises(files.CheckpointError, match=f"{name}.json: .*{reason}"):
            files.read_json(tmp_path / f"{name}.json")


def test_json_out_of_files_is_bounded(tmp_path: Path) -> None:
    """Deeper than Python recurses, deeper than we do, too long: a line each, at once."""
    assert files.parse_json("[" * 64 + "]" * 64, "x")
    assert files.parse_json(b"\xef\xbb\xbf[" + b"[]," * 99 + b"1e999]", "x")[-1] == float("inf")
    assert files.parse_json("[-" + "9" * 5000 + "]", "x") == [float("-inf")]
    for text, reason in (
        ("[" * 65 + "]" * 65, "x: must be nested at most 64 deep"),
        ('{"a":' * 100_000, "x: must be nested at most 64 deep"),
        (b"\xff", r"x: is not JSON \('utf-8' codec"),
        ('{"a": 1} 2', r"x: is not JSON \(Extra data"),
        (" " * 101, "x: must be at most 100 bytes of JSON, got 101"),
    ):
        with pytest.raises(ValueError, match=f"^{reason}"):
            files.parse_json(text, "x", 100 if text[0] == " " else files.MAX_JSON)
    deep = tmp_path / "deep.json"
    deep.write_text('{"a":' * 100 + "1" + "}" * 100)
    with pytest.raises(files.CheckpointError, match=r"deep.json: must be nested at most 64 deep"):
        files.read_json(deep)
    with pytest.raises(
        files.CheckpointError, match=r"deep.json: must be at most 99 bytes, got 601"
    ):
        files.read_json(deep, 99)


def test_what_a_file_says_of_itself_cannot_write_on_the_terminal() -> None:
    said = str(files.CheckpointError("é: \x1b[2J" + "x" * 99_999 + "\n\udcff; copy it again"))
    assert said.startswith("é: \\x1b[2Jx") and said.endswith("x\\n\\udcff; copy it again")
    assert said.isprintable() and len(said) < 20_000


def test_a_long_name_in_a_message_is_cut_in_the_middle() -> None:
    folder = "/".join(["d" * 250] * 4)
    said = str(files.CheckpointError(f"{folder}: lacks the shard {'a' * 5000}z; copy it again"))
    assert said.startswith(f"{folder}: lacks the shard aaa") and said.endswith("az; copy it again")
    assert "a...a" in said and said.count("a") < 320
    listing = str(files.CheckpointError("x: lacks " + ", ".join(["b" * 400] * 9000) + "; copy it"))
    assert (
        listing.startswith("x: lacks b") and listing.endswith("; copy it") and len(listing) < 2100
    )
    assert len(files.printable("a" * 500, 100)) < 110


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    """Of root, a link from a folder of somebody else to /dev/zero took that away."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=f"is a pipe or a device, not a file: '{tmp_path}/pipe'"):
            files.write_bytes(tmp_path / name, b"x")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2


def test_a_pipe_is_no_json_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(files.CheckpointError, match="pipe: must be a file"):
        files.read_json(tmp_path / "pipe")


def test_json_is_read_by_one_reader() -> None:
    """Only pixart.files bounds depth and size; what is in front of it may come from anywhere."""
    root = Path(__file__).parent.parent.parent
    sources = [path for top in ("pixart", "bench") for path in (root / top).rglob("*.py")]
    others = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sources
        if path != Path(files.__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr)
        in {("json", "load"), ("json", "loads"), ("json", "JSONDecoder")}
        or isinstance(node, ast.ImportFrom)
        and node.module == "json"
    ]
    assert len(sources) > 100 and others == []


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from pixart.files import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(Path(sys.argv[1]), bytes(9999))\n"
        "except OSError as error: print(error.strerror)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_known_before_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    files.check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == ["file"]
    for place in ("file/x", "n" * 300 + "/x"):
        with pytest.raises(OSError) as refused:
            files.check_writable(tmp_path / place)
        assert refused.value.filename == str(tmp_path / place)

    def full(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", "a.temporary.name")

    monkeypatch.setattr(files.tempfile, "mkdtemp", full)
    with pytest.raises(OSError) as refused:
        files.write_bytes(tmp_path / "a", b"")
    assert refused.value.filename == str(tmp_path / "a")


def test_no_file_takes_the_place_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "publish", lambda *_, **__: None)  # root's would do it
    for write in (files.check_writable, lambda path: files.write_bytes(path, b"")):
        with pytest.raises(OSError, match="is a pipe or a device, not a file"):
            write(Path(os.devnull))


def test_fingerprints_tell_folders_apart(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(json.dumps(text))
    a, b, c = (files.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_checksum_is_of_every_byte(tmp_path: Path) -> None:
    content = bytearray(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    content[-5] ^= 1
    (tmp_path / "b").write_bytes(content)
    assert files.sha256_of(tmp_path / "b") == hashlib.sha256(content).hexdigest()
