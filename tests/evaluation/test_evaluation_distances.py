"""pixart.evaluation.distances: against scipy, sums written out, and clouds whose distance is known."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

from pixart.evaluation.distances import (
    RunningMoments,
    Sample,
    Target,
    blocks_of,
    fid_infinity,
    frechet_distance,
    frechet_distance_of,
    jackknife,
    kernel_distance,
    kernel_distance_of_subsets,
    maximum_mean_discrepancy,
    moments_of,
    neighbourhoods,
)
from pixart.evaluation.metric import Moments

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"


def cloud(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Features with a covariance that falls as a network's do, fp32."""
    rng = np.random.default_rng(seed)
    axes = rng.normal(size=(d, d)) / (1 + np.arange(d))
    return (scale * rng.normal(size=(n, d)) @ axes.T + shift).astype(np.float32)


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    mean_a, mean_b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    cov_a, cov_b = np.cov(a.astype(np.float64).T), np.cov(b.astype(np.float64).T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    gap = mean_a - mean_b
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


@pytest.mark.parametrize(("n", "m", "d"), [(400, 500, 48), (1000, 900, 200)])
def test_the_frechet_distance_equals_scipys_root(n: int, m: int, d: int) -> None:
    a, b = cloud(n, d, 0), cloud(m, d, 1, 1.2, 0.1)
    expected = by_scipy(a, b)
    first, second = moments_of(a), moments_of(b)
    found = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert found == pytest.approx(expected, rel=1e-6)
    back = frechet_distance(second.mean, second.covariance, first.mean, first.covariance)
    assert back == pytest.approx(found, rel=1e-9)
    assert frechet_distance_of(a, b) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 300), (300, 20), (65, 64), (64, 65)])
def test_fewer_pictures_than_features_make_no_difference(n: int, m: int) -> None:
    """Both forms: singular values of rows, and eigenvalues of covariances that are singular. Of a zero
    eigenvalue the second has √ε ≈ 1e-8 left, of 64 at most 1e-6."""
    a, b = cloud(n, 64, 0), cloud(m, 64, 1, 1.2, 0.1)
    rows = [each - each.mean(axis=0, dtype=np.float64) for each in (a, b)]
    nuclear = scipy.linalg.svdvals(rows[0] @ rows[1].T).sum() / math.sqrt((n - 1) * (m - 1))
    gap = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    traces = sum((each**2).sum() / (len(each) - 1) for each in rows)
    expected = gap @ gap + traces - 2 * nuclear
    assert frechet_distance_of(a, b) == pytest.approx(expected, rel=1e-10)
    first, second = moments_of(a), moments_of(b)
    found = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert found == pytest.approx(expected, rel=1e-6)
    assert Sample(a, Target.of_moments(second)).distance() == pytest.approx(expected, rel=1e-6)


def test_gaussians_of_known_distance() -> None:
    """Of N(0, I) and N(m, s² I): ‖m‖² + d (1 - s)²."""
    one, mean = np.eye(5), np.arange(5.0)
    assert frechet_distance(np.zeros(5), one, mean, 9 * one) == pytest.approx(30 + 5 * 4)
    assert frechet_distance(mean, one, mean, one) == 0
    assert frechet_distance(mean, 0 * one, mean, one) == pytest.approx(5)


def test_moments_come_in_parts() -> None:
    """And lose no digits to a mean that is large beside the deviations, as sums of squares would."""
    rows = cloud(500, 12, 3).astype(np.float64) + 1e6
    running = RunningMoments()
    for start in (0, 7, 300):
        running.add(rows[start : {0: 7, 7: 300, 300: 500}[start]])
    found = running.moments()
    assert found.n == 500
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.T), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="features must be 12 wide, got 3"):
        running.add(np.zeros((2, 3)))


def test_what_has_no_distance_is_refused() -> None:
    rows = cloud(10, 4, 0)
    with pytest.raises(ValueError, match="features must be finite"):
        frechet_distance_of(np.where(rows > 0, np.nan, rows), rows)
    with pytest.raises(ValueError, match="as wide as the reference's 4, got 3"):
        frechet_distance_of(rows[:, :3], rows)
    with pytest.raises(ValueError, match="n at least 2"):
        frechet_distance_of(rows[:1], rows)
    with pytest.raises(ValueError, match="a mean .d,. goes with a covariance"):
        frechet_distance(np.zeros(4), np.eye(3), np.zeros(4), np.eye(4))


