"""Captions and scores beside a source: appended line by line, and joined to its samples."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pictures
import pytest
from pictures import write
from PIL import Image

from pixart.dataset.annotations import (
    annotate,
    check_output,
    in_order,
    read_lines,
    with_captions,
    with_prompt,
    with_scores,
)
from pixart.dataset.samples import Rejected, Sample
from pixart.dataset.sources import open_source


def width(image: Image.Image) -> dict[str, Any]:
    return {"score": image.width}


def has_score(line: Mapping[str, Any]) -> bool:
    return "score" in line


def test_a_run_that_was_stopped_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 4)
    output = tmp_path / "scores.jsonl"
    whole = '{"path": "0.png", "score": 1}\n{"path": "1.png", "other": 2}\n'
    output.write_text(whole + '{"path": "2.png", "sc')
    tally = annotate(open_source(source), output, width, has_score)
    assert (tally.new, tally.known, tally.rejected) == (3, 1, [])
    assert output.read_text().startswith(whole)
    assert [line["path"] for line in read_lines(output)] == [
        "0.png", "1.png", "1.png", "2.png", "3.png",
    ]  # fmt: skip


def test_a_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 2)
    output = write(tmp_path / "scores.jsonl", '{"path": "0.png", "score": 1}')
    assert annotate(open_source(source), output, width, has_score).known == 1
    assert len(read_lines(output)) == 2


def test_bad_pictures_are_reported_and_the_others_go_on(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 2)
    write(source / "bad.png", pictures.corrupt_png())
    write(source / "alone.txt", "x")
    output = tmp_path / "scores.jsonl"
    tally = annotate(open_source(source), output, width, has_score, workers=3)
    assert tally.new == 2
    report = json.loads((tmp_path / "scores.report.json").read_text())
    assert {Path(line["path"]).name for line in report["rejected"]} == {"bad.png", "alone.txt"}


def test_results_keep_their_order_and_errors_come_through() -> None:
    assert list(in_order(lambda n: n * n, range(9), 3)) == [n * n for n in range(9)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // n, [1, 0, 1], 2))


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 1)
    output = tmp_path / "o.jsonl"
    code = (
        "import time; from pathlib import Path; from pixart.dataset.annotations import annotate\n"
        "def waiting(): print('held', flush=True); time.sleep(30); yield\n"
        f"annotate(waiting(), Path({str(output)!r}), lambda image: {{}}, lambda line: True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process writes"):
            annotate(open_source(source), output, width, has_score)
        other.kill()
    assert annotate(open_source(source), output, width, has_score).new == 1


def test_captions_come_beside_the_old_ones(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 2)
    lines = [
        {"path": "0.png", "captions": {"long": "L", "synthetic": ["a", "b"]}},
        {"path": "9.png", "captions": {"long": "of no sample"}},
    ]
    file = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, lines)))
    zero, one, unused = with_captions(open_source(source), [file])
    assert isinstance(zero, Sample) and isinstance(one, Sample)
    assert dict(zero.captions) == {
        "prompt": "caption of picture 0", "long": "L", "synthetic.1": "a", "synthetic.2": "b",
    }  # fmt: skip
    assert dict(one.captions) == {"prompt": "caption of picture 1"}
    assert unused == Rejected("9.png", "1 annotated paths are not in the source")


def test_scores_below_the_minimum_are_rejected(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 3)
    lines = [{"path": "0.png", "score": 5}, {"path": "1.png", "score": 4.99}]
    file = write(tmp_path / "scores.jsonl", "\n".join(map(json.dumps, lines)))
    zero, one, two = with_scores(open_source(source), file, 5.0)
    assert isinstance(zero, Sample)
    assert isinstance(one, Rejected) and one.reason == "score 4.99 is below 5"
    assert isinstance(two, Rejected) and two.reason == "no score in scores.jsonl"


def test_a_bad_line_costs_its_sample(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 3)
    lines = (
        b'{"path": "2.png", "prompt": 5}\n'
        b'{"path": "0.png", "captions": {"long": "\\ud83d"}}\n'
        b'{"path": "1.png", "prompt": "caf\xe9"}'
    )
    zero, one, two = with_captions(open_source(source), [write(tmp_path / "c.jsonl", lines)])
    assert isinstance(zero, Rejected) and "caption long must be UTF-8" in zero.reason
    assert isinstance(one, Rejected) and "must be UTF-8" in one.reason
    assert two == Rejected(str(source / "2.png"), "c.jsonl: caption prompt must be text, got 5")
    (scored, *_) = with_scores(
        open_source(source), write(tmp_path / "n.jsonl", '{"path": "0.png", "score": NaN}'), 5.0
    )
    assert isinstance(scored, Rejected) and scored.reason == "no score in n.jsonl"


def test_a_prompt_that_utf8_cannot_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt must be UTF-8"):
        with_prompt(open_source(pictures.folder(tmp_path, 1)), "caf\udce9")


def test_a_pipe_is_no_annotation_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl: must be a file"):
        read_lines(tmp_path / "a.jsonl")


def test_files_that_are_no_annotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none"):
        read_lines(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"bad.jsonl:1 must be an object with a path"):
        read_lines(write(tmp_path / "bad.jsonl", '{"score": 1}\n'))
    with pytest.raises(ValueError, match="must be a .jsonl file"):
        check_output(tmp_path / "a.json", "s")
    with pytest.raises(ValueError, match="must not be inside the source"):
        check_output(tmp_path / "s" / "a.jsonl", str(tmp_path / "s"))
