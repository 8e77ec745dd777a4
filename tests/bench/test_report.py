import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import report
from bench.measure import machine
from bench.reporting import plots, sections, summary
from bench.workloads.blocks import FAMILIES, MERGING

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
MACHINE = {
    "device": "cpu",
    "processor": "Some CPU",
    "cores": 2,
    "threads": 2,
    "python": "3.12.1",
    "libraries": {"torch": "9.8.7", "triton": None},
    "commit": "c0ffee" * 6,
    "modified": False,
    "source_sha256": "5" * 64,
}
GPU = MACHINE | {"device": "cuda", "gpu": "Some H200", "driver": "1.2", "cuda": "3.4"}
SLOWER = "**Slower than a peer by more than the spread of both:**"
PEAKS = {"matmul": {"per_second": 4e12}, "copy": {"per_second": 2e10}}


def result(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "resources",
        "command": "python -m bench.resources",
        "triton": "9.9",
        "date": "2031-02-03T04:05:06Z",
        "commit": "c0ffee" * 6,
        "modified": False,
        "source_sha256": "0" * 64,
        "kernels_sha256": machine.source_hash(("kernels",)),
        "rows": [ROW | changes],
    }


def measured(kind: str, *rows: dict[str, Any], busy: float = 0.01, **values: Any) -> dict[str, Any]:
    """A file of one run."""
    run = {"command": f"python -m bench.{kind} --json x", "date": "2031-02-03T04:05:06Z"}
    run |= {"machine": MACHINE, "peaks": PEAKS, "tiny": False, **values}
    made = [{"busy_elsewhere": busy, "clocks": None, **row} for row in rows]
    return {"kind": kind, "runs": [{**run, "rows": made}]}


