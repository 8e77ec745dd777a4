"""`pytest bench`: what makes a row a benchmark, and a short run of it in a process of its own."""

import os
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_context import quick

from bench import saving, suite
from bench.measure import results
from bench.measure.case import Case, Context
from bench.workloads import sizes

ROOT = Path(__file__).parent.parent.parent
ROW: dict[str, Any] = {
    "variant": "ours",
    "status": "measured",
    "seconds": {"median": 0.25},
    "samples": (0.5, 0.1, 0.25),
    "bytes": 10,
}


class Recorder:
    """pytest-benchmark's fixture, as far as a row needs it."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.seconds: list[float] = []

    def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            begin = suite.CLOCK.read()
            target()
            self.seconds.append(suite.CLOCK.read() - begin)


def test_the_statistics_are_of_the_samples_that_were_measured() -> None:
    benchmark = Recorder()
    suite.report(benchmark, ROW)
    assert benchmark.seconds == [0.5, 0.1, 0.25]
    assert benchmark.extra_info == {"variant": "ours", "bytes": 10}


@pytest.mark.parametrize(
    ("variant", "status", "outcome"),
    [
        ("fa3", "not installed: no module", pytest.skip.Exception),
        ("fa3", "failed: RuntimeError: no kernel", pytest.skip.Exception),
        ("ours", "failed: RuntimeError: no kernel", pytest.fail.Exception),
        ("ours compiled", "no C++ compiler", pytest.skip.Exception),
        ("ours", "failed: OutOfMemoryError: CUDA out of memory", pytest.skip.Exception),
        ("fa3", "computes something else: out0 is 0.5 from that of fp64", pytest.fail.Exception),
        ("ours", "computes something else: d_q is 0.5 from that of fp64", pytest.fail.Exception),
    ],
)
def test_what_was_not_measured_is_skipped_with_its_reason_and_faults_fail(
    variant: str, status: str, outcome: type[BaseException]
) -> None:
    benchmark = Recorder()
    with pytest.raises(outcome, match=re.escape(status)):
        suite.report(benchmark, {"variant": variant, "status": status})
    assert not benchmark.seconds


@pytest.mark.parametrize(
    ("wanted", "found"), [((), ["small-ours", "small-fa3"]), (("fa3",), ["small-fa3"])]
)
def test_the_smoke_run_is_the_smallest_size_without_compilers_or_what_it_is_told(
    wanted: tuple[str, ...], found: list[str]
) -> None:
    case = partial(Case, run=print, variants=("ours", "ours compiled", "fa3"))
    mark = suite.at_each("part", ("small", "large"), lambda size: [case(size)], wanted)
    parameters = mark.args[1]  # type: ignore[attr-defined]
    smoke = [one.id for one in parameters if any(m.name == "smoke" for m in one.marks)]
    assert len(parameters) == 6 and smoke == found


def _item(bench: suite.Bench, variant: str) -> Any:
    return SimpleNamespace(callspec=SimpleNamespace(params={"row": (bench, variant)}))


def test_a_case_runs_once_for_all_of_its_variants_that_were_selected() -> None:
    asked: list[list[str]] = []

    def run(context: Context) -> None:
        asked.append(list(context.choose({"ours": 1, "eager": 2, "flex": 3})))
        for name in ("ours", "eager"):
            context.row(name)

    bench, other = (suite.Bench("part", Case("case", run)) for _ in range(2))
    items = [_item(bench, "ours"), _item(bench, "eager"), _item(other, "flex"), SimpleNamespace()]
    timed = suite.timed_once(quick(), items)
    assert timed(bench)["ours"]["id"] == "part/case/ours" and timed(bench)["eager"]
    assert asked == [["ours", "eager"]]


def test_a_case_that_failed_is_not_tried_again_and_holds_no_memory() -> None:
    held: list[Any] = []

    def run(context: Context) -> None:
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise RuntimeError("no such kernel")

    bench = suite.Bench("part", Case("case", run, ("ours", "eager")))
    timed = suite.timed_once(quick(), [_item(bench, name) for name in bench.case.variants])
    for name in bench.case.variants:
        assert timed(bench)[name]["status"] == "failed: RuntimeError: no such kernel"
    assert [ref() for ref in held] == [None]


def test_a_saving_is_a_bench_of_the_compressed_models_times() -> None:
    case = saving.case(sizes.TINY)
    names = ("ours", "ours compressed", "ours compressed r4", "diffusers")
    assert case.variants == names
    found = {row["variant"]: row for row in quick(names[2]).run("saving", case)}
    row = found[names[2]]
    benchmark = Recorder()
    suite.report(benchmark, row)
    assert tuple(benchmark.seconds) == row["samples"] and len(row["samples"]) == 3
    assert (row["ratio"], row["saving"]["paper"]) == (4, None) and "ours" in found
    assert f"FLOPs saved {row['saving']['flops']:.1%}" in suite.rate(row)


def test_the_models_whose_saving_is_a_bench_run_whole() -> None:
    assert set(sizes.MODEL_SIZES["cpu"]) <= set(saving.WHOLE_ON_CPU)


def test_the_ordinary_test_run_collects_no_bench(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]


BENCHES = """
from bench import suite
from bench.measure.case import Case, Ready, Unavailable, Verdict, time_variants

def run(context):
    def judge(ready):
        return {"fa4": Verdict({"out0": 0.5}, "fp64", False)} if "fa4" in ready else {}

    def absent():
        raise Unavailable("not installed")

    ready = {"ours": lambda: Ready([lambda: None], 0, 8), "fa3": absent, "fa4": lambda: Ready([])}
    for name, row in time_variants(context, ready, judge).items():
        context.row(name, what="it", shape={}, dtype="bfloat16", **row)

def fail(context):
    raise RuntimeError("no memory")

CASES = [Case("runs", run, ("ours", "fa3", "fa4")), Case("fails", fail, ("ours",))]

@suite.at_each("part", ("small",), lambda size: CASES)
def bench_it(row, report):
    report(row)
"""


def test_all_rows_are_kept_with_their_reasons_and_what_they_were_measured_on(
    tmp_path: Path,
) -> None:
    file, kept = tmp_path / "bench_it.py", tmp_path / "kept.json"
    file.write_text(BENCHES)
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-c", "pyproject.toml"]
    command += [str(file), f"--results={kept}", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "2 failed, 1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    (run,) = results.read(kept)["runs"]
    assert {row["id"]: row["status"] for row in run["rows"]} == {
        "part/runs/ours": "measured",
        "part/runs/fa3": "not installed",
        "part/runs/fa4": "computes something else: out0 is 0.5 from that of fp64",
        "part/fails/ours": "failed: RuntimeError: no memory",
    }
    assert run["complete"] and run["command"].startswith("pytest ") and run["source"]["commit"]
    ours = run["rows"][0]
    speed = ours["bytes"] / ours["seconds"]["median"]
    assert ours["share_of_copy"] == pytest.approx(speed / run["peaks"]["copy"]["per_second"])
    assert re.search(r"runs-ours\]: [\d.e+-]+ GB/s, \d+% of the copy", done.stdout)
    for name, unit in (("copy", "GB/s"), ("matmul", "TFLOP/s"), ("matmul_fp32", "TFLOP/s")):
        assert re.search(rf"peak of this machine, {name}: [\d.e+-]+ {unit}\n", done.stdout)
