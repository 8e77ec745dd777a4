"""Tars that several processes draw, and one that is killed: the same bytes as one process makes undisturbed."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from forked import lines_of

pytestmark = pytest.mark.slow

TARS = ["000.tar", "001.tar", "002.tar"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["case"]: line for line in lines_of("shard_cases.py", folder)}


def contents(folder: Path) -> dict[str, bytes]:
    """Of all that is there, hidden files too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def reports(line: dict[str, Any]) -> list[dict[str, Any]]:
    assert set(line["codes"]) == {0}, line["err"]
    return [json.loads(text) for text in line["out"] if text]


def test_each_picture_has_the_bits_of_one_that_is_drawn_without_tars(
    found: Any, folder: Path
) -> None:
    assert found["alone"]["codes"] == [0], found["alone"]["err"]
    pictures = {}
    for name in TARS:
        with tarfile.open(folder / "alone" / name) as tar:
            pictures |= {
                one.name: file.read()
                for one in tar
                if one.name.endswith(".png") and (file := tar.extractfile(one))
            }
    assert len(pictures) == 5 and pictures == contents(folder / "plain")


def test_a_run_that_was_killed_goes_on_and_repeats_one_tar(found: Any, folder: Path) -> None:
    assert found["killed"]["codes"] == [-9]
    tars = [name for name in found["left"]["left"] if not name.startswith(".")]
    asides = [name for name in found["left"]["left"] if name.startswith(".001.tar.")]
    assert tars == ["000.tar"] and len(asides) == 1
    [report] = reports(found["resumed"])
    notes = [(one["file"], one["note"]) for one in report["shards"]]
    assert notes == [
        ("killed/000.tar", "there already"), ("killed/001.tar", "drawn"), ("killed/002.tar", "drawn"),
    ]  # fmt: skip
    assert contents(folder / "killed") == contents(folder / "alone")


@pytest.mark.parametrize("case", ["torchrun", "array", "twice"])
def test_two_processes_make_what_one_makes(found: Any, folder: Path, case: str) -> None:
    told = reports(found[case])
    assert list(contents(folder / case)) == TARS
    assert contents(folder / case) == contents(folder / "alone")
    assert sum(report["drawn"] for report in told) == 5, "each tar is drawn once"
    if case == "torchrun":
        [report] = told
        assert [one["file"] for one in report["shards"]] == [f"torchrun/{name}" for name in TARS]
    if case == "array":
        assert [[Path(one["file"]).name for one in report["shards"]] for report in told] == [
            ["000.tar", "002.tar"], ["001.tar"],
        ]  # fmt: skip


def test_a_full_disk_leaves_whole_tars_alone(found: Any, folder: Path) -> None:
    assert found["full"]["codes"] == [1]
    assert list(contents(folder / "full")) == ["000.tar"]
    assert json.loads(found["full"]["out"][0])["drawn"] == 2
    [line] = [text for text in found["full"]["err"][0].splitlines() if "generate: " in text]
    assert "full/001.tar: No space left on device" in line


def test_what_goes_wrong_in_one_of_several_is_said_once(found: Any, folder: Path) -> None:
    for case, code, said in (("one full", 1, "No space left"), ("one bad", 2, "scheduler must be")):
        lines = [
            text
            for one in found[case]["err"]
            for text in one.splitlines()
            if text.startswith("pixart.generate: ")
        ]
        assert len(lines) == 1 and said in lines[0]
        assert code in found[case]["codes"]
    assert not (folder / "one-bad").exists()
