"""The element-wise work of a block: adaLN modulation and gated residuals (PixArt-α, section 2.3).

    modulate(x, shift, scale)  = LayerNorm(x) · (1 + scale) + shift        LayerNorm without weights
    gate_add(x, branch, gate)  = x + gate · branch
    gate_add_modulate(...)     = y, modulate(y, shift, scale)  with y = gate_add(x, branch, gate)

x, branch: (B, N, C); shift, scale, gate: one row for each sample, (B, C), or for each token, (B, N, C),
which may be fp32 beside 16-bit tokens. The public functions take other shapes as views of these two.
Statistics and sums are fp32; what is stored is rounded to the dtype of x. B batch, N tokens,
C channels.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_kernels.dispatch.bypass import Compute
from pixart_kernels.dispatch.registration import (
    are_known,
    check_device,
    check_floating,
    register_backward,
    register_operator,
    without_autocast,
)

Row = Tensor | float


@without_autocast
def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift in plain PyTorch, the LayerNorm without weights over C.

    x: (B, N, C); shift, scale: (B, C) or (B, N, C), of any floating dtype. Returns (B, N, C) in x's
    dtype, under autocast too. The adaLN of DiT (arXiv:2212.09748), whose rows PixArt-α shares among
    blocks (arXiv:2310.00426, section 2.3).
    """
    by_sample = shift.dim() == scale.dim() == 2 and are_known(x.shape[0])
    if by_sample and x.device.type == "cpu" and x.numel() > 0 and not torch.is_grad_enabled():
        return _modulate_each(x, shift, scale, eps)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    shift, scale = shift.to(x.dtype), (1 + scale).to(x.dtype)
    return torch.addcmul(_over_tokens(shift), normed, _over_tokens(scale))


def _over_tokens(row: Tensor) -> Tensor:
    return row.unsqueeze(1) if row.dim() == 2 else row


