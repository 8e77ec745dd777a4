"""Folders of results that somebody damaged: every command says so in one line, whatever stands there."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pixart.evaluation.comparing.compare import compare_folders
from pixart.evaluation.report import write_report
from pixart.evaluation.running.drawing import Shard, speaks
from pixart.evaluation.running.results import read_record
from pixart.evaluation.running.run import Pictures
from tests.builders import evaluated

WRONG = [
    None,
    [],
    {},
    "x",
    -1,
    10**30,
    True,
    float("nan"),
    float("inf"),
    "\ud800",
    [[1]],
    {"a": {}},
]
COLUMN = {
    "name": "one", "metric": "clip", "value": "clip", "category": "", "higher_is_better": True,
    "ours": {"value": 1.0, "low": 0.5, "high": 1.5, "n": 3}, "paper": 1.0, "unconfirmed": False,
    "same_protocol": False, "because": ["another set"], "verdict": None,
}  # fmt: skip
TABLE = {
    "source": "a paper", "title": "A table", "protocol": "made/0", "row": "ours", "model": "m",
    "columns": [COLUMN], "rows": [{"name": "r", "values": {"one": 1.0}, "unconfirmed": []}],
}  # fmt: skip


def places(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = list(values.items()) if isinstance(values, dict) else []
    inner = list(enumerate(values[:1])) if isinstance(values, list) else inner
    for key, one in inner:
        yield from places(one, (*place, key))


def changed(values: Any, place: tuple[Any, ...], wrong: Any) -> Any:
    if not place:
        return wrong
    copy = list(values) if isinstance(values, list) else dict(values)
    copy[place[0]] = changed(values[place[0]], place[1:], wrong)
    return copy


def test_whatever_stands_in_results_json_is_shown_or_refused(tmp_path: Path) -> None:
    a, b = evaluated.build(tmp_path / "a"), evaluated.build(tmp_path / "b")
    whole = evaluated.results_of(b) | {"paper": TABLE}
    every = [(place, wrong) for place in places(whole) for wrong in WRONG]
    refused = 0
    for place, wrong in random.Random(0).sample(every, 120):
        evaluated.write(b, changed(whole, place, wrong))
        for work in (
            lambda: write_report([b], tmp_path / "report"),
            lambda: compare_folders(a, b, tmp_path / "compared", pair_sets=False),
        ):
            try:
                work()
            except ValueError as error:  # of anything else the traceback is wanted
                assert "\n" not in str(error)
                refused += 1
    assert refused > 60


def test_a_metric_with_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    folder = evaluated.build(tmp_path / "a")
    results = evaluated.results_of(folder)
    results["metrics"]["w" * 100_000] = results["metrics"]["clip"]
    evaluated.write(folder, results)
    with pytest.raises(ValueError, match="metrics must have names and versions of at most 200"):
        write_report([folder])


@pytest.mark.parametrize(
    ("field", "value"),
    [("changes", None), ("resolved", 3), ("resolved", {"size": []}), ("prompts", "many"),
     ("count", "many"), ("size", 7), ("model", [1])],
)  # fmt: skip
def test_a_damaged_protocol_json_is_refused_with_its_name(
    tmp_path: Path, field: str, value: object
) -> None:
    file = tmp_path / "protocol.json"
    good = {
        "name": "own",
        "title": "t",
        "set": "jsonl",
        "count": 1,
        "metrics": [{"name": "shapes"}],
    }
    file.write_text(json.dumps(good))
    assert read_record(file) == good
    file.write_text(json.dumps({**good, field: value}))
    with pytest.raises(ValueError, match=rf"protocol\.json: {field}.*; name another --output"):
        Pictures.drawn(tmp_path)


@pytest.mark.parametrize("rank", ["\u00b2", "x", "-1", "9" * 5000, "", "4"])
def test_a_rank_that_is_no_number_is_named(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="RANK must be a number below WORLD_SIZE"):
        Shard.parse(None)
    assert speaks()  # --json prints its object


def test_others_of_torchrun_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert speaks()  # alone, whatever the shell has left
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not speaks()


@pytest.mark.parametrize("text", ["\u00b2/3", f"1/{'9' * 5000}", "1/2/3", "1\u2044 2"])
def test_a_shard_that_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shard must be K/N"):
        Shard.parse(text)
