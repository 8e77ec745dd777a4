"""Corners in which a kernel or an operator was once wrong, and did not say so.

What needs no kernel runs by the references too; the rest is for Triton's interpreter.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_formulas import attention_formula, random
from operator_formulas import unwritten_memory_is_nan as unwritten_memory_is_nan  # a fixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_kernels import compress_kv, flash_attention, gate_add, gate_add_modulate, modulate
from pixart_kernels.dispatch.registration import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")

if INTERPRETED:
    from pixart_kernels.attention import bound
    from pixart_kernels.dispatch import launch

Q, KEYS, VALUES = (random(2, 6, 2, 8, seed=seed) for seed in range(3))
X, BRANCH = random(2, 6, 8), random(2, 6, 8, seed=1)
ROW = random(2, 8, seed=2)
MERGE = random(8, 1, 2, 2), random(8, seed=1)


def compress(k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias, *norm = weights or (*MERGE, None, None)
    return compress_kv(k, v, weight, bias, *(norm or (None, None)), grid=(2, 3), ratio=2)


# All tensors of an operator, and the operator as a function of them.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "flash_attention": (flash_attention, (Q, KEYS, VALUES)),
    "compress_kv": (compress, (X, BRANCH, *MERGE, ROW[0], ROW[1])),
    "modulate": (modulate, (X, ROW, ROW)),
    "gate_add": (gate_add, (X, BRANCH, ROW)),
    "gate_add_modulate": (gate_add_modulate, (X, BRANCH, ROW, ROW, ROW)),
}
operators = pytest.mark.parametrize("name", CALLS)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


# ---- Peaky attention: one key's weight is far above all others', and true gradients nearly vanish.


def peaky(tokens: int, keys: int, sharpness: float) -> list[Tensor]:
    """q, k, v of bf16: each query is a key, some times as long, with noise of a unit."""
    k = random(1, keys, 1, 72)
    chosen = torch.randint(keys, (tokens,), generator=torch.Generator().manual_seed(3))
    q = sharpness * k[:, chosen] + random(1, tokens, 1, 72, seed=4)
    return [x.bfloat16() for x in (q, k, random(1, keys, 1, 72, seed=5))]


def derivatives(attention: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v, in fp64."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, random(*out.shape, seed=6).to(out.dtype))
    return [x.detach().double() for x in (out, *gradients)]


def check_peaky(tensors: list[Tensor]) -> None:
    """No rounding on top of the budget: it would be far larger than these gradients are."""
    exact = derivatives(attention_formula, *(x.double() for x in tensors))
    eager, ours = (derivatives(how, *tensors) for how in (attention_formula, flash_attention))
    for name, e, p, a in zip(("out", "dq", "dk", "dv"), exact, eager, ours, strict=True):
        error, budget = (a - e).norm() / e.norm(), 2 * (p - e).norm() / e.norm()
        assert error <= budget, f"{name}: error {error:.1e}, twice eager's is {budget:.1e}"


@interpreted
@pytest.mark.parametrize(
    ("tokens", "sharpness", "searched"), [(129, 2.0, True), (130, 3.0, True), (131, 3.0, False)]
)
def test_peaky_attention_is_as_accurate_without_a_maximum(
    tokens: int, sharpness: float, searched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each has a shape of its own: launchers keep what they found out about one.
    tensors = peaky(tokens, tokens, sharpness)
    # None of these is beyond the bound: the branch that is meant is the one that runs.
    longest_q, longest_k = (x.float().norm(dim=-1).max().item() for x in tensors[:2])
    assert longest_q * longest_k * 72**-0.5 * 1.4427 < bound.LIMITS[torch.bfloat16]
    monkeypatch.setattr(bound, "LOOKED_FOR_FROM", 0 if searched else 2**40)
    found, search = [], bound.prepare

    def longest(*arguments: Any) -> Any:
        found.append(arguments)
        return search(*arguments)

    monkeypatch.setattr(bound, "prepare", longest)
    check_peaky(tensors)
    assert bool(found) == searched


@interpreted
@pytest.mark.exhaustive
def test_peaky_attention_is_as_accurate_at_the_size_from_which_bounds_are_sought() -> None:
    check_peaky(peaky(bound.LOOKED_FOR_FROM // 512, 512, 2.0))


@interpreted
@pytest.mark.parametrize("size", [1e15, 1e17])
def test_large_values_pass_through_attention_without_a_maximum(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "LOOKED_FOR_FROM", 0)
    q, k, v = peaky(144, 176, 2.0)
    out = flash_attention(q, k, v * size)
    expected = attention_formula(q.double(), k.double(), (v * size).double())
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()


# ---- Dtypes.

STRANGE = [torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.complex64]


@operators
@pytest.mark.parametrize("dtype", STRANGE, ids=str)
def test_tensors_of_no_floating_dtype_are_refused_in_one_line(
    name: str, dtype: torch.dtype
) -> None:
    call, tensors = CALLS[name]
    for index in range(len(tensors)):
        given = list(tensors)
        given[index] = tensors[index].to(dtype)
        with pytest.raises(ValueError, match="must") as refusal:
            call(*given)
        assert str(dtype) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=str(dtype)):
        call(*(x.to(dtype) for x in tensors))


@operators
def test_fp64_is_computed_in_fp64_forward_and_backward(name: str) -> None:
    call, tensors = CALLS[name]
    leaves = [x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-7, fast_mode=True)
    if name == "flash_attention":
        exact = attention_formula(*(x.detach() for x in leaves))
        assert (call(*leaves) - exact).abs().max() < 1e-13


@operators
def test_a_tangent_of_any_argument_reaches_the_output(name: str) -> None:
    call, tensors = CALLS[name]
    step = 1e-5
    for index, x in enumerate(tensors):
        direction = random(*x.shape, seed=7)

        def of(x: Tensor, index: int = index) -> Tensor:
            given = [y.to(x.dtype) for y in tensors]
            given[index] = x
            return torch.cat([out.flatten() for out in outputs_of(call(*given))])

        exact = x.double()
        moved = step * direction.double()
        expected = (of(exact + moved) - of(exact - moved)) / (2 * step)
        tangent = torch.func.jvp(of, (x,), (direction,))[1]
        assert torch.allclose(tangent.double(), expected, rtol=1e-3, atol=1e-3)


# ---- Gradients that are not there.


class Drop(torch.autograd.Function):
    """Takes a tensor to a number, and gives it no gradient at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@operators
