"""results.json and what stands beside it: what is written is read again, and what is none is refused."""

import json
import math
from pathlib import Path

import pytest

from pixart.evaluation.metric import Context
from pixart.evaluation.metrics.shapes import ShapesEdges
from pixart.evaluation.protocols.protocol import load_protocol
from pixart.evaluation.running.record import note_run, protocol_of, write_record
from pixart.evaluation.running.results import block_of, open_folder, score_folder, write_errors
from pixart.evaluation.statistics.estimate import Estimate
from pixart.files import read_json


def test_a_block_says_all_of_a_metric_and_no_infinity() -> None:
    metric = ShapesEdges("shapes-edges", Context(device="cpu"))  # type: ignore[arg-type]
    one = Estimate(0.5, -math.inf, math.inf, 1, "none", ("one prompt",))
    block = block_of(metric, {"shapes-edges": one}, {"pair": {"shapes-edges": one}})
    told = {
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 1,
        "method": "none",
        "notes": ["one prompt"],
    }
    assert block["values"] == {"shapes-edges": told}
    assert block["categories"] == {"pair": {"shapes-edges": told}}
    assert block["constants"] == {"clean": 0.93, "stray": 0.001} and block["per_picture"]
    json.dumps(block, allow_nan=False)


def test_other_constants_have_another_folder_of_scores() -> None:
    assert score_folder("shapes", "1", {}) == "shapes-1"
    names = {score_folder("tifa", "1", {"judge": judge}) for judge in ("a", "b")}
    assert len(names) == 2 and all(name.startswith("tifa-1-") for name in names)
    assert score_folder("x", "2", {"a": 1, "b": 2}) == score_folder("x", "2", {"b": 2, "a": 1})


def test_errors_that_are_no_more_leave_no_file(tmp_path: Path) -> None:
    write_errors(tmp_path, [{"key": "a/0000", "error": "is missing"}])
    assert json.loads((tmp_path / "errors.jsonl").read_text())["key"] == "a/0000"
    write_errors(tmp_path, [])
    assert not (tmp_path / "errors.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "must be a folder of results, it has no results.json"),
        ("{", "is not JSON"),
        ('{"version": 2}', "version must be 1, got 2; score it again"),
        ('{"version": 1, "metrics": []}', "must have metrics and protocol"),
    ],
)
def test_folders_without_results_are_refused(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        open_folder(tmp_path)


def test_a_protocol_is_read_again_from_its_record_with_the_papers_table(tmp_path: Path) -> None:
    protocol = load_protocol("shapes").changed(count=7, steps=3)
    record = json.loads(json.dumps(protocol.record(prompts=7)))
    again = protocol_of(record)
    assert again.deciding() == protocol.deciding() and again.changes == protocol.changes
    assert again.paper == load_protocol("shapes").paper


def test_a_folder_is_about_one_thing(tmp_path: Path) -> None:
    protocol = load_protocol("shapes")
    write_record(tmp_path, [], protocol.record(prompts=0), draws=True)
    before = (tmp_path / "protocol.json").read_bytes()
    write_record(tmp_path, [], protocol.changed(metrics=["shapes"]).record(prompts=0), draws=True)
    assert (tmp_path / "protocol.json").read_bytes() == before  # metrics may be added
    with pytest.raises(
        ValueError, match="with sampling.steps 20, asked is 3; name another --output"
    ):
        write_record(tmp_path, [], protocol.changed(steps=3).record(prompts=0), draws=True)


def test_who_worked_there_is_noted_and_what_was_noted_before_stays(tmp_path: Path) -> None:
    note_run(tmp_path, drawn_on="cpu")
    note_run(tmp_path, images="x")
    told = read_json(tmp_path / "run.json")
    assert told["drawn_on"] == "cpu" and told["images"] == "x" and told["versions"]["torch"]
