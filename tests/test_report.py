import json
from pathlib import Path
from typing import Any

import pytest

from bench import report

ROW = {
    "architecture": "sm_90",
    "kernel": "attention_forward.forward",
    "config": "self-bf16-72-1k-Q128",
    "default": True,
    "error": None,
    "registers": 123,
    "spill_bytes": 0,
    "shared_bytes": 2048,
    "resident_warps": 16,
    "useful_share": 0.9,
    "waits": 2,
    "cycles": {"tensor": 640, "exp": 512, "fma": 166, "alu": 148, "issue": 600},
    "floor_bytes": {"self-bf16-72": {"4k": 1}},
    "defects": [],
}


def result(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "resources",
        "command": "python -m bench.resources",
        "triton": "9.9",
        "source_sha256": "0" * 64,
        "rows": [ROW | changes],
    }


def test_benchmarks_are_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_every_figure_comes_from_a_result() -> None:
    text = report.render([("r.json", result(registers=77, waits=3, spill_bytes=8))])
    assert "| 77 | 8 | 2 | 16 | 0.900 | 3 |  |" in text
    assert "640 / 512 / 166 / 148 / 600" in text and "Triton 9.9" in text


def test_what_was_not_measured_is_called_so() -> None:
    text = report.render([])
    assert text.count("not measured |") == len(report.TARGETS)
    assert "Not measured: no GPU" in text


def test_only_defaults_are_listed_and_defects_are_said() -> None:
    text = report.render([("r.json", result(defects=["spills 8 bytes"]))])
    assert "spills 8 bytes" in text
    assert "self-bf16" not in report.render([("r.json", result(default=False))])


def test_a_file_that_was_edited_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "OUTPUT", tmp_path / "BENCHMARKS.md")
    (tmp_path / "r.json").write_text(json.dumps(result()))
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    with open(tmp_path / "BENCHMARKS.md", "a") as file:
        file.write("1000 TFLOP/s\n")
    assert report.main(["--check"]) == 1 and "run python -m bench.report" in capsys.readouterr().out
