"""The Triton kernels of modulation, in Triton's interpreter, against formulas written out in fp64."""

from collections.abc import Callable

import pytest
import torch
from operator_formulas import DTYPES, check_accuracy, gate_formula, modulation_formula, random
from operator_formulas import unwritten_memory_is_nan as unwritten_memory_is_nan  # a fixture
from torch import Tensor
from torch.library import opcheck

from pixart_kernels import gate_add, gate_add_modulate, modulate
from pixart_kernels.dispatch.registration import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")


def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.stack(gate_add_modulate(x, branch, gate, shift, scale))


def both_formula(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    y = gate_formula(x, branch, gate)
    return torch.stack([y, modulation_formula(y, shift, scale)])


def tensors(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, row_dtype: torch.dtype
) -> list[Tensor]:
    """x, branch, gate, shift, scale."""
    pair = [random(batch, tokens, channels, dtype=dtype, seed=s) for s in (0, 1)]
    rows = random(batch, 6, channels, dtype=row_dtype, seed=2).unbind(1)
    return [*pair, rows[2], rows[0], rows[4]]


# One token; the model's width; tokens that no tile divides; more than one program in the backward.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 144), (2, 3, 1152), (1, 63, 144), (1, 17, 8)])
def test_outputs_and_gradients_are_accurate(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, branch, gate, shift, scale = tensors(*shape, dtype, dtype)
    check_accuracy(both, both_formula, x, branch, gate, shift, scale)
    check_accuracy(modulate, modulation_formula, x, shift, scale)
    check_accuracy(gate_add, gate_formula, x, branch, gate)


def test_many_tokens_are_accurate() -> None:
    inputs = tensors(1, 257, 24, torch.bfloat16, torch.bfloat16)
    check_accuracy(both, both_formula, *inputs)


@pytest.mark.parametrize("channels", [1, 7, 1000, 5000])
def test_any_number_of_channels_is_accurate(channels: int) -> None:
    check_accuracy(both, both_formula, *tensors(1, 5, channels, torch.float32, torch.float32))


def test_a_large_mean_does_not_cost_accuracy() -> None:
    x, _, _, shift, scale = tensors(1, 5, 144, torch.float32, torch.float32)
    check_accuracy(modulate, modulation_formula, x + 1000, shift, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_rows_beside_16_bit_tokens_keep_their_precision(dtype: torch.dtype) -> None:
    leaves = tensors(2, 9, 144, dtype, torch.float32)
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out, exact = both(*leaves), both_formula(*wide)
    weights = random(*out.shape, dtype=dtype)
    assert (out - exact).norm() <= torch.finfo(dtype).eps * exact.norm()
    gradients = torch.autograd.grad(out, leaves, weights)
    expected = torch.autograd.grad(exact, wide, weights.double())
    for leaf, actual, wanted in zip(leaves, gradients, expected, strict=True):
        assert actual.dtype == leaf.dtype
        assert (actual - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()


def test_no_gate_is_a_gate_of_one() -> None:
    x, branch, gate, shift, scale = tensors(2, 5, 24, torch.bfloat16, torch.bfloat16)
    one = torch.ones_like(gate)
    expected = gate_add_modulate(x, branch, one, shift, scale)
    for actual, wanted in zip(
        gate_add_modulate(x, branch, None, shift, scale), expected, strict=True
    ):
        assert torch.equal(actual, wanted)
    assert torch.equal(gate_add(x, branch), x + branch)

    def without(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.stack(gate_add_modulate(x, branch, None, shift, scale))

    def formula(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return both_formula(x, branch, one.to(x.dtype), shift, scale)

    check_accuracy(without, formula, x, branch, shift, scale)
    check_accuracy(gate_add, lambda x, branch: x + branch, x, branch)


@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nothing_uses_has_no_part_in_gradients(used: int, with_gate: bool) -> None:
    x, branch, gate, shift, scale = tensors(1, 5, 24, torch.float32, torch.float32)
    rows = (gate, shift, scale)

    def one(x: Tensor, branch: Tensor, *rows: Tensor) -> Tensor:
        given = rows[0] if with_gate else None
        # The rows that have no gradient take part with a weight of 0.
        return gate_add_modulate(x, branch, given, *rows[1:])[used] + 0 * sum(r.sum() for r in rows)

    def formula(x: Tensor, branch: Tensor, *rows: Tensor) -> Tensor:
        given = rows[0] if with_gate else torch.ones_like(rows[0])
        return both_formula(x, branch, given, *rows[1:])[used] + 0 * sum(r.sum() for r in rows)

    check_accuracy(one, formula, x, branch, *rows)


def test_any_strides_give_the_same_result() -> None:
    x, branch, gate, shift, scale = tensors(2, 5, 24, torch.float32, torch.float32)
    expected = both(x, branch, gate, shift, scale)
    apart = torch.cat([x, branch], dim=-1).chunk(2, dim=-1)
    transposed = [row.t().contiguous().t() for row in (gate, shift, scale)]
    assert not apart[0].is_contiguous() and not transposed[0].is_contiguous()
    assert torch.equal(both(*apart, *transposed), expected)
    shared = [row[:1].expand(2, -1) for row in (gate, shift, scale)]
    assert torch.equal(both(x, branch, *shared), both(x, branch, *(r.contiguous() for r in shared)))


def test_results_are_the_same_bits_every_time() -> None:
    inputs = [
        t.detach().requires_grad_() for t in tensors(2, 40, 144, torch.bfloat16, torch.float32)
    ]
    outs = [both(*inputs) for _ in range(2)]
    gradients = [torch.autograd.grad(out.float().square().sum(), inputs) for out in outs]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
def test_nothing_gives_nothing_and_rows_without_gradient(shape: tuple[int, int, int]) -> None:
    inputs = [t.requires_grad_() for t in tensors(*shape, torch.float32, torch.float32)]
    out = both(*inputs)
    assert out.shape == (2, *shape)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_operators_keep_the_contract_of_custom_operators() -> None:
    x, branch, gate, shift, scale = (
        t.detach().clone().requires_grad_() for t in tensors(2, 5, 24, torch.float32, torch.float32)
    )
    ops = torch.ops.pixart
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (ops.modulate.default, (x, shift, scale, 1e-6)),
        (ops.gate_add.default, (x, branch, gate)),
        (ops.gate_add.default, (x, branch, None)),
        (ops.gate_add_modulate.default, (x, branch, gate, shift, scale, 1e-6)),
        (ops.gate_add_modulate.default, (x, branch, None, shift, scale, 1e-6)),
    ]
    for operator, arguments in calls:
        opcheck(operator, arguments)


def test_compiled_modulation_is_the_same_forward_and_backward() -> None:
    inputs = [
        t.detach().clone().requires_grad_() for t in tensors(2, 5, 24, torch.float32, torch.float32)
    ]

    def block(x: Tensor, branch: Tensor, *rows: Tensor) -> Tensor:
        x, modulated = gate_add_modulate(x, branch, *rows)
        return gate_add(x, modulate(modulated, *rows[1:]), rows[0])

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), block(*inputs)
    assert torch.equal(out, expected)
    gradients = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