@pytest.mark.parametrize("n", [40, 200])  # fewer and more than features
def test_subsets_are_as_if_they_stood_alone(n: int) -> None:
    a, b = cloud(n, 64, 0), cloud(300, 64, 1, 1.1, 0.1)
    target = Target.of_features(b)
    sample = Sample(a, target)
    for block in blocks_of(range(n), 5):
        rest = np.setdiff1d(np.arange(n), block)
        expected = frechet_distance_of(a[rest], b)
        assert sample.without(block) == pytest.approx(expected, rel=1e-7)
        assert sample.of(rest) == pytest.approx(expected, rel=1e-7)
    assert sample.of(np.arange(n)) == pytest.approx(sample.distance(), rel=1e-7)


def test_blocks_keep_groups_whole_and_have_every_row_once() -> None:
    groups = [f"{row // 3}" for row in range(60)]
    blocks = blocks_of(groups, 7)
    assert len(blocks) == 7
    assert sorted(np.concatenate(blocks).tolist()) == list(range(60))
    for block in blocks:
        assert len({groups[row] for row in block}) * 3 == len(block)
    assert len(blocks_of(groups, 50)) == 20
    assert [block.tolist() for block in blocks_of(groups, 7)] == [b.tolist() for b in blocks]
    # Drawn, as neighbours are of one category: in order, the first block would be the first rows.
    assert [block.tolist() for block in blocks_of(groups, 7, 1)] != [b.tolist() for b in blocks]
    assert blocks[0].max() > 3 * len(blocks[0])


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    rows = np.random.default_rng(0).normal(size=30)
    found = jackknife(rows.mean(), [np.delete(rows, k).mean() for k in range(30)])
    assert found.error == pytest.approx(rows.std(ddof=1) / math.sqrt(30))
    assert found.bias == pytest.approx(0, abs=1e-12)
    biased = jackknife(rows.var(), [np.delete(rows, k).var() for k in range(30)])
    assert biased.bias == pytest.approx(-rows.var(ddof=1) / 30)
    assert jackknife(1.0, [2.0]).error == math.inf


def frechet_error(a: np.ndarray, target: Target) -> tuple[float, float, float]:
    sample = Sample(a, target)
    blocks = blocks_of(range(len(a)))
    found = jackknife(sample.distance(), [sample.without(block) for block in blocks])
    return found.value, found.error, found.bias


@pytest.mark.parametrize(("n", "d"), [(300, 12), (80, 96)])  # more and fewer than features
def test_the_jackknife_of_frechet_knows_error_and_bias(n: int, d: int) -> None:
    """40 sets know a deviation to 11 %, a jackknife of 50 blocks to 10 %; the mean of 40, of which all is
    bias where the truth is 0, to 5 %, and the jackknife has its first order in 1/n."""
    axes = np.diag(1 / (1 + np.arange(d)))
    rng = np.random.default_rng(1)
    for gap in (0.0, 0.5):
        target = Target.of_moments(Moments(np.eye(d)[0] * gap, axes @ axes))
        sets = [rng.normal(size=(n, d)) @ axes for _ in range(40)]
        values, errors, biases = np.array([frechet_error(each, target) for each in sets]).T
        if gap:
            assert 0.65 < np.median(errors) / values.std(ddof=1) < 1.35
        else:
            assert biases.mean() == pytest.approx(values.mean(), rel=0.25) and values.mean() > 0


