"""How strong each of several models is, from games between two of them: Bradley and Terry's model.

P(i beats j) = p_i / (p_i + p_j). The strengths are those that make the games likeliest. They are where
the steps of Zermelo's and Hunter's MM algorithm (Annals of Statistics 32, 2004) stand still; these steps
are Newman's (arXiv:2207.00076), which lead to the same place in a tenth of the time.
"""

import math
from collections.abc import Sequence

import numpy as np

PRIOR = 0.1  # games between every two that met, half of them won by each
ELO = 400 / math.log(10)  # points for a strength e times as large
TOLERANCE = 1e-11  # of logarithms of strengths, from one step to the next
STEPS = 20_000


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """Strengths (..., M), of geometric mean 1, from wins (..., M, M): wins[i, j] is how many games i won
    against j, a tie as half a win for each. Leading axes are resamples, solved together.

    prior: games that are added between every two that met, half won by each. Without any, a model that
    never lost would be infinitely strong. ValueError for models that no chain of games connects (without
    prior: of wins, in both directions), with the groups that they fall into.
    """
    wins = np.asarray(wins, dtype=np.float64)
    if wins.ndim < 2 or wins.shape[-1] != wins.shape[-2] or wins.shape[-1] < 2:
        raise ValueError(f"wins must be a square matrix of two models at least, got {wins.shape}")
    if not (np.isfinite(wins).all() and (wins >= 0).all() and math.isfinite(prior) and prior >= 0):
        raise ValueError("wins and prior must be finite and not negative")
    models = wins.shape[-1]
    games = wins.reshape(-1, models, models) * (1 - np.eye(models))
    met = (games + games.transpose(0, 2, 1) > 0).any(axis=0)
    check_connected(met, [str(k) for k in range(models)])
    if not prior:
        for one in games:
            check_connected(one > 0, [str(k) for k in range(models)], both_ways=True)
    games += met * prior / 2
    return settled(games).reshape(wins.shape[:-1])


def settled(games: np.ndarray) -> np.ndarray:
    """Strengths (B, M) from games (B, M, M) that hold the prior and are connected. One model after the
    other, each in all resamples."""
    logarithms = np.zeros(games.shape[:2])
    strengths = np.ones(games.shape[:2])
    for _ in range(STEPS):
        for k in range(games.shape[1]):
            shares = 1 / (strengths[:, k, None] + strengths)
            gained = (games[:, k] * strengths * shares).sum(axis=1)
            strengths[:, k] = gained / (games[:, :, k] * shares).sum(axis=1)
        before, logarithms = logarithms, np.log(strengths)
        logarithms -= logarithms.mean(axis=1, keepdims=True)
        strengths = np.exp(logarithms)
        if np.abs(logarithms - before).max() < TOLERANCE:
            return strengths
    raise RuntimeError(f"strengths do not settle in {STEPS:,} steps; give a larger prior")


def elo(strengths: np.ndarray) -> np.ndarray:
    """Strengths as points of which 400 more mean ten wins for a loss; their mean is 0."""
    points = ELO * np.log(strengths)
    return points - points.mean(axis=-1, keepdims=True)


def check_connected(met: np.ndarray, names: Sequence[str], *, both_ways: bool = False) -> None:
    """ValueError with the groups, unless games lead from every model to every other. met: (M, M), whether
    i won against j. both_ways: a game leads from winner to loser alone."""
    reach = np.asarray(met, dtype=bool) | np.eye(len(names), dtype=bool)
    if not both_ways:
        reach = reach | reach.T
    for k in range(len(names)):  # Warshall
        reach |= reach[:, k, None] & reach[k]
    alike = reach & reach.T
    groups = {tuple(np.flatnonzero(row).tolist()) for row in alike}
    if len(groups) > 1:
        said = "; ".join(", ".join(names[k] for k in group) for group in sorted(groups))
        what = "no wins lead both ways" if both_ways else "no pairs"
        raise ValueError(
            f"strengths need all models connected, there are {what} between the groups {said}; "
            + (
                "give a prior"
                if both_ways
                else "get votes on pairs between them, or study each group alone"
            )
        )
