"""Few runs: as many laws are called found where there are none as 95 % allow, and options that cannot be."""

from pathlib import Path

import numpy as np
import pytest

from pixart import scaling
from pixart.scalability.laws import MOST_NUMBERS, fit_power_law


def test_slopes_that_are_chance_are_called_a_law_once_in_twenty() -> None:
    """Each run leans to a side of its own. By the bootstrap alone 12 % of 4 runs and 8 % of 6 had a law."""
    found, runs = 0, 4
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x, run = np.tile(np.geomspace(1, 100, 6), runs), np.repeat(np.arange(runs), 6)
        logs = rng.normal(0, 0.1, runs)[run] * np.log(x) + rng.normal(0, 0.05, runs)[run]
        y = np.exp(logs + rng.normal(0, 0.02, len(x)))
        found += fit_power_law(x, y, "a*x^b", runs=run, resamples=200, seed=seed).identified
    assert found <= 200 * 0.05 + 2.6 * (200 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("form", ["a*x^b", "a*x^-b+c"])
def test_a_law_that_four_runs_share_is_found(form: str) -> None:
    rng = np.random.default_rng(2)
    x, run = np.tile(np.geomspace(1, 300, 10), 4), np.repeat(np.arange(4), 10)
    floor = 0.5 if form.endswith("c") else 0.0
    y = (2 * x**-0.5 + floor) * np.exp(rng.normal(0, 0.02, 4)[run] + rng.normal(0, 0.01, len(x)))
    law = fit_power_law(x, y, form, runs=run)
    assert law.identified, law.reasons


def test_more_resamples_than_memory_holds_are_refused() -> None:
    x = np.geomspace(1, 100, 10)
    with pytest.raises(ValueError, match=f"at most {MOST_NUMBERS // 10:,} for 10 measurements"):
        fit_power_law(x, x, "a*x^b", resamples=10**10)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        fit_power_law(x, x, "a*x^b", seed=-1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--maximum", "nan"), "--maximum must be finite, got nan"),
        (("--maximum", "inf"), "--maximum must be finite, got inf"),
    ],
)
def test_a_best_score_that_is_no_number_is_refused(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "a.csv"
    file.write_text("run,compute,loss\na,1,1\n")
    assert scaling.main(["fit", str(file), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
