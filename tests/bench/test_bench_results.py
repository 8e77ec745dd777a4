"""What is kept of a measurement: its row, its run, the machine, the commit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_context import CPU

from bench.measure import machine, results, timing

RESULTS = Path(results.__file__).parent.parent / "results"
MACHINE = {"device": "cpu", "processor": "One", "cores": 2, "threads": 2}


def _run(command: str, **values: float) -> dict[str, Any]:
    rows = [{"id": name, "value": value} for name, value in values.items()]
    return {"command": command, "date": command, "machine": MACHINE, "rows": rows}


def test_a_later_run_replaces_what_it_measured_again_and_nothing_else() -> None:
    first = results.merged(None, "saving", _run("first", a=1, b=2))
    both = results.merged(first, "saving", _run("second", b=3, c=4))
    found = [
        (run["command"], row["id"], row["value"]) for run in both["runs"] for row in run["rows"]
    ]
    assert found == [("first", "a", 1), ("second", "b", 3), ("second", "c", 4)]
    # The run that is going on saves again; a run of which nothing is left disappears.
    again = results.merged(both, "saving", _run("second", b=3, c=4, d=5))
    assert [len(run["rows"]) for run in again["runs"]] == [1, 3]
    third = results.merged(again, "saving", _run("third", a=0))
    assert [run["command"] for run in third["runs"]] == ["second", "third"]


def test_results_of_another_command_or_machine_are_not_mixed() -> None:
    first = results.merged(None, "saving", _run("first", a=1))
    with pytest.raises(ValueError, match="must name a file of cpu, got one of saving"):
        results.merged(first, "cpu", _run("second", a=1))
    other = {**_run("second", a=1), "machine": {**MACHINE, "threads": 1}}
    with pytest.raises(ValueError, match="this machine, One, 2 cores, 1 threads, got one of One"):
        results.merged(first, "saving", other)


def test_what_is_no_file_of_results_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 1, "kind": "gpu"}')
    with pytest.raises(ValueError, match="old.json must be results of schema 2"):
        results.read(path)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_committed_results_have_rows_with_all_that_every_row_has(path: Path) -> None:
    content = results.read(path)
    ids = [row["id"] for run in content["runs"] for row in run["rows"]]
    assert ids and len(set(ids)) == len(ids)
    for run in content["runs"]:
        assert len(run["source"]["kernels_sha256"]) == 64 and not run["dry_run"]
        for row in run["rows"]:
            assert {"part", "what", "variant", "shape", "dtype", "status"} <= set(row)
            # Studies count what is right; all else times.
            assert ("seconds" in row or "figures" in row) == (row["status"] == "measured")


def test_what_other_processes_took_is_told() -> None:
    before, after = machine.Moment(), machine.Moment()
    cores = machine.os.cpu_count() or 1
    before.wall, before.own, before.all = 10, 5, 100
    after.wall, after.own, after.all = 20, 8, 100 + 3 + 4 * cores
    assert after.elsewhere(before) == pytest.approx(0.4)
    after.wall = 10.5
    assert after.elsewhere(before) is None
    after.wall, after.all = 20, None
    assert after.elsewhere(before) is None


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of a source and of a result."""
    for name in ("bench/deep/a.py", "bench/results/r.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    machine._git("init")
    machine._git("add", ".")
    machine._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    return tmp_path


@pytest.mark.parametrize("changed", ["bench/deep/a.py", "bench/b.py"])
def test_a_tree_is_edited_if_a_source_is_and_not_if_a_result_is(
    repository: Path, changed: str
) -> None:
    before = machine.revision()
    (repository / "bench/results/r.json").write_text("2")
    assert machine.revision() == before and before["commit"] and not before["modified"]
    (repository / changed).write_text("2")
    after = machine.revision()
    assert after["modified"] and after["source_sha256"] != before["source_sha256"]
    assert after["kernels_sha256"] == before["kernels_sha256"]


def test_the_peaks_are_those_that_training_takes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.bfloat16: 2e9, torch.float32: 1e9}
    monkeypatch.setattr(machine, "measure_peak", lambda device, dtype, seconds: rates[dtype])
    monkeypatch.setattr(
        timing,
        "measure",
        lambda calls, *_, **__: {name: timing.summarize([4.0, 2.0], "wall") for name in calls},
    )
    peaks = machine.peaks(CPU, tiny=True)
    assert peaks["copy"]["per_second"] == 2 * (1 << 22) / 2.0  # of the quickest
    assert machine.product_rate(peaks, torch.float16) == rates[torch.bfloat16]
    assert machine.product_rate(peaks, torch.float32) == rates[torch.float32]
