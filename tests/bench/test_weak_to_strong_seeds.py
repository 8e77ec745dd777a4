"""The weak-to-strong study again with seeds: what it judges by, what it runs, how it goes on."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.studies.weak_to_strong import seeds as command
from bench.studies.weak_to_strong.claims import CLAIMS, Claim, judge, undecided
from bench.studies.weak_to_strong.differences import over_scenes, over_seeds
from bench.studies.weak_to_strong.experiments import EXPERIMENTS, TINY, recover, repeat, study_stage
from bench.studies.weak_to_strong.report import compose, modulation_costs
from pixart.evaluation.statistics.student import student_quantile
from pixart.files import write_json

# Two-sided 5 % and the 80 % quantile, from printed tables of Student's t.
TABLE = {1: (12.706, 1.376), 2: (4.303, 1.061), 3: (3.182, 0.978), 10: (2.228, 0.879)}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_quantiles_are_those_of_the_tables(freedom: int) -> None:
    high, power = TABLE[freedom]
    assert student_quantile(0.975, freedom) == pytest.approx(high, abs=6e-4)
    assert student_quantile(0.8, freedom) == pytest.approx(power, abs=6e-4)


def test_many_degrees_of_freedom_are_the_normal_distribution() -> None:
    normal = statistics.NormalDist().inv_cdf(0.975)
    # The first term of the expansion in 1/n (Abramowitz & Stegun 26.7.5), and more than the next.
    near = normal + (normal**3 + normal) / (4 * 2000)
    assert student_quantile(0.975, 2000) == pytest.approx(near, abs=1e-5)


def split(difference: Sequence[Sequence[float]]) -> tuple[list[list[float]], list[list[float]]]:
    """Losses that differ by so much, and vary over scenes far more."""
    lows = [[10.0 * n for n, _ in enumerate(row)] for row in difference]
    return lows, [
        [a + b for a, b in zip(*both, strict=True)] for both in zip(lows, difference, strict=True)
    ]


def test_the_error_of_seeds_that_alone_differ_is_that_of_their_mean() -> None:
    """Where all scenes differ alike: a t test of three numbers, by hand. 1, 2, 3: s = 1, s/√3."""
    found = over_seeds(*split([[1.0] * 5, [2.0] * 5, [3.0] * 5]))
    assert found.mean == pytest.approx(2) and found.each == pytest.approx((1, 2, 3))
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.factor == pytest.approx(4.303, abs=1e-3)
    assert found.detectable == pytest.approx((4.303 + 1.061) / math.sqrt(3), abs=1e-3)
    assert not found.is_decided  # 2 < 4.303 · 0.577 = 2.48


def test_seeds_that_do_not_differ_leave_the_error_of_the_scenes() -> None:
    row = [1.0, 2.0, 4.0, 3.0]
    found, one = over_seeds(*split([row] * 3)), over_scenes([0.0] * 4, row)
    assert (found.mean, found.error) == pytest.approx((one.mean, one.error))
    assert found.factor == pytest.approx(3.182, abs=1e-3)  # 4 scenes


def test_the_variance_is_that_of_crossed_random_effects() -> None:
    """Against sums of squares written with tensors, where all three components are positive."""
    torch.manual_seed(0)
    d = torch.randn(3, 50).double() + torch.randn(3, 1) + torch.randn(1, 50)
    found = over_seeds(*split(d.tolist()))
    rows, columns = d.mean(1, keepdim=True), d.mean(0, keepdim=True)
    seed = 50 * rows.var().item()
    scene = 3 * columns.var().item()
    rest = ((d - rows - columns + d.mean()) ** 2).sum().item() / (2 * 49)
    assert min(seed, scene) > rest
    assert found.error**2 == pytest.approx((seed + scene - rest) / 150)
    spread = seed**2 / 2 + scene**2 / 49 + rest**2 / 98
    freedom = math.floor((seed + scene - rest) ** 2 / spread)
    assert found.factor == student_quantile(0.975, freedom)


@pytest.mark.parametrize(("seed", "scene"), [(0.0, 0.5), (0.15, 0.5), (0.15, 0.0), (1.0, 3.0)])
def test_no_difference_is_seldom_decided(seed: float, scene: float) -> None:
    """400 studies of three seeds and 24 scenes; 5 % ± 3 · 1.1 % and what Satterthwaite is off by."""
    torch.manual_seed(1)
    wrong = sum(over_seeds(*split(_study(seed, scene).tolist())).is_decided for _ in range(STUDIES))
    assert wrong <= 0.1 * STUDIES


STUDIES = 400


def _study(seed: float, scene: float, true: float = 0.0) -> Tensor:
    return true + torch.randn(3, 24) + seed * torch.randn(3, 1) + scene * torch.randn(1, 24)


@pytest.mark.parametrize(("seed", "scene", "freedom"), [(30.0, 0.0, 2), (0.0, 5.0, 23)])
def test_a_detectable_difference_is_decided_four_times_in_five(
    seed: float, scene: float, freedom: int
) -> None:
    """Where seeds are nearly all of the spread, and where scenes are."""
    torch.manual_seed(2)
    error = math.sqrt(seed**2 / 3 + scene**2 / 24 + 1 / 72)
    true = (student_quantile(0.975, freedom) + student_quantile(0.8, freedom)) * error
    found = [over_seeds(*split(_study(seed, scene, true).tolist())) for _ in range(STUDIES)]
    seen = sum(one.is_decided for one in found) / STUDIES
    assert 0.72 < seen < 0.86
    assert statistics.fmean(one.detectable for one in found) == pytest.approx(true, rel=0.15)


CLAIM = Claim("a", "b", "a is lower", at=-1)


def results(first: Sequence[float], *again: Sequence[float]) -> dict[str, Any]:
    """A study in which “b” lies so much over “a”: in each scene of the first run, and of each seed."""

    def marks(losses: Sequence[float]) -> list[dict[str, Any]]:
        return [{"step": 0, "losses": [0.0] * len(losses)}, {"step": 500, "losses": list(losses)}]

    pairs = [("a", [0.0] * len(first)), ("b", list(first))]
    found: dict[str, Any] = {
        "experiments": [{"name": name, "marks": marks(losses)} for name, losses in pairs]
    }
    if again:
        found["repeats"] = {
            "runs": [
                {"name": name, "seed": seed, "marks": marks(losses)}
                for seed, row in enumerate(again, start=1)
                for name, losses in (("a", [0.0] * len(row)), ("b", row))
            ]
        }
    return found


VAGUE = (0.3, -0.2, 0.1, -0.1)  # +0.025 ± 0.111


def test_one_run_that_does_not_decide_says_so() -> None:
    assert judge(CLAIM, results(VAGUE)) == (
        "**Not decided here**: a is lower. "
        "At step 500 the loss of “b” minus that of “a” is +0.02500 ± 0.11087."
    )


def test_seeds_decide_what_one_run_did_not() -> None:
    rows = ((0.5, 0.6, 0.5, 0.6), (0.6, 0.5, 0.6, 0.5), (0.5, 0.5, 0.6, 0.6))
    said = judge(CLAIM, results(VAGUE, *rows))
    assert said.startswith(
        "**Agrees**: a is lower. At step 500 the loss of “b” minus that of “a” is +0.55"
    )
    assert "over 3 seeds (+0.55000, +0.55000, +0.55000)" in said
    assert said.endswith("The first run had +0.02500 ± 0.11087.")


def test_seeds_that_go_the_other_way_turn_the_verdict_even_of_a_run_that_decided() -> None:
    sure = (0.5, 0.6, 0.5, 0.6)
    assert judge(CLAIM, results(sure)).startswith("**Agrees**")
    low = [[-value for value in sure]] * 3
    said = judge(CLAIM, results(sure, *low))
    assert said.startswith("**Does not agree**")
    assert said.endswith("The first run had +0.55000 ± 0.02887, the other way.")


def test_what_seeds_do_not_decide_is_not_decidable_and_says_what_would_have_been_seen() -> None:
    said = judge(CLAIM, results(VAGUE, [1.0] * 4, [-1.0] * 4, [0.3] * 4))
    # Means 1, -1, 0.3: mean 0.1, s = 1.0149, error 0.58595, t = 4.30 at two degrees of freedom.
    assert said.startswith("**Not decidable at this size**: a is lower.")
    assert "+0.10000 ± 0.58595 over 3 seeds (+1.00000, -1.00000, +0.30000); 4.30 " in said
    assert "seeds and scenes sees a difference of 3.142" in said
    assert "four times in five; this one is 0.10000." in said


def test_only_seeds_that_both_have_are_compared() -> None:
    found = results(VAGUE, [1.0] * 4, [1.1] * 4, [9.0] * 4)
    runs = found["repeats"]["runs"]
    runs.remove(next(one for one in runs if (one["name"], one["seed"]) == ("a", 3)))
    assert "over 2 seeds (+1.00000, +1.10000)" in judge(CLAIM, found)
    found["repeats"]["runs"] = [one for one in runs if one["seed"] == 1]
    assert judge(CLAIM, found) == judge(CLAIM, results(VAGUE))


def test_a_seed_changes_the_data_and_the_first_is_0() -> None:
    stages = [study_stage(128, 4, (0, 1), seed) for seed in (0, 1)]
    draws = [stage.rngs(3, 1)[0].random() for stage in stages]
    assert draws[0] != draws[1] and study_stage(128, 4, (0, 1)) == stages[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "dense.safetensors"
    recover(file, TINY)
    return file


def test_a_seed_is_one_run_whatever_else_the_machine_does(weights: Path) -> None:
    experiment = next(one for one in EXPERIMENTS if one.name == "conv deep half, random")
    found = [repeat(experiment, weights, TINY, seed)["marks"] for seed in (1, 1, 2)]
    assert found[0] == found[1]
    begun, ended = ([marks[at]["losses"] for marks in (found[0], found[2])] for at in (0, 1))
    assert begun[0] != begun[1] and ended[0] != ended[1]


def test_a_seed_changes_the_data_and_not_the_scenes(weights: Path) -> None:
    experiment = next(one for one in EXPERIMENTS if one.name == "conv deep half, mean")
    marks = [repeat(experiment, weights, TINY, seed)["marks"] for seed in (1, 2)]
    assert marks[0][0]["losses"] == marks[1][0]["losses"]  # nothing is drawn before the first step
    assert marks[0][1]["losses"] != marks[1][1]["losses"]


def tiny_study() -> dict[str, Any]:
    """As `python -m bench.studies.weak_to_strong --tiny` leaves it, with one row that is not decided."""
    ranks = {claim.low: 0.0 for claim in CLAIMS} | {one.name: 9.0 for one in EXPERIMENTS}
    for _ in EXPERIMENTS:  # lower before higher
        for claim in CLAIMS:
            ranks[claim.low] = min(ranks[claim.low], ranks[claim.high] - 0.5)
    ranks["conv middle third"] = ranks["conv deep third"]
    vague = {"conv middle third": (0.1, -0.1, 0.1, -0.1)}
    experiments = [
        {
            "name": name,
            "marks": [
                {
                    "step": step,
                    "losses": [rank + part for part in vague.get(name, (0.0, 0.01, 0.02, 0.03))],
                    "right": 0,
                    "of": 1,
                }
                for step in TINY.marks
            ],
        }
        for name, rank in ranks.items()
    ]
    machine = {"cores": 2, "processor": "p", "libraries": {"torch": "2"}, "source_sha256": "0" * 64}
    return {
        "experiments": experiments,
        "machine": machine,
        "scale": {"images": TINY.images, "recovery": TINY.recovery},
        "command": "make weak-to-strong",
        "seconds": 60,
        "date": "2026-01-01",
        "modulation": modulation_costs(),
    }


class Here:
    """A pool that works in this process."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "pool", lambda *_: nullcontext(Here()))
    write_json(tmp_path / "study" / "results.json", tiny_study())
    return tmp_path / "study"


