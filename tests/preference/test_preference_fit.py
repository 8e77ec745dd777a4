"""Strengths against choix, and intervals against simulated voters whose preferences are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from preference_study import build_study

from pixart.evaluation.preference.bradley_terry import (
    ELO,
    check_connected,
    elo,
)
from pixart.evaluation.preference.fit import fit
from pixart.evaluation.preference.games import Games, fit_games
from pixart.evaluation.preference.options import Fit
from pixart.evaluation.preference.outcome import Voter, attention, majority
from pixart.evaluation.preference.study import Study
from pixart.evaluation.preference.votes import Vote
from pixart.preference import bradley_terry, main

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation" / "bradley_terry.json"
CASES = json.loads(GOLDEN.read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['by']}-{len(case['wins'])}")
def test_strengths_are_those_of_choix(case: dict[str, object]) -> None:
    found = np.log(bradley_terry(np.array(case["wins"]), prior=float(str(case["prior"]))))
    assert np.abs(found - (np.array(case["log"]) - np.mean(case["log"]))).max() < 1e-8


def test_strengths_of_two_models_are_the_ratio_of_their_wins() -> None:
    strengths = bradley_terry(np.array([[0, 30.0], [10, 0]]), prior=0)
    assert strengths[0] / strengths[1] == pytest.approx(3) and strengths.prod() == pytest.approx(1)
    assert elo(strengths)[0] - elo(strengths)[1] == pytest.approx(400 * np.log10(3))


def test_resamples_are_solved_as_each_alone() -> None:
    wins = np.random.default_rng(0).integers(1, 30, (5, 4, 4)).astype(float)
    together = bradley_terry(wins)
    assert np.allclose(together, [bradley_terry(one) for one in wins], rtol=1e-9)


def test_a_model_that_never_lost_has_a_finite_strength_by_the_prior_alone() -> None:
    wins = np.array([[0, 10.0], [0, 0]])
    assert bradley_terry(wins)[0] ** 2 == pytest.approx(10.05 / 0.05)
    with pytest.raises(ValueError, match="no wins lead both ways between the groups 0; 1"):
        bradley_terry(wins, prior=0)


def test_models_that_never_met_are_named_by_groups() -> None:
    met = np.zeros((5, 5), dtype=bool)
    met[0, 2] = met[2, 4] = met[1, 3] = True
    with pytest.raises(ValueError, match="no pairs between the groups a, c, e; b, d"):
        check_connected(met, "abcde")
    met[4, 3] = True
    check_connected(met, "abcde")
    with pytest.raises(ValueError, match="negative"):
        bradley_terry(np.array([[0, -1.0], [1, 0]]))


def simulated(rng: np.random.Generator, strengths: np.ndarray, prompts: int, ties: float) -> Games:
    """Every two models over every prompt by one of ten voters; of that share of pairs nobody sees a
    difference, which leaves the expected points as they are for models of equal strength alone."""
    size = len(strengths)
    i, j = (np.tile(k, prompts) for k in np.triu_indices(size, 1))
    of = np.repeat(np.arange(prompts), size * (size - 1) // 2)
    points = (rng.random(len(i)) < strengths[i] / (strengths[i] + strengths[j])).astype(float)
    points[rng.random(len(i)) < ties] = 0.5
    voters = rng.integers(0, 10, len(i))
    return Games(tuple(f"m{k}" for k in range(size)), i, j, points, of, voters)


@pytest.mark.parametrize(
    ("strengths", "ties"), [([2.0, 1.2, 0.7, 0.5], 0.0), ([1.0, 1.0, 1.0], 0.3)]
)
def test_intervals_hold_the_truth_in_nine_of_ten_simulations(
    strengths: list[float], ties: float
) -> None:
    """95 of 100 are meant; 90 of 100 are three standard errors of 200 simulations below."""
    true = np.array(strengths)
    rates = {
        (i, j): true[i] / (true[i] + true[j]) for i in range(len(true)) for j in range(len(true))
    }
    held = np.zeros(len(true))
    held_rates = []
    for number in range(200):
        games = simulated(np.random.default_rng([16, number]), true, 60, ties)
        fitted = fit_games(games, prior=0.1, resamples=200, seed=number)
        for k, estimate in enumerate(fitted.points.values()):
            held[k] += estimate.low <= elo(true)[k] <= estimate.high
        held_rates += [
            one.rate.low <= rates[int(one.a[1]), int(one.b[1])] <= one.rate.high
            for one in fitted.rates
        ]
    assert (held / 200 >= 0.9).all() and np.mean(held_rates) >= 0.9
    # Not because they hold everything: they tell the strongest from the weakest.
    if not ties:
        assert fitted.points["m0"].low > fitted.points["m3"].high


def test_voters_who_differ_make_intervals_wider() -> None:
    rng = np.random.default_rng(3)
    games = simulated(rng, np.ones(2), 200, 0.0)
    split = Games(
        games.models, games.first, games.second, (games.voters % 2).astype(float), games.prompts,
        games.voters,
    )  # fmt: skip
    alike, differing = (fit_games(g, prior=0.1, resamples=500, seed=0) for g in (games, split))

    def width(fitted: object) -> float:
        one = fitted.points["m0"]  # type: ignore[attr-defined]
        return one.high - one.low

    assert width(differing) > 1.5 * width(alike)
    assert differing.points["m0"].method == "bootstrap over voters"


def test_a_side_without_a_loss_is_decided_and_not_known_exactly() -> None:
    n = 300
    games = Games(
        ("a", "b"), np.zeros(n, int), np.ones(n, int), np.ones(n), np.arange(n), np.zeros(n, int)
    )
    fitted = fit_games(games, prior=0.1, resamples=200, seed=0)
    (rate,) = fitted.rates
    assert rate.rate.value == rate.rate.high == 1 and 0.98 < rate.rate.low < 1
    a, b = fitted.points["a"], fitted.points["b"]
    assert b.high < 0 < a.low < a.value and a.low > 200


def test_ties_are_half_a_win_each() -> None:
    games = Games(
        ("a", "b"), np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0]), np.array([1, 0.5, 0.5, 0.0]),
        np.arange(4), np.zeros(4, int),
    )  # fmt: skip
    (rate,) = fit_games(games, prior=0.1, resamples=100, seed=0).rates
    assert (rate.wins, rate.ties, rate.losses) == (2, 2, 0) and rate.rate.value == 0.75
    assert ELO * np.log(10) == pytest.approx(400)


def write_votes(study: Study, votes: list[Vote]) -> None:
    lines = [json.dumps(vote.to_dict()) for vote in votes]
    (study.folder / "votes.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_careless_voters_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, key = build_study(tmp_path, 12, ("ours", "theirs", "others"), checks=0.25)
    votes = []
    for number, voter in enumerate(("s" + "1" * 16, "s" + "2" * 16, "p" + "3" * 16)):
        for order, pair in enumerate(study.pairs, 1):
            answer = key.answers[pair.id]
            side = "left" if answer.left == "ours" else "right"
            if answer.check and number < 2:
                side = "tie"
            votes.append(Vote(pair.id, voter, side, side, 1500, order, "test"))
    write_votes(study, votes)
    assert [v.is_attentive for v in attention(key, votes)] == [False, True, True]
    assert main(["fit", str(study.folder), "--resamples", "200"]) == 0
    out = capsys.readouterr().out
    assert "p3333333333333333 is left out: 6 of 6 attention checks failed" in out
    values = json.loads((study.folder / "fit.json").read_text())
    assert [v["excluded"] for v in values["voters"]] == [True, False, False]
    for side in values["results"]:
        assert side["by"] == "people"
        assert {(r["a"], r["b"], r["wins"], r["losses"]) for r in side["rates"]} == {
            ("ours", "theirs", 24, 0), ("ours", "others", 24, 0)
        }  # fmt: skip
    # 48 votes of both questions with one answer each: not 96 answers that know nothing of each other.
    assert values["left"]["n"] == 48 and values["seconds"] == 1.5
    for place in (out, (study.folder / "README.md").read_text()):
        assert values["protocol"] in place
    assert values["protocol"].startswith("preference/")
    other = json.loads(json.dumps(values["settings"])) | {"prior": 0.2}
    assert main(["fit", str(study.folder), "--resamples", "200", "--prior", "0.2"]) == 0
    again = json.loads((study.folder / "fit.json").read_text())
    assert again["settings"] == other and again["protocol"] != values["protocol"]
    assert main(["fit", str(study.folder), "--resamples", "200"]) == 0
    (alpha, _) = values["agreement"]
    assert alpha["measure"] == "Krippendorff's alpha" and alpha["estimate"]["value"] == 1
    first = (
        (study.folder / "fit.json").read_bytes(),
        (study.folder / "plots" / "preference.svg").read_bytes(),
    )
    assert main(["fit", str(study.folder), "--resamples", "200"]) == 0
    again = (
        (study.folder / "fit.json").read_bytes(),
        (study.folder / "plots" / "preference.svg").read_bytes(),
    )
    assert first == again


def test_a_fifth_of_the_checks_may_fail() -> None:
    assert Voter("s", 9, 5, 1).is_attentive and not Voter("s", 9, 9, 2).is_attentive
    assert Voter("s", 9, 0, 0).is_attentive


def test_one_slip_leaves_nobody_out() -> None:
    assert Voter("s", 9, 1, 1).is_attentive and not Voter("s", 9, 2, 2).is_attentive


def test_the_majority_of_voters_is_a_tie_where_they_are_split() -> None:
    assert majority(["left", "left", "right"]) == "left"
    assert majority(["left", "right"]) == "tie" == majority(["tie", "tie", "left"])


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    study, key = build_study(tmp_path, 4, ("a", "b", "c"), checks=0)
    with pytest.raises(ValueError, match="no votes and no judgements"):
        fit(Fit(study.folder))
    pair = next(
        p for p in study.pairs if "c" not in (key.answers[p.id].left, key.answers[p.id].right)
    )
    write_votes(study, [Vote(pair.id, "s" + "1" * 16, "left", "tie", None, 1, "test")])
    for resamples in (0, 10**9):
        with pytest.raises(ValueError, match="--resamples must be from 100 to 100,000"):
            fit(Fit(study.folder, resamples=resamples))
    with pytest.raises(ValueError, match="people, quality: .* no pairs between the groups a, b; c"):
        fit(Fit(study.folder))
    with pytest.raises(ValueError, match="--prior must be above 0"):
        fit(Fit(study.folder, prior=0))