def step(variant: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """A denoising step at 4K."""
    row = {"step": "denoise", "resolution": "4k", "variant": variant, **time(seconds)}
    row |= {"status": "measured", "flops_per_second": 1.0, "share_of_matmul": 0.5}
    return row | {"shape": {"batch": 1, "tokens": 65536}, "agrees": True} | changes


def time(median: float, around: float = 2) -> dict[str, Any]:
    spread = {"p20": median / around, "p80": median * around}
    return {"median": median, **spread, "method": "wall"}


def saving(**changes: Any) -> dict[str, Any]:
    row = {
        "case": "2k/R2",
        "size": "2k",
        "tokens": 16384,
        "ratio": 2,
        "scope": "whole",
        "depth": 28,
    }
    row |= {
        "dense": time(40),
        "compressed": time(29),
        "diffusers": time(50),
        "time_saved": 0.275,
        "flops_saved": 0.248,
    }
    row |= {"time_saved_p20": 0.27, "time_saved_p80": 0.28, "paper": 0.34}
    seconds = dict.fromkeys(FAMILIES, 0.125)
    row |= {"operations": {"dense": seconds, "compressed": seconds}}
    return row | {"eaten": dict.fromkeys(FAMILIES, 0.0) | {MERGING: 0.051}} | changes


def forward(variant: str, times_as_fast: float, **changes: Any) -> dict[str, Any]:
    row = {"size": "1k", "tokens": 4096, "dtype": "bfloat16", "variant": variant, "flops": 10**12}
    row |= {"case": f"1k/bfloat16/{variant}", "difference_from_diffusers": 0.002}
    row |= {"peak_bytes": 3 << 20, "times_as_fast": times_as_fast, **time(2)}
    return row | changes


def block(
    size: str, median: float | None, peak: int | None = None, **changes: Any
) -> dict[str, Any]:
    tokens = {"1k": 4096, "4k": 65536, "8k": 262144}[size]
    row = {"case": f"{size}/bfloat16/dense", "size": size, "tokens": tokens, "dtype": "bfloat16"}
    row |= {"variant": "dense", "floors": [[4 * 10**12 * tokens // 4096, 1]]}
    return row | ({} if median is None else {**time(median), "peak_bytes": peak}) | changes


def operator(variant: str, seconds: float | None, **changes: Any) -> dict[str, Any]:
    """Timed within a tenth."""
    row = {"part": "operators", "operator": "flash_attention", "kind": "self", "variant": variant}
    row |= {"direction": "forward", "resolution": "4k", "shape": {"batch": 1, "tokens": 65536}}
    row |= {"dtype": "bfloat16", "agrees": True}
    if seconds is None:
        return row | {"status": "not installed: No module named 'fa'"} | changes
    rates = {"flops_per_second": 1e12 / seconds, "share_of_matmul": 0.25, "status": "measured"}
    return row | rates | time(seconds, 1.1) | changes


def gpu_file(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As bench.gpu writes it."""
    head = {"command": "python -m bench.gpu --out x", "date": "2031-02-03T04:05:06Z"}
    head |= {"machine": GPU, "peaks": [PEAKS], "parts": {}, "dry_run": False, "rows": list(rows)}
    return head | {"failures": [], "crashes": [], "skipped": []} | changes


def render(*results: dict[str, Any]) -> str:
    names = [f"r{index}.json" for index in range(len(results))]
    return report.render(
        [(name, report.normal(name, one)) for name, one in zip(names, results, strict=True)]
    )


def line(text: str, *words: str) -> str:
    """The one line that has all of these words."""
    (found,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return found


def test_benchmarks_are_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_every_figure_comes_from_a_result() -> None:
    text = render(result(registers=77, waits=3, spill_bytes=8))
    assert "| 77 | 8 | 2 | 16 | 0.900 | 3 |  |" in text
    assert "640 / 512 / 166 / 148 / 600" in text and "Triton 9.9" in text


def test_what_was_not_measured_is_called_so() -> None:
    text = report.render([])
    assert text.count("not measured |\n") == len(report.TARGETS)
    assert "Not measured: no GPU" in text and "## On a CPU\n\nNot measured." in text
    text = render(measured("saving", saving()))
    assert line(text, "| 4k |  | 2 |") == "| 4k |  | 2 | not measured |  |  |  |  |  |  |  |  |"
    assert "`python -m bench.growth`: not measured on this machine." in text
    assert "Not measured: no GPU" in text and "bench.gpu --out DIR`: not" not in text


def test_only_defaults_are_listed_and_defects_are_said() -> None:
    assert "spills 8 bytes" in render(result(defects=["spills 8 bytes"]))
    assert "self-bf16" not in render(result(default=False))


def test_compiled_code_tells_its_commit_and_whether_the_kernels_are_still_the_same() -> None:
    text = render(result())
    assert "`bench/results/r0.json`; 2031-02-03T04:05:06Z; commit `c0ffeec0ffee`. It" in text
    assert "kernels have changed" not in text
    assert "**The kernels have changed since.**" in render(result() | {"kernels_sha256": "0" * 64})


def test_libraries_that_changed_are_told_by_run() -> None:
    file = measured("saving", saving())
    assert "- Some CPU" in render(file) and "run 1 of" not in render(file)
    updated = MACHINE | {"python": "3.13.0"}
    file["runs"] += measured("saving", saving(case="4k/R2", size="4k"), machine=updated)["runs"]
    text = render(file)
    assert line(text, "Python 3.12.1").endswith("(run 1 of `r0.json`)")
    assert line(text, "Python 3.13.0").endswith("(run 2 of `r0.json`)")


def test_a_stranger_can_tell_machine_commit_command_date_and_load() -> None:
    text = render(measured("saving", saving()))
    assert "## On a CPU: Some CPU, 2 cores" in text and "Python 3.12.1; torch 9.8.7" in text
    made = line(text, "1. `python -m bench.saving --json x`")
    for word in (
        "2031-02-03T04:05:06Z",
        "commit `c0ffeec0ffee`;",
        "timed by wall",
        "up to 1 % of the CPUs",
        "4 TFLOP/s",
    ):
        assert word in made
    assert "provisional" not in text and "Kept in `bench/results/r0.json`" in text


def test_figures_of_a_busy_machine_or_an_edited_tree_are_marked() -> None:
    edited = MACHINE | {"modified": True}
    text = render(measured("saving", saving(), busy=0.3, machine=edited))
    assert "up to 30 % of the CPUs: **provisional**" in text
    assert "with changes, sources `555555555555`" in text


def test_the_saving_stands_beside_flops_and_paper_and_names_what_eats_it() -> None:
    text = render(measured("saving", saving()))
    found = line(text, "| 2k | 16,384 | 2 | whole |")
    assert "| 40 s (20 to 80) | 29 s (14.5 to 58) | 50 s (25 to 100) |" in found
    assert "| 27.5 % (27.0 % to 28.0 %) | 24.8 % | 34 % |" in found
    assert "nothing: within 3 points | 1 |" in found
    text = render(measured("saving", saving(time_saved=0.2, scope="block")))
    assert "one block × 28 | 40 s" in text and f"| {MERGING}: 5.1 points | 1 |" in text
    assert "| 2k | eaten | +0.0 |" in text


@pytest.mark.parametrize(
    ("eaten", "named"),
    [
        (0.04, f"{MERGING}: 4.0 points"),
        (-0.01, "not in the profile: 5.8 points"),  # whole models that lose time elsewhere
        (0.022, "not in the profile: 2.6 points"),
    ],
)
def test_what_the_profile_does_not_explain_is_not_blamed_on_an_operation(
    eaten: float, named: str
) -> None:
    shares = dict.fromkeys(FAMILIES, 0.0) | {MERGING: eaten}
    row = saving(time_saved=0.2, eaten=shares)
    assert sections.culprit(row) == named
    rest = 4.8 - 100 * eaten
    assert line(render(measured("saving", row)), "| eaten |").endswith(f"| {rest:+.1f} | +4.8 |")
    half = dict.fromkeys(FAMILIES[:3], 0.016)
    assert sections.culprit(row | {"eaten": half}) == "no single operation"


def test_every_measured_ratio_is_listed() -> None:
    text = render(measured("saving", saving(case="2k/R3", ratio=3)))
    assert "| 2k | 16,384 | 3 | whole |" in text and "| 2k |  | 2 | not measured |" in text


def test_a_saving_that_knows_no_diffusers_is_still_reported() -> None:
    row = saving()
    del row["diffusers"]
    text = render(measured("saving", row))
    assert "| 40 s (20 to 80) | 29 s (14.5 to 58) | not measured | 27.5 %" in text
    (curves,) = plots.PLOTS[0].curves([("", measured("saving", row))]).values()
    assert curves == {"ours, dense": [(2048, 40)], "ours, R = 2": [(2048, 29)]}


@pytest.mark.parametrize(
    ("saved", "low", "high", "said"),
    [
        (0.279, 0.27, 0.28, "nothing: saved more than FLOPs"),
        (0.277, 0.27, 0.28, "nothing: within 3 points"),
        (0.22, 0.18, 0.24, "nothing: within 3 points"),
        (0.22, 0.18, 0.25, "nothing: within 3 points; spread of 7 points"),
        (0.2, 0.1, 0.3, f"{MERGING}: 5.1 points; spread of 20 points"),
    ],
)
def test_a_saving_beyond_its_flops_or_of_a_wide_spread_is_called_so(
    saved: float, low: float, high: float, said: str
) -> None:
    row = saving(time_saved=saved, time_saved_p20=low, time_saved_p80=high)
    assert sections.culprit(row) == said


def test_the_peak_of_fp32_is_told_where_it_was_measured() -> None:
    assert "peaks 4 TFLOP/s (bf16 product), 20 GB/s (copy)" in render(measured("saving", saving()))
    peaks = PEAKS | {"matmul_fp32": {"per_second": 5e11}}
    text = render(measured("saving", saving(), peaks=peaks))
    assert "peaks 4 TFLOP/s (bf16 product), 0.5 TFLOP/s (fp32 product), 20 GB/s (copy)" in text


def test_losses_are_told_first() -> None:
    slow = forward("ours, caption encoded", 0.2, **time(10))
    text = render(measured("cpu", forward("ours", 1.25), slow, forward("diffusers", 1)))
    told = "**Slower than diffusers by more than the spread of both:** "
    assert f"{told}ours, caption encoded at 1k in bfloat16.\n" in text
    assert "| 2 s (1 to 4) | 500 |  | 1.25 × | 2.0e-03 | 3 MiB | 1 |" in text
    noise = forward("ours", 0.8, **time(2.5))
    assert "Slower than" not in render(measured("cpu", noise, forward("diffusers", 1)))


def test_a_later_run_of_a_file_is_the_second_of_its_table() -> None:
    file = measured("cpu", forward("ours", 1.5))
    other = measured("cpu", forward("diffusers", 1), date="2032-01-01T00:00:00Z")
    file["runs"] += other["runs"]
    text = render(file)
    assert line(text, "| 1k | bfloat16 | ours | 2 s").endswith("| 1 |")
    assert line(text, "| 1k | bfloat16 | diffusers | 2 s").endswith("| 2 |")
    assert line(text, "2. `python -m bench.cpu").count("2032-01-01")


def test_growth_is_fitted_and_what_is_not_measured_is_predicted_from_the_roofline() -> None:
    rows = (block("1k", 2, 1 << 20), block("4k", 64, 16 << 20), block("8k", None))
    text = render(measured("growth", *rows))
    # 16 times the tokens in 32 times the time, and in 16 times the memory.
    assert "to the power of 1.25 over all sizes, 1.25 between the last two; memory 1.00 and" in text
    assert "| 4k | 65,536 | 64 s (32 to 128) | 1.25 | 16 s | 25 % | 16 MiB | 1.00 | 1 |" in text
    # The roofline of 8k is 4 times that of 4k, of which 25 % were reached.
    assert (
        "| 8k | 262,144 | not measured; 256 s expected |  | 64 s |  | not measured |  | 1 |" in text
    )


def test_a_size_of_growth_that_was_not_measured_has_its_place() -> None:
    rows = (block("1k", 2, 1 << 20), block("4k", 64, 16 << 20))
    section = render(measured("growth", *rows)).split("**dense, bfloat16**")[1].split("\n\n")[1]
    sizes = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    assert sizes == ["| image", "| 256", "| 512", "| 1k", "| 2k", "| 4k"]
    assert "\n| 2k |  | not measured |  |  |  |  |  |  |\n" in section
    assert "(32 to 128) | 1.25 |" in line(section, "| 4k |")  # from 1k on


def test_the_roofline_is_at_the_peaks_of_the_run_that_measured_the_largest_size() -> None:
    file = measured("growth", block("4k", 64, 1))
    slow = {name: {"per_second": peak["per_second"] / 2} for name, peak in PEAKS.items()}
    file["runs"] += measured("growth", block("1k", 2, 1), block("8k", None), peaks=slow)["runs"]
    assert sections.ceiling(file) == (4e12, 2e10)
    assert "256 s expected" in render(file)


def test_results_of_a_gpu_fill_targets_and_tables() -> None:
    rows = (
        operator("ours", 0.002),
        operator("sdpa flash", 0.003),
        operator("fa4", 0.001),
        operator("fa2", None),
    )
    text = render(gpu_file(*rows))
    target = line(text, "attention, D = 72, 4K, forward")
    assert "| 500 TFLOP/s, 1.50 × the best SDPA, 0.50 × FA4 |" in target
    assert f"{SLOWER} flash_attention self forward 4k fa4." in text
    assert "| fa2 | not measured: not installed: No module named 'fa' |" in text
    assert "## On a GPU: Some H200" in text and "driver 1.2" in text and "no GPU was" not in text
    assert "1. `python -m bench.gpu --out x`; 2031-02-03T04:05:06Z; commit" in text


def test_a_peer_is_faster_beyond_the_spread_of_both_only() -> None:
    assert "Slower than" not in render(gpu_file(operator("ours", 1), operator("eager", 0.9)))
    assert f"{SLOWER} flash" in render(gpu_file(operator("ours", 1), operator("eager", 0.7)))


def test_who_computes_something_else_has_no_time() -> None:
    wrong = operator("fa4", 0.001, agrees=False, case="operators/x")
    file = gpu_file(operator("ours", 0.002), wrong)
    text = render(file)
    assert "| fa4 | not measured: computes something else |" in text
    assert "FA4 not measured |" in text and "Slower than" not in text
    named = [("", report.normal("", file))]
    assert plots.PLOTS[1].curves(named) == {"Some H200": {"ours": [(65536, 500)]}}
    printed = summary.render(file)
    assert "fa4 1" not in printed and "fa4: computes something else" in printed


def test_targets_are_of_the_gpu_that_they_name_and_of_the_published_ratio() -> None:
    tuned = operator("", 1e-5) | {"part": "tuning"}  # one configuration of ours, and no rate
    del tuned["variant"], tuned["flops_per_second"]
    merged: dict[str, Any] = {"operator": "compress_kv", "kind": "", "bytes_per_second": 1e9}
    half, third = (
        operator("ours", 1, **merged, share_of_copy=share, shape={"batch": 1, "ratio": ratio})
        for ratio, share in ((2, 0.9), (3, 0.6))
    )
    file = gpu_file(operator("ours", 0.002), half, third)
    text = render({**file, "rows": [*file["rows"], tuned]})
    assert "| measured, `r0.json`: 2031-02-03T04:05:06Z, commit `c0ffeec0ffee` |" in text
    assert "| 4k forward: 90 % |" in line(text, "| compress_kv, 2K")
    assert "| compress_kv forward R = 3 | 4k | ours |" in text
    assert "compress_kv forward R = 3 4k" in summary.render(file)
    other = render({**file, "machine": GPU | {"gpu": "Some GPU"}})
    assert "not measured |" in line(other, "| compress_kv, 2K")


def test_what_is_not_usual_is_part_of_the_name_of_what_was_timed() -> None:
    row = operator("ours", 1)
    assert summary.what(row) == "flash_attention self forward"
    changed = row | {"shape": {"batch": 2, "ratio": 4}, "dtype": "float16"}
    assert summary.what(changed) == "flash_attention self forward R = 4 batch 2 float16"
    assert summary.what({"group": "picture", "dtype": "torch.float32"}) == "picture float32"
    trained = step("ours", 1, step="train")
    assert summary.what(trained | {"checkpointing": False}) == "train"
    assert summary.what(trained | {"checkpointing": True}) == "train checkpointed"
    told = trained | {"checkpointing": True, "variant": "ours checkpointed"}
    assert summary.what(told) == "train"  # beside the variant without


def test_cases_of_a_gpu_that_came_to_no_end_are_listed() -> None:
    lost = {
        "failures": [{"part": "steps", "case": "steps/train/4k", "error": "Traceback\nE: no"}],
        "crashes": [{"case": "steps/x", "variant": "fa3", "reason": "hung"}],
        "skipped": [{"part": "tuning", "reason": "out of time"}] * 2,
    }
    text = render(gpu_file(operator("ours", 1), **lost))
    assert "- FAILED steps/train/4k: E: no\n- CRASHED steps/x fa3: hung\n" in text
    assert "- tuning: 2 cases not run, out of time\n" in text
    assert "no end" not in render(gpu_file(operator("ours", 1)))


def test_streaming_operators_and_steps_of_a_gpu_fill_their_targets() -> None:
    copied = {"operator": "compress_kv", "kind": "", "share_of_copy": 0.9, "bytes_per_second": 1e9}
    steps = [
        step(name, seconds, part="steps")
        for name, seconds in (("ours", 3.0), ("ours compressed", 2.0), ("diffusers", 9.0))
    ]
    text = render(
        gpu_file(operator("ours", 2, **copied), operator("compiled", 3, **copied), *steps)
    )
    assert "4k forward: 90 %, 1.50 × torch.compile |" in line(text, "| compress_kv, 2K")
    assert "| 33.3 % of the time saved |" in line(text, "4K, compressed |")
    assert "| 3.00 × diffusers |" in line(text, "| denoising step at 4K |")


def suite_file(*rows: dict[str, Any], bench: str = "bench_attention") -> dict[str, Any]:
    """As pytest-benchmark writes it, with what bench/conftest.py adds."""
    commit = ("commit", "modified", "source_sha256")
    rows = rows or (operator("ours", 2), operator("sdpa flash", 1, images_per_second=3))
    statistics = ("median", "p20", "p80")
    return {
        "datetime": "2031-02-03T04:05:06",
        "machine_info": {key: value for key, value in MACHINE.items() if key not in commit},
        "commit_info": {key: MACHINE[key] for key in commit},
        "peaks": PEAKS,
        "benchmarks": [
            {
                "name": f"{bench}[{row['variant']}]",
                "group": "g",
                "stats": {"median": row["median"], "q1": row["p20"], "q3": row["p80"]},
                "extra_info": {key: row[key] for key in row if key not in statistics},
            }
            for row in rows
        ],
        "unmeasured": [{"bench": bench, "group": "g", **operator("fa2", None)}],
    }


def test_the_json_of_pytest_benchmark_is_a_section_as_well() -> None:
    text = render(suite_file())
    assert "`bench_attention`" in text
    assert (
        "| flash_attention self forward | 4k | sdpa flash | 1 s (0.9091 to 1.1) | wall "
        "| 1 TFLOP/s, 3 images/s | 25 % |" in text
    )
    assert "flash_attention self forward | 4k | fa2 | not measured: not installed: No" in text
    assert f"{SLOWER} flash_attention self forward 4k sdpa flash." in text


def test_a_saving_of_pytest_bench_tells_time_flops_and_paper() -> None:
    row = saving(**step("ours R = 2", 29))
    text = render(suite_file(row, bench="bench_kv_compression_saving"))
    said = "time saved 27.5 %, FLOPs saved 24.8 %, paper 34 % | 50 % |"
    assert said in line(text, "| denoise | 4k | ours R = 2 | 29 s (14.5 to 58) |")


def test_dry_runs_and_files_of_nobody_are_refused() -> None:
    for trial in (measured("saving", saving(), tiny=True), gpu_file(dry_run=True)):
        with pytest.raises(ValueError, match=r"r0.json must be measured at real shapes, got a dry"):
            render(trial)
    with pytest.raises(ValueError, match="must be a result of a bench command, got other"):
        render({"kind": "other"})


def test_plots_show_what_the_results_say() -> None:
    files = [
        measured("saving", saving()),
        measured("cpu", forward("diffusers", 1)),
        measured("growth", block("1k", 2, 1 << 20), block("8k", None)),
        suite_file(),
        gpu_file(operator("ours", 0.002)),
    ]
    named = [("", report.normal("", file)) for file in files]
    shown = {plot.file: plot.curves(named) for plot in plots.drawable(named)}
    cpu, gpu = "Some CPU, 2 cores, 2 threads", "Some H200"
    assert shown["steps.png"][cpu] == {
        "ours, dense": [(2048, 40)],
        "ours, R = 2": [(2048, 29)],
        "diffusers": [(2048, 50)],
    }
    assert shown["attention.png"] == {
        cpu: {"ours": [(65536, 0.5)], "sdpa flash": [(65536, 1.0)]},
        gpu: {"ours": [(65536, 500)]},
    }
    assert shown["growth-memory.png"] == {cpu: {"ours, dense, bfloat16": [(4096, 1)]}}
    floor = shown["growth-time.png"][cpu]["roofline of ours, dense"]
    assert floor == [(4096, 1.0), (262144, 64.0)]


def test_a_curve_is_of_one_file_and_what_is_composed_is_none_of_what_was_measured() -> None:
    whole, composed = saving(), saving(case="4k/R2", size="4k", tokens=65536, scope="block")
    suite = suite_file() | {"machine_info": GPU}
    ours = operator("ours", 0.002)
    files = [suite, measured("saving", whole, composed), gpu_file(ours), gpu_file(ours)]
    named = [("", report.normal("", file)) for file in files]
    steps, attention = (plot.curves(named) for plot in plots.PLOTS[:2])
    assert attention["Some H200"] == {"ours": [(65536, 500)], "sdpa flash": [(65536, 1.0)]}
    (curves,) = steps.values()
    assert curves["ours, dense"] == [(2048, 40)]
    assert curves["ours, dense, composed of single blocks"] == [(4096, 40)]


def test_steps_of_pytest_bench_are_drawn_of_models_of_full_depth() -> None:
    shallow = step("ours", 1, resolution="1k-shallow")
    rows = (step("ours", 3), step("ours compressed", 2), step("ours compiled", 4), shallow)
    named = [("", report.normal("", suite_file(*rows, bench="bench_denoising")))]
    (curves,) = plots.PLOTS[0].curves(named).values()
    assert curves == {"ours, dense": [(4096, 3)], "ours, R = 2": [(4096, 2)]}


def test_a_picture_drawn_in_another_style_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plots._hash(plots.PLOTS[0], {})
    assert plots._hash(plots.PLOTS[0], {}) == before
    monkeypatch.setattr(plots, "_draw", lambda *arguments: None)
    assert plots._hash(plots.PLOTS[0], {}) != before


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are read and the report is written instead."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "OUTPUT", tmp_path / "BENCHMARKS.md")
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    return tmp_path


def test_a_file_that_was_edited_is_found_out(folder: Path, capsys: Any) -> None:
    (folder / "r.json").write_text(json.dumps(result()))
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    with open(folder / "BENCHMARKS.md", "a") as file:
        file.write("1000 TFLOP/s\n")
    assert report.main(["--check"]) == 1 and "run python -m bench.report" in capsys.readouterr().out


def test_a_picture_of_other_results_is_found_out_and_drawn_again(folder: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    (folder / "r.json").write_text(json.dumps(measured("saving", saving())))
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    picture = folder / "plots" / "steps.png"
    with Image.open(picture) as drawn:  # with a ground of its own, whatever the page's
        assert drawn.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    assert [path.name for path in picture.parent.iterdir()] == ["steps.png"]
    (folder / "r.json").write_text(json.dumps(measured("saving", saving(dense=time(41)))))
    report.OUTPUT.write_text(report.render(report.read_results(folder)), encoding="utf-8")
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith("steps.png is not what")
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    picture.unlink()
    assert report.main(["--check"]) == 1
    (folder / "r.json").unlink()
    assert report.main([]) == 0 and report.main(["--check"]) == 0 and not picture.exists()


def test_the_readme_shows_the_pictures_that_there_are() -> None:
    text = (report.ROOT / "README.md").read_text(encoding="utf-8")
    shown = {path.name for path in report.PLOTS.glob("*.png")}
    assert shown == {plot.file for plot in plots.PLOTS if f"bench/plots/{plot.file}" in text}
