"""How far the results of operators are from those in fp64, made from the same rounded inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.workloads.operators.workload import (
    Inputs,
    Oracle,
    Workload,
    differentiable,
    output_gradients,
    outputs_of,
)

# Relative. Who sums a gradient over 1,024 tokens in bf16 is off by 0.02, and grows with the root of
# the tokens; another formula is off by about 1.
ANOTHER_FORMULA = 0.3


def results(
    run: Callable[..., Any], inputs: Inputs, backward: bool, gradients: tuple[Tensor, ...] = ()
) -> dict[str, Tensor]:
    """Outputs, and gradients for random (or the given) gradients of them, by name."""
    outputs = outputs_of(run(**inputs))
    named = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    if backward:
        wanted = differentiable(inputs)
        gradients = gradients or output_gradients(outputs)
        made = torch.autograd.grad(outputs, list(wanted.values()), gradients)
        named |= {f"d_{name}": gradient for name, gradient in zip(wanted, made, strict=True)}
    return named


def oracle(work: Workload, inputs: Inputs, backward: bool) -> Oracle:
    if work.operator.oracle is not None:
        return work.operator.oracle(inputs, backward)
    # The gradients are drawn in the dtype of the results, then widened: all see the same.
    with torch.no_grad():
        rounded = outputs_of(work.operator.reference(**inputs))
    gradients = tuple(gradient.double() for gradient in output_gradients(rounded))
    del rounded
    wide = {name: _widen(value) for name, value in inputs.items()}
    made = results(work.operator.reference, wide, backward, gradients)
    return Oracle(made, lambda result: result)


def errors(made: Mapping[str, Tensor], truth: Oracle) -> dict[str, float]:
    """Relative error (of the norm) of each result; infinite if any value of it is not finite."""
    found = {}
    for name, result in made.items():
        expected = truth.expected[name]
        if not bool(result.isfinite().all()):
            found[name] = float("inf")
            continue
        distance = (truth.select(result).double() - expected).norm()
        found[name] = float(distance / expected.norm().clamp(min=1e-30))
    return found


def within(ours: Mapping[str, float], eager: Mapping[str, float], dtype: torch.dtype) -> bool:
    """At most twice the error of eager PyTorch in the same dtype, plus a rounding."""
    rounding = torch.finfo(dtype).eps / 4
    return all(ours[name] <= 2 * eager[name] + rounding for name in ours)


def plausible(errors: Mapping[str, float], dtype: torch.dtype, *, is_ours: bool) -> bool:
    """Ours: of the size of a few roundings. Others: not of another formula, however they round."""
    bound = 2 * torch.finfo(dtype).eps if is_ours else ANOTHER_FORMULA
    return all(error <= bound for error in errors.values())


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def _widen(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
