"""The GPU script, run on a CPU at tiny shapes; and what becomes of a case that fails or dies."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stubbed
import torch
from bench_context import CPU

import pixart_kernels
from bench import gpu
from bench.measure import results, supervisor
from bench.measure.case import Case, Context
from bench.measure.worker import Part, run
from bench.workloads import models, sizes
from bench.workloads.operators import OPERATORS

ROOT = Path(__file__).parent.parent.parent
# Hides all but torch, Triton and what these need.
SITE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {hidden}
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
HIDDEN = ("safetensors", "diffusers", "transformers", "huggingface_hub", "peft", "pytest", "PIL")
HIDDEN += ("tqdm", "pydantic", "tyro", "matplotlib", "sentencepiece", "tokenizers")


PARTS = ["columns", "correctness", "configurations", "launches", "operators", "steps", "pictures"]
PARTS += ["ladder", "backends"]


def _run(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The run, and what was printed, where torch and Triton are all there is."""
    out, site = folder / "out", folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.replace("{hidden}", repr(set(HIDDEN))))
    path = os.pathsep.join(map(str, (site, ROOT / "kernels", ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.gpu", *options, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.log"]
    (found,) = results.read(out / "gpu.json")["runs"]
    return found, done.stdout + (out / "gpu.log").read_text()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return _run(tmp_path_factory.mktemp("gpu"), "--device", "cpu")


def _rows(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["part"] == part]


def test_the_dry_run_comes_to_its_end_with_every_part_in_its_order(
    dry_run: tuple[dict[str, Any], str],
) -> None:
    found, printed = dry_run
    assert found["complete"] and not found["unfinished"]
    parts = list(dict.fromkeys(row["part"] for row in found["rows"]))
    assert parts == PARTS
    assert found["command"].startswith("python -m bench.gpu --device cpu --out ")
    assert "flash_attention self forward" in printed


def test_no_time_of_a_cpu_can_be_taken_for_one_of_a_gpu(
    dry_run: tuple[dict[str, Any], str],
) -> None:
    found, _ = dry_run
    assert found["dry_run"] and found["machine"]["device"] == "cpu"
    assert "gpu" not in found["machine"]


def test_every_operator_with_a_reference_is_checked_and_compared_in_both_directions(
    dry_run: tuple[dict[str, Any], str],
) -> None:
    found, _ = dry_run
    public = pixart_kernels.__all__
    names = {name for name in public if f"{name}_reference" in public}
    checked = _rows(found, "correctness")
    for dtype in ("bfloat16", "float16", "float32"):
        assert {row["what"].split()[0] for row in checked if row["dtype"] == dtype} == names
    assert {row["shape"]["batch"] for row in checked} == {1, 2, 4}
    assert all(row["passed"] and row["repeatable"] for row in checked)
    compared = {
        (row["what"].split()[0], row["what"].split()[-1])
        for row in _rows(found, "operators")
        if row["variant"] == "ours" and row["status"] == "measured"
    }
    assert compared >= {(name, way) for name in names for way in ("forward", "backward")}
    assert names <= set(OPERATORS)


def test_a_row_says_what_was_measured_and_how(dry_run: tuple[dict[str, Any], str]) -> None:
    found, _ = dry_run
    timed = [row for row in found["rows"] if "seconds" in row]
    assert len(timed) > 40 and len({row["id"] for row in found["rows"]}) == len(found["rows"])
    for row in timed:
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] and seconds["count"]
        assert {"what", "shape", "dtype", "clocks", "busy_elsewhere"} <= set(row)
        assert {"share_of_matmul", "share_of_copy"} & set(row) and "samples" not in row
    for name in ("copy", "matmul", "matmul_fp32"):
        assert found["peaks"][name]["per_second"] > 0
    assert {"commit", "modified", "source_sha256", "kernels_sha256"} == set(found["source"])


def test_dense_models_are_compared_where_there_is_no_diffusers(
    dry_run: tuple[dict[str, Any], str],
) -> None:
    found, _ = dry_run
    steps = [row for row in _rows(found, "steps") if row["status"] == "measured"]
    assert {row["variant"] for row in steps} >= {"ours", "ours compressed", "ours compiled"}
    for row in steps:
        assert row["agrees"] is True and row["errors_from"] == "eager operators"
    assert {row["variant"] for row in steps if "ours" in row["errors_beside"]} == {"ours compiled"}


@pytest.mark.skipif(not stubbed.has_compiler(), reason="needs a C compiler")
def test_every_launch_goes_as_far_as_the_driver_and_counts_as_nothing(tmp_path: Path) -> None:
    """Without a GPU: the script to its end, through the launchers and Triton's compiler."""
    found, printed = _run(tmp_path, "--dry-run", "--minutes", "30")
    assert found["complete"] and not found["unfinished"] and found["dry_run"]
    assert list(dict.fromkeys(row["part"] for row in found["rows"])) == PARTS
    launches = re.search(r"(\d+) launches, (\d+) maps, 0 refused", printed)
    assert launches and int(launches[1]) > 100 and int(launches[2]) > 50
    for row in found["rows"]:
        assert row["status"] != "measured", row["id"]
        assert not {"seconds", "share_of_copy", "exact", "passed", "agrees"} & set(row)
    dry = {row["part"] for row in found["rows"] if "stub of the driver" in row["status"]}
    assert dry >= {"columns", "correctness", "configurations", "operators", "steps"}


def test_peers_that_cannot_run_say_why(dry_run: tuple[dict[str, Any], str]) -> None:
    found, _ = dry_run
    statuses = {row["variant"]: row["status"] for row in _rows(found, "operators")}
    assert statuses["fa3"].startswith("not installed: ") or "padded" in statuses["fa3"]
    assert statuses["diffusers"] == "diffusers has no key/value compression"
    assert statuses["sdpa cudnn"].startswith("failed: RuntimeError: No viable backend")
    steps = {row["variant"]: row["status"] for row in _rows(found, "steps")}
    assert steps["ours"] == "measured" and steps["diffusers"].startswith("not installed")
    launched = {row["variant"]: row["kernels"] for row in _rows(found, "backends")}
    assert any("flash_attention_for_cpu" in name for name in launched["sdpa flash forward"])


def _good(context: Context) -> None:
    context.row("ours", what="good", shape={}, dtype=None, value=float("inf"))


def _bad(context: Context) -> None:
    raise ZeroDivisionError("on purpose")


def _assembled(parts: list[Part], seconds: float) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    context = Context(CPU, lambda event: events.append(results.plain(event)))
    run(parts, context, time.time() + seconds)
    found = supervisor.assemble(events, "gpu", time.time(), [])
    assert found is not None
    return found


def test_a_failing_case_or_part_is_told_and_the_others_go_on() -> None:
    def no_cases() -> list[Case]:
        raise LookupError("no cases today")

    parts = [
        Part("first", 1, lambda: [Case("bad", _bad), Case("good", _good)]),
        Part("second", 1, no_cases),
        Part("third", 1, lambda: [Case("good", _good)]),
    ]
    found = _assembled(parts, 60)
    assert [row["id"] for row in found["rows"]] == ["first/good/ours", "third/good/ours"]
    assert found["rows"][0]["value"] == "inf"  # JSON has no infinity
    case, part = found["unfinished"]
    assert (case["part"], case["case"], case["event"]) == ("first", "bad", "failure")
    assert "ZeroDivisionError: on purpose" in case["reason"]
    assert part["part"] == "second" and "LookupError: no cases today" in part["reason"]


def test_cases_that_time_does_not_suffice_for_are_told() -> None:
    found = _assembled([Part("part", 1, lambda: [Case("good", _good)])], -1)
    (skipped,) = found["unfinished"]
    assert (skipped["case"], skipped["event"]) == ("good", "skipped")
    assert skipped["reason"] == "out of time" and found["complete"]


WORKER = """
import os, sys, time
from bench.measure import worker
from bench.measure.case import Case, Ready, time_variants
from pathlib import Path

def bad():
    {deed}

def builders():
    return {{name: lambda name=name: Ready([lambda: name != "bad" or bad()])
            for name in ("good", "bad", "last")}}

def end(context):
    for name, row in time_variants(context, builders()).items():
        context.row(name, what="it", shape={{}}, dtype=None, **row)

def after(context):
    context.row("ours", what="it", shape={{}}, dtype=None)

parts = [worker.Part("part", 1, lambda: [Case("ends", end), Case("after", after)])]
worker.main(parts, "cpu", Path(sys.argv[1]), time.time() + 300)
"""


@pytest.mark.parametrize(
    ("deed", "reason"),
    [("os.abort()", "died: signal 6"), ("time.sleep(600)", "hung: nothing for 20 s")],
)
def test_a_variant_that_kills_or_hangs_the_process_is_left_out_and_the_rest_goes_on(
    deed: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, events, log = (tmp_path / name for name in ("w.py", "events.jsonl", "log"))
    script.write_text(WORKER.format(deed=deed))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}:{ROOT}")
    command = [sys.executable, str(script), str(events)]
    supervisor.supervise(command, events, log, time.time() + 300, lambda: None, stall_seconds=20)
    found = supervisor.assemble(results.read_events(events), "gpu", time.time(), [])
    assert found is not None
    assert {row["id"]: row["status"] for row in found["rows"]} == {
        "part/ends/good": "measured",
        "part/ends/bad": reason,
        "part/ends/last": "measured",
        "part/after/ours": "measured",
    }
    (crash,) = found["unfinished"]
    assert (crash["case"], crash["variant"], crash["reason"]) == ("ends", "bad", reason)


SILENT = """
import json, sys, time
with open(sys.argv[1], "a", buffering=1) as file:
    print(json.dumps({"event": "variant", "variant": "ours compiled", "patience": 60}), file=file)
    time.sleep(4)
    print(json.dumps({"event": "variant", "variant": "ours"}), file=file)
    time.sleep(60)
"""


def test_who_announces_that_it_compiles_may_be_silent_for_longer(tmp_path: Path) -> None:
    script, events = tmp_path / "w.py", tmp_path / "events.jsonl"
    script.write_text(SILENT)
    worker = subprocess.Popen([sys.executable, str(script), str(events)], start_new_session=True)
    try:
        reason = supervisor._watch(worker, events, time.time() + 300, lambda: None, stall_seconds=2)
    finally:
        supervisor._end(worker)
    assert reason == "hung: nothing for 2 s"
    assert [event["variant"] for event in results.read_events(events)] == ["ours compiled", "ours"]


def test_a_step_of_a_compiled_model_announces_it() -> None:
    told: list[dict[str, Any]] = []
    context = Context(CPU, told.append)
    context.chosen, context.peaks = frozenset({"ours compiled"}), {"copy": {"per_second": 1.0}}
    context.peaks["matmul"] = {"per_second": 1.0}
    context.run("steps", models.denoise(sizes.TINY))
    (first, *_) = [event for event in told if event["event"] == "variant"]
    assert first["variant"] == "ours compiled" and first["patience"] >= 180


def test_events_of_a_worker_that_died_in_the_middle_of_a_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "case"}\n{"event": "row", "ro', encoding="utf-8")
    assert results.read_events(path) == [{"event": "case"}]


def test_without_a_gpu_the_script_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}:{ROOT}")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "this needs a GPU, and torch sees none; --dry-run" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()
