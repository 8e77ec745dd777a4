"""What bench.report makes of results: nothing typed, nothing hidden, nothing left behind."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import report
from bench.measure import machine
from bench.reporting import card, comparisons, editing, few_steps, ladder, overview, pages, plots

MACHINE = {
    "device": "cpu",
    "processor": "Some(R) CPU",
    "cores": 2,
    "threads": 2,
    "python": "3.12.1",
    "libraries": {"torch": "9.8.7", "triton": None},
}
GPU = MACHINE | {"device": "cuda", "gpu": "Some H200", "driver": "1.2", "cuda": "3.4"}
PEAKS = {"matmul": {"per_second": 4e12}, "copy": {"per_second": 2e10}}
SLOWER = "**Slower than a peer by more than the spread of both:**"
TOKENS = {"512": 1024, "1k": 4096, "2k": 16384, "4k": 65536, "8k": 262144}


def result(kind: str, *rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A file of one run."""
    source: Any = {"commit": "c0ffee" * 6, "modified": False, "source_sha256": "5" * 64}
    source |= {"kernels_sha256": machine.source_hash(("kernels",))}
    run: Any = {"command": f"python -m bench.{kind} --json x", "date": "2031-02-03T04:05:06Z"}
    run |= {"seconds": 1.0, "complete": True, "dry_run": False, "machine": MACHINE, "peaks": PEAKS}
    run |= {"source": source, "load_before": 0.0, "unfinished": [], **changes}
    return {"schema": 2, "kind": kind, "runs": [{**run, "rows": list(rows)}]}


def row(what: str, variant: str, median: float | None, size: str = "4k", **changes: Any) -> Any:
    """Timed within a tenth; without a median not at all."""
    made: Any = {"id": f"x/{what}/{size}/{variant}", "part": "operators", "what": what}
    made |= {"variant": variant, "dtype": "bfloat16", "status": "measured"}
    made |= {"shape": {"size": size, "batch": 1, "tokens": TOKENS[size]}, "busy_elsewhere": 0.01}
    if median is None:
        return made | {"status": "not installed: No module named 'fa'"} | changes
    seconds: Any = {"median": median, "p20": median / 1.1, "p80": median * 1.1}
    return made | {"seconds": seconds | {"count": 5, "method": "wall"}} | changes


ATTENTION, STEP = "flash_attention self forward", "denoising step"


def attention(variant: str, median: float | None, **changes: Any) -> Any:
    return row(ATTENTION, variant, median, **{"flops": 10**12, "share_of_matmul": 0.25, **changes})


def saving(**changes: Any) -> dict[str, Any]:
    time = {"median": 0.2, "p20": 0.19, "p80": 0.21}
    taken = {"attention": 0.0, "merging": 0.04}
    operations = {"ours": taken, "ours compressed": taken}
    made = {"time": time, "flops": 0.25, "paper": 0.34, "operations": operations, "lost": taken}
    return {**made, **changes}


def compressed(**changes: Any) -> Any:
    return row(STEP, "ours compressed", 32, part="saving", saving=saving(**changes))


def overall(*files: dict[str, Any]) -> str:
    return overview.render([(f"r{index}", file) for index, file in enumerate(files)])


