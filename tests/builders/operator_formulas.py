"""Formulas of the operators in plain PyTorch, random inputs, and the accuracy that tests hold to.

An error may be twice that of plain PyTorch in the same dtype, plus one rounding of the result
(errors are norms; inputs have unit scale).
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fills what torch.empty gives. A file that imports this has it in all of its tests."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_accuracy(
    operator: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Output and gradients of operator within the budget that formula in the same dtype sets."""
    exact = run(formula, *(x.double() for x in inputs))
    actual = run(operator, *inputs)
    plain = run(formula, *inputs)
    for index, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        rounding = torch.finfo(a.dtype).eps * max(e.norm().item(), e.numel() ** 0.5)
        budget = 2 * (p.double() - e).norm().item() + rounding
        error = (a.double() - e).norm().item()
        assert error <= budget, f"tensor {index}: error {error:.2e}, budget {budget:.2e}"


def run(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = random(*output.shape, seed=9).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


def attention_formula(
    q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5)
    if kv_lengths is not None:
        beyond = torch.arange(k.shape[1]) >= kv_lengths.view(-1, 1, 1, 1)
        scores = scores.masked_fill(beyond, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def modulation_formula(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gate_formula(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * branch
