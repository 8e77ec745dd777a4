"""bench.host: what it makes of a worker's figures, and a short run of the worker."""

from pathlib import Path
from typing import Any

import pytest
import stubbed
import torch
from bench_context import quick

from bench import host
from bench.compiled import host_worker, stub_driver
from bench.measure import results, timing
from bench.reporting import host as reporting
from bench.reporting import pages


def _row(least: float) -> dict[str, Any]:
    seconds = {"median": 2 * least, "p20": least, "p80": 3 * least, "least": least}
    seconds |= {"count": 5, "method": "thread"}
    return {"seconds": seconds, "samples": (least,), "launches": 1, "layer_norms": least / 2e-6}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A worker that finds 10 µs here and 40 µs elsewhere, and no diffusers; the calls of it."""
    asked: list[tuple[Any, ...]] = []

    def start(what: str, seconds: float, rounds: int, tree: Path) -> host_worker.Rows:
        asked.append((what, tree))
        least = 1e-5 if tree == host.ROOT else 4e-5
        names = [case.name for case in host.cases(what)]
        return {name: {v: _row(least) for v in ("ours", host.EAGER, "torch")} for name in names}

    monkeypatch.setattr(host, "_started", start)
    monkeypatch.setattr(host.stub_driver, "build", lambda: None)
    return asked


def test_every_call_with_a_target_is_measured() -> None:
    names = [case.name for what in ("operators", "model") for case in host.cases(what)]
    assert set(reporting.TARGETS) <= set(names) and len(names) == len(set(names)) == 24


def test_a_case_has_rows_of_its_variants_with_reasons_for_the_absent(worker: Any) -> None:
    case = host.cases("model")[0]
    found = {row["variant"]: row["status"] for row in quick().run("host", case)}
    assert found == {
        "ours": "measured",
        "eager references": "measured",
        "diffusers": "not installed",
    }
    chosen = [row["variant"] for row in quick("ours").run("host", case)]
    assert chosen == ["ours"]


def test_without_a_compiler_nothing_is_measured_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build() -> Path:
        raise stub_driver.NoCompiler("the stub driver needs a C compiler")

    monkeypatch.setattr(host.stub_driver, "build", build)
    (row,) = quick().run("host", host.cases("operators")[1])
    assert row["status"] == "the stub driver needs a C compiler"


def test_a_worker_that_fails_is_a_failure_with_its_last_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_worker, "PROGRAM", "raise SystemExit('no such kernel')")
    monkeypatch.setattr(host.stub_driver, "build", lambda: None)
    monkeypatch.setattr(host, "_started", host_worker.start)
    (row,) = quick().run("host", host.cases("operators")[1])
    assert row["status"] == "failed: RuntimeError: no such kernel"


def test_the_command_keeps_before_and_now_and_the_page_shows_both(
    worker: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    (old / "kernels" / "pixart_kernels").mkdir(parents=True)
    file = tmp_path / "host.json"
    assert host.main(["--json", str(file), "--before", str(old)]) == 0
    assert {tree for _, tree in worker} == {host.ROOT, old}
    page = capsys.readouterr().out
    assert "| modulate forward | ours | 10 µs | 20 µs (10 to 30) | 5.0 | 1 | 1.00 × | 1 |" in page
    assert "| modulate forward | ours at old | 40 µs |" in page and "4.00 ×" in page
    content = results.read(file)
    assert pages.page(content, "host.json").startswith("# Time of the host")
    text = reporting.overview([("host-x", content)])
    assert "| modulate forward | 40 µs (old) | 10 µs | ≤ 8 µs, **missed** |" in text
    assert "| compress_kv forward | 40 µs (old) | 10 µs | ≤ 13 µs |" in text
    assert "not measured" in reporting.overview([])


def test_before_must_be_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main(["--before", str(tmp_path)])
    assert "--before must be a checkout of this project" in capsys.readouterr().err


def test_calls_of_the_host_are_timed_in_turn_as_means_of_many() -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    x = torch.zeros(64, 64)
    variants = {"a": lambda: (count("a"), x @ x), "b": lambda: (count("b"), x @ x)}
    found = timing.measure_host(variants, seconds=0, least_rounds=3)
    assert {one.method for one in found.values()} == {"thread"}
    assert all(len(one.samples) == 3 and min(one.samples) > 0 for one in found.values())
    assert min(calls.values()) > 3 * 2  # of each sample more than one call


@pytest.mark.skipif(not stubbed.has_compiler(), reason="needs a C compiler")
def test_the_worker_measures_every_operator_each_way() -> None:
    found = host_worker.start("operators", 0.0, 1)
    assert {case.name for case in host.cases("operators")} == set(found)
    for name, rows in found.items():
        for row in rows.values():
            assert row["seconds"]["least"] > 0 and row["layer_norms"] > 0
            assert row["launches"] > 0 or name == host.LAYER_NORM
