"""What holds for every operator wherever it runs: by its reference on a CPU, and by its kernels, for
which the same file runs again in Triton's interpreter.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from operator_formulas import attention_formula, check_accuracy, random
from operator_formulas import unwritten_memory_is_nan as unwritten_memory_is_nan  # a fixture
from torch import Tensor
from torch.library import opcheck

from pixart_kernels import compress_kv, flash_attention, gate_add, gate_add_modulate, modulate
from pixart_kernels.dispatch.registration import INTERPRETED

Q, KEYS, VALUES = (random(2, 5, 2, 8, seed=seed) for seed in range(3))
X, BRANCH = random(2, 4, 8), random(2, 4, 8, seed=1)
ROW = random(2, 8, seed=2)
MERGE = random(8, 1, 2, 2), random(8, seed=1)


def compress(x: Tensor) -> Tensor:
    return torch.stack(compress_kv(x, x, *MERGE, ROW[0], ROW[1], grid=(2, 2), ratio=2))


def attend(q: Tensor) -> Tensor:
    return flash_attention(q, KEYS.to(q), VALUES.to(q), kv_lengths=[5, 3])


# An operator as a function of its first argument, and that argument.
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "flash_attention": (attend, Q),
    "compress_kv": (compress, X),
    "modulate": (lambda x: modulate(x, ROW, ROW), X),
    "gate_add": (lambda x: gate_add(x, BRANCH, ROW), X),
    "plain gate_add": (lambda x: gate_add(x, BRANCH), X),
    "gate_add_modulate": (lambda x: torch.stack(gate_add_modulate(x, BRANCH, ROW, ROW, ROW)), X),
}
operators = pytest.mark.parametrize("name", CALLS)


@operators
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_changes_nothing(name: str, grad: bool) -> None:
    call, x = CALLS[name]
    for dtype in (torch.float32, torch.bfloat16):
        tokens = x.to(dtype).requires_grad_(grad)
        expected = call(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            actual = call(tokens)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


@operators
def test_what_comes_out_has_the_dtype_of_the_first_argument(name: str) -> None:
    call, x = CALLS[name]
    for dtype in (torch.float64, torch.float16):
        tokens = x.to(dtype).requires_grad_()
        out = call(tokens)
        assert out.dtype == dtype
        assert torch.autograd.grad(out.sum(), tokens)[0].dtype == dtype
    with pytest.raises(ValueError, match=r"must be fp32, bf16, fp16 or fp64, got torch.int64"):
        call(x.long())


def test_fp64_tokens_are_computed_in_fp64() -> None:
    exact = attention_formula(*(x.double() for x in (Q, KEYS, VALUES)))
    assert (flash_attention(Q.double(), KEYS.double(), VALUES.double()) - exact).norm() < 1e-12


def test_16_bit_keys_beside_wider_queries_are_refused_under_autocast_too() -> None:
    for enabled in (True, False):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            pytest.raises(ValueError, match="k must have the dtype of q"),
        ):
            flash_attention(Q, KEYS.bfloat16(), VALUES.bfloat16())


@operators
def test_forward_mode_gives_the_derivative(name: str) -> None:
    call, x = CALLS[name]
    # Central differences in fp64, whose own error is 1e-9 and less.
    x, direction, step = x.double(), random(*x.shape, seed=7).double(), 1e-5
    expected = (call(x + step * direction) - call(x - step * direction)) / (2 * step)
    value, tangent = torch.func.jvp(call, (x.float(),), (direction.float(),))
    assert torch.allclose(value.double(), call(x), atol=1e-5)
    assert torch.allclose(tangent.double(), expected, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.float().requires_grad_(), direction.float())
        tangent = forward_ad.unpack_dual(call(dual)).tangent
    assert torch.allclose(tangent.double(), expected, atol=1e-4)


@operators
def test_it_can_be_mapped_and_differentiated_by_torch_func(name: str) -> None:
    call, x = CALLS[name]
    tokens = torch.stack([x, 2 * x])
    expected = torch.stack([call(one) for one in tokens])
    assert torch.allclose(torch.vmap(call)(tokens), expected, atol=1e-5)

    def loss(x: Tensor) -> Tensor:
        return call(x).square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(x), gradient, rtol=1e-3, atol=1e-4)
    # A product with the Hessian, forward over reverse mode: central differences of the gradient.
    x, direction, step = x.double(), random(*x.shape, seed=7).double(), 1e-5
    grad = torch.func.grad(loss)
    expected = (grad(x + step * direction) - grad(x - step * direction)) / (2 * step)
    product = torch.func.jvp(grad, (x.float(),), (direction.float(),))[1]
    assert torch.allclose(product.double(), expected, rtol=1e-3, atol=1e-2)


@operators
def test_a_second_derivative_is_right_or_refused(name: str) -> None:
    call, x = CALLS[name]
    grad = torch.func.grad(lambda x: call(x).square().sum())
    twice = torch.func.grad(lambda x: grad(x).square().sum())
    expected = twice(x.double())
    assert torch.allclose(twice(x).double(), expected, rtol=1e-3, atol=1e-2)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
    try:
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    except NotImplementedError as error:  # of the kernels
        assert INTERPRETED and "second derivatives must be taken by torch.func" in str(error)
    except RuntimeError as error:  # of PyTorch's own attention
        assert name == "flash_attention" and "is not implemented" in str(error)
    else:
        assert torch.allclose(second.double(), expected, rtol=1e-3, atol=1e-2)


SHAPES: dict[str, tuple[int, ...] | None] = {
    "(B, C)": (2, 8),
    "(B, 1, C)": (2, 1, 8),
    "(C,)": (8,),
    "(B, N, C)": (2, 4, 8),
    "()": (),
    "number": None,
}


def rows_of(shape: str) -> Tensor | float:
    """shift, scale or gate in each shape that is taken."""
    size = SHAPES[shape]
    return 0.3 if size is None else random(64, seed=5)[: math.prod(size)].view(size)


def over_tokens(row: Tensor | float) -> Tensor | float:
    return row.unsqueeze(1) if isinstance(row, Tensor) and row.dim() == 2 else row


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_may_have_any_shape_that_says_how_they_are_shared(shape: str) -> None:
    row = rows_of(shape)

    def both(x: Tensor, branch: Tensor, *rows: Tensor) -> Tensor:
        gate, shift, scale = rows or (row, row, row)
        outputs = (gate_add(x, branch, gate), modulate(x, shift, scale))
        return torch.stack([*outputs, *gate_add_modulate(x, branch, gate, shift, scale)])

    def formula(x: Tensor, branch: Tensor, *rows: Tensor) -> Tensor:
        gate, shift, scale = (over_tokens(one) for one in rows or (row, row, row))

        def norm(x: Tensor) -> Tensor:
            return torch.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

        y = x + gate * branch
        return torch.stack([y, norm(x), y, norm(y)])

    leaves = [row, row * 0.5, 1 - row] if isinstance(row, Tensor) else []
    check_accuracy(both, formula, X, BRANCH, *leaves)


def test_each_row_may_have_a_shape_of_its_own_and_any_strides() -> None:
    token_rows = random(2, 8, 4, seed=3).transpose(1, 2)  # channels not side by side
    shared = random(2, 1, 8, seed=4).expand(2, 4, 8)  # a step of 0
    for gate, shift, scale in (
        (token_rows, ROW, ROW[0]),
        (ROW[0], shared, ROW),
        (ROW, ROW[:, None], token_rows),
        (None, token_rows, shared),
    ):
        given = [row for row in (gate, shift, scale) if row is not None]

        def both(x: Tensor, branch: Tensor, *rows: Tensor) -> Tensor:
            gate, shift, scale = rows if len(rows) == 3 else (None, *rows)
            return torch.stack(gate_add_modulate(x, branch, gate, shift, scale))

        def formula(x: Tensor, branch: Tensor, *rows: Tensor) -> Tensor:
            gate, shift, scale = (over_tokens(row) for row in ((1.0, *rows)[-3:]))
            y = x + gate * branch
            return torch.stack([y, torch.layer_norm(y, (8,), eps=1e-6) * (1 + scale) + shift])

        check_accuracy(both, formula, X, BRANCH, *given)


def test_rows_of_tokens_keep_the_contract_of_custom_operators() -> None:
    x, rows = X.clone().requires_grad_(), random(2, 4, 8, seed=5).requires_grad_()
    arguments = (x, BRANCH, rows, rows, rows, 1e-6)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    opcheck(torch.ops.pixart.gate_add_modulate.default, arguments, test_utils=utilities)

    def block(x: Tensor, row: Tensor) -> Tensor:
        x = gate_add(modulate(x, row[0, 0], row[:, :1]), x, 0.5) + gate_add(x, x, row)
        heads = x.unflatten(2, (2, 4))
        return flash_attention(heads, heads, heads, kv_lengths=[4, 1])

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, rows), block(x, rows))


def test_a_gate_for_each_token_is_rounded_once_in_16_bits() -> None:
    gate = random(2, 4, 8, seed=5)
    out = gate_add(X.bfloat16(), BRANCH.bfloat16(), gate)
    exact = X.bfloat16().double() + gate.double() * BRANCH.bfloat16().double()
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() <= 2 * torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize("lengths", [[5, 3], (5, 3), torch.tensor([5, 3])])
def test_lengths_may_be_a_list(lengths: object) -> None:
    expected = attention_formula(Q, KEYS, VALUES, torch.tensor([5, 3]))
    out = flash_attention(Q, KEYS, VALUES, kv_lengths=lengths)
    assert torch.allclose(out, expected, atol=1e-6)
    assert flash_attention(Q[:0], KEYS[:0], VALUES[:0], kv_lengths=[]).shape == (0, 5, 2, 8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_nothing_beyond_the_lengths_has_a_part(
    needs_grad: bool, dtype: torch.dtype, bad: float
) -> None:
    tensors = [x.to(dtype).clone() for x in (Q, KEYS, VALUES)]
    lengths = torch.tensor([3, 0])

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(needs_grad) for x in tensors]
        out = flash_attention(*leaves, kv_lengths=lengths)
        found = [out.detach()]
        return found + (list(torch.autograd.grad(out.sum(), leaves)) if needs_grad else [])

    expected = run(*tensors)
    for spoilt in tensors[1:]:
        spoilt[0, 3:] = bad
        spoilt[1] = bad
    assert all(map(torch.equal, run(*tensors), expected))


HEADS_FIRST = random(2, 2, 5, 8)
SWAPPED = "tokens come before heads"


@pytest.mark.parametrize(
    "call",
    [
        lambda: flash_attention(Q.transpose(1, 2), KEYS[:, :4].transpose(1, 2), KEYS[:, :4]),
        lambda: flash_attention(*[Q.transpose(1, 2), *[KEYS[:, :4].transpose(1, 2)] * 2]),
        lambda: flash_attention(Q, *[KEYS.transpose(1, 2)] * 2),
        lambda: flash_attention(Q, KEYS, VALUES.transpose(1, 2)),
        lambda: flash_attention(*[HEADS_FIRST] * 3, kv_lengths=[5, 3]),
        lambda: flash_attention(*[HEADS_FIRST] * 3, kv_lengths=torch.tensor([1, 4])),
    ],
)
def test_heads_before_tokens_are_refused_where_it_shows(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=SWAPPED):
        call()


@pytest.mark.parametrize(
    "lengths", [[1.5, 2.0], ["a", "b"], [True, False], [[1, 2]], [1], 3, [[1], []]]
)
def test_lengths_that_are_no_integers_for_each_sample_are_refused(lengths: object) -> None:
    with pytest.raises(ValueError, match="kv_lengths must"):
        flash_attention(Q, KEYS, VALUES, kv_lengths=lengths)


@pytest.mark.parametrize(
    "row", [X[:, :2], X[:1], random(1, 8), random(2, 1), random(7), X.unsqueeze(1)]
)
def test_rows_of_other_shapes_are_refused(row: Tensor) -> None:
    for call in (lambda: modulate(X, row, ROW), lambda: modulate(X, ROW, row)):
        with pytest.raises(ValueError, match="must have shape"):
            call()
    with pytest.raises(ValueError, match="gate must have shape"):
        gate_add(X, BRANCH, row)


def test_tensors_on_two_devices_are_refused_by_name() -> None:
    """An offloaded layer is on "meta", to which PyTorch's dispatcher would send the call."""
    meta = torch.device("meta")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("k", lambda: flash_attention(Q, KEYS.to(meta), VALUES)),
        ("v", lambda: flash_attention(Q, KEYS, VALUES.to(meta))),
        ("shift", lambda: modulate(X, ROW.to(meta), ROW)),
        ("branch", lambda: gate_add(X, BRANCH.to(meta), ROW)),
        ("scale", lambda: gate_add_modulate(X, BRANCH, ROW, ROW, ROW.to(meta))),
        ("v", lambda: compress_kv(X, X.to(meta), *MERGE, None, None, grid=(2, 2), ratio=2)),
        (
            "weight",
            lambda: compress_kv(
                X, X, MERGE[0].to(meta), MERGE[1], None, None, grid=(2, 2), ratio=2
            ),
        ),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"^{name} must be on cpu, got meta"):
            call()