def test_an_output_whose_gradient_is_undefined_is_no_error(name: str) -> None:
    call, tensors = CALLS[name]
    for used in range(-1, len(outputs_of(call(*tensors)))):  # none, or one of the outputs

        def gradients(tensors: tuple[Tensor, ...], used: int = used) -> list[Tensor | None]:
            leaves = [x.clone().requires_grad_() for x in tensors]
            outputs = outputs_of(call(*leaves))
            total = sum(Drop.apply(out) for index, out in enumerate(outputs) if index != used)
            if used >= 0:
                total = total + outputs[used].square().sum()
            total.backward()
            return [leaf.grad for leaf in leaves]

        found = gradients(tensors)
        exact = gradients(tuple(x.double() for x in tensors))
        for x, gradient, expected in zip(tensors, found, exact, strict=True):
            gradient = torch.zeros_like(x) if gradient is None else gradient
            expected = torch.zeros_like(x) if expected is None else expected
            assert torch.allclose(gradient.double(), expected.double(), rtol=1e-3, atol=1e-4)


CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Counting(TorchDispatchMode):
    """The operations of PyTorch that ran, with the shape of what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "pixart":  # what is done inside counts, too
            with self:
                return func.redispatch(CPU_KERNELS, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.found.append((func._overloadpacket.__name__, tuple(out.shape)))
        return out

    def shapes(self, *names: str) -> list[tuple[int, ...]]:
        return [shape for name, shape in self.found if name in names]


FILLS = ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "full_like")


@interpreted
def test_attention_makes_no_gradient_of_the_sums_that_nobody_differentiates() -> None:
    q, k, v = (x.clone().requires_grad_() for x in (Q, KEYS, VALUES))
    out = flash_attention(q, k, v)
    with Counting() as counted:
        out.backward(torch.ones_like(out))
    assert q.grad is not None
    assert (2, 2, 6) not in counted.shapes(*FILLS)


@interpreted
def test_keys_and_values_of_different_strides_are_not_copied_to_be_compressed() -> None:
    tokens, channels = 6, 16
    keys = random(2, tokens, channels)  # contiguous, as a norm leaves them
    packed = random(2, tokens, 3 * channels, seed=1)  # values are still a part of the projection
    weights = (random(channels, 1, 2, 2), *(random(channels, seed=s) for s in (1, 2, 3)))

    def run(packed: Tensor) -> tuple[list[Tensor], Counting]:
        k, v = keys.clone().requires_grad_(), packed.clone().requires_grad_()
        leaves = [x.clone().requires_grad_() for x in weights]
        values = v if v.shape[2] == channels else v[..., 2 * channels :]
        with Counting() as counted:
            outputs = compress_kv(k, values, *leaves, grid=(2, 3), ratio=2)
            loss = outputs[0].square().sum() + (outputs[1] * outputs[0]).sum()
            gradients = torch.autograd.grad(loss, [k, values, *leaves])
        return [*outputs, *gradients], counted

    found, counted = run(packed)
    assert (2, tokens, channels) not in counted.shapes("clone", "copy_", "contiguous", "_to_copy")
    expected, _ = run(packed[..., 2 * channels :].contiguous())
    assert all(map(torch.equal, found, expected))


# ---- Arguments at the edge.


def test_heads_without_channels_are_refused_or_empty() -> None:
    q = torch.empty(2, 5, 2, 0)
    try:
        out = flash_attention(q, q, q)
    except ValueError as error:
        assert "head_dim" in str(error) and "got 0" in str(error)
    else:
        assert out.shape == q.shape


def test_lengths_without_numbers_are_refused() -> None:
    lengths = torch.ones(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="kv_lengths must be on cpu"):
        flash_attention(Q, KEYS, VALUES, kv_lengths=lengths)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operators on tensors without data take the way of a GPU, which is a Tesla T4, and whatever is
    compiled fails the test."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from bench.compiled.ahead_of_time import _Launchers

    properties = type("Properties", (), {"major": 7, "minor": 5, "name": "Tesla T4"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("it compiles"))
    with _Launchers():
        yield


@operators
def test_a_gpu_that_is_too_old_is_told_before_anything_is_compiled(turing: None, name: str) -> None:
    call, tensors = CALLS[name]
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        call(*(x.to("meta", torch.bfloat16) for x in tensors))
    line = str(refusal.value)
    assert "Tesla T4" in line and "sm_75" in line and "sm_80" in line and "\n" not in line


@interpreted
def test_the_architecture_of_the_interpreter_is_asked_of_no_gpu() -> None:
    assert launch.architecture(torch.device("cpu")) == "interpreter"
