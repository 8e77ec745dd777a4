"""--dry-run of prepare, filter, clean and caption: what there is to do, and nothing that is written."""

import json
from pathlib import Path
from typing import Any

import pictures
import pytest
from caption_server import Server
from caption_server import server as server  # a fixture

from pixart import data
from pixart.dataset import prepare


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = pictures.folder(tmp_path / "source", 5)
    pictures.write(source / "3.long.txt", "a long caption")
    pictures.write(source / "blank.png", pictures.png())
    pictures.write(source / "absent.txt", "of no picture")
    pictures.write(source / "bad.png", pictures.corrupt_png())
    pictures.write(source / "bad.txt", "bad")
    return source


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What a dry run says as JSON."""
    assert data.main([*map(str, arguments), "--dry-run", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def files(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_prepare_says_what_is_done_and_what_is_left(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 3)
    out, before = tmp_path / "out", files(tmp_path)
    command = ("prepare", source, out, "--resolution", 64, "--device", "cpu")
    found = told(capsys, *command)
    assert files(tmp_path) == before
    assert (found["pictures"], found["done"], found["left"]) == (8, 0, 6)
    assert (found["chunks"], found["chunks_done"]) == (3, 0)
    assert found["rejected"] == {"missing file": 2}
    assert found["captions"] == {"long": 1 / 6, "prompt": 1.0}
    assert found["measured"] == 6 and found["measured_rejected"] == {"unreadable image": 1}
    assert found["hours"] == found["seconds_a_picture"] * 6 / 3600 > 0
    assert data.main([*map(str, command)]) == 0
    pictures.folder(source, 6)  # the last of them is new, and all have another time
    (source / "5.png").unlink()
    capsys.readouterr()
    before = files(tmp_path)
    for number in range(5):
        (source / f"{number}.png").touch()
    found = told(capsys, *command, "--engine", "ray", "--workers", 4)
    assert files(out) == {file: when for file, when in before.items() if out in file.parents}
    assert found["workers"] == 4 and found["done"] + found["left"] + 3 == found["pictures"] == 9
    assert data.main([*map(str, command)]) == 0
    assert data.main([*map(str, command), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "5 done, 0 to do in 0 of 3 chunks" in said and "nothing is left to do" in said


def test_filter_clean_and_caption_say_it_too(
    source: Path,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures.write(tmp_path / "taste_of_dry_runs.py", "def score(image):\n    return image.width\n")
    monkeypatch.syspath_prepend(tmp_path)
    scorer = ("--scorer", "taste_of_dry_runs:score")
    commands = {
        "filter": ("filter", source, tmp_path / "f.jsonl", *scorer),
        "clean": ("clean", source, "--output", tmp_path / "c.jsonl", *scorer),
        "caption": ("caption", source, tmp_path / "t.jsonl", "--model", "vlm",
                    "--endpoint", server.address),
    }  # fmt: skip
    for name, command in commands.items():
        before = files(tmp_path)
        found = told(capsys, *command)
        assert {file for file in files(tmp_path) if file.suffix != ".pyc"} - {
            tmp_path / "__pycache__"
        } == before.keys()
        assert (found["pictures"], found["done"], found["left"]) == (8, 0, 7), name
        assert found["chunks"] is None and found["measured"] == (2 if name == "caption" else 7)
        assert data.main([*map(str, command)]) == 0
        capsys.readouterr()
        found = told(capsys, *command)
        # What could not be read is tried again, as the command does.
        assert (found["done"], found["left"], found["measured"]) == (6, 1, 1), name
        assert found["measured_rejected"] == {"unreadable image": 1}


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--address", "auto"], "--address must be given with --engine ray"),
        (["--json"], "--json must be given with --dry-run"),
        (
            ["--engine", "ray", "--device", "cuda:1"],
            "--device must be cpu or cuda with --engine ray",
        ),
        (["--engine", "ray", "--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    command = ["prepare", str(source), str(tmp_path / "out"), "--resolution", "64", *arguments]
    assert data.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and not (tmp_path / "out").exists()


def test_ray_that_is_not_there_is_asked_for(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert data.main(["filter", str(source), str(tmp_path / "f.jsonl"), "--scorer", "a:b",
                      "--engine", "ray"]) == 2  # fmt: skip
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "pixart-fast[ray]"' in line and not (tmp_path / "f.jsonl").exists()
