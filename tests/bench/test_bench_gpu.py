"""The GPU script, run on a CPU at tiny shapes; and what becomes of a part that fails."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.measure import timing
from bench.measure.worker import Case, Context, Part, run
from bench.reporting import summary
from bench.workloads import accuracy, peers, sizes
from bench.workloads.operators import Workload

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and what was printed."""
    out = tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.log"]
    return json.loads((out / "gpu.json").read_text()), done.stdout


def _rows(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["part"] == part]


def test_the_dry_run_comes_to_its_end_with_every_part(dry_run: tuple[dict[str, Any], str]) -> None:
    result, _ = dry_run
    assert result["complete"] and not result["failures"] + result["crashes"] + result["skipped"]
    assert list(result["parts"]) == ["correctness", "operators", "steps", "backends", "tuning"]
    assert all(_rows(result, part) for part in result["parts"])


def test_no_time_of_a_cpu_can_be_taken_for_one_of_a_gpu(
    dry_run: tuple[dict[str, Any], str],
) -> None:
    result, printed = dry_run
    assert result["dry_run"] and result["machine"]["device"] == "cpu"
    assert "gpu" not in result["machine"]
    assert printed.startswith("cpu (a dry run: these times mean nothing)")


@pytest.mark.parametrize(("device", "is_dry"), [("cpu", True), ("cuda", False)])
def test_a_run_is_a_dry_one_by_its_machine_and_not_by_its_command(
    device: str, is_dry: bool
) -> None:
    events = [{"event": "machine", "part": "", "case": "", "device": device}]
    assert gpu.assemble(events, time.time(), ["--device=cpu"], True)["dry_run"] is is_dry


def test_every_operator_is_checked_and_compared_in_both_directions(
    dry_run: tuple[dict[str, Any], str],
) -> None:
    result, _ = dry_run
    checked = _rows(result, "correctness")
    names = {"flash_attention", "compress_kv", "modulate", "gate_add", "gate_add_modulate"}
    for dtype in ("bfloat16", "float16", "float32"):
        assert {row["operator"] for row in checked if row["dtype"] == dtype} == names
    assert {row["shape"]["batch"] for row in checked} == {1, 2, 4}
    assert all(row["passed"] and row["repeatable"] for row in checked)
    compared = {
        (row["operator"], row["direction"])
        for row in _rows(result, "operators")
        if row["variant"] == "ours" and row["status"] == "measured"
    }
    assert compared >= {(name, way) for name in names for way in ("forward", "backward")}


def test_a_row_says_what_was_measured_and_how(dry_run: tuple[dict[str, Any], str]) -> None:
    result, _ = dry_run
    timed = [row for row in result["rows"] if "median" in row]
    assert len(timed) > 40
    for row in timed:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert {"reps", "method", "shape", "dtype", "variant", "clocks", "peaks"} <= set(row)
        assert "share_of_matmul" in row or "share_of_copy" in row
    for name in ("copy", "matmul", "matmul_fp32"):
        assert result["peaks"][0][name]["per_second"] > 0


def test_peers_that_cannot_run_say_why(dry_run: tuple[dict[str, Any], str]) -> None:
    result, printed = dry_run
    statuses = {row["variant"]: row["status"] for row in _rows(result, "operators")}
    assert statuses["fa3"].startswith("not installed: ") or "padded" in statuses["fa3"]
    assert statuses["diffusers"] == "diffusers has no key/value compression"
    assert statuses["sdpa cudnn"].startswith("failed: RuntimeError: ")
    launched = {row["variant"]: row["kernels"] for row in _rows(result, "backends")}
    assert any("flash_attention_for_cpu" in kernel for kernel in launched["sdpa flash"])
    assert "sdpa cudnn: failed: RuntimeError" in printed


def test_whole_steps_are_compared_with_the_same_model_of_diffusers(
    dry_run: tuple[dict[str, Any], str],
) -> None:
    result, _ = dry_run
    rows = {(row["step"], row["variant"]): row for row in _rows(result, "steps")}
    for step in ("denoise", "train"):
        for name in ("ours", "ours compressed", "diffusers", "diffusers compiled"):
            assert rows[step, name]["status"] == "measured"
    ours, compressed = rows["denoise", "ours"], rows["denoise", "ours compressed"]
    assert ours["difference_from_diffusers"] < 0.03  # bf16, and another order of rounding
    assert compressed["flops"] < ours["flops"]
    # Only ours has encoded its caption before it denoises; a training step makes it as well.
    made = ours["flops"] + sizes.caption_flops(sizes.TINY_MODEL)
    assert rows["denoise", "diffusers"]["flops"] == made
    assert rows["train", "ours"]["flops"] == rows["train", "diffusers"]["flops"] == 3 * made


def _context(tmp_path: Path) -> tuple[Context, Path]:
    return Context(CPU, tmp_path / "events.jsonl"), tmp_path / "events.jsonl"