def _modulate_each(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    # The CPU's LayerNorm applies fp32 weights in the same pass, but the same to every sample: 9
    # against 12 ms for bf16 (2, 4096, 1152) on one Sapphire Rapids core, torch 2.13, and one rounding
    # less. Not for training: its backward sums the gradients of 16-bit tokens' weights in 16 bits.
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = zip(x, (1 + scale).to(dtype), shift.to(dtype), strict=True)
    return torch.stack([F.layer_norm(tokens, x.shape[-1:], w, b, eps) for tokens, w, b in rows])


@without_autocast
def gate_add_reference(x: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate · branch in plain PyTorch: the end of a residual branch (DiT, arXiv:2212.09748).

    x, branch: (B, N, C); gate: (B, C) or (B, N, C), or None for 1. Returns (B, N, C) in x's dtype,
    under autocast too.
    """
    if gate is None:
        return (x + branch).to(x.dtype)
    return torch.addcmul(x, _over_tokens(gate.to(x.dtype)), branch).to(x.dtype)


@without_autocast
def gate_add_modulate_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """y = gate_add_reference(x, branch, gate), and modulate_reference(y, shift, scale).

    x, branch: (B, N, C); gate, shift, scale: (B, C) or (B, N, C), gate None for 1. Returns two
    (B, N, C) in x's dtype, under autocast too. y is rounded to it before the LayerNorm sees it.
    """
    y = gate_add_reference(x, branch, gate)
    return y, modulate_reference(y, shift, scale, eps=eps)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return modulate_reference(x, shift, scale, eps=eps)


def _prepare_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Compute:
    compute = _prepare_forward(x, None, None, shift, scale, eps)
    return lambda x, shift, scale, eps: compute(x, None, None, shift, scale)[1]


def _check_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    _check(x, None, shift=shift, scale=scale)


def _save_modulate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, eps = inputs
    _save(ctx, x, {"x": x, "shift": shift, "scale": scale}, eps)


def _gate_add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return gate_add_reference(x, branch, gate)


def _prepare_gate_add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Compute:
    compute = _prepare_forward(x, branch, gate, None, None, 0.0)
    return lambda x, branch, gate: compute(x, branch, gate, None, None)[0]


def _check_gate_add(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    _check(x, branch, gate=gate)


def _save_gate_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, branch, gate = inputs
    _save(ctx, None, {"x": x, "branch": branch, "gate": gate}, 0.0)


def _gate_add_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return gate_add_modulate_reference(x, branch, gate, shift, scale, eps=eps)


def _save_gate_add_modulate(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    x, branch, gate, shift, scale, eps = inputs
    given = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    _save(ctx, output[0], given, eps)


def _prepare_gate_add_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Compute:
    compute = _prepare_forward(x, branch, gate, shift, scale, eps)
    return lambda x, branch, gate, shift, scale, eps: compute(x, branch, gate, shift, scale)


def _check_gate_add_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> None:
    _check(x, branch, gate=gate, shift=shift, scale=scale)


def _prepare_forward(*arguments: Any) -> Compute:
    from pixart_kernels.modulation.kernels import prepare_forward

    return prepare_forward(*arguments)


_ROWS = ("shift", "scale", "gate")


def _is_of_tokens(row: Tensor | None) -> TypeGuard[Tensor]:
    return row is not None and row.dim() == 3


def _save(ctx: Any, y: Tensor | None, given: dict[str, Any], eps: float) -> None:
    """y: what the LayerNorm saw; given: the operator's arguments that may have gradients."""
    gate = given.get("gate")
    branch = None if gate is None else given["branch"]
    ctx.save_for_backward(y, branch, gate, given.get("scale"))
    ctx.dtypes = {name: None if value is None else value.dtype for name, value in given.items()}
    ctx.of_tokens = [name for name in _ROWS if name in given and _is_of_tokens(given[name])]
    ctx.eps = eps


def _backward(ctx: Any, grad_y: Tensor | None, grad_out: Tensor | None) -> list[Tensor | None]:
    """Gradients of the given arguments, in their order."""
    if grad_y is None and grad_out is None:
        return [None] * len(ctx.dtypes)
    y, branch, gate, scale = ctx.saved_tensors
    found = {"x": grad_y, "branch": grad_y}
    if grad_out is None:
        y, scale = None, None
    if gate is not None or scale is not None:
        inputs = (grad_y, grad_out, y, branch, gate, scale, ctx.eps)
        dx, dbranch, rows, dscale, dgate = _modulation_backward(*inputs)
        found["x"] = grad_y if scale is None else dx
        found["branch"] = found["x"] if gate is None else dbranch
        names = ([] if scale is None else ["shift", "scale"]) + ([] if gate is None else ["gate"])
        found.update(zip(names, rows, strict=True))
        # No sums over tokens for those that have a row of their own. That of shift is what came in.
        each = {"shift": grad_out, "scale": dscale, "gate": dgate}
        found.update((name, each[name]) for name in ctx.of_tokens if name in names)
    gradients = [found.get(name) for name in ctx.dtypes]
    return [
        grad.to(dtype) if needs and grad is not None else None
        for grad, dtype, needs in zip(
            gradients, ctx.dtypes.values(), ctx.needs_input_grad, strict=False
        )
    ]


def _backward_schema(
    grad_y: Tensor | None,
    grad_out: Tensor | None,
    y: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx with grad_out; dbranch with gate; as one (rows, B, C) in fp32 the gradients of shift and
    scale, if there is grad_out, and of gate, if there is one; and those of scale and gate where these
    are (B, N, C): the row among the sums is then undefined. What is not there is None, or empty."""
    raise NotImplementedError


def _prepare_backward(*arguments: Any) -> Compute:
    from pixart_kernels.modulation.kernels import prepare_backward

    return prepare_backward(*arguments)


def _fake_backward(
    grad_y: Tensor | None,
    grad_out: Tensor | None,
    y: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad_y if grad_out is None else grad_out
    assert grad is not None
    batch, tokens, channels = grad.shape
    rows = (0 if scale is None else 2) + (0 if gate is None else 1)
    nothing = [grad.new_empty(0, dtype=torch.float32) for _ in range(4)]  # no two may be one
    return (
        nothing[0] if y is None else y.new_empty(grad.shape),
        nothing[1] if branch is None else branch.new_empty(grad.shape),
        grad.new_empty((rows, batch, channels), dtype=torch.float32),
        scale.new_empty(grad.shape) if _is_of_tokens(scale) else nothing[2],
        gate.new_empty(grad.shape) if _is_of_tokens(gate) else nothing[3],
    )


_modulate_operator = register_operator(
    "modulate",
    _modulate,
    check=_check_modulate,
    prepare=_prepare_modulate,
    fake=lambda x, shift, scale, eps: x.new_empty(x.shape),
    save=_save_modulate,
    backward=lambda ctx, grad: (*_backward(ctx, None, grad), None),
)
_gate_add_operator = register_operator(
    "gate_add",
    _gate_add,
    check=_check_gate_add,
    prepare=_prepare_gate_add,
    fake=lambda x, branch, gate: x.new_empty(x.shape),
    save=_save_gate_add,
    backward=lambda ctx, grad: (*_backward(ctx, grad, None),),
)
_gate_add_modulate_operator = register_operator(
    "gate_add_modulate",
    _gate_add_modulate,
    check=_check_gate_add_modulate,
    prepare=_prepare_gate_add_modulate,
    fake=lambda x, branch, gate, shift, scale, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    save=_save_gate_add_modulate,
    backward=lambda ctx, grad_y, grad_out: (*_backward(ctx, grad_y, grad_out), None),
)
_modulation_backward = register_backward(
    "modulation_backward", _backward_schema, prepare=_prepare_backward, fake=_fake_backward
)


def modulate(x: Tensor, shift: Row, scale: Row, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights over C, then times (1 + scale), plus shift.

    x: (B, N, C) in fp32, bf16, fp16 or fp64; shift, scale: (B, C), (B, 1, C), (C,), (B, N, C) or a
    number, of any floating dtype. Returns (B, N, C) in x's dtype, under autocast too; statistics are
    fp32 (fp64 for fp64, by the reference). Raises ValueError for other shapes. Differentiable in all
    three, in forward mode and under torch.func by the reference. From DiT and PixArt-α, as
    modulate_reference says.
    """
    rows = _row("shift", shift, x), _row("scale", scale, x)
    return _modulate_operator(x, *rows, float(eps))


def gate_add(x: Tensor, branch: Tensor, gate: Row | None = None) -> Tensor:
    """x + gate · branch, the end of a residual branch.

    x: (B, N, C) in fp32, bf16, fp16 or fp64; branch: the same shape; gate: (B, C), (B, 1, C), (C,),
    (B, N, C) or a number, None for 1; both of any floating dtype. Returns (B, N, C) in x's dtype, under
    autocast too. Raises ValueError for other shapes. Differentiable as modulate is.
    """
    return _gate_add_operator(x, branch, None if gate is None else _row("gate", gate, x))


def gate_add_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Row | None,
    shift: Row,
    scale: Row,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """End one branch and prepare the next: y = x + gate · branch, and modulate(y, shift, scale).

    x: (B, N, C) in fp32, bf16, fp16 or fp64; branch: the same shape; gate, shift, scale: (B, C),
    (B, 1, C), (C,), (B, N, C) or a number, gate None for 1; all of any floating dtype. Returns two
    (B, N, C) in x's dtype, under autocast too, in one pass over memory. Raises ValueError for other
    shapes. Differentiable as modulate is.
    """
    opening = None if gate is None else _row("gate", gate, x)
    rows = (opening, _row("shift", shift, x), _row("scale", scale, x))
    return _gate_add_modulate_operator(x, branch, *rows, float(eps))


def _check(x: Tensor, branch: Tensor | None, **rows: Tensor | None) -> None:
    _check_tokens(x)
    if branch is not None:
        if branch.shape != x.shape:
            raise ValueError(
                f"branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}"
            )
        check_floating("branch", branch)
        check_device("branch", branch, x)
    for name, row in rows.items():
        if row is not None:
            _check_row(name, row, x)


def _check_tokens(x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must have 3 dimensions, got {tuple(x.shape)}")
    check_floating("x", x)


def _check_row(name: str, row: Tensor, x: Tensor) -> None:
    batch, tokens, channels = x.shape
    if row.shape not in ((batch, channels), (batch, tokens, channels)):
        raise ValueError(
            f"{name} must have shape {(batch, channels)}, got {tuple(row.shape)}; "
            f"{(batch, 1, channels)}, {(channels,)}, {(batch, tokens, channels)} and a number will do"
        )
    check_floating(name, row)
    check_device(name, row, x)


def _row(name: str, value: Row, x: Tensor) -> Tensor:
    """A view (B, C) or (B, N, C) of what stands for that, so that its gradient has its own shape."""
    if isinstance(value, Tensor) and value.dim() == 2:
        return value  # found right or wrong where the shapes are new
    _check_tokens(x)
    batch, _, channels = x.shape
    if value is None or isinstance(value, (list, tuple, str)):
        raise ValueError(f"{name} must be a tensor or a number, got {type(value).__name__}")
    if not isinstance(value, Tensor):
        value = x.new_full((channels,), value, dtype=torch.promote_types(x.dtype, torch.float32))
    if value.dim() == 0:
        value = value.to(x.device)  # which PyTorch's own arithmetic does not ask for either
    if value.shape in ((), (channels,)):
        return value.expand(batch, channels)
    if value.shape == (batch, 1, channels):
        return value.squeeze(1)
    _check_row(name, value, x)
    return value
