"""Laws that are there are found, inside their intervals; laws that are not are called not identified."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize

from pixart.scalability.laws import Law, fit_power_law

RUNS, CHECKPOINTS = 8, 12


def trajectories(
    law: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
    between: float = 0.03,
    within: float = 0.02,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and runs of RUNS runs with noise of their own, and noise of each checkpoint."""
    x = np.tile(np.geomspace(1, 300, CHECKPOINTS), RUNS)
    runs = np.repeat(np.arange(RUNS), CHECKPOINTS)
    noise = rng.normal(0, between, RUNS)[runs] + rng.normal(0, within, len(x))
    return x, law(x) * np.exp(noise), runs


def grid(
    rng: np.random.Generator, noise: float
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Hoffmann's law at 6 sizes x 8 amounts of data."""
    sizes, data = np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e7, 1e11, 8), indexing="ij")
    n, d = sizes.ravel(), data.ravel()
    return (n, d), (1.7 + 400 * n**-0.34 + 410 * d**-0.28) * np.exp(rng.normal(0, noise, n.size))


def inside(law: Law, **truth: float) -> bool:
    return all(
        law.parameters[name].low <= value <= law.parameters[name].high
        for name, value in truth.items()
    )


def test_a_power_law_without_noise_is_exact() -> None:
    x = np.geomspace(1, 1e4, 9)
    law = fit_power_law(x, 0.47 * x**0.02, "a*x^b")
    assert law.identified, law.reasons
    assert law.parameters["a"].value == pytest.approx(0.47, rel=1e-9)
    assert law.parameters["b"].value == pytest.approx(0.02, rel=1e-9)
    assert law.r2 == pytest.approx(1)
    assert law.held_out is not None and law.held_out.error < 1e-9


def test_a_power_law_is_what_polyfit_finds() -> None:
    rng = np.random.default_rng(0)
    x = np.geomspace(2, 500, 12)
    y = 3 * x**-0.4 * np.exp(rng.normal(0, 0.1, 12))
    slope, height = np.polyfit(np.log(x), np.log(y), 1)
    law = fit_power_law(x, y, "a*x^b", resamples=200)
    assert law.parameters["b"].value == pytest.approx(slope, rel=1e-9)
    assert law.parameters["a"].value == pytest.approx(np.exp(height), rel=1e-9)
    weighted = fit_power_law(x, y, "a*x^b", se=y * np.linspace(0.01, 0.1, 12), resamples=200)
    expected = np.polyfit(np.log(x), np.log(y), 1, w=1 / np.linspace(0.01, 0.1, 12))
    assert weighted.parameters["b"].value == pytest.approx(expected[0], rel=1e-9)


