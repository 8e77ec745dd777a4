"""Votes as games between models, resampled by prompts and by voters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pixart.evaluation.preference.bradley_terry import (
    ELO,
    check_connected,
    elo,
    settled,
)
from pixart.evaluation.preference.study import Answer
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.intervals import wilson
from pixart.evaluation.statistics.resampling import LEVEL, counts, interval, quantile_of_normal

MOST_RESAMPLES = 100_000


@dataclass(frozen=True)
class Games:
    """models: names. first, second: places of the two models of each game; points: of the first, 1 for a
    win, 0.5 for a tie, 0. prompts, voters: whom each game belongs to, as whole numbers from 0."""

    models: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    points: np.ndarray
    prompts: np.ndarray
    voters: np.ndarray

    def wins(self, clusters: np.ndarray | None = None) -> np.ndarray:
        """(clusters, M, M): how many games i won against j in each cluster, ties as half; of all games as
        one where no clusters are given."""
        if clusters is None:
            clusters = np.zeros(len(self.first), dtype=np.int64)
        size = len(self.models)
        found = np.zeros((int(clusters.max(initial=-1)) + 1, size, size))
        np.add.at(found, (clusters, self.first, self.second), self.points)
        np.add.at(found, (clusters, self.second, self.first), 1 - self.points)
        return found

    def clusters(self) -> dict[str, np.ndarray]:
        """What is resampled, by name: what belongs together is drawn together."""
        several = {"prompts": self.prompts, "voters": self.voters}
        return {name: one for name, one in several.items() if len(np.unique(one)) > 1}


@dataclass(frozen=True)
class Rate:
    """How often model a was preferred to b: (wins + ties / 2) / n."""

    a: str
    b: str
    wins: int
    ties: int
    losses: int
    rate: Estimate


@dataclass(frozen=True)
class Fitted:
    """rates: of every two models that met. points: of each model, on a scale like Elo's with mean 0."""

    rates: tuple[Rate, ...]
    points: Mapping[str, Estimate]


def games_of(
    models: Sequence[str],
    answers: Mapping[str, Answer],
    votes: Iterable[tuple[str, str, str]],
) -> Games:
    """From (pair, voter, side) of one question. Attention checks are no games."""
    rows = []
    prompts: dict[str, int] = {}
    voters: dict[str, int] = {}
    places = {name: place for place, name in enumerate(models)}
    for pair, voter, side in votes:
        answer = answers[pair]
        if answer.check:
            continue
        rows.append(
            (
                places[answer.left], places[answer.right],
                {"left": 1.0, "right": 0.0}.get(side, 0.5),
                prompts.setdefault(answer.prompt, len(prompts)), voters.setdefault(voter, len(voters)),
            )
        )  # fmt: skip
    columns = list(zip(*rows, strict=True)) or [()] * 5
    first, second, points, of, by = (np.asarray(column) for column in columns)
    whole = np.int64
    return Games(
        tuple(models), first.astype(whole), second.astype(whole), points.astype(np.float64),
        of.astype(whole), by.astype(whole),
    )  # fmt: skip


def fit_games(games: Games, *, prior: float, resamples: int, seed: int) -> Fitted:
    """Rates and strengths with their intervals: the widest of those over prompts, over voters, and of one
    that takes games for independent, but knows what a side without a loss is worth: Wilson's for rates,
    and like Agresti and Coull's for strengths. ValueError without games, or where they leave the models in groups
    that never met."""
    if not len(games.first):
        raise ValueError("there must be votes, there are none")
    if not 0 < prior < np.inf:
        raise ValueError(f"--prior must be above 0, got {prior:g}")
    if not 100 <= resamples <= MOST_RESAMPLES:
        raise ValueError(
            f"--resamples must be from 100 to {MOST_RESAMPLES:,}, which all are in memory, got {resamples:,}"
        )
    whole = games.wins()[0]
    met = whole + whole.T > 0
    check_connected(met, games.models)
    drawn = {
        name: _resampled(games.wins(clusters), resamples, seed)
        for name, clusters in games.clusters().items()
    }
    rates = tuple(_rate(games, i, j, drawn) for i, j in zip(*np.nonzero(np.triu(met)), strict=True))
    return Fitted(rates, _points(games, whole, met * prior / 2, drawn))


def _resampled(wins: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, M, M) from the wins of each cluster."""
    flat = wins.reshape(len(wins), -1)
    drawn = np.concatenate([weights @ flat for weights in counts(len(wins), resamples, seed)])
    return drawn.reshape(-1, *wins.shape[1:])


def _rate(games: Games, i: int, j: int, drawn: Mapping[str, np.ndarray]) -> Rate:
    is_forth = (games.first == i) & (games.second == j)
    is_back = (games.first == j) & (games.second == i)
    points = np.concatenate([games.points[is_forth], 1 - games.points[is_back]])
    ways = {"Wilson": wilson(float(points.sum()), len(points))}
    for name, wins in drawn.items():
        of = wins[:, i, j] + wins[:, j, i]
        with np.errstate(invalid="ignore"):  # a resample may have none of these games
            ways[f"bootstrap over {name}"] = interval(np.where(of > 0, wins[:, i, j] / of, np.nan))
    rate = _widest(float(points.mean()), ways, len(points))
    won, tied, lost = (int((points == value).sum()) for value in (1, 0.5, 0))
    return Rate(games.models[i], games.models[j], won, tied, lost, rate)


def _points(
    games: Games, whole: np.ndarray, prior: np.ndarray, drawn: Mapping[str, np.ndarray]
) -> dict[str, Estimate]:
    value = elo(settled((whole + prior)[None])[0])
    margin = quantile_of_normal(LEVEL)
    # As Agresti and Coull do for a proportion. Without these games, the curvature where nobody ever lost is
    # next to none, and 300 wins of 300 would not decide.
    padded = whole + (prior > 0) * margin**2 / 2
    strengths = settled(padded[None])[0]
    centres, errors = elo(strengths), margin * ELO * _errors(padded, strengths)
    resampled = {name: elo(settled(wins + prior)) for name, wins in drawn.items()}
    played = (whole + whole.T).sum(axis=1).astype(int)
    found = {}
    for place, model in enumerate(games.models):
        points, middle, error = (float(one[place]) for one in (value, centres, errors))
        ways = {
            f"bootstrap over {name}": interval(one[:, place]) for name, one in resampled.items()
        }
        ways["Agresti-Coull"] = (min(points, middle - error), max(points, middle + error))
        found[model] = _widest(points, ways, int(played[place]))
    return found


def _errors(games: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Standard errors (M,) of the logarithms of strengths less their mean, by the curvature of the
    likelihood. Of a model that never lost, or only tied, all resamples are alike: they alone would say that
    its strength is known exactly."""
    chance = strengths[:, None] / (strengths[:, None] + strengths)
    weights = (games + games.T) * chance * chance.T
    information = np.diag(weights.sum(axis=1)) - weights
    return np.sqrt(np.diag(np.linalg.pinv(information)))


def _widest(value: float, ways: Mapping[str, tuple[float, float]], n: int) -> Estimate:
    finite = {name: way for name, way in ways.items() if np.isfinite(way).all()}
    method = max(finite, key=lambda name: finite[name][1] - finite[name][0])
    return Estimate(value, *finite[method], n, method)