def _assembled(events: Path) -> dict[str, Any]:
    return gpu.assemble(gpu.read_events(events), time.time(), [], True)


def _good(context: Context) -> None:
    context.row(status="measured", value=float("inf"))


def _bad(context: Context) -> None:
    raise ZeroDivisionError("on purpose")


def test_a_failing_case_or_part_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    def no_cases(tiny: bool) -> list[Case]:
        raise LookupError("no cases today")

    context, events = _context(tmp_path)
    parts = [
        Part("first", 1, lambda tiny: [Case("bad", _bad), Case("good", _good)]),
        Part("second", 1, no_cases),
        Part("third", 1, lambda tiny: [Case("good", _good)]),
    ]
    run(parts, context, time.time() + 60)
    result = _assembled(events)
    assert [row["case"] for row in result["rows"]] == ["first/good", "third/good"]
    assert result["rows"][0]["value"] == "inf"  # JSON has no infinity
    case, part = result["failures"]
    assert case["case"] == "first/bad" and "ZeroDivisionError: on purpose" in case["error"]
    assert part["part"] == "second" and "LookupError: no cases today" in part["error"]
    assert "FAILED first/bad: ZeroDivisionError: on purpose" in summary.render(result)


def test_cases_that_time_does_not_suffice_for_are_told(tmp_path: Path) -> None:
    context, events = _context(tmp_path)
    run([Part("part", 1, lambda tiny: [Case("good", _good)])], context, time.time() - 1)
    result = _assembled(events)
    assert [(s["case"], s["reason"]) for s in result["skipped"]] == [("part/good", "out of time")]


WORKER = """
import os, sys, time
from bench import worker
from pathlib import Path

def end(context):
    for name in ("good", "bad", "last"):
        if context.crashed(name):
            context.row(variant=name, status=context.crashed(name))
            continue
        context.announce(name)
        if name == "bad":
            {deed}
        context.row(variant=name, status="measured")

def after(context):
    context.row(variant="ours", status="measured")

cases = [worker.Case("ends", end), worker.Case("after", after)]
parts = [worker.Part("part", 1, lambda tiny: cases)]
worker.main(parts, "cpu", Path(sys.argv[1]), time.time() + 300)
"""


@pytest.mark.parametrize(
    ("deed", "reason"),
    [("os.abort()", "died: signal 6"), ("time.sleep(600)", "hung: nothing for 8 s")],
)
def test_a_variant_that_kills_or_hangs_the_process_is_left_out_and_the_rest_goes_on(
    deed: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, events, log = (tmp_path / name for name in ("w.py", "events.jsonl", "log"))
    script.write_text(WORKER.format(deed=deed))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}:{ROOT}")
    command = [sys.executable, str(script), str(events)]
    gpu.supervise(command, events, log, time.time() + 300, lambda: None, stall_seconds=8)
    result = _assembled(events)
    statuses = [(row["case"], row["variant"], row["status"]) for row in result["rows"]]
    assert statuses == [
        ("part/ends", "good", "measured"),
        ("part/ends", "bad", reason),
        ("part/ends", "last", "measured"),
        ("part/after", "ours", "measured"),
    ]
    assert [(c["case"], c["variant"]) for c in result["crashes"]] == [("part/ends", "bad")]
    assert f"CRASHED part/ends bad: {reason}" in summary.render(result)


def test_without_a_gpu_the_script_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}:{ROOT}")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "bench.gpu needs a GPU" in capsys.readouterr().out


def test_timing_gives_a_failing_variant_its_error_and_times_the_others() -> None:
    def fail() -> None:
        raise KeyError("peer")

    calls = []
    variants = {"bad": [fail], "good": [lambda: calls.append(0), lambda: calls.append(1)]}
    results = timing.measure(variants, CPU, seconds=0, least_rounds=4)
    assert list(results) == ["bad", "good"] and isinstance(results["bad"], KeyError)
    assert isinstance(results["good"], timing.Timing) and results["good"].reps == 4
    assert calls == [0, 1, 0, 1, 0]  # one warm-up, then the sets of inputs in turn


@pytest.mark.parametrize(
    ("resolution", "saved"), [("512", 0.041), ("1k", 0.123), ("2k", 0.248), ("4k", 0.333)]
)
def test_compression_saves_the_published_share_of_flops(resolution: str, saved: float) -> None:
    dense, compressed = (sizes.step_flops(resolution, 1, kind) for kind in (False, True))
    assert 1 - compressed / dense == pytest.approx(saved, abs=6e-4)


