"""What is listed: sets, metrics and protocols, what they need, and the runs of a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pixart.evaluation import metrics as registry
from pixart.evaluation import report
from pixart.evaluation.listing import (
    Row,
    list_sets,
    listing,
    listing_json,
    listing_text,
    metric_row,
    protocol_row,
)
from pixart.evaluation.metric import Context, PictureMetric
from pixart.evaluation.needs import Need
from pixart.evaluation.options import Run
from pixart.evaluation.prompt_sets import NAMES, SETS
from pixart.evaluation.protocols.protocol import Protocol, Use, load_protocol, shipped
from pixart.evaluation.protocols.published import with_paper
from pixart.evaluation.running.several import run_variants
from pixart.evaluation.running.variants import find_variants

CONTEXT = Context(torch.device("cpu"))


class Ready(PictureMetric):
    source = "a paper"

    def __init__(self, name: str, context: Context) -> None:
        self.name = name


class Wanting(Ready):
    def needs(self) -> list[Need]:
        return [Need("net.pt", "a site", "--weights", 4_000_000)]


class Wrong(Ready):
    def __init__(self, name: str, context: Context) -> None:
        raise ValueError("--option x must be yes or no")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"ready": Ready, "wanting": Wanting, "also": Wanting, "wrong": Wrong}
    for name, metric in found.items():
        monkeypatch.setitem(registry.METRICS, name, metric)


def protocol(**other: Any) -> Protocol:
    fields = {"set": "shapes", "metrics": (Use("ready"),), **other}
    return Protocol("mine", "a protocol", count=3, **fields)


def test_every_set_metric_and_shipped_protocol_is_listed() -> None:
    found = listing(CONTEXT)
    assert {row.name for row in found["sets"]} == set(NAMES)
    assert [row.name for row in found["metrics"]] == sorted(registry.METRICS)
    assert [row.name for row in found["protocols"]] == shipped()


def test_a_set_runs_that_is_generated_and_others_say_where_their_files_are() -> None:
    rows = {row.name: row for row in list_sets()}
    assert [name for name, row in rows.items() if row.runs] == ["shapes"]
    for name, known_set in SETS.items():
        assert known_set.source in rows[name].because[0] and "--from" in rows[name].because[0]


def test_a_metric_runs_that_needs_nothing() -> None:
    assert metric_row("ready", CONTEXT).runs
    row = metric_row("wanting", CONTEXT)
    assert not row.runs
    assert row.because == (str(Need("net.pt", "a site", "--weights", 4_000_000)),)


@pytest.mark.parametrize(
    ("name", "reason"), [("wrong", "--option x must be"), ("nobody", "no metric has this name")]
)
def test_a_metric_that_cannot_be_opened_says_why(name: str, reason: str) -> None:
    row = metric_row(name, CONTEXT)
    assert not row.runs and row.because[0].startswith(reason)


@pytest.mark.parametrize(
    ("other", "reasons"),
    [
        ({}, []),
        ({"reference": "scenes"}, []),
        ({"set": "parti"}, ["prompts parti: --set PartiPrompts.tsv"]),
        ({"set": "mine"}, ["prompts mine: --set, a file of yours"]),
        ({"metrics": (Use("ready"), Use("wanting"), Use("also"))}, ["wanting, also: net.pt"]),
        ({"reference": "set"}, ["--reference"]),
    ],
)
def test_a_protocol_runs_where_prompts_metrics_and_reference_are_there(
    other: dict[str, Any], reasons: list[str]
) -> None:
    row = protocol_row(protocol(**other), CONTEXT)
    assert row.runs == (not reasons)
    assert len(row.because) == len(reasons)
    assert all(map(str.startswith, row.because, reasons))


def test_the_text_has_a_line_for_each_and_what_it_needs_below_it() -> None:
    text = listing_text(listing(CONTEXT))
    lines = [line.split() for line in text.splitlines()]
    assert ["ready", "yes", "a", "paper"] in lines
    at = lines.index(["wanting", "no", "a", "paper"])
    assert lines[at + 1] == ["needs", "net.pt,", "as", "for", "also"]
    assert max(len(line) for line in text.splitlines() if "://" not in line) <= 130


def test_what_several_need_is_told_in_full_once() -> None:
    need = str(Need("net.pt", "a site", "--weights"))
    rows = {
        "sets": [],
        "metrics": [Row("one", "a", False, (need,)), Row("two", "b", False, (need,))],
        "protocols": [Row("p", "c", False, (f"one, two: {need}", "--reference, the pictures"))],
    }
    text = listing_text(rows)
    assert text.count("a site") == 1 and "needs net.pt, as for one" in text
    assert "needs one, two: net.pt, as for one" in text and "needs --reference" in text


def test_the_json_says_the_same() -> None:
    values = listing_json(listing(CONTEXT))
    one = next(row for row in values["metrics"] if row["name"] == "wanting")
    assert one == {
        "name": "wanting",
        "title": "a paper",
        "runs": False,
        "because": [str(Need("net.pt", "a site", "--weights", 4_000_000))],
    }


# --- models of a folder of runs


def run(folder: Path, name: str, step: int, latest: str | None = None) -> None:
    state = folder / name / f"step-{step:08d}"
    state.mkdir(parents=True)
    (state / "model.safetensors").touch()
    (folder / name / "latest").write_text(f"{latest or state.name}\n")


def test_the_newest_model_of_every_run_is_found(tmp_path: Path) -> None:
    run(tmp_path, "deep/convert", 10, "step-00000020")
    run(tmp_path, "deep/convert", 20)
    run(tmp_path, "shallow/convert", 10)
    run(tmp_path, "two/first", 1)
    run(tmp_path, "two/second", 1)
    found = find_variants(tmp_path)
    assert [one.name for one in found] == ["deep", "shallow", "two/first", "two/second"]
    assert found[0].transformer == tmp_path / "deep/convert/step-00000020/model.safetensors"


def test_the_folder_of_one_run_is_its_models(tmp_path: Path) -> None:
    run(tmp_path, "deep/convert", 10)
    assert [one.name for one in find_variants(tmp_path / "deep")] == ["convert"]
    assert [one.name for one in find_variants(tmp_path / "deep/convert")] == ["convert"]


@pytest.mark.parametrize("latest", ["../../etc", "step-1", "step-00000099"])
def test_a_run_that_names_no_state_is_refused(tmp_path: Path, latest: str) -> None:
    run(tmp_path, "deep/convert", 10, latest)
    with pytest.raises(ValueError, match="must name a state|is not there, but"):
        find_variants(tmp_path)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold training runs"):
        find_variants(tmp_path)


def test_variants_are_run_one_after_another_and_stand_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "runs", "deep/convert", 10)
    run(tmp_path / "runs", "dense/convert", 10)
    asked = []

    def drawn(options: Run) -> tuple[str, dict[str, Any]]:
        asked.append(options)
        table = load_protocol("sigma-table-3")
        results = {
            "protocol": table.record(kv_compress="" if options.name == "dense" else "14-27:2:conv"),
            "model": options.name,
            "metrics": {},
        }
        return "", with_paper(table, results)

    monkeypatch.setattr(report, "write_report", lambda folders, output: output / "report.html")
    options = Run(protocol="sigma-table-3", output=tmp_path / "out", variants=tmp_path / "runs")
    text, values = run_variants(options, drawn)
    assert [(one.name, one.output.name) for one in asked] == [("deep", "deep"), ("dense", "dense")]
    assert [Path(one.transformer).parts[-4] for one in asked] == ["deep", "dense"]
    assert all(one.variants is None for one in asked)
    assert "ours: deep" in text and "ours: dense" in text
    assert "> (a) none, 512 px" in text and "> (a) deep blocks 14-27" in text
    assert list(values) == ["deep", "dense"]


def test_variants_and_a_transformer_are_refused(tmp_path: Path) -> None:
    options = Run(protocol="shapes", output=tmp_path, variants=tmp_path, transformer="x")
    with pytest.raises(ValueError, match="got --transformer too"):
        run_variants(options, lambda own: ("", {}))
