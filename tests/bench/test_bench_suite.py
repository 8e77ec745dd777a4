"""`pytest bench`: what makes a row a benchmark, and a short run of it in a process of its own."""

import json
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

from bench import report, saving, suite
from bench.measure import memory, results
from bench.measure.worker import Case, Context
from bench.workloads import accuracy, comparisons, models, sizes
from bench.workloads.operators import Workload

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
ROW = {
    "variant": "ours",
    "status": "measured",
    "agrees": True,
    "median": 0.25,
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
    assert benchmark.extra_info == {"variant": "ours", "agrees": True, "bytes": 10}


@pytest.mark.parametrize(
    ("variant", "status", "outcome"),
    [
        ("fa3", "not installed: no module", pytest.skip.Exception),
        ("fa3", "failed: RuntimeError: no kernel", pytest.skip.Exception),
        ("ours", "failed: RuntimeError: no kernel", pytest.fail.Exception),
        ("ours compiled", "no C++ compiler", pytest.skip.Exception),
        ("ours", "failed: OutOfMemoryError: CUDA out of memory", pytest.skip.Exception),
    ],
)
def test_what_was_not_measured_is_skipped_with_its_reason_and_ours_fails(
    variant: str, status: str, outcome: type[BaseException]
) -> None:
    benchmark = Recorder()
    with pytest.raises(outcome, match=re.escape(status)):
        suite.report(benchmark, {"variant": variant, "status": status})
    assert not benchmark.seconds


def test_who_computes_something_else_has_no_time() -> None:
    benchmark = Recorder()
    with pytest.raises(AssertionError, match="computes something else"):
        suite.report(benchmark, ROW | {"agrees": False})
    assert not benchmark.seconds


def test_ours_must_be_right_to_roundings_and_a_peer_must_compute_the_same_formula() -> None:
    work = Workload("flash_attention", sizes.TINY, "self")
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=True)
    right = accuracy.errors(accuracy.results(work.ours, inputs, True), truth)
    wrong = accuracy.results(partial(work.ours, scale=0.5), inputs, True)  # 72^-½ is 0.12
    for is_ours in (True, False):
        assert accuracy.plausible(right, work.dtype, is_ours=is_ours)
        assert not accuracy.plausible(accuracy.errors(wrong, truth), work.dtype, is_ours=is_ours)
    rough = {"out0": 0.05}
    assert accuracy.plausible(rough, work.dtype, is_ours=False)
    assert not accuracy.plausible(rough, work.dtype, is_ours=True)


def test_the_smoke_run_is_the_smallest_size_without_compilers() -> None:
    mark = suite.at_each(
        ("small", "large"), lambda size: [Case(size, print, ("ours", "ours compiled"))]
    )
    parameters = mark.args[1]  # type: ignore[attr-defined]
    smoke = [one.id for one in parameters if any(m.name == "smoke" for m in one.marks)]
    assert len(parameters) == 4 and smoke == ["small-ours"]
    groups = {one.id: one.marks[0].kwargs["group"] for one in parameters}
    assert groups["large-ours compiled"] == "large"


def test_only_the_variants_of_selected_benches_run() -> None:
    case, other = Case("case", print), Case("case", print, ("ours",))
    calls = [(case, "ours"), (case, "eager"), (other, "flex")]
    items: list[Any] = [
        SimpleNamespace(callspec=SimpleNamespace(params={"rows": rows, "variant": variant}))
        for rows, variant in calls
    ]
    context = Context(CPU)
    items.append(SimpleNamespace())
    context.chosen = suite.chosen(items, case)
    assert context.choose({"ours": 1, "eager": 2, "flex": 3}) == {"ours": 1, "eager": 2}
    context.chosen = None
    assert context.choose({"flex": 3}) == {"flex": 3}


def test_a_case_runs_once_for_all_of_its_variants() -> None:
    runs: list[str] = []

    def run(context: Context) -> None:
        runs.append("run")
        for name in ("ours", "eager"):
            context.row(variant=name)

    timed = suite.timed_once(Context(CPU), [])
    case = Case("case", run, ("ours", "eager"))
    assert timed(case)["ours"]["variant"] == "ours" and timed(case)["eager"]
    assert runs == ["run"]


def test_a_case_that_failed_is_not_tried_again_and_holds_no_memory() -> None:
    held: list[Any] = []

    def run(context: Context) -> None:
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise RuntimeError("no such kernel")

    timed = suite.timed_once(Context(CPU), [])
    case = Case("case", run, ("ours", "eager"))
    for _ in case.variants:
        with pytest.raises(RuntimeError, match="no such kernel"):
            timed(case)
    assert [ref() for ref in held] == [None]


