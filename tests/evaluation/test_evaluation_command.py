"""`python -m pixart.evaluate`: exit codes, what is printed, and folders as people have them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shapes_pictures import write_lines, write_scenes

from pixart.evaluate import main
from pixart.evaluation.running.drawing import is_whole
from pixart.evaluation.running.results import open_folder

TINY = ["--count", "5", "--size", "64", "--steps", "1", "--device", "cpu"]


OWN = ["--images", "images", "--prompts", "prompts.jsonl"]


def _score(folder: Path, *options: str, metrics: str = "shapes") -> int:
    given = ["--images", str(folder / "images"), "--prompts", str(folder / "prompts.jsonl")]
    return main(["score", metrics, *given, "--output", str(folder / "out"), *options])


def test_scores_are_printed_with_intervals_and_kept(tmp_path: Path, capsys: Any) -> None:
    write_scenes(tmp_path, 8)
    assert _score(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "shapes: 1 [0.6756, 1]\n" in printed and "8 pictures: see " in printed
    found = open_folder(tmp_path / "out")
    assert found.protocol["id"] in printed and found.protocol["id"].startswith("pictures/")
    assert found.results["model"] == "images" and found.results["errors"] == 0
    assert len(found.scores("shapes")) == len(found.entries) == 8
    assert str(tmp_path) not in json.dumps(found.results)


def test_json_is_one_object_and_the_same_as_the_file(tmp_path: Path, capsys: Any) -> None:
    write_scenes(tmp_path, 3)
    assert _score(tmp_path, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_folder_against_a_folder_needs_no_prompts(tmp_path: Path, capsys: Any) -> None:
    for name in ("mine", "real"):
        (tmp_path / name).mkdir()
        for k in range(8):
            picture = Image.new("RGB", (64, 64), (20 * k, 99, 255 * (name == "real")))
            picture.save(tmp_path / name / f"photo {k}.png")
    given = ["--images", str(tmp_path / "mine"), "--reference", str(tmp_path / "real")]
    given += ["--output", str(tmp_path / "out")]
    assert main(["score", "kid", *given, "--option", "features=shapes-clip"]) == 0
    assert "protocol pictures/" in capsys.readouterr().out
    assert main(["score", "shapes", *given]) == 2
    assert "photo 0.png: holds no prompt" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "out")]) == 0


def test_another_metric_joins_those_of_before(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3)
    assert _score(tmp_path) == 0
    one = json.loads((tmp_path / "out" / "results.json").read_text())
    assert main(["score", "shapes-edges", "--output", str(tmp_path / "out")]) == 0
    both = json.loads((tmp_path / "out" / "results.json").read_text())
    assert both["metrics"].keys() == {"shapes", "shapes-edges"} and both["model"] == "images"
    assert both["metrics"]["shapes"] == one["metrics"]["shapes"]
    assert both["protocol"]["id"] != one["protocol"]["id"]


def test_numbers_of_other_pictures_do_not_stay(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3)
    assert _score(tmp_path) == 0
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "00000" / "0000.png")
    assert _score(tmp_path, metrics="shapes-edges") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"].keys() == {"shapes-edges"}


def test_missing_pictures_fail_unless_they_are_allowed(tmp_path: Path, capsys: Any) -> None:
    write_scenes(tmp_path, 4)
    (tmp_path / "images" / "00001" / "0000.png").unlink()
    assert _score(tmp_path) == 1
    assert "1 of 4 pictures are missing (00001/0000)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
    assert _score(tmp_path, "--allow-missing") == 0
    assert ", 3 pictures, 1 left out: see" in capsys.readouterr().out


def test_pictures_that_are_left_out_make_another_id_and_are_not_forgotten(tmp_path: Path) -> None:
    write_scenes(tmp_path, 4)
    assert _score(tmp_path) == 0
    file = tmp_path / "out" / "results.json"
    whole = json.loads(file.read_text())
    (tmp_path / "images" / "00001" / "0000.png").unlink()
    assert _score(tmp_path, "--allow-missing") == 0
    part = json.loads(file.read_text())
    assert "left_out" not in whole["metrics"]["shapes"]
    assert part["metrics"]["shapes"]["left_out"] == 1
    assert part["protocol"]["id"] != whole["protocol"]["id"]
    assert (whole["errors"], part["errors"]) == (0, 1)


def test_a_damaged_part_is_made_again_with_a_word(tmp_path: Path, capsys: Any) -> None:
    write_scenes(tmp_path, 4)
    assert _score(tmp_path) == 0
    results = (tmp_path / "out" / "results.json").read_bytes()
    [part] = tmp_path.rglob("part-00000.jsonl")
    part.write_text(part.read_text()[:50])
    assert _score(tmp_path) == 0
    assert "part-00000.jsonl: is damaged and made again" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == results


def test_a_folder_of_other_results_is_refused(tmp_path: Path, capsys: Any) -> None:
    write_scenes(tmp_path, 4)
    assert _score(tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "prompts.jsonl", lines[:3])
    assert _score(tmp_path) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "holds an evaluation of pictures with count 4, asked is 3; name another" in line


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["score", "beauty", "--images", "images", "--output", "o"], 2, "metric must be one of"),
        (["score", ",", "--images", "images", "--output", "o"], 2, "metrics must be named"),
        (["score", "shapes,shapes", "--images", "images", "--output", "o"], 2, "named once"),
        (["score", "shapes", "--images", "absent", "--output", "o"], 2, "no such folder"),
        (["score", "shapes", "--images", "images", "--output", "images/o"], 2, "must not lie in"),
        (["score", "shapes", "--images", "images", "--output", "images"], 2, "must not lie in"),
        (["score", "shapes", "--output", "o"], 2, "must hold what `draw` or `run` drew"),
        (["score", "shapes", "--output", "o", "--prompts", "p.txt"], 2, "goes with --images"),
        (["score", "shapes", *OWN, "--output", "file"], 2, "Not a directory"),
        (["score", "shapes", "--images", "images", "--output", "o", "--option", "x=1"], 2, "knows it"),
        (["score", "shapes", "--images", "images", "--output", "o", "--option", "x"], 2, "NAME=VALUE"),
        (["score", "kid", "--images", "images", "--output", "o"], 3, "looked for in"),
        (["run", "alpha-table-2", "--output", "o"], 3, "alpha-table-2, prompt set coco, fid-clean"),
        (["run", "shape", "--output", "o"], 2, "did you mean 'shapes'?"),
        (["run", "shapes", "--output", "o", "--shard", "5/4"], 2, "--shard must be K/N"),
        (["run", "shapes", "--output", "o", "--model", "absent"], 2, "absent: no such file"),
        (["run", "shapes", "--output", "o", "--count", "0"], 2, "count must be from 1"),
        (["compare", "o", "o"], 2, "results.json"),
        (["report", "o"], 2, "results.json"),
        (["prompts", "coco", "--output", "p.jsonl"], 3, "captions_val2014.json"),
        (["statistics", "images", "--output", "x.npz"], 3, "pt_inception-2015-12-05"),
        (["statistics", "images", "--output", "x.npz", "--features", "z"], 2, "features must be one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    reason: str,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path, 2)
    (tmp_path / "file").write_text("x")
    assert main(arguments) == code
    printed = capsys.readouterr()
    [line] = printed.err.strip().splitlines()
    assert line.startswith("pixart.evaluate: ") and reason in line and not printed.out
    assert {path.name for path in tmp_path.iterdir()} == {"images", "prompts.jsonl", "file"}


def test_a_protocol_is_run_from_drawing_to_the_report(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "ev"
    assert main(["run", "shapes", "--output", str(output), *TINY]) == 0
    printed = capsys.readouterr().out
    assert "protocol shapes/" in printed and "report: " in printed
    assert (output / "report.html").is_file() and (output / "README.md").is_file()
    found = open_folder(output)
    assert found.results["model"] == "shapes" and set(found.results["weights"]) >= {"transformer"}
    assert found.results["protocol"]["changes"][0] == "count 300 → 5"
    assert found.results["paper"]["source"].startswith("model card")
    assert set(found.results["metrics"]["shapes"]["categories"]) >= {"one", "unseen-pair"}
    results = (output / "results.json").read_bytes()
    lost = next((output / "images").rglob("0000.png"))
    lost.unlink()  # between drawing and scoring
    assert main(["score", "shapes", "--output", str(output)]) == 1
    assert "1 of 5 pictures are missing" in capsys.readouterr().err
    assert main(["run", "shapes", "--output", str(output), *TINY]) == 0
    assert lost.is_file() and (output / "results.json").read_bytes() == results
    (output / "prompts.jsonl").write_text('{"id": "a", "prompt": "b"}\n')
    assert main(["score", "shapes", "--output", str(output)]) == 2
    assert "must hold the prompts that were drawn" in capsys.readouterr().err


def test_weights_that_are_not_what_was_published_are_a_failure(tmp_path: Path, capsys: Any) -> None:
    assert main(["check-weights", str(tmp_path)]) == 0
    assert "not checked" in capsys.readouterr().out
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"x" * 100)
    assert main(["check-weights", str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    assert {row["verdict"] for row in json.loads(printed.out)["checks"]} == {"fail", "not checked"}
    assert "is not what was published: Inception" in printed.err


def test_a_metric_that_is_scored_again_makes_no_other_results(tmp_path: Path) -> None:
    write_scenes(tmp_path, 4)
    assert _score(tmp_path, metrics="shapes,shapes-edges") == 0
    before = open_folder(tmp_path / "out").results
    assert main(["score", "shapes", "--output", str(tmp_path / "out")]) == 0
    after = open_folder(tmp_path / "out").results
    assert [*after["metrics"]] == ["shapes", "shapes-edges"]
    assert after["metrics"] == before["metrics"]
    assert after["protocol"]["id"] == before["protocol"]["id"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_a_missing_picture_and_nobody_waits(tmp_path: Path, capsys: Any) -> None:
    write_scenes(tmp_path, 2)
    picture = next((tmp_path / "images").glob("*/0000.png"))
    picture.unlink()
    os.mkfifo(picture)
    assert _score(tmp_path) == 1
    assert "1 of 2 pictures are missing" in capsys.readouterr().err
    assert not is_whole(picture)


def test_under_torchrun_the_first_process_alone_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_scenes(tmp_path, 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _score(tmp_path) == 0
    assert not capsys.readouterr().out


def test_a_full_disk_is_a_failure_that_names_the_place(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    write_scenes(tmp_path, 4)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "from pixart.evaluate import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["score", "shapes", "--images", "images", "--prompts", "prompts.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--output", "out"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "File too large" in done.stderr
    assert not (tmp_path / "out" / "results.json").exists()