@pytest.mark.parametrize("kind", ["self", "compressed", "masked"])
def test_the_oracle_of_attention_is_the_formula_and_its_gradient(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "ORACLE_BYTES", 8 * 36 * 5)  # a few rows at a time
    work = Workload("flash_attention", sizes.TINY, kind, 2, torch.float64)
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=True)
    errors = accuracy.errors(accuracy.results(work.reference, inputs, True), truth)
    assert set(errors) == {"out0", "d_q", "d_k", "d_v"}
    assert max(errors.values()) < 1e-12
    broken = accuracy.results(work.reference, {**inputs, "k": inputs["k"].flip(1)}, False)
    assert accuracy.errors(broken, truth)["out0"] > 0.1
    assert accuracy.errors({"out0": broken["out0"] / 0}, truth) == {"out0": float("inf")}


@pytest.mark.parametrize("operator", ["compress_kv", "modulate", "gate_add", "gate_add_modulate"])
def test_peers_compute_what_the_operator_computes(operator: str) -> None:
    work = Workload(operator, sizes.TINY, "plain" if operator == "gate_add_modulate" else "")
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=True)
    for name, variant in peers.variants(work).items():
        if name == "diffusers":
            continue
        call = variant(inputs)
        errors = accuracy.errors(
            accuracy.results(lambda call=call, **_: call(), inputs, True), truth
        )
        assert max(errors.values()) < 0.01, name


def test_the_folded_projection_equals_projecting_then_merging() -> None:
    work = Workload("project_kv", sizes.TINY, batch=2, dtype=torch.float32)
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=False)
    call = peers.variants(work)["folded"](inputs)
    errors = accuracy.errors(accuracy.results(lambda **_: call(), inputs, False), truth)
    assert max(errors.values()) < 1e-5


class FakeCuda:
    """A GPU whose calls take what `spend` says, on a clock of its own; graphs replay calls.

    now: when it will be idle. host: the host's clock, which runs ahead until they synchronise.
    """

    def __init__(self) -> None:
        self.now = self.host = 0.0
        self.captured: list[float] | None = None
        self.slept: list[int] = []

    def spend(self, seconds: float, launch: float = 0.0) -> None:
        if self.captured is None:
            self.host += launch
            self.now = max(self.now, self.host) + seconds
        else:
            self.captured.append(seconds)

    def synchronize(self, *device: Any) -> None:
        self.host = max(self.host, self.now)

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.when = 0.0

            def record(self) -> None:
                self.when = max(fake.now, fake.host)

            def elapsed_time(self, other: "Event") -> float:
                return 1e3 * (other.when - self.when)

        class Graph:
            work: list[float]

            def replay(self) -> None:
                fake.now += sum(self.work)

        @contextmanager
        def capture(graph: Any, stream: Any) -> Iterator[None]:
            fake.captured = []
            try:
                yield
            finally:
                graph.work, fake.captured = fake.captured, None

        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        for name in ("Stream", "current_stream", "default_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: "stream")
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append, raising=False)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 0)
        monkeypatch.setattr(timing, "_scratch", lambda device: torch.empty(1))


def test_short_calls_are_timed_in_a_graph_and_long_ones_behind_a_backlog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    fake.replace(monkeypatch)

    def refuses_capture() -> None:
        assert fake.captured is None
        fake.spend(2e-5)

    variants: dict[str, list[timing.Call]] = {
        "short": [partial(fake.spend, 2e-5), partial(fake.spend, 4e-5)],
        "long": [partial(fake.spend, 2e-3)],
        "refuses capture": [refuses_capture],
    }
    results = timing.measure(variants, torch.device("cuda"), seconds=0, least_rounds=3)
    assert all(isinstance(result, timing.Timing) for result in results.values())
    found = {name: (round(r.median, 9), r.method) for name, r in results.items()}  # type: ignore[union-attr]
    assert found == {
        "short": (3e-5, "graph"),
        "long": (2e-3, "events"),
        "refuses capture": (2e-5, "events"),
    }
    assert fake.slept
    fake.slept.clear()
    results = timing.measure(
        variants, torch.device("cuda"), seconds=0, least_rounds=3, with_host=True
    )
    assert {r.method for r in results.values()} == {"events with host"}  # type: ignore[union-attr]
    assert not fake.slept


def test_with_the_host_a_call_takes_the_same_after_a_long_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    fake.replace(monkeypatch)
    variants = {
        "bound by the GPU": [partial(fake.spend, 5e-3, launch=1e-4)],
        "bound by launches": [partial(fake.spend, 1e-4, launch=1e-3)],
    }
    results = timing.measure(
        variants, torch.device("cuda"), seconds=0, least_rounds=4, with_host=True
    )
    for name, expected in (("bound by the GPU", 5.1e-3), ("bound by launches", 1.1e-3)):
        result = results[name]
        assert isinstance(result, timing.Timing)
        assert result.samples == pytest.approx([expected] * 4)


def test_a_broken_context_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*device: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(timing.DeviceLost, match="first"):
        timing.survive(KeyError("first"), torch.device("cuda"))