def test_a_row_tells_what_other_processes_took_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.Moment, "elsewhere", lambda self, before: 0.3)
    case = Case("case", lambda context: context.row(variant="ours"), ("ours",))
    assert suite.timed_once(Context(CPU), [])(case) == {
        "ours": {"variant": "ours", "busy_elsewhere": 0.3}
    }


def test_the_machine_and_the_commit_are_told_apart() -> None:
    machine, commit = suite.machine_info(), suite.commit_info()
    assert machine["cores"] >= 1 and machine["processor"]
    assert machine["libraries"]["torch"] == torch.__version__
    assert len(commit["source_sha256"]) == 64 and not set(machine) & set(commit)


def test_a_rate_names_the_peak_that_it_is_a_share_of() -> None:
    flops = {"flops_per_second": 2e12, "share_of_matmul": 0.5, "images_per_second": 1.5}
    moved = {"bytes_per_second": 3e9, "share_of_copy": 0.25, "peak_bytes": 3 << 20}
    assert suite.rate(flops) == "2 TFLOP/s, 50% of the matrix product; 1.5 images/s"
    assert suite.rate(moved) == "3 GB/s, 25% of the copy; 3 MiB at its peak"
    assert suite.rate({}) == ""
    saved = {"time_saved": 0.2, "flops_saved": 0.248, "paper": 0.34}
    assert suite.rate(saved) == "time saved 20.0 %, FLOPs saved 24.8 %, paper 34 %"
    assert suite.rate(saved | {"paper": None}) == "time saved 20.0 %, FLOPs saved 24.8 %"


def test_compression_by_four_and_everywhere_saves_more() -> None:
    def saved(compression: sizes.Compression) -> float:
        dense, compressed = (
            sizes.step_flops("4k", 1, is_compressed, compression) for is_compressed in (False, True)
        )
        return 1 - compressed / dense

    half = [saved(sizes.Compression(ratio)) for ratio in (2, 4)]
    # Half of the blocks lose 1 - 1 / R² of an attention that is 8/9 of the saving at R → ∞.
    assert half[1] / half[0] == pytest.approx((1 - 1 / 16) / (1 - 1 / 4))
    assert saved(sizes.Compression(everywhere=True)) == pytest.approx(2 * half[0])