def line(text: str, *words: str) -> str:
    """The one line that has all of these words."""
    (found,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return found


def test_everything_is_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_no_figure_is_typed_and_what_was_not_measured_is_called_so() -> None:
    text = overall()
    assert re.findall(r"\d\.\d\d \(|\d TFLOP/s,", text) == []
    assert "| everything on a GPU | not measured |" in text
    assert "| everything on a CPU | not measured |" in text
    # Beside the targets: the Gluon kernels among others, what a second process gains, and the ladder's rungs
    # with two parts of each.
    goals = len(overview.TARGETS) + len(editing.TARGETS) + len(few_steps.GATES) + 2
    goals += len(ladder.RUNGS) + 2
    assert text.count("not measured") == 4 + goals
    here = overall(result("suite", attention("ours", 2), attention("sdpa flash", 3)))
    assert "| 1.50 (1.24 to 1.82), sdpa flash at 4k | the same | 0 of 1 | Some, 2 cores |" in here
    assert "everything on a CPU" not in here and "| everything on a GPU | not measured |" in here


def test_losses_beyond_the_spread_of_both_stand_first() -> None:
    rows = [row(STEP, "ours", 1), row(STEP, "diffusers", 0.9)]  # within it
    rows += [attention("ours", 2), attention("fa4", 1), attention("sdpa flash", 4)]
    rows += [attention("ours", 2, size="1k"), attention("fa4", 3, size="1k")]
    file = result("suite", *rows)
    first, second = (one for one in overall(file).splitlines() if re.search(r"\d of \d", one))
    assert f"[{ATTENTION}]" in first and "| 0.50 (0.41 to 0.61), fa4 at 4k |" in first
    assert "| **1 of 3** |" in first and "| 0 of 1 |" in second
    page = pages.page(file)
    assert f"{SLOWER} {ATTENTION}: 0.50 × fa4 at 4k." in page
    assert page.index(SLOWER) < page.index("| what |")


def test_a_peer_that_keeps_no_activations_is_held_against_ours_that_keeps_none() -> None:
    times = {"ours": 1.0, "ours checkpointed": 3.0, "diffusers": 2.0, "diffusers checkpointed": 4.5}
    rows = [row("training step", name, median) for name, median in times.items()]
    found = comparisons.of_result(result("suite", *rows))
    assert {one.against: one.ratio for one in found} == {
        "diffusers": 2.0,
        "diffusers checkpointed": 1.5,
    }


def test_what_was_timed_in_another_run_is_not_compared() -> None:
    file, later = result("suite", attention("ours", 2)), result("suite", attention("fa4", 1))
    file["runs"] += later["runs"]
    assert list(comparisons.of_result(file)) == []
    assert "fa4 | 1 s" in pages.page(file) and "0.50 ×" not in pages.page(file)


def test_who_measured_what_and_when_stands_there_and_what_makes_it_doubtful() -> None:
    clean, dirty = result("suite", attention("ours", 2)), result("suite", attention("ours", 2))
    dirty["runs"][0]["rows"][0]["busy_elsewhere"] = 0.3
    dirty["runs"][0]["source"] |= {"modified": True, "kernels_sha256": "0" * 64}
    dirty["runs"][0]["complete"] = False
    page = pages.page(clean)
    made = line(page, "1. `python -m bench.suite --json x`")
    assert "2031-02-03T04:05:06Z; commit `c0ffeec0ffee`; peaks 4 TFLOP/s" in made
    assert "Some(R) CPU, 2 cores, 2 threads; Python 3.12.1, torch 9.8.7" in page
    doubts = "**provisional**: others took up to 30 % of the CPUs; did not come to its end; "
    doubts += "the kernels have changed since"
    assert f"`c0ffeec0ffee` with changes, sources `555555555555`; {doubts}" in pages.page(dirty)
    text = overall(clean, dirty)
    assert line(text, "[r0](").endswith("| 2031-02-03 | `c0ffeec0ffee` |  |")
    assert line(text, "[r1](").endswith(f"`555555555555` | {doubts} |")


def test_peers_that_are_absent_are_one_line() -> None:
    rows = [attention("fa2", None, size=size) for size in ("512", "1k", "4k")]
    page = pages.page(result("suite", attention("ours", 2), *rows))
    assert page.count("fa2") == 1
    assert "\nNot measured:\n\n- fa2, 3 cases: not installed: No module named 'fa'\n" in page


def test_wrong_results_and_cases_without_an_end_are_on_the_page_of_a_gpu() -> None:
    checked: Any = {"part": "correctness", "errors": {"out0": 0.5}, "errors_eager": {"out0": 0.25}}
    good = row("modulate", "ours", None, status="measured", passed=True, repeatable=True, **checked)
    bad = row(
        "attention", "ours", None, status="measured", passed=False, repeatable=True, **checked
    )
    tried = [
        row("x", name, median, part="configurations", kernel="k", config=name, chosen=name == "a")
        for name, median in (("a", 3.0), ("b", 2.0))
    ]
    lost = [{"case": "steps/4k", "variant": "fa3", "event": "crash", "reason": "hung"}]
    lost += [
        {"case": case, "variant": "", "event": "skipped", "reason": "no time"} for case in "xy"
    ]
    page = pages.page(result("gpu", good, bad, *tried, machine=GPU, unfinished=lost))
    assert "Of 2 results, 1 are within" in page
    assert "| x/attention/4k/ours | **no** | yes | out0 5.0e-01 | out0 2.5e-01 |" in page
    assert "x/modulate" not in page
    assert "- crash steps/4k fa3: hung\n- not run, 2 cases: no time" in page
    assert "0 of 1 choices" in page and "| x/x/4k | k | b | 1.50 × |" in page


def test_narrow_products_and_first_launches_are_on_the_page_of_a_gpu() -> None:
    tried: Any = {"part": "columns", "status": "measured", "columns": 8, "config": "BLOCK_Q=128"}
    rows = [row("exact", "a", None, **tried, exact=exact) for exact in (True, False)]
    rows.append(row("exact", "ours", None, part="columns", status="measured", columns=16))
    first: Any = {"part": "launches", "status": "measured", "first_calls": [2.0, 0.001]}
    rows.append(row("first", "modulate forward, nothing compiled", None, **first))
    page = pages.page(result("gpu", *rows, machine=GPU))
    assert "| 8 | bfloat16 | BLOCK_Q=128 | yes |\n| 8 | bfloat16 | BLOCK_Q=128 | **no** |" in page
    assert "Tails of V have 16 columns in all that follows." in page
    assert "| modulate forward, nothing compiled | 2 s | 1 ms |" in page


def test_targets_are_filled_by_the_gpu_that_they_name_and_predicted_from_compiled_code() -> None:
    rows = (attention("ours", 0.002), attention("fa4", 0.001), attention("fa2", None))
    compiled = row("attention_forward.forward", "c", None, part="resources", status="compiled")
    compiled |= {"architecture": "sm_90", "default": True, "defects": ["spills 8 bytes"]}
    compiled |= {"registers": 77, "spill_bytes": 8, "shared_bytes": 2048, "resident_warps": 16}
    compiled |= {"useful_share": 0.9, "waits": 2, "floor_bytes": {"self-bf16-72": {"4k": 1}}}
    compiled |= {"cycles": {"tensor": 640, "exp": 512}, "exp": 34, "fma": 5, "alu": 6}
    compiled |= {"tensor": {"64x8x16": 9}, "loads": {"TMA": 8, "16": 7}, "stores": {}}
    resources = result("resources", compiled, machine=None, peaks=None, triton="9.9")
    text = overall(result("gpu", *rows, machine=GPU), resources)
    target = line(text, "| attention, forward |")
    assert target.endswith(f"| {ATTENTION}: 500 TFLOP/s, 25 % of peak, fa4 0.50 × | 640 / 512 |")
    assert "| predicted cycles, Triton 9.9 |" in text and "everything on a GPU" not in text
    assert line(text, "| modulate |").endswith("| not measured |  |")
    other = overall(result("gpu", *rows, machine=GPU | {"gpu": "Some GPU"}))
    assert line(other, "| attention, forward |").endswith("| not measured |")
    page = pages.page(resources)
    found = "| yes | 77 | 8 | 2 | 16 | 9 × 64x8x16 | 0.900 | 34 | 5 | 6 | 2 | 7 × 16, 8 × TMA |  "
    assert found + "| 640/512 | spills 8 bytes | 1 |" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "merging: 4.0 points"),
        ({"lost": {"merging": 0.02}}, "not in the profile: 3.0 points"),
        ({"lost": {"a": 0.02, "b": 0.02}}, "no single operation"),
        ({"flops": 0.22}, "nothing: within 3 points"),
        ({"flops": 0.1}, "nothing: saved more than FLOPs"),
    ],
)
def test_what_a_saving_lacks_of_its_flops_has_a_name(changes: Any, words: str) -> None:
    assert pages.largest_loss(saving(**changes)) == words
    wide = {"time": {"median": 0.2, "p20": 0.1, "p80": 0.3}}
    assert pages.largest_loss(saving(**changes | wide)) == f"{words}; spread of 20 points"


