"""Writes evaluation/bradley_terry.json: strengths by choix (https://github.com/lucasmaystre/choix).

Run where choix is installed, which this repository does not need:

    python -m venv /tmp/choix && /tmp/choix/bin/pip install choix==0.4.1
    /tmp/choix/bin/python tests/golden/make_evaluation_bradley_terry.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import choix
import numpy as np

PLACE = Path(__file__).parent / "evaluation" / "bradley_terry.json"
PRIOR = 0.1


def games(rng: np.random.Generator, strengths: np.ndarray, count: int) -> np.ndarray:
    """wins[i, j] of so many games between every two."""
    wins = np.zeros((len(strengths), len(strengths)))
    for i in range(len(strengths)):
        for j in range(i):
            won = rng.binomial(count, strengths[i] / (strengths[i] + strengths[j]))
            wins[i, j], wins[j, i] = won, count - won
    return wins


def main() -> None:
    rng = np.random.default_rng(16)
    cases = []
    for models, count in ((2, 20), (3, 25), (7, 40)):
        wins = games(rng, np.exp(rng.normal(0, 0.7, models)), count)
        pairs = [
            (i, j) for i in range(models) for j in range(models) for _ in range(int(wins[i, j]))
        ]
        found = choix.ilsr_pairwise(models, pairs, alpha=0.0, max_iter=10_000, tol=1e-13)
        cases.append({"by": "ilsr_pairwise", "prior": 0, "wins": wins.tolist(), "log": list(found)})
    for models, count in ((2, 10), (4, 12), (7, 30)):
        wins = games(rng, np.exp(rng.normal(0, 1.5, models)), count)
        ties = rng.integers(0, 6, (models, models)) / 2
        wins += (ties + ties.T) * (1 - np.eye(models))
        if models == 4:  # one that never lost, and two that never met
            wins[:, 0] = 0
            wins[1, 2] = wins[2, 1] = 0
        met = wins + wins.T > 0
        found = choix.ilsr_pairwise_dense(
            wins + met * PRIOR / 2, alpha=0.0, max_iter=100_000, tol=1e-13
        )
        values = {"by": "ilsr_pairwise_dense", "prior": PRIOR, "wins": wins.tolist()}
        cases.append({**values, "log": list(found)})
    made = {
        "made_by": "tests/golden/make_evaluation_bradley_terry.py",
        "with": f"choix {version('choix')}, numpy {np.__version__}",
        "note": "alpha is 0: choix's own regularisation is another than games that are added. These are "
        "added to wins before choix sees them, prior / 2 each way between models that met.",
        "cases": cases,
    }
    PLACE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