@pytest.mark.skipif(not os.access(memory.RESET, os.W_OK), reason="the kernel does not tell")
def test_a_peak_is_of_the_call_and_not_of_what_came_before() -> None:
    size = 64 << 20
    kept = torch.ones(size, dtype=torch.uint8)
    del kept
    out, small = memory.of(lambda: torch.ones(size // 8, dtype=torch.uint8), CPU)
    _, large = memory.of(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert small is not None and large is not None and len(out) == size // 8
    assert size // 8 <= small < size // 2 and size <= large < 2 * size
    meter = memory.Meter(CPU)
    held = torch.ones(size, dtype=torch.uint8)
    assert (meter.held() or 0) >= 0.9 * len(held)


def test_a_meter_tells_nothing_where_nobody_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RESET", Path("/nowhere"))
    assert memory.of(lambda: 1, CPU) == (1, None) and memory.Meter(CPU).held() is None


def test_training_both_ways_times_one_model_with_and_without_checkpoints() -> None:
    context = Context(CPU)
    context.seconds, context.chosen = 0, frozenset({"ours", "ours checkpointed"})
    context.peaks = {name: {"per_second": 1e12} for name in ("matmul", "copy")}
    context.run(models.train_both_ways(sizes.TINY))
    plain, checkpointed = context.rows
    assert [row["checkpointing"] for row in context.rows] == [False, True]
    for row in (plain, checkpointed):
        assert row["images_per_second"] == 1 / row["median"]
        assert row["flops"] == 3 * sizes.step_flops(sizes.TINY, 1, False, captions=True)


def test_a_saving_is_a_bench_of_the_compressed_models_times() -> None:
    context = Context(CPU)
    context.seconds, context.chosen = 0, frozenset({"ours R = 4"})
    context.peaks = {name: {"per_second": 1e12} for name in ("matmul", "copy")}
    case = saving.case(sizes.TINY)
    assert case.variants == ("ours R = 2", "ours R = 4")
    context.run(case)
    (row,) = context.rows
    benchmark = Recorder()
    suite.report(benchmark, row)
    assert tuple(benchmark.seconds) == row["samples"] and len(row["samples"]) == 3
    told = benchmark.extra_info
    assert (told["ratio"], told["resolution"], told["paper"]) == (4, sizes.TINY, None)
    assert row["compressed"]["median"] == row["median"]
    for name in ("dense", "diffusers"):
        assert told[name]["median"] > 0
    compressed = sizes.step_flops(sizes.TINY, 1, True, sizes.Compression(4))
    dense = sizes.step_flops(sizes.TINY, 1, False)
    assert told["flops"] == compressed
    assert told["flops_saved"] == pytest.approx(1 - compressed / dense)
    assert suite.rate(row).endswith(f"FLOPs saved {100 * told['flops_saved']:.1f} %")


def test_the_models_whose_saving_is_a_bench_run_whole() -> None:
    assert set(sizes.MODEL_SIZES["cpu"]) <= set(saving.WHOLE_ON_CPU)


def test_flex_is_left_out_only_where_time_is_short() -> None:
    context = Context(CPU)
    context.seconds, context.chosen = 0, frozenset({"flex"})
    work = Workload("flash_attention", sizes.TINY, "cross")
    context.run(comparisons.compared([work], hurried=True)[0])
    assert context.rows[0]["status"] == "not measured: compiles for seconds at every shape"


def test_the_ordinary_test_run_collects_no_bench(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The JSON of a run, what it printed, and what a second run printed that compares with it."""
    folder = tmp_path_factory.mktemp("bench")
    run = [sys.executable, "-m", "pytest", "bench", "-m", "smoke", "-p", "no:cacheprovider"]
    run += ["-k", "bench_modulate and forward or bench_startup", f"--benchmark-storage={folder}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    printed = []
    for more in (["--benchmark-only", "--benchmark-save=run"], ["--benchmark-compare=0001"]):
        done = subprocess.run(run + more, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    (path,) = folder.rglob("*_run.json")
    return json.loads(path.read_text()), printed[0], printed[1]


def test_a_run_says_what_was_measured_where_and_of_which_commit(
    short_run: tuple[dict[str, Any], str, str],
) -> None:
    result, printed, _ = short_run
    assert result["machine_info"]["cores"] and result["commit_info"]["source_sha256"]
    assert "clocks" in result and result["peaks"]["copy"]["per_second"] > 0
    modulate = [bench for bench in result["benchmarks"] if "modulate" in bench["name"]]
    assert {bench["params"]["variant"] for bench in modulate} >= {"ours", "eager"}
    for bench in modulate:
        extra, statistics = bench["extra_info"], bench["stats"]
        speed = extra["bytes"] / statistics["median"]
        assert extra["bytes_per_second"] == pytest.approx(speed)
        copy = result["peaks"]["copy"]["per_second"]
        assert extra["share_of_copy"] == pytest.approx(speed / copy)
        assert extra["shape"] and extra["errors"]["out0"] < 0.01 and "busy_elsewhere" in extra
    assert "% of the copy" in printed
    for name, unit in (("copy", "GB/s"), ("matmul", "TFLOP/s"), ("matmul_fp32", "TFLOP/s")):
        assert re.search(rf"peak of this machine, {name}: [\d.e+-]+ {unit}\n", printed)


BENCHES = """
from bench import suite
from bench.measure.worker import Case

def run(context):
    context.row(variant="ours", status="measured", agrees=True, samples=[0.25])
    context.row(variant="fa3", status="not installed")
    context.row(variant="fa4", status="measured", agrees=False, samples=[0.5])

def fail(context):
    raise RuntimeError("no memory")

CASES = [Case("runs", run, ("ours", "fa3", "fa4")), Case("fails", fail, ("ours",))]

@suite.at_each(("small",), lambda size: CASES)
def bench_it(rows, variant, report):
    report(rows[variant])
"""


def test_what_has_no_time_is_in_the_json_with_its_reason(tmp_path: Path) -> None:
    file, kept = tmp_path / "bench_it.py", tmp_path / "kept.json"
    file.write_text(BENCHES)
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-c", "pyproject.toml"]
    command += [str(file), f"--benchmark-json={kept}", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout
    (run,) = report.normal("", json.loads(kept.read_text()))["runs"]
    assert {(row["group"], row["variant"]): row["status"] for row in run["rows"]} == {
        ("runs", "ours"): "measured",
        ("runs", "fa3"): "not installed",
        ("runs", "fa4"): "computes something else",
        ("fails", "ours"): "failed: RuntimeError: no memory",
    }
    assert {row["bench"] for row in run["rows"]} == {"bench_it"}


def test_variants_are_timed_in_turn(short_run: tuple[dict[str, Any], str, str]) -> None:
    starts = [bench for bench in short_run[0]["benchmarks"] if "startup" in bench["name"]]
    # Alone, an empty Python would start more often in the same time than the command line.
    assert len(starts) == 3 and len({bench["stats"]["rounds"] for bench in starts}) == 1


def test_runs_compare_as_those_of_any_other_suite(
    short_run: tuple[dict[str, Any], str, str],
) -> None:
    _, _, compared = short_run
    assert "(0001_run)" in compared and "(NOW)" in compared
    assert "machine_info is different" not in compared
