"""Two evaluated folders compared: signs, intervals, verdicts, what is refused, and the page."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evaluated
import numpy as np
import pytest
from test_evaluation_report import Page

from pixart.evaluation.comparing.compare import OPEN, Comparison, compare_folders, comparison_text
from pixart.evaluation.comparing.paired_sets import METHOD, Unpaired, apart, paired_distance
from pixart.evaluation.comparing.pairing import verdict
from pixart.evaluation.distances import frechet_distance_of, kernel_distance
from pixart.evaluation.metric import Estimate, Score
from pixart.evaluation.report.comparison_page import differ_most
from pixart.evaluation.running.results import open_folder
from pixart.evaluation.statistics.intervals import Difference
from pixart.evaluation.store.parts import FeatureStore, Row

FEATURES = "made-clean-0123"


def pair(place: Path, *, better: float = 0.0, seed: int = 0, count: int = 30) -> tuple[Path, Path]:
    """A, and B whose scores are higher by `better`; with the same seed they differ in nothing else."""
    a = evaluated.build(place / "a", count=count)
    return a, evaluated.build(place / "b", count=count, better=better, seed=seed, model="other")


def compare(a: Path, b: Path) -> Comparison:
    return compare_folders(a, b)


def test_a_model_with_itself_differs_by_nothing(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    for other in (a, b):
        comparison = compare(a, other)
        for one in comparison.numbers:
            assert one.difference.difference == 0 and one.verdict == OPEN
        for changes in comparison.categories.values():
            assert {one.verdict for one in changes.values()} == {OPEN}
        assert comparison["clip"].difference.low == comparison["clip"].difference.high == 0


def test_a_gap_in_every_prompt_is_decided_with_the_right_sign(tmp_path: Path) -> None:
    a, b = pair(tmp_path, better=0.05)
    one = compare(a, b)["clip"]
    # The same scores and 0.05: each resample has that gap, so the interval has no width.
    assert one.difference.difference == pytest.approx(0.05)
    assert (one.difference.low, one.difference.high) == pytest.approx((0.05, 0.05))
    assert one.verdict == "B better"
    other = compare(b, a)["clip"]
    assert other.difference.difference == pytest.approx(-0.05) and other.verdict == "A better"
    # Without pairing, the intervals of the two would overlap.
    assert one.a.high > one.b.low - 0.05


def test_what_is_lower_is_better_where_lower_is_better(tmp_path: Path) -> None:
    a, b = pair(tmp_path, better=1.0)  # fid-clean is 20 and 10, each +- 1.5
    one = compare(a, b)["fid-clean"]
    assert one.difference.difference == pytest.approx(-10)
    assert one.difference.high - one.difference.difference == pytest.approx(1.5 * math.sqrt(2))
    assert one.verdict == "B better"
    assert "Not paired" in one.difference.notes[0]


def test_a_number_may_be_better_the_other_way_than_its_metric(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    for folder, value in ((a, 9.0), (b, 5.0)):
        results = evaluated.results_of(folder)
        number = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 30, "method": "m"}
        values = results["metrics"]["clip"]["values"]
        values |= {"clip-up": number, "clip-down": {**number, "higher_is_better": False}}
        evaluated.write(folder, results)
    found = compare(a, b)
    assert (found["clip-up"].verdict, found["clip-up"].higher_is_better) == ("A better", True)
    assert (found["clip-down"].verdict, found["clip-down"].higher_is_better) == ("B better", False)


@pytest.mark.parametrize(("gap", "decided"), [(0.2, False), (0.4, True)])
def test_fid_gaps_below_1_3_percent_are_inconclusive(
    gap: float, decided: bool, tmp_path: Path
) -> None:
    a, b = pair(tmp_path)
    for folder, value in ((a, 20.0), (b, 20.0 - gap)):  # 1 % and 2 %, both far outside of chance
        results = evaluated.results_of(folder)
        told = evaluated.estimate(value, 0.001, 30, "jackknife")
        results["metrics"]["fid-clean"]["values"]["fid-clean"] = told
        evaluated.write(folder, results)
    one = compare(a, b)["fid-clean"]
    assert (one.verdict == "B better") == decided
    assert any("inconclusive" in note for note in one.difference.notes) != decided
    for name, words in (("kid", "B better"), ("fid-infinity", OPEN), ("fd-dinov2", OPEN)):
        assert (
            verdict(Difference(-0.2, -0.3, -0.1, 0.001, 9, ""), False, 0.001, (name, 20.0, 19.8))
            == words
        )


def test_categories_are_adjusted_by_holm(tmp_path: Path) -> None:
    a, b = pair(tmp_path, better=0.02, seed=3)
    changes = compare(a, b).categories["clip"]
    assert list(changes) == list(evaluated.CATEGORIES)
    ranked = sorted(changes.values(), key=lambda one: one.difference.p)
    least = 0.0
    for number, one in enumerate(ranked):
        least = max(least, min(1.0, one.difference.p * (len(ranked) - number)))
        assert one.adjusted == pytest.approx(least)
        assert one.difference.n == 10
        assert one.verdict == OPEN or one.adjusted < 0.05


def test_parts_of_scores_are_compared_as_numbers_of_their_own(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    for folder in (a, b):
        results = evaluated.results_of(folder)
        values = results["metrics"]["shapes"]["values"]
        values["shapes/colour"] = evaluated.estimate(1.0, 0.0, 30, "Wilson")
        values["shapes/unknown"] = evaluated.estimate(0.5, 0.1, 30, "made")
        evaluated.write(folder, results)
    comparison = compare(a, b)
    assert comparison["shapes/colour"].difference.method == "paired bootstrap over prompts"
    assert "it is no mean of scores" in comparison["shapes/unknown"].difference.notes[0]


def test_a_number_that_is_no_mean_of_its_scores_is_told_to_be_none(tmp_path: Path) -> None:
    a, b = pair(tmp_path, better=0.1)
    results = evaluated.results_of(a)
    results["metrics"]["clip"]["values"]["clip"] |= {"value": 0.9, "low": 0.8, "high": 1.0}
    evaluated.write(a, results)
    one = compare(a, b)["clip"]
    assert one.difference.difference == pytest.approx(0.1)
    assert any("not the mean over prompts" in note for note in one.difference.notes)


def test_prompts_with_scores_in_one_folder_are_left_out_and_told(tmp_path: Path) -> None:
    a, b = pair(tmp_path, better=0.05)
    (part,) = (b / "scores").glob("clip-*/part-00001.jsonl")
    part.unlink()
    one = compare(a, b)["clip"]
    assert one.difference.n == 15 and one.difference.difference == pytest.approx(0.05)
    assert any("15 prompts have scores in one folder only" in note for note in one.difference.notes)


def _change(name: str, value: Any) -> Any:
    def change(results: dict[str, Any]) -> None:
        results["metrics"]["clip"][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_change("version", "9"), "clip: version 1 and 9"),
        (_change("constants", {"model": "other", "times": 1}), "clip: model clip-tiny and other"),
        (_change("constants", {"model": "clip-tiny"}), "clip: times 1 and not set"),
        (lambda results: results["metrics"].clear(), "metrics clip, shapes, fid-clean and"),
    ],
)
def test_other_versions_and_constants_are_refused_with_all_that_differs(
    change: Any, reason: str, tmp_path: Path
) -> None:
    a, b = pair(tmp_path)
    results = evaluated.results_of(b)
    change(results)
    evaluated.write(b, results)
    with pytest.raises(
        ValueError, match=f"they differ in {reason}.*; evaluate both in the same way"
    ):
        compare(a, b)


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    a = evaluated.build(tmp_path / "a")
    fewer = evaluated.build(tmp_path / "b", count=28)
    with pytest.raises(ValueError, match=r"2 prompts that one of them has \(00028, 00029\)"):
        compare(a, fewer)
    others = evaluated.build(tmp_path / "c", prompts={"00004": "another"})
    with pytest.raises(ValueError, match=r"the words or category of 1 prompts \(00004\)"):
        compare(a, others)


def test_what_else_differs_is_told_and_allowed(tmp_path: Path) -> None:
    a = evaluated.build(tmp_path / "a")
    b = evaluated.build(
        tmp_path / "b", protocol={"sampling": {"scheduler": "dpm-solver++", "steps": 3}}
    )
    results = evaluated.results_of(b)
    results["metrics"]["extra"] = results["metrics"]["clip"]
    evaluated.write(b, results)
    comparison = compare(a, b)
    assert ("sampling.steps", "20", "3") in comparison.settings
    assert comparison.only == ("extra (B)",)
    assert "in one folder only: extra (B)" in comparison_text(comparison)


def _features(folder: Path, ours: Mapping[str, np.ndarray], real: np.ndarray) -> None:
    for place, rows in (
        ("features", ours),
        ("reference", {f"{number:03d}.png/0000": row for number, row in enumerate(real)}),
    ):
        store = FeatureStore(folder / place / FEATURES)
        store.write(0, [Row(key, "x", row.astype(np.float32)) for key, row in rows.items()])


def _clouds(
    a: Path, b: Path, shift: float, count: int = 120
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    real = rng.standard_normal((count, 6)).astype(np.float32)
    ours = (rng.standard_normal((count, 6)) + 0.6).astype(np.float32)
    theirs = (ours + shift + 0.05 * rng.standard_normal(ours.shape)).astype(np.float32)
    for folder, rows in ((a, ours), (b, theirs)):
        _features(folder, {f"{k:05d}/0000": row for k, row in enumerate(rows)}, real)
    return ours, theirs, real


@pytest.mark.parametrize("metric", ["fid-clean", "kid"])
def test_distances_of_sets_are_paired_by_leaving_out_the_same_prompts(
    metric: str, tmp_path: Path
) -> None:
    a, b = pair(tmp_path, count=120)
    ours, theirs, real = _clouds(a, b, shift=0.1)

    def distance(rows: np.ndarray) -> float:
        if metric == "fid-clean":
            return frechet_distance_of(rows, real)
        return 1000 * kernel_distance(rows, real).value

    found = paired_distance(open_folder(a), open_folder(b), metric, "made-clean")
    assert found.difference == pytest.approx(distance(theirs) - distance(ours), rel=1e-6)
    # Pairing knows that both have the same prompts: the spread of each alone is several times as wide.
    rng = np.random.default_rng(0)
    spread, gaps = [], []
    for _ in range(100):
        chosen = rng.integers(0, len(ours), len(ours))
        spread.append(distance(ours[chosen]))
        gaps.append(distance(theirs[chosen]) - distance(ours[chosen]))
    half = (found.high - found.low) / 2
    assert half == pytest.approx(
        1.96 * np.std(gaps), rel=0.35
    )  # 100 draws and 50 blocks: 7 % and 10 % each
    assert half < np.std(spread)
    assert found.low > 0 and found.p < 0.05 and METHOD in found.method


def test_a_comparison_takes_the_features_that_are_kept(tmp_path: Path) -> None:
    a, b = pair(tmp_path, count=120)
    ours, theirs, real = _clouds(a, b, shift=0.1)
    for folder, rows in ((a, ours), (b, theirs)):
        results = evaluated.results_of(folder)
        block = results["metrics"]["fid-clean"] | {"constants": {"features": "made-clean"}}
        block["values"]["fid-clean"] = evaluated.estimate(
            frechet_distance_of(rows, real), 0.5, 120, "jackknife"
        )
        results["metrics"]["fid-clean"] = block
        evaluated.write(folder, results)
    one = compare(a, b)["fid-clean"]
    assert METHOD in one.difference.method and one.verdict == "A better"
    apart_ = compare_folders(a, b, pair_sets=False)["fid-clean"]
    assert apart_.difference.high - apart_.difference.low > one.difference.high - one.difference.low
    assert compare(a, a)["fid-clean"].difference.high == 0


def test_features_of_other_weights_or_references_are_not_paired(tmp_path: Path) -> None:
    a, b = pair(tmp_path, count=120)
    _clouds(a, b, shift=0.1)
    folders = open_folder(a), open_folder(b)
    with pytest.raises(Unpaired, match="features of another are not kept"):
        paired_distance(*folders, "fid-clean", "another")
    with pytest.raises(Unpaired, match="no form that is left out block by block"):
        paired_distance(*folders, "cmmd", "made-clean")
    _features(b, {"00000/0000": np.zeros(6)}, np.zeros((120, 6)))
    with pytest.raises(Unpaired, match="not of the same prompts"):
        paired_distance(*folders, "fid-clean", "made-clean")
    (b / "features" / FEATURES).rename(b / "features" / "made-clean-4567")
    with pytest.raises(
        ValueError, match="must be of the same weights in both, got made-clean-0123"
    ):
        paired_distance(*folders, "fid-clean", "made-clean")


def test_intervals_taken_apart_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        a, b = rng.normal(0, 1), rng.normal(0.5, 2)
        found = apart(
            Estimate(a, a - 1.96, a + 1.96, 9, ""), Estimate(b, b - 3.92, b + 3.92, 9, ""), "x"
        )
        held += found.low <= 0.5 <= found.high
    # 95 % of 2,000, four standard errors of a proportion either way.
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_intervals_without_end_decide_nothing() -> None:
    found = apart(Estimate(1, -math.inf, math.inf, 1, ""), Estimate(9, 8, 10, 1, ""), "x")
    assert found.p == 1 and found.low == -math.inf
    assert verdict(found, True, found.p, ("clip", 1, 9)) == OPEN


def test_the_pictures_that_differ_most_come_first() -> None:
    a = {f"{k:02d}": Score(0.5) for k in range(20)}
    b = {f"{k:02d}": Score(0.5 + (k - 10) / 100) for k in range(20)}
    most = differ_most(a, b, higher_is_better=True)
    assert most["B better"][:2] == ["19", "18"] and most["A better"][:2] == ["00", "01"]
    assert "10" not in most["A better"] + most["B better"]
    assert differ_most(a, b, higher_is_better=False)["A better"][0] == "19"


def test_page_text_and_json_say_the_same(tmp_path: Path) -> None:
    a, b = pair(tmp_path, better=0.05)
    comparison = compare(a, b)
    place = tmp_path / "compare-a-b"
    assert sorted(path.name for path in place.iterdir()) == [
        "README.md", "compare.html", "compare.json", "plots",
    ]  # fmt: skip
    page = Page((place / "compare.html").read_text(encoding="utf-8"))
    values = json.loads((place / "compare.json").read_text())
    readme = (place / "README.md").read_text()
    assert values == json.loads(json.dumps(comparison.values()))
    assert values["metrics"]["clip"]["values"]["clip"]["verdict"] == "B better"
    for text in (page.text, readme, comparison_text(comparison)):
        assert "+0.05000" in text and "[0.05000, 0.05000]" in text and "B better" in text
    assert not page.all("script") and len(page.all("h1")) == 1
    for anchor in page.all("a"):
        target = str(anchor["href"])
        assert target.startswith("#") or (place / target).is_file()
    before = {path.name: path.read_bytes() for path in place.glob("*.*")}
    compare(a, b)
    assert before == {path.name: path.read_bytes() for path in place.glob("*.*")}


def test_infinite_ends_are_null_in_json(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    results = evaluated.results_of(b)
    results["metrics"]["fid-clean"]["values"]["fid-infinity"]["high"] = None
    evaluated.write(b, results)
    values = compare(a, b).values()
    assert values["metrics"]["fid-clean"]["values"]["fid-infinity"]["high"] is None
    json.dumps(values, allow_nan=False)
