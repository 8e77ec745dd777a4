"""The command line on several processes, against the same on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import lines_of
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("among")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["case"]: line for line in lines_of("generate_cases.py", folder)}


def report(line: dict[str, Any]) -> dict[str, Any]:
    """What the first process printed, and it alone."""
    assert set(line["codes"]) == {0}, line["err"]
    first, *others = line["out"]
    assert not any(others)
    return json.loads(first)


def complaint(line: dict[str, Any]) -> str:
    """The one line that all processes together print on standard error."""
    lines = [text for said in line["err"] for text in said.splitlines() if text.strip()]
    [complaint] = [text for text in lines if text.startswith("pixart.generate: ")]
    assert not any("Traceback" in text for text in lines)
    return complaint


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", ["two", "three"])
def test_processes_share_pictures_without_changing_a_bit(
    found: Any, folder: Path, count: str
) -> None:
    files = sorted((folder / "alone").iterdir())
    assert len(files) == 5
    for file in files:
        assert (folder / count / file.name).read_bytes() == file.read_bytes()
    expected, shared = report(found["five alone"]), report(found[f"five by {count}"])
    assert shared["drawn"] == 5
    for one, other in zip(expected["images"], shared["images"], strict=True):
        assert Path(one["file"]).name == Path(other["file"]).name
        assert {**one, "file": "", "seconds": ""} == {**other, "file": "", "seconds": ""}


@pytest.mark.exhaustive
def test_the_sheet_has_the_pictures_of_all(found: Any, folder: Path) -> None:
    assert report(found["five by two"])["grid"] == "two/grid.png"
    assert pixels(folder / "two" / "grid.png").shape[1] > 2 * 128


@pytest.mark.exhaustive
def test_what_is_there_is_not_drawn_again_by_any(found: Any) -> None:
    again = report(found["five again"])
    assert again["drawn"] == 0 and len(again["images"]) == 5


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "name"),
    [("one, auto", "auto"), ("one, sequence", "sequence"), ("one by four", "four")],
)
def test_a_picture_drawn_together_is_that_of_one_process(
    found: Any, folder: Path, case: str, name: str
) -> None:
    assert len(report(found[case])["images"]) == 1
    assert np.abs(pixels(folder / f"{name}.png") - pixels(folder / "one.png")).max() <= 1
    assert not list(folder.glob(f"{name}-2*"))


@pytest.mark.exhaustive
def test_the_first_process_draws_lots_for_all(found: Any) -> None:
    assert report(found["by lot"])["images"][0]["seed"] == 100


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("too many", "4 processes for the tokens are more than the 3 heads"),
        ("halves for three", "got guidance: halves of guidance are for 2 processes"),
        ("no halves", "a picture without guidance has no two halves"),
        ("bad option", "--steps must be a whole number"),
        ("bad value", "steps must be"),
        ("alone together", "--parallel must be left out of a single process, got sequence"),
        ("machines", "output must be a folder that all processes see"),
    ],
)
def test_bad_input_is_one_line_and_2_from_all(
    found: Any, folder: Path, case: str, words: str
) -> None:
    assert set(found[case]["codes"]) == {2}
    assert words in complaint(found[case])
    assert not (folder / "no.png").exists()


@pytest.mark.exhaustive
def test_a_dry_run_measures_the_processes_that_are_there(found: Any, folder: Path) -> None:
    one, tars = report(found["dry run"]), report(found["dry run of tars"])
    assert (one["processes"], one["parallel"], one["is_measured"]) == (2, "sequence", True)
    assert one["kinds"][0]["bytes_received_in_a_step"] > 0
    assert (tars["parallel"], tars["is_measured"]) == ("pictures", True)
    assert tars["tars"]["of_each_process"] == [2, 1]
    assert tars["pictures"] == {"all": 5, "there": 0, "left": 5}
    assert not (folder / "dry").exists()


@pytest.mark.exhaustive
def test_a_process_that_fails_ends_all_with_its_line(found: Any) -> None:
    line = found["full disk"]
    assert complaint(line).startswith("pixart.generate: there: No space left on device")
    assert line["codes"] == [1, 1]