def test_a_law_with_a_floor_is_what_scipy_finds() -> None:
    x, y, runs = trajectories(lambda x: 8.5 * x**-0.9 + 0.05, np.random.default_rng(1))
    law = fit_power_law(x * 1e12, y, runs=runs, resamples=300)  # units do not matter

    def model(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return np.log(a * x**-b + c)

    (a, b, c), _ = scipy.optimize.curve_fit(
        model, x, np.log(y), [8.0, 1.0, 0.05], xtol=1e-12, ftol=1e-12
    )
    assert law.identified, law.reasons
    assert law.parameters["b"].value == pytest.approx(b, rel=1e-4)
    assert law.parameters["c"].value == pytest.approx(c, rel=1e-4)
    assert law.parameters["a"].value == pytest.approx(a * 1e12**b, rel=1e-2)
    assert inside(law, b=0.9, c=0.05)
    assert law.predict(x * 1e12) == pytest.approx(np.exp(model(x, a, b, c)), rel=1e-4)
    low, high = law.interval([1e12, 1e14])
    assert (low < law.predict([1e12, 1e14])).all() and (law.predict([1e12, 1e14]) < high).all()


def test_chinchillas_law_is_found_on_a_grid() -> None:
    (n, d), y = grid(np.random.default_rng(1), 0.003)
    law = fit_power_law((n, d), y, "chinchilla", resamples=200)
    assert law.identified, law.reasons
    assert inside(law, E=1.7, alpha=0.34, beta=0.28)
    assert law.covariance.shape == (5, 5) and np.allclose(law.covariance, law.covariance.T)

    def loss(fitted: np.ndarray) -> float:
        e, a, b, alpha, beta = fitted
        terms = np.stack([np.full(n.size, e), a - alpha * np.log(n), b - beta * np.log(d)])
        off = np.abs(np.log(y) - np.log(np.exp(terms).sum(axis=0)))
        return float(np.where(off < 1e-3, off**2 / 2, 1e-3 * (off - 5e-4)).mean())

    found = scipy.optimize.minimize(
        loss, law.fitted, method="Nelder-Mead", options={"fatol": 1e-14, "xatol": 1e-8}
    )
    assert loss(law.fitted) <= found.fun * (1 + 1e-4)


def test_chinchillas_law_is_exact_without_noise() -> None:
    x, y = grid(np.random.default_rng(0), 0)
    law = fit_power_law(x, y, "chinchilla", resamples=100)
    expected = {"E": 1.7, "A": 400, "B": 410, "alpha": 0.34, "beta": 0.28}
    for name, value in expected.items():
        assert law.parameters[name].value == pytest.approx(value, rel=1e-3)


def test_one_seed_decides_everything() -> None:
    x, y, runs = trajectories(lambda x: 5 * x**-0.7 + 0.3, np.random.default_rng(2))
    one, other = (fit_power_law(x, y, runs=runs, resamples=150, seed=3) for _ in range(2))
    assert one.as_json() == other.as_json()
    assert one.as_json() != fit_power_law(x, y, runs=runs, resamples=150, seed=4).as_json()


@pytest.mark.parametrize("form", ["a*x^b", "a*x^-b+c"])
def test_copies_of_checkpoints_do_not_narrow_the_interval(form: str) -> None:
    x, y, runs = trajectories(lambda x: 5 * x**-0.7 + 0.3, np.random.default_rng(3))
    once = fit_power_law(x, y, form, runs=runs, resamples=300)
    often = fit_power_law(np.tile(x, 5), np.tile(y, 5), form, runs=np.tile(runs, 5), resamples=300)
    for name, one in once.parameters.items():
        assert often.parameters[name].low == pytest.approx(one.low, rel=1e-2)
        assert often.parameters[name].high == pytest.approx(one.high, rel=1e-2)


def test_checkpoints_that_are_taken_for_runs_would_promise_too_much() -> None:
    x, y, runs = trajectories(lambda x: 5 * x**-0.7, np.random.default_rng(3), between=0.2)
    honest = fit_power_law(x, y, "a*x^b", runs=runs).parameters["a"]
    wrong = fit_power_law(x, y, "a*x^b").parameters["a"]
    assert wrong.high - wrong.low < 0.5 * (honest.high - honest.low)


def test_the_largest_left_out_tells_a_line_from_a_floor() -> None:
    x, y, runs = trajectories(lambda x: 5 * x**-0.9 + 0.3, np.random.default_rng(4))
    floored, line = (fit_power_law(x, y, form, runs=runs) for form in ("a*x^-b+c", "a*x^b"))
    assert floored.held_out is not None and line.held_out is not None
    assert floored.held_out.points == line.held_out.points == 2 * RUNS
    assert floored.held_out.error < 0.1 < line.held_out.error


NOTHING_THERE = {
    "constant": lambda x: np.full_like(x, 3.0),
    "exponential": lambda x: 3 * np.exp(-x / 30),
    "exponential with a floor": lambda x: 3 * np.exp(-x / 30) + 0.5,
    "a bump": lambda x: 1 + np.exp(-((np.log(x) - 2) ** 2)),
}


@pytest.mark.parametrize("form", ["a*x^b", "a*x^-b+c"])
@pytest.mark.parametrize("name", NOTHING_THERE)
def test_a_law_that_is_not_there_is_not_identified(name: str, form: str) -> None:
    accepted = 0
    for seed in range(3):
        x, y, runs = trajectories(NOTHING_THERE[name], np.random.default_rng(seed))
        accepted += fit_power_law(x, y, form, runs=runs, resamples=100).identified
    assert accepted <= 1  # of a constant one in twenty has a trend by chance


def test_pure_noise_has_no_trend() -> None:
    rng = np.random.default_rng(0)
    law = fit_power_law(np.geomspace(1, 100, 12), rng.lognormal(0, 0.5, 12), "a*x^b")
    assert any("no trend" in reason for reason in law.reasons)


def test_a_floor_that_is_0_is_not_identified() -> None:
    x, y, runs = trajectories(lambda x: 5 * x**-0.5, np.random.default_rng(5))
    law = fit_power_law(x, y, runs=runs)
    assert not law.identified and "floor c is not told from 0" in law.reasons[0]
    assert law.parameters["c"].low == 0
    assert fit_power_law(x, y, "a*x^b", runs=runs).identified


def test_a_floor_does_not_belong_under_what_rises() -> None:
    x = np.geomspace(1, 100, 10)
    law = fit_power_law(x, 0.5 * x**0.1)
    assert "y rises with x" in law.reasons[0]


@pytest.mark.parametrize(
    ("count", "last", "reason"),
    [(3, 1e3, "3 runs are too few"), (10, 9.0, "decades"), (4, 1e3, "different x are too few")],
)
def test_too_few_runs_and_too_narrow_a_range_are_not_fitted(
    count: int, last: float, reason: str
) -> None:
    x = np.geomspace(1, last, count)
    law = fit_power_law(x, 5 * x**-0.5 + 1)
    assert not law.identified and reason in " ".join(law.reasons)
    assert law.parameters == {} and law.as_json()["parameters"] == {}
    with pytest.raises(ValueError, match="nothing was fitted"):
        law.predict([1.0])


def test_many_checkpoints_of_three_runs_are_three_runs() -> None:
    x = np.tile(np.geomspace(1, 1e3, 40), 3)
    law = fit_power_law(x, x**-0.5, "a*x^b", runs=np.repeat([0, 1, 2], 40))
    assert "3 runs are too few" in law.reasons[0]


def test_one_run_that_spans_x_alone_is_too_little() -> None:
    x = np.concatenate([np.geomspace(1, 1e3, 9), np.full(3, 10.0)])
    runs = np.array([0] * 9 + [1, 2, 3])
    law = fit_power_law(x, 5 * x**-0.5, "a*x^b", runs=runs)
    assert "resamples of the runs could be fitted" in law.reasons[0]


def test_size_and_data_that_grow_together_are_not_told_apart() -> None:
    n = np.geomspace(1e6, 1e9, 20)
    law = fit_power_law((n, 20 * n), 1.7 + 400 * n**-0.34, "chinchilla")
    assert "N and D go together" in law.reasons[0] and law.parameters == {}


def test_a_size_that_does_nothing_is_no_law_of_size() -> None:
    (n, d), _ = grid(np.random.default_rng(0), 0)
    y = (1.7 + 410 * d**-0.28) * np.exp(np.random.default_rng(0).normal(0, 0.01, d.size))
    law = fit_power_law((n, d), y, "chinchilla", resamples=150)
    assert any("over N includes 0" in reason for reason in law.reasons)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("side", ["x", "y", "se"])
def test_numbers_without_a_log_are_refused(bad: float, side: str) -> None:
    given = {name: np.geomspace(1, 100, 8) for name in ("x", "y", "se")}
    given[side][3] = bad
    with pytest.raises(ValueError, match=rf"^{side} must be positive and finite.* at place 3$"):
        fit_power_law(given["x"], given["y"], "a*x^b", given["se"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"form": "exp"}, "the form must be one of"),
        ({"y": [1.0, 2.0]}, "x must be as long as y, got 8 and 2"),
        ({"se": [1.0]}, "se must be as long as y, got 1 and 8"),
        ({"runs": [1]}, "runs must be as long as y, got 1 and 8"),
        ({"resamples": 10}, "resamples must be at least 100"),
        ({"form": "chinchilla"}, "must be a pair of lists"),
        ({"front": "left"}, "front must be lower or upper"),
        ({"x": []}, "x must be a list of numbers"),
        ({"x": "abcdefgh"}, "x must be positive numbers"),
    ],
)
def test_bad_input_is_refused_in_one_line(changed: dict[str, object], message: str) -> None:
    x = list(np.geomspace(1, 100, 8))
    with pytest.raises(ValueError, match=message) as error:
        fit_power_law(**({"x": x, "y": x, "form": "a*x^b"} | changed))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "truth"),
    [("a*x^b", {"a": 5, "b": -0.4}), ("a*x^-b+c", {"a": 5, "b": 0.7, "c": 0.3})],
)
@pytest.mark.parametrize("between", [0.0, 0.05])
def test_intervals_hold_the_truth_as_often_as_they_say(
    form: str, truth: dict[str, float], between: float
) -> None:
    a, b, c = truth["a"], abs(truth["b"]), truth.get("c", 0)
    held, identified = dict.fromkeys(truth, 0), 0
    for seed in range(60):
        x, y, runs = trajectories(
            lambda x: a * x**-b + c, np.random.default_rng(seed), between, 0.03
        )
        law = fit_power_law(x, y, form, runs=runs, resamples=300, seed=seed)
        identified += law.identified
        for name, value in truth.items():
            held[name] += inside(law, **{name: value})
    # At 0.95 each, fewer than 51 of 60 happen once in a thousand times.
    assert all(count >= 51 for count in held.values()), held
    assert identified >= 51


@pytest.mark.slow
def test_chinchillas_intervals_hold_the_truth() -> None:
    held = 0
    for seed in range(20):
        (n, d), y = grid(np.random.default_rng(seed), 0.005)
        held += inside(fit_power_law((n, d), y, "chinchilla", resamples=200), E=1.7, alpha=0.34)
    assert held >= 16
