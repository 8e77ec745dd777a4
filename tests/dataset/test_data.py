"""The command line of training data, from raw pictures to a batch."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pictures
import pytest
from pictures import write

from pixart import data
from pixart.dataset.batches import FeatureDataset

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Good pictures 0 and 1, and one of each that is none."""
    source = pictures.folder(tmp_path / "source", 2)
    for name, content in (
        ("corrupt", pictures.corrupt_png()),
        ("line", pictures.png(1, 5000)),
        ("blank", pictures.png()),
    ):
        write(source / f"{name}.png", content)
        write(source / f"{name}.txt", "" if name == "blank" else "a red circle")
    write(source / "absent.txt", "a red circle")
    return source


def run(*arguments: object) -> int:
    return data.main([str(argument) for argument in arguments])


def test_pictures_become_batches_through_every_command(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the embedded model's own VAE and text encoder."""
    out, scores = tmp_path / "out", tmp_path / "scores.jsonl"
    write(tmp_path / "taste_of_data.py", "def score(image):\n    return image.width * 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    pictures.folder(source / "small", 1, width=70)
    captions = [{"path": "0.png", "captions": {"long": "a large red circle on white"}}]
    long = write(tmp_path / "long.jsonl", "\n".join(map(json.dumps, captions)))

    assert run("filter", source, scores, "--scorer", "taste_of_data:score") == 0
    assert "5 pictures scored, 2 rejected" in capsys.readouterr().out
    prepare = ("prepare", source, out, "--resolution", 64, "--device", "cpu")
    assert run(*prepare, "--captions", long, "--scores", scores, "--min-score", 75) == 0
    said = capsys.readouterr()
    assert "2 samples prepared, 5 rejected" in said.out
    assert re.search(r"pixart\.data: rejected .+ \(.+\), and 4 more\n", said.err)

    report = json.loads((out / "report.json").read_text())
    assert report["prepared"] == {"64": 2}
    reasons = {Path(line["path"]).stem: line["reason"] for line in report["rejected"][:]}
    assert set(reasons) == {"0", "corrupt", "line", "blank", "absent"}
    assert reasons["0"] == "score 70 is below 75"
    features = FeatureDataset(out)
    assert features.caption_names == ["long", "prompt"] and len(features) == 2
    batch = features.batch([0, 1], Random(0), {"long": 60, "prompt": 40})
    assert batch.mean.shape[:2] == (2, 4) and batch.features.shape[2] == 128


def test_another_limit_for_tiny_pictures_may_be_set(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("prepare", source, out, "--resolution", 64, "--min-side", 61, "--device", "cpu")
    assert run(*command) == 0
    report = json.loads((out / "report.json").read_text())
    reasons = {Path(line["path"]).stem: line["reason"] for line in report["rejected"]}
    assert reasons["0"] == "80x60 is too small, its shorter side must be at least 61 px"


def test_only_bad_samples_finish_with_all_of_them_reported(source: Path, tmp_path: Path) -> None:
    for file in source.glob("[01].*"):
        file.unlink()
    out = tmp_path / "out"
    assert run("prepare", source, out, "--resolution", 64, "--device", "cpu") == 0
    report = json.loads((out / "report.json").read_text())
    assert report["prepared"] == {"64": 0} and len(report["rejected"]) == 4


def test_bad_input_ends_with_one_line_and_code_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], str]] = [
        (("prepare", tmp_path / "absent", out, "--resolution", 64), "source must be a folder"),
        (("prepare", source, out, "--resolution", 100), "multiple of 16"),
        (("prepare", source, out, "--resolution", 64, "--min-score", 5), "given together"),
        (("prepare", source, out, "--resolution", 64, "--workers", 0), "--workers must be"),
        (("prepare", source, out, "--resolution", 64, "--model", tmp_path), "has no tokenizer"),
        (("filter", source, tmp_path / "s.jsonl", "--scorer", "nothing"), "MODULE:FUNCTION"),
        (("filter", source, source / "s.jsonl", "--scorer", "json:dumps"), "inside the source"),
        (
            ("caption", source, tmp_path / "c.jsonl", "--model", "m", "--endpoint", "host"),
            "must begin with http",
        ),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert error.startswith("pixart.data: ") and message in error and "\n" not in error
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_endpoint_that_is_away_is_a_failure(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pixart.endpoint.WAITS", ())
    output = tmp_path / "c.jsonl"
    endpoint = ("--model", "m", "--endpoint", "http://127.0.0.1:9/v1")
    assert run("caption", source, output, *endpoint) == 1
    assert "must answer" in capsys.readouterr().err


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom pixart import data\n"
        "try: data.main(['prepare', '--help'])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
