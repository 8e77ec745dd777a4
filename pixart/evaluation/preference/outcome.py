"""What people and judges say of a study, computed: see pixart.evaluation.preference.fit."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixart.evaluation.preference.games import Fitted, fit_games, games_of
from pixart.evaluation.preference.judgements import Verdicts, read_judgements, verdicts
from pixart.evaluation.preference.options import Fit
from pixart.evaluation.preference.study import (
    QUESTIONS,
    SIDES,
    Key,
    Study,
)
from pixart.evaluation.preference.votes import Vote, read_votes
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.intervals import cohen_kappa, krippendorff_alpha, wilson

MOST_FAILED = 0.2  # of a voter's attention checks
LEAST_FAILED = 2  # one slip leaves nobody out, however few the checks
PEOPLE = "people"


@dataclass(frozen=True)
class Side:
    """What one kind of judge says of one question. by: PEOPLE or a model. verdicts: None for people."""

    by: str
    question: str
    fitted: Fitted
    verdicts: Verdicts | None = None

    @property
    def is_usable(self) -> bool:
        return self.verdicts is None or self.verdicts.is_usable


@dataclass(frozen=True)
class Voter:
    """failed: how many of checks were answered wrong."""

    name: str
    votes: int
    checks: int
    failed: int

    @property
    def is_attentive(self) -> bool:
        return self.failed < LEAST_FAILED or self.failed <= MOST_FAILED * self.checks


@dataclass(frozen=True)
class Agreement:
    """between: who with whom. estimate: None where it is not defined, and why."""

    between: str
    question: str
    measure: str
    estimate: Estimate | None
    why_not: str = ""


@dataclass(frozen=True)
class Results:
    study: Study
    key: Key
    sides: tuple[Side, ...]
    voters: tuple[Voter, ...]
    agreements: tuple[Agreement, ...]
    left: Estimate | None  # how often people chose the left one of what was no tie
    seconds: float | None  # median of a vote


def gather(study: Study, key: Key, options: Fit) -> Results:
    """Everything that is said, computed."""
    standing, _ = read_votes(study)
    voters = attention(key, standing.values())
    attentive = {voter.name for voter in voters if voter.is_attentive}
    votes = [vote for vote in standing.values() if vote.voter in attentive]
    judged = verdicts(read_judgements(study))
    counted = [vote for vote in votes if not key.answers[vote.pair].check]
    if not counted and not any(one.sides for one in judged):
        left_out = len(voters) - len(attentive)
        raise ValueError(
            f"{study.folder}: there is nothing to fit, no votes and no judgements"
            + (f" but those of {left_out} voters who failed the checks" if left_out else "")
        )
    sides = []
    for question in QUESTIONS:
        if counted:
            said = [(vote.pair, vote.voter, getattr(vote, question)) for vote in counted]
            sides.append(_side(PEOPLE, question, said, key, options))
        for one in judged:
            said = [(pair, one.model, side) for pair, side in one.sides.items()]
            if one.question == question and any(not key.answers[pair].check for pair, *_ in said):
                sides.append(_side(one.model, question, said, key, options, one))
    return Results(
        study, key, tuple(sides), tuple(voters),
        tuple(agreements(key, counted, judged)), _left(counted, options),
        statistics.median(times) if (times := [v.ms / 1000 for v in counted if v.ms]) else None,
    )  # fmt: skip


def _side(
    by: str,
    question: str,
    said: Iterable[tuple[str, str, str]],
    key: Key,
    options: Fit,
    judged: Verdicts | None = None,
) -> Side:
    games = games_of(key.models, key.answers, said)
    try:
        fitted = fit_games(
            games, prior=options.prior, resamples=options.resamples, seed=options.seed
        )
    except ValueError as error:
        raise ValueError(f"{by}, {question}: {error}") from error
    return Side(by, question, fitted, judged)


def attention(key: Key, votes: Iterable[Vote]) -> list[Voter]:
    """How attentive each voter was, in order of names."""
    by_voter: dict[str, list[Vote]] = {}
    for vote in votes:
        by_voter.setdefault(vote.voter, []).append(vote)
    found = []
    for name, theirs in sorted(by_voter.items()):
        checks = [(vote, check) for vote in theirs if (check := key.answers[vote.pair].check)]
        failed = sum(
            any(getattr(vote, question) != answer for question, answer in check.items())
            for vote, check in checks
        )
        found.append(Voter(name, len(theirs), len(checks), failed))
    return found


def agreements(key: Key, votes: Sequence[Vote], judged: Sequence[Verdicts]) -> Iterable[Agreement]:
    """Of voters among themselves, and of their majority with each judge."""
    for question in QUESTIONS:
        by_pair: dict[str, list[str]] = {}
        for vote in votes:
            by_pair.setdefault(vote.pair, []).append(getattr(vote, question))
        if not by_pair:
            continue
        pairs = sorted(by_pair)
        ratings = [by_pair[pair] for pair in pairs]
        measure = "Krippendorff's alpha"
        yield _agreement("voters", question, measure, lambda r=ratings: krippendorff_alpha(r))
        for one in judged:
            if one.question != question:
                continue
            both = [pair for pair in pairs if pair in one.sides]
            people = [majority(by_pair[pair]) for pair in both]
            model = [one.sides[pair] for pair in both]
            yield _agreement(
                f"{PEOPLE} and {one.model}", question, "Cohen's kappa",
                lambda p=people, m=model: cohen_kappa(p, m),
            )  # fmt: skip


def majority(answers: Sequence[str]) -> str:
    """The answer that most voters gave; a tie where two are as frequent."""
    counts = Counter(answers).most_common()
    return "tie" if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


def _agreement(between: str, question: str, measure: str, compute: Any) -> Agreement:
    try:
        return Agreement(between, question, measure, compute())
    except ValueError as error:  # not defined: nobody voted twice, or all said the same
        return Agreement(between, question, measure, None, str(error))


def _left(votes: Sequence[Vote], options: Fit) -> Estimate | None:
    """n: votes. The two answers of a vote are mostly the same, so that a vote counts once, by their mean."""
    shares = []
    for vote in votes:
        chosen = [answer for q in QUESTIONS if (answer := getattr(vote, q)) in SIDES]
        if chosen:
            shares.append(chosen.count("left") / len(chosen))
    if not shares:
        return None
    n, count = len(shares), math.fsum(shares)
    return Estimate(count / n, *wilson(count, n), n, "Wilson")


def finite(value: float | None) -> float | None:
    """For JSON, which has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def estimate_dict(one: Estimate | None) -> Mapping[str, Any] | None:
    if one is None:
        return None
    return {
        "value": finite(one.value), "low": finite(one.low), "high": finite(one.high), "n": one.n,
        "method": one.method, "notes": list(one.notes),
    }  # fmt: skip