def run(study: Path, **options: Any) -> dict[str, Any]:
    work = study.parent / "work"
    assert command.main(study, work, seeds=2, processes=1, tiny=True, **options) == 0
    found: dict[str, Any] = json.loads((study / "results.json").read_text())
    return found


def test_a_dry_run_says_what_it_would_cost_and_leaves_nothing(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (study / "results.json").read_bytes()
    run(study, dry_run=True)
    said = capsys.readouterr().out
    assert [(one.low, one.high) for one in undecided(tiny_study())] == [
        ("conv deep third", "conv middle third")
    ]
    assert "“conv deep third” against “conv middle third”: 4 runs, 1 CPU-minutes" in said
    assert "4 of 4 runs are left and the start" in said
    assert (study / "results.json").read_bytes() == before
    assert not (study.parent / "work").exists() and not (study / "README.md").exists()


def test_it_goes_on_where_it_was_stopped_and_keeps_the_first_numbers(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(study)
    first = tiny_study()
    assert {key: found[key] for key in first} == json.loads(json.dumps(first))
    runs = found["repeats"]["runs"]
    assert [(one["name"], one["seed"]) for one in runs] == [
        (name, seed) for name in ("conv middle third", "conv deep third") for seed in (1, 2)
    ]
    assert (study / "README.md").read_text() == compose(found)
    assert "over 2 seeds (" in compose(found) and "## The seeds\n" in compose(found)

    work = study.parent / "work"
    (work / "conv-deep-third-2.json").unlink()  # as if it had been stopped before that
    kept = {file: file.stat().st_mtime_ns for file in work.iterdir()}
    capsys.readouterr()
    again = run(study)
    said = capsys.readouterr().out
    assert "1 of 4 runs are left, " in said and said.count("seed ") == 1
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    for old, new in zip(runs, again["repeats"]["runs"], strict=True):
        assert old["marks"] == new["marks"]

    monkeypatch.setattr(command, "pool", None)  # nothing left: no process is needed for a plan
    run(study, dry_run=True)
    assert "0 of 4 runs are left, 0 CPU-minutes" in capsys.readouterr().out
    (work / "dense.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"start.json: must have weights .*remove that folder"):
        run(study, dry_run=True)


def test_without_the_weights_whole_seeds_are_kept_and_others_begin_anew(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on another machine, which has what is committed."""
    first = run(study)["repeats"]["runs"]
    work = study.parent / "work"
    (work / "dense.safetensors").unlink()
    run(study)  # nothing is left to run, so no weights are needed
    assert not (work / "dense.safetensors").exists()
    (work / "conv-deep-third-2.json").unlink()
    kept = {file: file.stat().st_mtime_ns for file in work.glob("*-1.json")}
    capsys.readouterr()
    again = run(study)["repeats"]["runs"]
    assert "2 of 4 runs are left and the start, " in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert [(one["name"], one["seed"]) for one in again] == [
        (one["name"], one["seed"]) for one in first
    ]


def test_a_study_of_another_scale_is_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be of a study with images 32, got 4; name another"):
        command.main(study, tmp_path / "work")
    write_json(tmp_path / "work" / "conv-deep-third-1.json", {"name": "conv deep third", "seed": 1})
    with pytest.raises(ValueError, match=r"conv-deep-third-1.json: must have scale .* got None"):
        run(study)


@pytest.mark.parametrize(("option", "value"), [("seeds", 1), ("processes", 0)])
def test_too_few_are_refused(study: Path, option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{option} must be at least"):
        command.main(study, study.parent, tiny=True, **{option: value})


def test_a_study_that_decided_all_runs_nothing(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decided = tiny_study()
    deep, middle = (
        next(one for one in decided["experiments"] if one["name"] == f"conv {part} third")
        for part in ("deep", "middle")
    )
    for low, high in zip(deep["marks"], middle["marks"], strict=True):
        high["losses"] = [loss + 0.2 for loss in low["losses"]]
    write_json(study / "results.json", decided)
    assert command.main(study, study.parent / "work", tiny=True) == 0
    assert capsys.readouterr().out.endswith("every row is decided\n")
