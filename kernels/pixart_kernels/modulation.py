"""The element-wise work of a block: adaLN modulation and gated residuals (PixArt-α, section 2.3).

    modulate(x, shift, scale)  = LayerNorm(x) · (1 + scale) + shift        LayerNorm without weights
    gate_add(x, branch, gate)  = x + gate · branch
    gate_add_modulate(...)     = y, modulate(y, shift, scale)  with y = gate_add(x, branch, gate)

x, branch: (B, N, C); shift, scale, gate: (B, C), in fp32 if the model likes beside 16-bit tokens.
Everything is computed in fp32 and rounded once, to the dtype of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    shift, scale = shift.to(dtype).unsqueeze(1), scale.to(dtype).unsqueeze(1)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gate_add_reference(x: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    if gate is None:
        return (x + branch).to(x.dtype)
    # A product with an fp32 gate is fp32 without a copy of the branch.
    gate = gate.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(1)
    return (x + gate * branch).to(x.dtype)


def gate_add_modulate_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    y = gate_add_reference(x, branch, gate)
    return y, modulate_reference(y, shift, scale, eps=eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights over C, then times (1 + scale), plus shift.

    x: (B, N, C); shift, scale: (B, C). Returns (B, N, C) in x's dtype.
    """
    _check_rows(x, shift=shift, scale=scale)
    return modulate_reference(x, shift, scale, eps=eps)


def gate_add(x: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate · branch. x, branch: (B, N, C); gate: (B, C), or None for 1. Returns x's dtype."""
    _check_branch(x, branch, gate)
    return gate_add_reference(x, branch, gate)


def gate_add_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """End one branch and prepare the next: y = x + gate · branch, and modulate(y, shift, scale).

    x, branch: (B, N, C); gate, shift, scale: (B, C), gate None for 1. Returns two (B, N, C) in x's
    dtype.
    """
    _check_branch(x, branch, gate)
    _check_rows(x, shift=shift, scale=scale)
    return gate_add_modulate_reference(x, branch, gate, shift, scale, eps=eps)


def _check_branch(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    if branch.shape != x.shape:
        raise ValueError(
            f"branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}"
        )
    _check_rows(x, **({} if gate is None else {"gate": gate}))


def _check_rows(x: Tensor, **rows: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must have 3 dimensions, got {tuple(x.shape)}")
    for name, row in rows.items():
        if row.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name} must have shape {(x.shape[0], x.shape[2])}, got {tuple(row.shape)}"
            )
