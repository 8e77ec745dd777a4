"""The front of runs and the best size at equal compute, against plain definitions."""

import numpy as np
import pytest
import scipy.spatial

from pixart.evaluation.statistics.student import student_quantile
from pixart.scalability.intervals import interval_of_runs
from pixart.scalability.laws import fit_power_law
from pixart.scalability.pareto import compute_optimal, pareto


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_the_falling_part_of_the_convex_hull(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compute, loss = rng.lognormal(0, 2, 60), rng.lognormal(0, 1, 60)
    logs = np.log(np.stack([compute, loss], axis=1))
    corners = scipy.spatial.ConvexHull(logs).vertices
    found = pareto(compute, loss)
    assert set(found) <= set(corners)
    for place in corners:  # nothing has less of both, and a line that falls passes below all others
        tops = logs[:, 0] <= logs[place, 0]
        falls = logs[tops, 1].min() >= logs[place, 1]
        assert falls == (place in found)
    assert (np.diff(compute[found]) > 0).all() and (np.diff(loss[found]) < 0).all()


def test_the_front_of_a_score_is_above() -> None:
    assert list(pareto([1, 2, 4, 8], [0.1, 0.9, 0.5, 1.0], upper=True)) == [0, 1, 3]
    assert list(pareto([1, 2, 4, 8], [1.0, 0.5, 2.0, 0.1])) == [0, 3]
    assert list(pareto([3.0, 3.0, 3.0], [2.0, 1.0, 1.5])) == [1]


def test_a_front_of_numbers_without_logs_is_refused() -> None:
    with pytest.raises(ValueError, match="loss must be positive and finite"):
        pareto([1, 2], [0.0, 1.0])
    with pytest.raises(ValueError, match="as long, got 2 and 1"):
        pareto([1, 2], [1.0])


def test_a_law_is_fitted_to_the_front_that_every_resample_has() -> None:
    rng = np.random.default_rng(0)
    runs = np.repeat(np.arange(10), 12)
    x = np.tile(np.geomspace(1, 1e3, 12), 10)
    above = rng.exponential(0.3, 10)[runs] + rng.exponential(0.02, 120)  # the front is the law
    y = (5 * x**-0.6 + 0.4) * np.exp(above)
    law = fit_power_law(x, y, runs=runs, front="lower", resamples=200)
    whole = fit_power_law(x, y, runs=runs, resamples=200)
    assert (law.predict(x) < whole.predict(x)).all()
    assert list(law.chosen) == sorted(pareto(x, y)) and law.points == len(law.chosen) < 12
    assert law.parameters["b"].low < 0.6 < law.parameters["b"].high


def test_a_front_of_few_corners_is_not_identified() -> None:
    x = np.geomspace(1, 1e3, 12)
    law = fit_power_law(x, 5 * x**-0.6 * np.linspace(1, 0.9, 12) ** 2, "a*x^b", front="lower")
    assert "different x are too few" in law.reasons[0]


def profile(
    optimum: float, sizes: np.ndarray, noise: float, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Sizes, compute, loss and runs whose loss at compute 1e12 is lowest at `optimum`."""
    rng = np.random.default_rng(seed)
    n, c = (one.ravel() for one in np.meshgrid(sizes, [5e11, 1e12, 2e12], indexing="ij"))
    runs = np.repeat(np.arange(len(sizes)), 3)
    shifted = np.log(n / optimum) - 0.5 * np.log(c / 1e12)
    return n, c, 0.1 * np.exp(0.1 * shifted**2 + rng.normal(0, noise, len(sizes))[runs]), runs


def test_the_best_size_is_found_inside_its_interval() -> None:
    held = 0
    for seed in range(20):
        found = compute_optimal(
            *profile(3e6, np.geomspace(1e6, 1e7, 9), 0.005, seed),
            1e12,
            resamples=200,  # type: ignore[arg-type]
        )
        assert found.identified and found.size is not None, found.reasons
        held += found.size.low <= 3e6 <= found.size.high
    assert held >= 17


@pytest.mark.parametrize(
    ("optimum", "sizes", "at", "reason"),
    [
        (1e9, np.geomspace(1e6, 1e7, 8), 1e12, "above the largest size"),
        (1e4, np.geomspace(1e6, 1e7, 8), 1e12, "below the smallest size"),
        (3e6, np.geomspace(1e6, 1e7, 3), 1e12, "3 sizes were measured"),
        (3e6, np.geomspace(1e6, 1e7, 8), 1e14, "0 sizes were measured"),
    ],
)
def test_a_best_size_that_is_not_told_is_not_identified(
    optimum: float, sizes: np.ndarray, at: float, reason: str
) -> None:
    found = compute_optimal(*profile(optimum, sizes, 0), at, resamples=100)  # type: ignore[arg-type]
    assert not found.identified and reason in found.reasons[0]


def test_a_profile_that_is_noise_has_no_best_size() -> None:
    rng = np.random.default_rng(0)
    identified = 0
    for _ in range(20):
        sizes = np.geomspace(1e6, 1e7, 6)
        loss = rng.lognormal(0, 0.1, 6)
        identified += compute_optimal(
            sizes,
            np.full(6, 1e12),
            loss,
            np.arange(6),
            1e12,
            resamples=100,  # type: ignore[arg-type]
        ).identified
    assert identified <= 2


def test_a_run_of_two_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="run 'a' must have one size"):
        compute_optimal([1e6, 2e6], [1e12, 1e12], [1.0, 1.0], ["a", "a"], 1e12)


def test_students_quantiles_are_those_of_the_tables() -> None:
    for degrees, expected in ((3, 3.182), (10, 2.228), (100, 1.984)):
        assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=1e-3)
    values = np.random.default_rng(0).normal(size=20_000)
    few, many = interval_of_runs(values, 5), interval_of_runs(values, 10_000)
    assert few[0] < many[0] < -1.9 and few[1] > many[1] > 1.9
    assert many == pytest.approx((-1.96, 1.96), abs=0.05)
