"""How far results are from those in fp64, made from the same rounded inputs.

Attention at 4K has 4 billion scores a head. There the fp64 result is made for some heads only, the
first and the last among them, every row of them; finiteness is checked everywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.workloads.operators import Inputs, Workload, differentiable, output_gradients, outputs_of

ORACLE_BYTES = 2 << 30  # of one chunk of scores
HEADS_CHECKED = 3
# Relative. Who sums a gradient over 1,024 tokens in bf16 is off by 0.02, and grows with the root of
# the tokens; another formula is off by about 1.
ANOTHER_FORMULA = 0.3


class Oracle(NamedTuple):
    """expected: fp64 results by name ("out0", "out1", "d_q", ...); select: what of a result they
    are compared with."""

    expected: dict[str, Tensor]
    select: Callable[[Tensor], Tensor]


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
    if work.operator == "flash_attention":
        return _attention_oracle(inputs, backward)
    # The gradients are drawn in the dtype of the results, then widened: all see the same.
    with torch.no_grad():
        rounded = outputs_of(work.reference(**inputs))
    gradients = tuple(gradient.double() for gradient in output_gradients(rounded))
    del rounded
    wide = {name: _widen(value) for name, value in inputs.items()}
    return Oracle(results(work.reference, wide, backward, gradients), lambda result: result)


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


def _attention_oracle(inputs: Inputs, backward: bool) -> Oracle:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    lengths = inputs.get("kv_lengths")
    pairs = _pairs(q.shape[0], q.shape[2])

    def select(result: Tensor) -> Tensor:
        return torch.stack([result[batch, :, head] for batch, head in pairs])

    gradient = output_gradients((q,))[0] if backward else None
    columns: dict[str, list[Tensor]] = {}
    for batch, head in pairs:
        count = k.shape[1] if lengths is None else int(lengths[batch])
        grad_out = None if gradient is None else gradient[batch, :, head].double()
        one = [tokens.detach()[batch, :, head].double() for tokens in (q, k, v)]
        for name, tensor in _one_head(one[0], one[1], one[2], count, grad_out).items():
            columns.setdefault(name, []).append(tensor)
    return Oracle({name: torch.stack(tensors) for name, tensors in columns.items()}, select)


def _pairs(batch: int, heads: int) -> list[tuple[int, int]]:
    """Samples and heads, evenly spread from the first to the last."""
    last = batch * heads - 1
    count = min(HEADS_CHECKED, last + 1)
    flat = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [divmod(index, heads) for index in sorted(flat)]


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, count: int, grad_out: Tensor | None
) -> dict[str, Tensor]:
    """q: (N, D), k, v: (M, D), of which the first `count` keys exist; all fp64."""
    scale, out = q.shape[1] ** -0.5, torch.zeros_like(q)
    named = {"out0": out}
    if grad_out is not None:
        named |= {"d_q": torch.zeros_like(q), "d_k": torch.zeros_like(k)}
        named["d_v"] = torch.zeros_like(v)
    rows = max(1, ORACLE_BYTES // (8 * max(count, 1)))
    for begin in range(0, q.shape[0] if count else 0, rows):
        part = slice(begin, begin + rows)
        weights = (scale * q[part] @ k[:count].T).softmax(dim=1)
        out[part] = weights @ v[:count]
        if grad_out is None:
            continue
        named["d_v"][:count] += weights.T @ grad_out[part]
        inner = (grad_out[part] * out[part]).sum(dim=1, keepdim=True)
        weights *= grad_out[part] @ v[:count].T - inner
        named["d_q"][part] = scale * weights @ k[:count]
        named["d_k"][:count] += scale * weights.T @ q[part]
    return named