def test_fid_at_infinity_is_nearer_to_the_truth() -> None:
    """Of 40 sets of 600: the distance is too high by its bias, the intercept is not."""
    d, axes = 24, np.diag(1 / (1 + np.arange(24)) ** 0.5)
    target = Target.of_moments(Moments(np.eye(d)[0] * 0.3, axes @ axes))
    rng = np.random.default_rng(2)
    plain, endless, covered = [], [], 0
    for seed in range(40):
        sample = Sample(rng.normal(size=(600, d)) @ axes, target)
        value, error = fid_infinity(sample, seed=seed)
        plain.append(sample.distance())
        endless.append(value)
        spread = jackknife(plain[-1], [sample.without(block) for block in blocks_of(range(600))])
        covered += abs(value - 0.09) < 1.96 * math.hypot(error, spread.error)
    # The standard error of the mean of 40.
    noise = np.std(endless, ddof=1) / math.sqrt(40)
    assert abs(np.mean(endless) - 0.09) < 3 * noise < 0.02
    assert np.mean(plain) - 0.09 > 5 * noise
    assert covered >= 34  # of 38 to be expected
    with pytest.raises(ValueError, match="needs 30 pictures, got 20"):
        fid_infinity(Sample(cloud(20, 24, 0), target))


def kernel_sums(a: np.ndarray, b: np.ndarray, kernel: Callable) -> tuple[float, float]:  # type: ignore[type-arg]
    """(unbiased, with the diagonal), pair by pair."""
    n, m = len(a), len(b)
    aa = [[kernel(x, y) for y in a] for x in a]
    bb = [[kernel(x, y) for y in b] for x in b]
    ab = [[kernel(x, y) for y in b] for x in a]
    apart = (np.sum(aa) - np.trace(aa)) / (n * (n - 1)) + (np.sum(bb) - np.trace(bb)) / (
        m * (m - 1)
    )
    return apart - 2 * np.mean(ab), np.mean(aa) + np.mean(bb) - 2 * np.mean(ab)


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return float((x.astype(np.float64) @ y.astype(np.float64) / len(x) + 1) ** 3)


