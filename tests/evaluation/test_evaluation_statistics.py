"""pixart.evaluation.statistics.intervals: against scipy, formulas written out, textbooks and simulations."""

import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from pixart.evaluation.statistics.intervals import (
    auc,
    cohen_kappa,
    holm,
    is_inconclusive,
    kendall,
    krippendorff_alpha,
    mean_over_prompts,
    paired_accuracy,
    paired_difference,
    spearman,
    wilson,
)
from pixart.evaluation.statistics.resampling import counts, picks
from pixart.evaluation.store.entries import Entry, Prompt


def entries(prompts: int, samples: int = 1) -> list[Entry]:
    of = [Prompt(f"{prompt:05d}", "") for prompt in range(prompts)]
    return [Entry(prompt, sample, Path("x")) for prompt in of for sample in range(samples)]


def values(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(size=n).tolist()


def test_a_mean_is_of_prompts_and_not_of_pictures() -> None:
    some = [Entry(Prompt("a", ""), k, Path("x")) for k in range(3)]
    some.append(Entry(Prompt("b", ""), 0, Path("x")))
    estimate = mean_over_prompts(some, [1.0, 2.0, 3.0, 10.0])
    assert (estimate.value, estimate.n) == (6.0, 2)
    assert estimate.low == 2 and estimate.high == 10  # a quarter of resamples has either twice


def test_the_interval_is_that_of_multinomial_weights_times_means() -> None:
    some = values(40)
    estimate = mean_over_prompts(entries(40), some, resamples=500, seed=3)
    weights = np.concatenate(list(counts(40, 500, 3)))
    low, high = np.quantile(weights @ np.array(some) / 40, [0.025, 0.975])
    assert (weights.sum(axis=1) == 40).all()
    assert estimate.low == pytest.approx(low, abs=1e-14)
    assert estimate.high == pytest.approx(high, abs=1e-14)


def test_weights_count_the_picks_however_memory_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(picks(7, 50, 1)))
    monkeypatch.setattr("pixart.evaluation.statistics.resampling._CHUNK", 7 * 8)
    assert (np.concatenate(list(picks(7, 50, 1))) == whole).all()
    counted = np.concatenate(list(counts(7, 50, 1)))
    assert (counted == [np.bincount(row, minlength=7) for row in whole]).all()


def test_the_order_of_entries_does_not_matter_and_the_seed_does() -> None:
    some, numbers = entries(20, 2), values(40)
    first = mean_over_prompts(some, numbers)
    together = list(zip(some, numbers, strict=True))
    random.Random(0).shuffle(together)
    assert mean_over_prompts(*zip(*together, strict=True)) == first  # type: ignore[arg-type]
    assert mean_over_prompts(some, numbers, seed=1) != first


@pytest.mark.parametrize("kind", ["normal", "skewed", "clustered"])
def test_intervals_of_means_cover_the_truth(kind: str) -> None:
    """95 % of 300 sets, give or take 1.26 % of standard deviation, less what a percentile bootstrap of
    50 prompts is too narrow."""
    rng = np.random.default_rng(7)
    some = entries(50, 4 if kind == "clustered" else 1)
    covered = 0
    for _ in range(300):
        if kind == "clustered":  # pictures of a prompt are alike: 4 are worth little more than one
            numbers = (rng.normal(size=(50, 1)) + 0.2 * rng.normal(size=(50, 4))).ravel()
            truth = 0.0
        elif kind == "skewed":
            numbers, truth = rng.exponential(size=50), 1.0
        else:
            numbers, truth = rng.normal(size=50), 0.0
        estimate = mean_over_prompts(some, numbers.tolist(), resamples=400)
        covered += estimate.low <= truth <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_intervals_of_proportions_cover_the_truth(share: float) -> None:
    """Exactly: the chance of every count times whether its interval has the share."""
    n = 50
    covered = 0.0
    for right in range(n + 1):
        estimate = mean_over_prompts(entries(n), [1.0] * right + [0.0] * (n - right))
        assert estimate.method == "Wilson"
        if estimate.low <= share <= estimate.high:
            covered += scipy.stats.binom.pmf(right, n, share)
    assert 0.90 <= covered <= 0.99


def test_all_right_is_not_certain() -> None:
    single = mean_over_prompts(entries(30), [1.0] * 30)
    assert (single.value, single.high, single.method) == (1, 1, "Wilson")
    assert single.low == pytest.approx(30 / (30 + 1.959964**2), abs=1e-6)  # n / (n + z²)
    several = mean_over_prompts(entries(30, 4), [1.0] * 120)  # as if a prompt's pictures were one
    assert (several.low, several.method) == (single.low, "Wilson over prompts")
    mixed = mean_over_prompts(entries(30, 2), [1.0, 0.0] * 30)
    assert mixed.method == "bootstrap over prompts"