def test_a_saving_is_a_ratio_and_stands_beside_flops_and_paper() -> None:
    file = result("saving", row(STEP, "ours", 40, part="saving"), compressed())
    assert "| 1.25 (1.23 to 1.27), ours dense at 4k |" in overall(file)
    assert "| 0.80 × | 20.0 % (19.0 % to 21.0 %) | 25.0 % | 34 % | merging: 4.0" in pages.page(file)


def test_growth_is_fitted_and_what_no_machine_runs_is_predicted() -> None:
    work: Any = {"part": "growth", "peak_bytes": 1 << 20}
    floors: Any = {size: [[4 * 10**12 * TOKENS[size] // 4096, 1]] for size in TOKENS}
    rows = [row("block", "ours", 2, size="1k", floors=floors["1k"], **work)]
    rows += [row("block", "ours", 64, floors=floors["4k"], **work | {"peak_bytes": 16 << 20})]
    rows += [row("block", "ours", None, size="8k", floors=floors["8k"], part="growth")]
    page = pages.page(result("growth", *rows))
    # 16 times the tokens in 32 times the time; the roofline at 8k is 4 times that at 4k, of which a
    # quarter was reached.
    assert "to the power of 1.25 over all sizes, 1.25 between the last two; memory 1.00" in page
    assert "| 16 s | 25 % | 16 MiB | 1.00 |" in line(page, "| 4k | 65,536 | 64 s")
    assert "| 8k | 262,144 | not measured; 256 s predicted |  | 64 s |" in page


def test_plots_show_what_the_results_say_a_curve_from_one_file() -> None:
    steps = [row(STEP, "ours", 40, size="2k", part="saving"), compressed() | {"scope": "block"}]
    suite = result("suite", attention("ours", 2), attention("sdpa flash", 1), machine=GPU)
    gpu = result("gpu", attention("ours", 0.002), machine=GPU)
    named = [("a", result("saving", *steps)), ("b", suite), ("c", gpu)]
    drawn, shown, *_ = (plot.curves(named) for plot in plots.PLOTS)
    cpu = {"ours, dense": [(2048, 40)], "ours, R = 2, composed of single blocks": [(4096, 32)]}
    assert drawn == {"Some(R) CPU, 2 cores, 2 threads": cpu}
    assert shown == {"Some H200": {"ours": [(65536, 500)], "sdpa flash": [(65536, 1.0)]}}
    assert [plot.file for plot in plots.drawable(named)] == ["steps.png", "attention.png"]


def test_check_finds_what_is_stale_and_what_should_not_be_there(
    tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    results, drawings = tmp_path / "bench" / "results", tmp_path / "bench" / "plots"
    results.mkdir(parents=True)
    file = results / "r.json"
    rows = [row(STEP, name, 40, part="saving") for name in ("ours", "diffusers")]
    file.write_text(json.dumps(result("saving", *rows, compressed())))

    def stale() -> list[str]:
        code = report.main(["--check"], tmp_path)
        names = [found.split(" is not what")[0] for found in capsys.readouterr().out.splitlines()]
        assert code == bool(names)
        return names

    made = ["BENCHMARKS.md", "bench/results/r.md", "bench/plots/steps.png"]
    assert stale() == made
    assert report.main([], tmp_path) == 0 and stale() == []
    for name in made[:2]:
        with (tmp_path / name).open("a") as page:
            page.write("1000 TFLOP/s\n")
    assert stale() == made[:2]
    (results / "old.md").write_text("")
    (drawings / "old.png").write_bytes((drawings / "steps.png").read_bytes())
    assert stale() == [*made[:2], "bench/results/old.md", "bench/plots/old.png"]
    assert report.main([], tmp_path) == 0 and stale() == []
    with Image.open(
        drawings / "steps.png"
    ) as picture:  # its ground is its own, whatever the page's
        assert picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    rows[0]["seconds"]["median"] += 1
    file.write_text(json.dumps(result("saving", *rows, compressed())))
    assert stale() == made
    file.write_text(json.dumps(result("saving", *rows, dry_run=True)))
    with pytest.raises(ValueError, match=r"r.json must be measured at real shapes, got a dry run"):
        report.main(["--check"], tmp_path)


def test_the_readme_shows_pictures_that_there_are_and_benchmarks_all_of_them() -> None:
    there = {path.name for path in (report.ROOT / "bench" / "plots").glob("*.png")}
    texts = [(report.ROOT / name).read_text("utf-8") for name in ("README.md", "BENCHMARKS.md")]
    some, everything = (set(re.findall(r"bench/plots/([^)]+)\)", text)) for text in texts)
    assert some and some <= there == everything


def test_the_card_of_the_embedded_model_is_made_of_what_lies_beside_it(tmp_path: Path) -> None:
    shipped = report.ROOT / "pixart" / "assets" / "shapes"
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(shipped, model, ignore=shutil.ignore_patterns("log", "README.md", "sheet.png"))
    for log in (shipped / "log").glob("*.jsonl"):
        (run / log.stem).mkdir(parents=True)
        shutil.copy(log, run / log.stem / "log.jsonl")
    card.main(run, run, model)
    assert (model / "README.md").read_text("utf-8") == (shipped / "README.md").read_text("utf-8")
    sheet, theirs = (np.asarray(Image.open(at / "sheet.png")) for at in (model, shipped))
    assert sheet.shape == theirs.shape and sheet.shape[0] > 4 * 256 and sheet.shape[1] > 4 * 256
    # Another processor rounds otherwise: outlines move by parts of a pixel.
    assert (np.abs(sheet.astype(int) - theirs).max(axis=2) > 32).mean() < 0.002


@pytest.mark.parametrize("kind", sorted(pages.BODIES))
def test_results_of_every_kind_are_looked_through_for_curves(kind: str) -> None:
    assert plots.drawable([("x", result(kind))]) == []