def gaussian(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (each.astype(np.float64) / np.linalg.norm(each.astype(np.float64)) for each in (x, y))
    return 1000 * math.exp(-((x - y) ** 2).sum() / 200)


@pytest.mark.parametrize(
    ("ours", "kernel"), [(kernel_distance, cubic), (maximum_mean_discrepancy, gaussian)]
)
@pytest.mark.parametrize("numbers", [2**24, 40])  # in one part, and row by row
def test_kernel_distances_are_sums_over_pairs(
    ours: Callable,
    kernel: Callable,
    numbers: int,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[type-arg]
) -> None:
    monkeypatch.setattr("pixart.evaluation.distances.kernels._NUMBERS", numbers)
    a, b = cloud(15, 6, 0), cloud(20, 6, 1, 1.2, 0.3)
    found = ours(a, b)
    assert (found.value, found.with_diagonal) == pytest.approx(kernel_sums(a, b, kernel), rel=1e-9)
    groups = [row // 3 for row in range(15)]
    without = [
        kernel_sums(np.delete(a, range(3 * k, 3 * k + 3), 0), b, kernel)[0] for k in range(5)
    ]
    real = [kernel_sums(a, np.delete(b, k, 0), kernel)[0] for k in range(20)]
    expected = math.hypot(jackknife(0, without).error, jackknife(0, real).error)
    assert ours(a, b, groups_a=groups).error == pytest.approx(expected, rel=1e-7)


def test_subsets_are_drawn_and_averaged() -> None:
    a, b = cloud(60, 6, 0), cloud(50, 6, 1, 1.2)
    found = kernel_distance_of_subsets(a, b, subsets=4, size=20, seed=5)
    rng = np.random.RandomState(5)
    each = []
    for _ in range(4):
        first, second = (rng.choice(n, 20, replace=False) for n in (60, 50))
        each.append(kernel_sums(a[first], b[second], cubic)[0])
    assert (found.mean, found.deviation) == pytest.approx((np.mean(each), np.std(each)), rel=1e-9)
    whole = kernel_distance_of_subsets(a[:50], b, subsets=3, size=50)
    assert whole.mean == pytest.approx(kernel_distance(a[:50], b).value) and whole.deviation < 1e-9
    with pytest.raises(ValueError, match="subsets of 1000 need as many pictures"):
        kernel_distance_of_subsets(a, b)


def test_kernel_distance_is_nothing_for_equal_clouds_and_its_error_is_right() -> None:
    """120 pairs of sets: mean 0, and 95 % intervals that cover it; one standard deviation is 2 %."""
    rng = np.random.default_rng(4)
    found = [kernel_distance(*rng.normal(size=(2, 60, 8))) for _ in range(120)]
    values = np.array([each.value for each in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(120)
    covered = [abs(each.value) <= 1.96 * each.error for each in found]
    assert np.mean(covered) >= 0.90
    shifted = rng.normal(size=(120, 2, 60, 8)) + np.array([0, 0.4])[:, None, None]
    found = [kernel_distance(*pair) for pair in shifted]
    # E[k] of N(s, I) in d = 8 from a long run would be noisy: their own mean is the truth here.
    truth = np.mean([each.value for each in found])
    covered = [abs(each.value - truth) <= 1.96 * each.error for each in found]
    assert 0.90 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("numbers", [2**23, 100])
def test_neighbourhoods_by_all_distances(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.evaluation.distances.neighbours._NUMBERS", numbers)
    a, b = cloud(60, 6, 0, 1.1, 0.1), cloud(50, 6, 1)
    cross = scipy.spatial.distance.cdist(a, b)
    radius = {
        (name, k): np.sort(scipy.spatial.distance.cdist(each, each), axis=1)[:, k]
        for name, each in (("a", a), ("b", b))
        for k in (3, 5)
    }
    found = neighbourhoods(a, b)
    assert (found.precise == (cross <= radius["b", 3]).any(axis=1)).all()
    assert (found.recalled == (cross <= radius["a", 3][:, None]).any(axis=0)).all()
    assert (found.density * 5 == (cross < radius["b", 5]).sum(axis=1)).all()
    assert (found.covered == (cross.min(axis=0) < radius["b", 5])).all()
    assert 0 < found.precise.mean() < 1 and 0 < found.recalled.mean() < 1


def test_a_set_has_itself_for_neighbours_and_a_far_one_has_none() -> None:
    rows = cloud(30, 5, 0)
    same = neighbourhoods(rows, rows)
    assert same.precise.all() and same.recalled.all() and same.covered.all()
    far = neighbourhoods(rows + 1000, rows)
    assert not (far.precise.any() or far.recalled.any() or far.covered.any() or far.density.any())
    with pytest.raises(ValueError, match="n at least 6"):
        neighbourhoods(rows[:5], rows)


def test_numbers_are_those_of_the_implementations_that_papers_use() -> None:
    """torch-fidelity and prdc, in fp64 as here; but torch-fidelity means shares of neighbours in fp32."""
    golden = json.loads((GOLDEN / "distances.json").read_text())["values"]
    rng = np.random.RandomState(11)  # as in tests/golden/make_evaluation_distances.py
    axes = rng.normal(size=(24, 24)) / (1 + np.arange(24))
    ours = 1.1 * rng.normal(size=(150, 24)) @ axes.T + 0.1
    real = rng.normal(size=(130, 24)) @ axes.T
    assert frechet_distance_of(ours, real) == pytest.approx(golden["fid"], rel=1e-9)
    kid = kernel_distance_of_subsets(ours, real, subsets=20, size=60)
    assert (kid.mean, kid.deviation) == pytest.approx(
        (golden["kid"], golden["kid_deviation"]), rel=1e-9
    )
    found = neighbourhoods(ours, real)
    theirs = golden["precision_recall"]
    assert found.precise.mean() == pytest.approx(theirs["precision"], rel=1e-6)
    assert found.recalled.mean() == pytest.approx(theirs["recall"], rel=1e-6)
    theirs = golden["density_coverage"]
    assert found.density.mean() == pytest.approx(theirs["density"], rel=1e-12)
    assert found.covered.mean() == pytest.approx(theirs["coverage"], rel=1e-12)
    wide = neighbourhoods(ours, real, of_precision=5)
    assert wide.precise.mean() == pytest.approx(theirs["precision"], rel=1e-12)
    assert wide.recalled.mean() == pytest.approx(theirs["recall"], rel=1e-12)