def test_one_prompt_has_an_infinite_interval() -> None:
    estimate = mean_over_prompts(entries(1, 3), [0.1, 0.2, 0.3])
    assert (estimate.low, estimate.high) == (-math.inf, math.inf) and estimate.notes
    assert (
        mean_over_prompts(entries(5), values(5)).notes
        and not mean_over_prompts(entries(10), values(10)).notes
    )
    one, other = entries(1), [0.5]
    assert paired_difference(one, [0.2], one, other).p == 1


def test_values_that_cannot_be_averaged_are_refused() -> None:
    some = entries(2)
    with pytest.raises(ValueError, match="values must be finite, 00001/0000 has nan"):
        mean_over_prompts(some, [1.0, math.nan])
    with pytest.raises(ValueError, match="got 2 entries and 1 values"):
        mean_over_prompts(some, [1.0])
    with pytest.raises(ValueError, match="got 0 entries"):
        mean_over_prompts([], [])
    with pytest.raises(ValueError, match="00000/0000 is there twice"):
        mean_over_prompts([some[0], some[0]], [1.0, 2.0])


def test_a_model_does_not_differ_from_itself() -> None:
    some, numbers = entries(30, 2), values(60)
    same = paired_difference(some, numbers, some[::-1], numbers[::-1])
    assert (same.difference, same.low, same.high, same.p, same.n) == (0, 0, 0, 1, 30)


def test_pairing_finds_what_separate_intervals_hide() -> None:
    some = entries(60)
    a = [10 * value for value in values(60)]
    b = [value + 0.3 + 0.1 * noise for value, noise in zip(a, values(60, 1), strict=True)]
    alone = mean_over_prompts(some, a)
    found = paired_difference(some, a, some, b)
    assert alone.low < found.difference + alone.value < alone.high
    assert 0.25 < found.low < found.difference < found.high < 0.35 and found.p < 0.002
    back = paired_difference(some, b, some, a)
    assert back.difference == -found.difference and back.p == found.p


def test_no_difference_is_found_as_often_as_p_says() -> None:
    """P(p < .05) is .05: 300 sets, so 15 ± 3.8, and a bootstrap of 40 prompts is a little eager."""
    rng = np.random.default_rng(1)
    some = entries(40)
    low = covered = 0
    for _ in range(300):
        a, b = rng.normal(size=(2, 40))
        found = paired_difference(some, a.tolist(), some, b.tolist(), resamples=400)
        low += found.p < 0.05
        covered += found.low <= 0 <= found.high
    assert 6 <= low <= 30 and 270 <= covered <= 294


def test_few_prompts_cannot_be_significant() -> None:
    """The bootstrap of three equal gaps has no width; a test of signs says 2/2³."""
    some = entries(3)
    found = paired_difference(some, [0.0] * 3, some, [1.0] * 3)
    assert found.p == 0.25 and found.method == "Newcombe"
    # Newcombe's method 10 without correlation, written out: Wilson's bound of 3 of 3 is 0.4385.
    assert found.low == pytest.approx(1 - math.sqrt(2) * (1 - 0.43850), abs=1e-4)
    assert found.high == 1
    back = paired_difference(some, [1.0] * 3, some, [0.0] * 3)
    assert (back.low, back.high) == (-found.high, -found.low)


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts, 1 are in one of them only: 00002"):
        paired_difference(entries(3), [1.0] * 3, entries(2), [1.0] * 2)


def test_holm_by_hand() -> None:
    """In order .005 x 4, .01 x 3, .03 x 2 and .04 x 1, which may not fall below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1] and holm([]) == []
    with pytest.raises(ValueError, match="p-values must be from 0 to 1"):
        holm([math.nan])


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (81, 263), (15, 148), (29, 29)])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_wilson_equals_scipy(right: int, n: int, level: float) -> None:
    expected = scipy.stats.binomtest(right, n).proportion_ci(level, "wilson")
    assert wilson(right, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_the_textbook_and_of_halves() -> None:
    """Newcombe 1998, table I: 81 of 263 is .2553 to .3662, 1 of 29 .0061 to .1718."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(2, 10)[0] < wilson(2.5, 10)[0] < wilson(3, 10)[0]
    with pytest.raises(ValueError, match="successes must be from 0 to n"):
        wilson(3, 2)


def test_auc_counts_pairs() -> None:
    positive, negative = [0.1, 0.5, 0.5, 0.9], [0.0, 0.5, 0.2]
    pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
    estimate = auc(positive, negative)
    assert estimate.value == pytest.approx(sum(pairs) / 12) and estimate.n == 7
    swapped = auc(negative, positive)
    assert (swapped.low, swapped.high) == pytest.approx((1 - estimate.high, 1 - estimate.low))
    assert auc([1, 2], [3, 4]).value == 0 and auc([1, 2], [1, 2], paired=True).value == 0.5


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("paired", [False, True])
def test_intervals_of_auc_cover_the_truth(shift: float, paired: bool) -> None:
    rng = np.random.default_rng(5)
    truth = scipy.stats.norm.cdf(shift / math.sqrt(2))
    covered = 0
    for _ in range(300):
        negative, positive = rng.normal(size=(2, 40))
        if paired:  # as two captions of one scene
            positive = 0.8 * negative + 0.6 * positive
        found = auc((positive + shift).tolist(), negative.tolist(), paired=paired)
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_a_perfect_auc_is_not_certain() -> None:
    assert auc([2, 3, 4], [0, 1]).low == wilson(2, 2)[0]
    with pytest.raises(ValueError, match="as many positive as negative"):
        auc([1, 2], [1], paired=True)
    with pytest.raises(ValueError, match="positive must be finite"):
        auc([], [1])


