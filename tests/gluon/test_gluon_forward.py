"""The Gluon forward kernel in the simulator: values, padding, bits, and mistakes that must be found."""

from typing import Any

import numpy as np
import pytest
from forward_problem import BOUND_PARTS, BOUND_ROWS, FORWARD, Problem
from gluon_simulator import Fault

pytest.importorskip("triton.experimental.gluon")

from pixart_kernels.attention import bound, hopper

TWO, THREE = (
    {key: value for key, value in candidate.items() if key != "REGISTERS"}
    for candidate in hopper.FORWARD_CANDIDATES
)
LIMIT = {"bf16": 64, "fp16": 14}


def check(problem: Problem, seed: int, **tuned: Any) -> None:
    worst, worst_lse = problem.errors(*problem.attend(seed, **tuned))
    assert worst < 1 and worst_lse < 1, (worst, worst_lse)


@pytest.mark.parametrize("tuned", [TWO, THREE], ids=["2 warpgroups", "3 warpgroups"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_candidates_are_right_with_and_without_a_bound(
    tuned: dict[str, Any], dtype: str, scaled: bool
) -> None:
    rng = np.random.default_rng(0)
    # Of the outliers, some blocks of queries are bounded and some are not.
    problem = Problem(rng, 450, 333, heads=2, dtype=dtype, scaled=scaled, outliers=30.0)
    for seed, limit in ((0, 0), (1, LIMIT[dtype]), (2, LIMIT[dtype])):
        check(problem, seed, LIMIT=limit, **tuned)


@pytest.mark.parametrize("keys", [1, 5, 63, 64, 65, 128, 129, 256])
def test_any_number_of_keys_serves(keys: int) -> None:
    problem = Problem(np.random.default_rng(keys), 70, keys)
    for tuned in (TWO, THREE):
        check(problem, keys, LIMIT=64, **tuned)


@pytest.mark.parametrize("dim", range(65, 73))
def test_head_dimensions_between_64_and_72_serve(dim: int) -> None:
    check(Problem(np.random.default_rng(dim), 100, 200, heads=2, dim=dim), dim, **TWO)


@pytest.mark.parametrize("limit", [0, 64])
def test_what_lies_beyond_a_samples_keys_has_no_part(limit: int) -> None:
    """There is NaN. Lengths are kept between 0 and the number of keys; without a key O and lse are 0."""
    lengths = [300, 0, 1, 63, 64, 100, 128, 129, 299, -3, 1000]
    problem = Problem(np.random.default_rng(1), 70, 300, batch=len(lengths), lengths=lengths)
    for tuned in (TWO, THREE):
        out, lse = problem.attend(3, LIMIT=limit, **tuned)
        assert max(problem.errors(out, lse)) < 1
        empty = [1, 9]
        assert not out[empty].any() and not lse[empty].any()


def test_bits_do_not_depend_on_the_order_of_events_or_on_lse() -> None:
    problem = Problem(np.random.default_rng(2), 200, 500, lengths=[450])
    first, _ = problem.attend(0, **TWO)
    for seed in range(1, 4):
        out, lse = problem.attend(seed, with_lse=False, **TWO)
        assert np.array_equal(out, first) and np.isnan(lse).all()


def test_a_key_that_dominates_is_divided_by_what_it_was_multiplied_with() -> None:
    """The sum is of rounded weights: of those that are not, O would be off by a rounding more."""
    problem = Problem(np.random.default_rng(3), 64, 128, scaled=True)
    problem.q[..., :] = 0.0
    problem.k[..., 0] = -0.1  # all scores but one are far below it
    problem.k[0, 0, 0, 0], problem.q[..., 0] = 0.2578125, 64.0
    problem._solve()
    out, _ = problem.attend(0, LIMIT=64, **TWO)  # the weight is 2^16.5, which is rounded
    assert np.array_equal(out, np.broadcast_to(problem.v[:, :, :1], out.shape))


def test_the_bound_is_that_of_the_plain_kernel() -> None:
    assert (bound.ROWS.value, bound.PARTS.value) == (BOUND_ROWS, BOUND_PARTS)


def draw(rng: np.random.Generator) -> tuple[Problem, dict[str, Any]]:
    """A random problem and setting."""
    flag = lambda: bool(rng.integers(2))  # noqa: E731
    dtype = str(rng.choice(["bf16", "fp16"]))
    batch, heads = [(1, 1), (1, 1), (2, 1), (1, 2)][rng.integers(4)]
    keys = int(rng.integers(1, rng.choice([100, 500])))
    problem = Problem(
        rng,
        queries=int(rng.integers(1, 200)),
        keys=keys,
        batch=batch,
        heads=heads,
        dim=int(rng.integers(65, 73)),
        dtype=dtype,
        scaled=flag(),
        lengths=rng.integers(0, keys + 1, batch).tolist() if flag() else None,
        size=float(rng.choice([0.3, 1.0, 3.0])),
        outliers=float(rng.choice([1.0, 20.0])),
    )
    tuned = {
        "BLOCK_K": int(rng.choice([64, 128])),
        "STAGES": int(rng.integers(2, 6)),
        "CONSUMERS": int(rng.integers(2, 4)),
        "TURNS": flag(),
        "Q_IN_REGISTERS": flag(),
        "LIMIT": LIMIT[dtype] if flag() else 0,
    }
    return problem, tuned


@pytest.mark.parametrize("part", range(5))
def test_random_settings(part: int) -> None:
    """100 for each part, of which each has an order of events of its own."""
    rng = np.random.default_rng(100 + part)
    for i in range(100):
        problem, tuned = draw(rng)
        worst = problem.errors(*problem.attend(int(rng.integers(2**31)), **tuned))
        assert max(worst) < 1, (part, i, worst, tuned, problem.q.shape, problem.k.shape)


WAIT_SCORES = "        scores = warpgroup_mma_wait(2, deps=[scores])\n"
FREE_K = "        mbarrier.arrive(k_empty.index(slot), count=1)\n"
WAIT_SUMS = "        acc, acc_tail = warpgroup_mma_wait(0, deps=[acc, acc_tail])\n"
FREE_V = "        mbarrier.arrive(v_empty.index((j - 1) % STAGES), count=1)\n"
NEXT_K = "        mbarrier.wait(k_full.index((j + 1) % STAGES), (j + 1) // STAGES & 1, pred=j + 1 < blocks)\n"
CLEARED = "        mbarrier.wait(cleared.index(0), 0)\n"
SHRINK = "            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]\n"
MASK = '_scaled(gl.where((key < short)[None, :], scores, float("-inf")), scale, SCALED)'
MISTAKES = {
    "V given back before its product is over": (WAIT_SUMS + FREE_V, FREE_V + WAIT_SUMS),
    "the wrong V given back": (FREE_V, FREE_V.replace("(j - 1) % STAGES", "slot")),
    "V given back twice": (FREE_V, FREE_V * 2),
    "no wait for V": ("        mbarrier.wait(v_full.index(slot), j // STAGES & 1)\n", ""),
    "no wait for the first V": ("    mbarrier.wait(v_full.index(0), 0)\n", ""),
    "no wait for K": (NEXT_K, ""),
    "no wait for Q": ("    mbarrier.wait(q_full.index(WHICH), 0)\n", ""),
    "phase of the next K a block late": (
        NEXT_K,
        NEXT_K.replace("(j + 1) // STAGES", "j // STAGES"),
    ),
    "waits for a K that never comes": (NEXT_K, NEXT_K.replace(", pred=j + 1 < blocks", "")),
    "scores used while under way": (WAIT_SCORES, WAIT_SCORES.replace("2", "3")),
    "K never given back": (WAIT_SCORES + FREE_K, WAIT_SCORES),
    "the copier does not wait for K's room": (
        "        mbarrier.wait(k_empty.index(slot), free)\n",
        "",
    ),
    "the copier does not wait for V's room": (
        "        mbarrier.wait(v_empty.index(slot), free)\n",
        "",
    ),
    "the copier's phase is wrong": ("(j // STAGES & 1) ^ 1", "(j // STAGES & 1)"),
    "too few bytes announced": ("BLOCK_K * (MAIN + HALF) * 2", "BLOCK_K * MAIN * 2"),
    "too many bytes announced": ("BLOCK_K * (MAIN + HALF) * 2", "BLOCK_K * (MAIN + TAIL) * 2"),
    "room after one warpgroup's release": (
        "empty = (barriers(STAGES, CONSUMERS)",
        "empty = (barriers(STAGES, 1)",
    ),
    "turns that begin with nobody": ("(j & 1) ^ 1 if WHICH else j & 1", "(j & 1) ^ 1"),
    "another's Q": ("q = matrix(memory[0].index(WHICH)", "q = matrix(memory[0].index(0)"),
    "the tail copied over the ones": ("v_halves.index(2 * slot))", "v_halves.index(2 * slot + 1))"),
    "no ones": ("    _write_ones(v_halves, STAGES, BLOCK_K)", "    pass"),
    "ones without a fence": ("store(ones)\n    fence_async_shared()\n", "store(ones)\n"),
    "halves interleaved": (
        "[0, 4]] + [[2**i, 0] for i in range(rows.bit_length() - 1)] + [[0, 8]]",
        "[0, 4], [0, 8]] + [[2**i, 0] for i in range(rows.bit_length() - 1)]",
    ),
    "no shrinking": (SHRINK, ""),
    "no mask": (MASK, "_scaled(scores, scale, SCALED)"),
    "padding left as it was": (
        "            if is_padded:\n",
        "            if is_padded & False:\n",
    ),
    "padding cleared without a fence": (
        "BLOCK_K, HALF), length, BLOCK_K, HALF)\n    fence_async_shared()\n",
        "BLOCK_K, HALF), length, BLOCK_K, HALF)\n",
    ),
    "no wait for cleared padding": (CLEARED, ""),
    "always bounded": ("        if task[-1]:\n", "        if True:\n"),
    "the bound of the first queries for all": ("first // BOUND_ROWS + i", "i"),
    "queries beyond the last stored": (
        "lse, mask=row < left)",
        "lse, mask=row < left + 1)",
    ),
    "the other half of a rounded pair": (
        '"cvt.rn.bf16x2.f32 $0, $2, $1;"',
        '"cvt.rn.bf16x2.f32 $0, $1, $2;"',
    ),
    "sums of one half only": ("column == HALF, acc_tail", "column == 0, acc_tail"),
    "starts again from the first key": (
        "gl.where(j == 0, short, start",
        "gl.where(j == 0, 0, start",
    ),
}
# K is copied into again only when V of the block before it was given back, behind a wait for all.
HARMLESS = {"K given back before its product is over": (WAIT_SCORES + FREE_K, FREE_K + WAIT_SCORES)}


def _found(problems: list[Problem], kernel: Any, seed: int) -> str:
    """What is wrong, if it is seen."""
    for problem in problems:
        try:
            worst = problem.errors(
                *problem.attend(seed, kernel, LIMIT=64, **{**TWO, "STAGES": 2, "BLOCK_K": 64})
            )
        except (Fault, IndexError) as fault:
            return str(fault)
        if max(worst) >= 1:
            return f"values: {max(worst):.1f}"
    return ""


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    rng = np.random.default_rng(5)
    # The first block of queries is bounded and the second is not, or there is padding.
    mixed = next(
        problem
        for problem in (Problem(rng, 200, 400, outliers=30.0) for _ in range(20))
        if len({bool(x > 1e4) for x in problem.longest()[0]}) == 2 and problem.longest()[0][0] < 1e4
    )
    return [Problem(rng, 100, 200, batch=2, lengths=[20, 190]), mixed]


ORDERS = [0, *(pytest.param(order, marks=pytest.mark.exhaustive) for order in range(1, 5))]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", [*MISTAKES, *HARMLESS, "nothing"])
def test_mistakes_are_found_in_any_order(problems: list[Problem], what: str, order: int) -> None:
    change = {**MISTAKES, **HARMLESS}.get(what)
    kernel = FORWARD.with_mistake(*change) if change else FORWARD
    found = [_found(problems, kernel, 10 * order + seed) for seed in range(2)]
    assert all(found) if what in MISTAKES else not any(found), found