@operators
def test_several_gradients_at_once_are_those_one_by_one(name: str) -> None:
    call, x = CALLS[name]
    x = x.clone().requires_grad_()
    out = call(x)
    several = torch.stack([random(*out.shape, seed=seed) for seed in (3, 4)])
    (batched,) = torch.autograd.grad(out, x, several, is_grads_batched=True, retain_graph=True)
    for gradient, given in zip(batched, several, strict=True):
        (expected,) = torch.autograd.grad(out, x, given, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_tensors_of_one_channel_need_no_stride() -> None:
    x = torch.randn(2, 4, 1, 3).transpose(2, 3)
    torch.testing.assert_close(flash_attention(x, x, x), attention_formula(x, x, x))
    q = torch.randn(1, 1, 1, 1, requires_grad=True)
    flash_attention(q, q, q).sum().backward()
    tokens = torch.randn(2, 1, 4).transpose(1, 2)
    tap = torch.randn(1, 1, 1, 1).as_strided((1, 1, 1, 1), (1, 8, 2, 1))
    merged, _ = compress_kv(tokens, tokens, tap, torch.zeros(1), None, None, grid=(2, 2), ratio=1)
    torch.testing.assert_close(merged, tokens * tap.item())


def test_what_was_exported_without_gradients_can_be_trained() -> None:
    class Attends(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return flash_attention(q, q, q)

    with torch.no_grad():
        program = torch.export.export(Attends(), (Q,))
    q = Q.clone().requires_grad_()
    program.module()(q).sum().backward()
    expected = Q.clone().requires_grad_()
    flash_attention(expected, expected, expected).sum().backward()
    torch.testing.assert_close(q.grad, expected.grad)


@pytest.mark.skipif(not INTERPRETED, reason="of kernels")
def test_kernels_refuse_fp64_instead_of_computing_in_fp32() -> None:
    q = Q.double()
    with pytest.raises(ValueError, match="kernels compute in fp32, got fp64"):
        torch.ops.pixart.flash_attention(q, q, q, None, None, True)