def test_paired_accuracy_has_ties_as_half() -> None:
    estimate = paired_accuracy([1, 2, 3, 4], [0, 2, 5, 1])
    assert (estimate.value, estimate.n) == (2.5 / 4, 4)
    assert (estimate.low, estimate.high) == wilson(2.5, 4)


def test_kappa_of_the_textbook() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreed .7, by chance .5, kappa .4; its large-sample
    standard error (Fleiss, Cohen, Everitt 1969) is .127."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    estimate = cohen_kappa(first, second)
    assert estimate.value == pytest.approx(0.4) and estimate.n == 50
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.127, rel=0.1)
    assert cohen_kappa(first, first).value == 1
    with pytest.raises(ValueError, match="two different labels, all 2 items have 'a'"):
        cohen_kappa("aa", "aa")
    with pytest.raises(ValueError, match="same items, got 2 and 1"):
        cohen_kappa("ab", "a")


KRIPPENDORFF = [  # Krippendorff 2011, example C: four observers, twelve units, some missing
    (1, 1, None, 1), (2, 2, 3, 2), (3, 3, 3, 3), (3, 3, 3, 3), (2, 2, 2, 2), (1, 2, 3, 4),
    (4, 4, 4, 4), (1, 1, 2, 1), (2, 2, 2, 2), (None, 5, 5, 5), (None, None, 1, 1),
    (None, None, 3, None),
]  # fmt: skip


def test_alpha_of_the_textbook() -> None:
    estimate = krippendorff_alpha(KRIPPENDORFF)
    assert estimate.value == pytest.approx(0.743, abs=5e-4) and estimate.n == 11
    assert estimate.low < estimate.value < estimate.high <= 1
    assert krippendorff_alpha([("a", "a"), ("b", "b")]).value == 1
    with pytest.raises(ValueError, match="got 1 such items and 1 labels"):
        krippendorff_alpha([("a", "a"), ("b", None)])


def test_alpha_written_out_in_fractions() -> None:
    """Of all pairs of labels within an item, each weighted 1/(m-1), against all pairs of labels."""
    items = [[label for label in item if label is not None] for item in KRIPPENDORFF]
    items = [item for item in items if len(item) > 1]
    pool = [label for item in items for label in item]
    observed = sum(
        Fraction(int(a != b), len(item) - 1) for item in items for a in item for b in item
    ) / len(pool)
    expected = Fraction(sum(a != b for a in pool for b in pool), len(pool) * (len(pool) - 1))
    assert krippendorff_alpha(KRIPPENDORFF).value == pytest.approx(float(1 - observed / expected))


@pytest.mark.parametrize("ties", [False, True])
def test_orders_are_compared_as_scipy_does(ties: bool) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    if ties:
        x, y = x.round(), (2 * y).round()
    assert spearman(x, y).value == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-12)
    assert kendall(x, y).value == pytest.approx(scipy.stats.kendalltau(x, y)[0], abs=1e-12)


@pytest.mark.parametrize("ours", [spearman, kendall])
def test_resamples_of_orders_are_those_of_repeated_items(ours: object) -> None:
    """Weights against the items written out as often as they were drawn."""
    theirs = scipy.stats.spearmanr if ours is spearman else scipy.stats.kendalltau
    rng = np.random.default_rng(3)
    x = rng.integers(0, 6, size=25).astype(float)
    y = x + rng.integers(0, 4, size=25)
    drawn = next(picks(25, 200, 0))
    expected = [theirs(x[chosen], y[chosen])[0] for chosen in drawn]
    estimate = ours(x, y, resamples=200, seed=0)  # type: ignore[operator]
    low, high = np.quantile(expected, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-12)


def test_a_constant_has_no_order() -> None:
    for compare in (spearman, kendall):
        with pytest.raises(ValueError, match="x must have two different values, got 3 alike"):
            compare([1, 1, 1], [1, 2, 3])
        with pytest.raises(ValueError, match="as long, got 2 and 3"):
            compare([1, 2], [1, 2, 3])


def test_small_gaps_of_fid_are_inconclusive() -> None:
    assert is_inconclusive(8.00, 8.10) and not is_inconclusive(8.00, 8.11)  # 1.24 %, 1.37 %
    assert is_inconclusive(8.10, 8.00) and is_inconclusive(0, 0)
