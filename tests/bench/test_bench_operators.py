"""What the benches know of operators: fp64 results, peers that compute the same, FLOPs, sizes."""

from functools import partial

import pytest
import torch
from bench_context import CPU, quick

from bench.workloads import accuracy, comparisons, sizes
from bench.workloads.operators import OPERATORS, Workload, attention

ATTENTION = OPERATORS["flash_attention"]
CALLS = [
    Workload(operator, sizes.TINY, kind)
    for operator in OPERATORS.values()
    for kind in operator.kinds
    if operator.has_backward and operator is not ATTENTION
]


@pytest.mark.parametrize("kind", ["self", "compressed", "masked"])
def test_the_oracle_of_attention_is_the_formula_and_its_gradient(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "ORACLE_BYTES", 8 * 36 * 5)  # a few rows at a time
    work = Workload(ATTENTION, sizes.TINY, kind, 2, torch.float64)
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=True)
    errors = accuracy.errors(accuracy.results(ATTENTION.reference, inputs, True), truth)
    assert set(errors) == {"out0", "d_q", "d_k", "d_v"}
    assert max(errors.values()) < 1e-12
    broken = accuracy.results(ATTENTION.reference, {**inputs, "k": inputs["k"].flip(1)}, False)
    assert accuracy.errors(broken, truth)["out0"] > 0.1
    assert accuracy.errors({"out0": broken["out0"] / 0}, truth) == {"out0": float("inf")}


@pytest.mark.parametrize("work", CALLS, ids=lambda work: work.name)
def test_peers_compute_what_the_operator_computes(work: Workload) -> None:
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=True)
    for name, variant in work.variants().items():
        if name == "diffusers":
            continue
        call = variant(inputs)
        made = accuracy.results(lambda call=call, **_: call(), inputs, True)
        assert max(accuracy.errors(made, truth).values()) < 0.01, name


def test_the_folded_projection_equals_projecting_then_merging() -> None:
    work = Workload(OPERATORS["project_kv"], sizes.TINY, batch=2, dtype=torch.float32)
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=False)
    call = work.variants()["folded"](inputs)
    errors = accuracy.errors(accuracy.results(lambda **_: call(), inputs, False), truth)
    assert max(errors.values()) < 1e-5


def test_ours_must_be_right_to_roundings_and_a_peer_must_compute_the_same_formula() -> None:
    work = Workload(ATTENTION, sizes.TINY, "self")
    inputs = work.inputs(CPU)
    truth = accuracy.oracle(work, inputs, backward=True)
    right = accuracy.errors(accuracy.results(ATTENTION.ours, inputs, True), truth)
    wrong = accuracy.results(partial(ATTENTION.ours, scale=0.5), inputs, True)  # 72^-½ is 0.12
    for is_ours in (True, False):
        assert accuracy.plausible(right, work.dtype, is_ours=is_ours)
        assert not accuracy.plausible(accuracy.errors(wrong, truth), work.dtype, is_ours=is_ours)
    rough = {"out0": 0.05}
    assert accuracy.plausible(rough, work.dtype, is_ours=False)
    assert not accuracy.plausible(rough, work.dtype, is_ours=True)


def test_flex_is_left_out_only_where_time_is_short() -> None:
    context = quick("flex")
    context.hurried = True
    (case, _) = comparisons.compared([Workload(ATTENTION, sizes.TINY, "cross")])
    (row,) = context.run("operators", case)
    assert row["status"] == "not measured: compiles for seconds at every shape"


def test_a_masked_call_counts_the_keys_that_exist() -> None:
    work = Workload(ATTENTION, "1k", "masked", batch=2)
    assert work.flops(False) == 4 * 4096 * (300 + 100) * 1152
    assert work.flops(True) == 2.5 * work.flops(False)
