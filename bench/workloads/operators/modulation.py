"""modulate, gate_add and both in one pass, gated and not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.workloads.operators.workload import (
    SHORT,
    Draw,
    Inputs,
    Operator,
    Variant,
    Workload,
    bound,
    compiled,
)
from pixart.resolution import RESOLUTIONS
from pixart_kernels import (
    gate_add,
    gate_add_modulate,
    gate_add_modulate_reference,
    gate_add_reference,
    modulate,
    modulate_reference,
)

# Passes over one (B, N, C) tensor, forward and backward. A gradient that equals another (x's in
# gate_add, and the branch's without a gate) takes no pass of its own.
PASSES = {
    ("modulate", ""): (2, 3),  # x, out / x, gradient, dx
    ("gate_add", ""): (3, 3),  # x, branch, out / branch, gradient, dbranch
    ("gate_add", "plain"): (3, 0),  # both gradients are the one that came in
    ("gate_add_modulate", "gated"): (
        4,
        6,
    ),  # x, branch, y, out / branch, y, 2 gradients, dx, dbranch
    ("gate_add_modulate", "plain"): (4, 4),  # the same without a gate: y, 2 gradients, dx
}
LABELS = {("gate_add", "plain"): "add", ("gate_add_modulate", "plain"): "add_modulate"}


def elementwise_bytes(
    name: str, kind: str, tokens: int, width: int, itemsize: int, backward: bool
) -> int:
    return PASSES[name, kind][backward] * tokens * width * itemsize


def _inputs(work: Workload, draw: Draw) -> Inputs:
    name, size = work.operator.name, (work.batch, work.tokens, work.width)
    # In the model these rows are slices of one fp32 table, whatever the tokens' dtype.
    gate, shift, scale = draw(work.batch, 6, work.width, dtype=torch.float32, scale=0.5).unbind(1)[
        :3
    ]
    found: Inputs = {"x": draw(*size, dtype=work.dtype)}
    if name != "modulate":
        found["branch"] = draw(*size, dtype=work.dtype)
        found["gate"] = None if work.kind == "plain" else gate
    if name != "gate_add":
        found |= {"shift": shift, "scale": scale}
    return found


def _bytes(work: Workload, backward: bool) -> int:
    tokens, size = work.batch * work.tokens, work.dtype.itemsize
    return elementwise_bytes(work.operator.name, work.kind, tokens, work.width, size, backward)


# The formulas as model code usually has them, one operation of PyTorch after the other.
def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    shift, scale = (row.to(x.dtype).unsqueeze(1) for row in (shift, scale))
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _gate_add(x: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    return x + branch if gate is None else x + gate.to(x.dtype).unsqueeze(1) * branch


def _gate_add_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    y = _gate_add(x, branch, gate)
    return y, _modulate(y, shift, scale)


def _peers(
    reference: Callable[..., Any], formula: Callable[..., Any], work: Workload, hurried: bool
) -> dict[str, Variant]:
    eager = {"eager": bound(reference), "eager formula": bound(formula)}
    return eager | {"compiled": compiled(reference, work)}


def _compiled(kinds: tuple[str, ...], operator: Operator) -> list[Workload]:
    calls = [(size, torch.bfloat16) for size in RESOLUTIONS]
    calls += [("1k", torch.float16), ("1k", torch.float32)]
    return [Workload(operator, size, kind, 2, dtype) for size, dtype in calls for kind in kinds]


def _label(work: Workload) -> str:
    name = work.operator.name
    return f"{LABELS.get((name, work.kind), name)}-{SHORT[work.dtype]}"


def _operator(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    formula: Callable[..., Any],
    kinds: tuple[str, ...],
    compiled_kinds: tuple[str, ...],
) -> Operator:
    return Operator(
        reference.__name__.removesuffix("_reference"),
        ours=ours,
        reference=reference,
        inputs=_inputs,
        bytes=_bytes,
        peers=partial(_peers, reference, formula),
        kinds=kinds,
        tuned=kinds,
        compiled=partial(_compiled, compiled_kinds),
        label=_label,
        shape=lambda work: {"channels": work.width},
    )


BOTH = ("gated", "plain")
OPERATORS = (
    _operator(gate_add_modulate, gate_add_modulate_reference, _gate_add_modulate, BOTH, BOTH),
    _operator(modulate, modulate_reference, _modulate, ("",), ("",)),
    _operator(gate_add, gate_add_reference, _gate_add, ("",), ("", "plain")),
)
