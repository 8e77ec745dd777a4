"""The verdicts and the report of the scaling study, of results made by hand."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pixart.scalability.study.claims import CLAIMS, Claim, difference, judged
from pixart.scalability.study.fits import best_size, measurements
from pixart.scalability.study.plan import (
    AGAIN,
    BASE,
    BATCH,
    FULL,
    RUNS,
    SIZES,
    UNETS,
    Run,
    level_steps,
    mark_steps,
    scored_steps,
    settings,
)
from pixart.scalability.study.report import compose
from pixart.scalability.study.training import listed
from pixart.scalability.study.verdicts import Difference, Results

FOLDER = Path(__file__).parents[2] / "bench" / "studies" / "scaling"
SHARED = Claim("data", "first ends lower", BASE, "2048 scenes", "loss", "ours")


def made(run: Run, loss: float, share: float, flops: int = 10**8) -> dict[str, Any]:
    """A run whose loss falls to `loss`, of scenes a tenth apart, and whose pictures hold to `share`."""
    step_flops = 3 * flops * BATCH
    marks = []
    levels = level_steps(run, FULL, step_flops)
    for step in mark_steps(run, FULL, step_flops):
        own = loss * (1 + 30 / step)
        mark: dict[str, Any] = {"step": step, "loss": own, "tflop": step * step_flops / 1e12}
        if step in levels.values() or step == FULL.shared:
            mark |= {"losses": listed([0.9 * own, own, 1.1 * own]), "own_loss": own - 0.01}
        if step in levels.values():
            mark |= {"ema_loss": own}
        marks.append(mark)
    accuracy = [
        {
            "step": step,
            "by_kind": {"colour": [max(1, round(40 * share)), 40], "relation": [0, 20]},
            "all_right": 3,
            "captions": 4,
            "shares": listed([share, share, share - 0.01, share + 0.01]),
        }
        for step in scored_steps(run, FULL, step_flops)
    ]
    return settings(run, FULL) | {
        "identity": "",
        "parameters": flops // 100 * run.depth,
        "forward_flops": flops,
        "steps": marks[-1]["step"],
        "seen_scenes": 1000,
        "levels": {f"{level:g}": step for level, step in levels.items()},
        "marks": marks,
        "accuracy": accuracy,
        "seconds": 1.0,
        "cpu_seconds": 2.0,
        "processor": "p",
    }


def told(runs: list[dict[str, Any]]) -> dict[str, Any]:
    named = {run["name"]: run for run in runs}
    return {
        "version": 1,
        "scale": json.loads(json.dumps(asdict(FULL))),
        "date": "2026-01-01",
        "machine": {"processor": "p", "cores": 2, "python": "3", "libraries": {"torch": "2", "diffusers": "0"}},
        "seconds": 60,
        "missing": [run.name for run in RUNS if run.name not in named],
        "measurements": measurements(named, FULL.pool),
        "runs": runs,
    }  # fmt: skip


def results(levels: dict[str, tuple[float, float]], spread: float = 0.01) -> Results:
    """Of runs at these losses and shares, the repeated ones apart by `spread`."""
    found = []
    for run in RUNS:
        loss, share = levels.get(run.name, (0.2, 0.5))
        if run.seed:
            loss, share = levels.get(run.name.split(",")[0], (0.2, 0.5))
            loss, share = loss * (1 + spread * run.seed), share + spread * run.seed
        found.append(made(run, loss, share))
    return Results(told(found))


def test_a_claim_is_decided_by_twice_its_error_and_no_less() -> None:
    assert Difference(2.1, 1.0).verdict == "Agrees"
    assert Difference(-2.1, 1.0).verdict == "Does not agree"
    assert {Difference(value, 1.0).verdict for value in (2.0, -2.0, 0.0)} == {"Not decided here"}
    assert Difference(9.0, None).verdict == "Not decided here"


def test_the_error_holds_the_scenes_and_the_seeds() -> None:
    """Against the formula, written out: seeds of the base at log losses 0, ln 1.01, ln 1.02, ln 1.03, of 72x2
    and the UNet 0 and ln 1.01; one run against four; three paired scenes."""
    found = difference(SHARED, results({"2048 scenes": (0.3, 0.5)}))
    logs = [[math.log(1 + 0.01 * k) for k in range(n)] for n in (4, 2, 2)]
    squares = sum(sum((x - sum(g) / len(g)) ** 2 for x in g) for g in logs)
    deviation = math.sqrt(squares / 5)
    factor = 1 + 30 / round(8e12 / (3 * 10**8 * BATCH))
    high, low = 0.3 * factor, 0.2 * 1.015 * factor
    gaps = [scale * (high - low) for scale in (0.9, 1.0, 1.1)]
    scenes = sum((gap - (high - low)) ** 2 for gap in gaps) / 2 / 3
    expected = math.sqrt(scenes + (deviation * high) ** 2 + (deviation * low) ** 2 / 4)
    assert found.value == pytest.approx(high - low, rel=1e-3)
    assert found.error == pytest.approx(expected, rel=1e-2)


def test_what_seeds_alone_could_do_is_not_decided() -> None:
    near = {"2048 scenes": (0.21, 0.5)}
    assert difference(SHARED, results(near)).verdict == "Agrees"
    assert difference(SHARED, results(near, spread=0.1)).verdict == "Not decided here"
    assert difference(SHARED, results({"2048 scenes": (0.1, 0.5)})).verdict == "Does not agree"


def test_without_a_repeated_run_nothing_is_decided() -> None:
    runs = [made(run, 0.2 if run.scenes else 0.1, 0.5) for run in RUNS if not run.seed]
    sentence = judged(SHARED, Results(told(runs)))
    assert sentence.startswith("**Not decided here**") and "no run was repeated" in sentence


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:40])
def test_each_claim_names_the_better_side(claim: Claim) -> None:
    good, bad = (0.1, 0.9), (0.4, 0.1)
    known = {"72x2": bad, BASE: bad, claim.first: good}
    agreeing = judged(claim, results(known | {claim.second: bad, claim.first: good}))
    opposite = judged(claim, results(known | {claim.second: good, claim.first: bad}))
    assert agreeing.startswith("**Agrees**") and opposite.startswith("**Does not agree**")


def test_what_was_not_run_is_named() -> None:
    runs = [made(run, 0.2, 0.5) for run in RUNS if run.name not in ("2048 scenes", "216x6")]
    report = compose(told(runs))
    assert "**Not whole**: 216x6, 2048 scenes have not been run." in report
    assert "Missing: 2048 scenes." in report


def test_a_report_of_nothing_is_a_report() -> None:
    report = compose(told([]))
    assert report.count("**Not run**") == len(CLAIMS) + 3 and "$" not in report


def test_the_report_has_a_verdict_for_every_claim_and_the_law_that_was_planted() -> None:
    """Losses of L = 0.1 C^-0.5 + 0.05, C in TFLOP, of sizes that differ in nothing else."""
    runs = []
    for number, run in enumerate(RUNS):
        flops = 10**8 * (1 + SIZES.index(run) if run in SIZES[1:] else 1)
        found = made(run, 0.2, 0.5 + 0.01 * run.seed, flops)
        for mark in found["marks"]:
            mark["loss"] = (0.1 * mark["tflop"] ** -0.5 + 0.05) * (1 + 1e-4 * (number % 3))
        runs.append(found)
    report = compose(told(runs))
    assert report.count("**Agrees**: the loss falls as a power of compute") == 1
    law = report.split("C in TFLOP: ")[1].split(";")[0]
    assert "a = 0.1 [" in law and "b = 0.5" in law
    for claim in CLAIMS:
        assert f": {claim.text} (" in report


def test_measurements_are_those_of_sizes_and_seeds_alone() -> None:
    runs = {run.name: made(run, 0.2, 0.5) for run in RUNS}
    found = measurements(runs, FULL.pool)
    assert {one["run"] for one in found} == {run.name for run in (*SIZES, *AGAIN)}
    first = runs["72x2"]["marks"][0]
    assert found[0]["compute"] == pytest.approx(first["step"] * 3 * 10**8 * BATCH)
    assert found[0]["images"] == first["step"] * BATCH


def test_all_sizes_are_measured_at_the_shared_step_and_the_levels() -> None:
    for run in (*SIZES, *UNETS):
        steps = mark_steps(run, FULL, 3 * BATCH * 10**8)
        assert FULL.shared in steps
        assert set(level_steps(run, FULL, 3 * BATCH * 10**8).values()) <= set(steps)


@pytest.mark.skipif(not (FOLDER / "results.json").exists(), reason="the study was not run")
def test_the_committed_report_is_made_of_the_committed_results() -> None:
    found = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == compose(found)


def test_a_report_says_which_processors_the_runs_took() -> None:
    study = told([made(run, 0.2, 0.5) for run in RUNS])
    study["runs"][0]["processor"] = "q"
    said = (
        f"in 1 minutes on 2 cores, {2 * len(RUNS) / 60:.0f} CPU-minutes of training and measuring "
    )
    said += f"({len(RUNS) - 1} runs on p, 1 runs on q), torch 2, diffusers 0, 2026-01-01"
    assert said in compose(study)


def test_sizes_that_end_at_a_level_are_compared_there() -> None:
    """Steps are whole, so that a run ends within half a step of its compute, on either side."""
    runs = [made(run, 0.2, 0.5) for run in SIZES if run.compute == 8.0]
    for number, run in enumerate(runs):
        run["parameters"] += number  # no two are of one size
        step = run["forward_flops"] * 48 / 1e12
        run["marks"][-1]["tflop"] = 8.0 + 0.4 * step * (-1) ** number
    found = best_size(Results(told(runs)), 8.0)
    assert found is not None and found.sizes == len(runs) == 5
