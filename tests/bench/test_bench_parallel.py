"""bench.parallel: what it makes of timings, and a short run of its workers."""

from pathlib import Path

import pytest
from bench_context import quick

from bench import parallel
from bench.measure import results, timing
from bench.reporting import pages
from bench.reporting import parallel as reporting


def _rows(monkeypatch: pytest.MonkeyPatch, *samples: tuple[float, ...]) -> list[results.Row]:
    names = [reporting.variant(count) for count in (1, 2)]
    found = {
        name: timing.summarize(taken, "wall") for name, taken in zip(names, samples, strict=True)
    }
    monkeypatch.setattr(parallel, "_timed", lambda *_: found)
    return quick().run(reporting.KIND, parallel.case(2, 8, 20))


def test_the_gain_is_that_of_calls_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = _rows(monkeypatch, (4.0, 8.0, 4.0), (2.0, 5.0, 2.5))
    assert one["gain"]["median"] == 1 and one["images_per_second"] == 2
    assert two["gain"] == {"median": 1.6, "p20": 1.6, "p80": 2.0}
    assert (two["processes"], two["images_per_second"]) == (2, 8 / 2.5)
    said = reporting.overview([("x", {"kind": "parallel", "runs": [{"rows": [one, two]}]})])
    assert "1.60 × (1.60 to 2.00)" in said


def test_without_cores_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_cores", lambda: {0})
    rows = quick().run(reporting.KIND, parallel.case(2, 8, 20))
    expected = "not measured: 2 processes want a core each, there are 1"
    assert [row["status"] for row in rows] == [expected] * 2
    assert expected in "\n".join(reporting.page([{**row, "run": "1"} for row in rows]))
    assert "not measured" in reporting.overview([])


@pytest.mark.parametrize("words", [["--processes", "3"], ["--processes", "1"], ["--steps", "0"]])
def test_options_that_cannot_be_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parallel.main(words)


@pytest.mark.exhaustive
def test_a_short_run_is_kept_and_marked_as_a_try(tmp_path: Path) -> None:
    file = tmp_path / "tried.json"
    words = ["--json", str(file), "--pictures", "2", "--steps", "1", "--rounds", "1"]
    assert parallel.main([*words, "--seconds", "0"]) == 0
    content = results.read(file)
    [run] = content["runs"]
    assert run["dry_run"] and [row["status"] for row in run["rows"]] == ["measured"] * 2
    assert "times one process" in pages.page(content)
