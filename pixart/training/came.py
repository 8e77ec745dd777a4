"""CAME, the optimizer of PixArt-Σ (arXiv 2307.02047): Adam's moments, the second one kept as row and
column means, and an update that shrinks where it disagrees with its own average.

For a matrix with gradient g, step by step (·̄ are means over a column or a row, ⊗ the outer product):

    r, c  <- means of the rows, columns of g² + ε₁, averaged with β₂
    u      = g / √(r ⊗ c / r̄), scaled down to a root mean square of 1 if it is larger
    m     <- u averaged with β₁
    R, C  <- means of the rows, columns of (u - m)² + ε₂, averaged with β₃
    w     <- w - lr · (m / √(R ⊗ C / R̄) + decay · w)

Everything that is no matrix keeps g² whole and steps by m. There is no bias correction, so the first
steps are ten times too long: warm up.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard

from pixart.distributed import local

_FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")


class CAME(torch.optim.Optimizer):
    """Steps all tensors of a group together, in fp32 whatever their dtype, and rounds them once.

    Only true matrices are factored: 2-D weights and 1×1 convolutions. (The published implementation
    also takes the two sides of a convolution's kernel for rows and columns.) Weights that FSDP2 has
    cut along their first dimension are stepped where they lie; three small sums cross the network.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number from 0 up, got {value}")
        if not clip_threshold > 0 or not all(0 < one < math.inf for one in eps):
            raise ValueError(
                f"clip_threshold and eps must be positive, got {clip_threshold} and {eps}"
            )
        if len(betas) != 3 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be three numbers from 0 below 1, got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            for parameter in given:
                if not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter)
            matrices = [p for p in given if _is_matrix(p)]
            others = [p for p in given if not _is_matrix(p)]
            if matrices:
                self._step_matrices(matrices, group)
            if others:
                self._step_others(others, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states of a state_dict, in fp32 as they are."""
        super().load_state_dict(state_dict)
        keep_fp32(self, state_dict)

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        (_, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
        gradients = [_matrix(local(p.grad)).float() for p in params]  # type: ignore[arg-type]
        states = [self.state[p] for p in params]
        squares = list(torch._foreach_mul(gradients, gradients))
        torch._foreach_add_(squares, eps1)
        updates = _scale(params, gradients, squares, states, "exp_avg_sq", beta2)
        averages = _average(params, updates, states, group)
        residuals = list(torch._foreach_sub(updates, averages))
        torch._foreach_mul_(residuals, residuals)
        torch._foreach_add_(residuals, eps2)
        _apply(params, _scale(params, averages, residuals, states, "exp_avg_res", beta3), group)

    def _step_others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta2, eps1 = group["betas"][1], group["eps"][0]
        gradients = [local(p.grad).float() for p in params]  # type: ignore[arg-type]
        squares = list(torch._foreach_mul(gradients, gradients))
        torch._foreach_add_(squares, eps1)
        states = [self.state[p] for p in params]
        moments = [local(state["exp_avg_sq"]) for state in states]
        torch._foreach_mul_(moments, beta2)
        torch._foreach_add_(moments, squares, alpha=1 - beta2)
        updates = [moment.rsqrt().mul_(g) for moment, g in zip(moments, gradients, strict=True)]
        _apply(params, _average(params, updates, states, group), group)


def _scale(
    params: list[Tensor],
    values: list[Tensor],
    squares: list[Tensor],
    states: list[dict[str, Tensor]],
    name: str,
    beta: float,
) -> list[Tensor]:
    """values / √(r ⊗ c / r̄), where r and c take up the means of `squares`, which is consumed."""
    rows = [local(state[f"{name}_row"]) for state in states]
    torch._foreach_mul_(rows, beta)
    torch._foreach_add_(rows, [square.mean(1) for square in squares], alpha=1 - beta)
    columns = [state[f"{name}_col"] for state in states]
    sums = [*(square.sum(0) for square in squares), *(row.sum() for row in rows)]
    sums = _sum_over_shards(sums, params + params)
    column_sums, row_sums = sums[: len(params)], sums[len(params) :]
    counts = [p.shape[0] for p in params]
    torch._foreach_mul_(columns, beta)
    torch._foreach_add_(
        columns, [s / n for s, n in zip(column_sums, counts, strict=True)], alpha=1 - beta
    )
    scaled = []
    for square, value, row, column, total, count in zip(
        squares, values, rows, columns, row_sums, counts, strict=True
    ):
        torch.mul(value, (row / (total / count)).rsqrt_().unsqueeze(1), out=square)
        scaled.append(square.mul_(column.rsqrt()))
    return scaled


def _average(
    params: list[Tensor], updates: list[Tensor], states: list[dict[str, Tensor]], group: Any
) -> list[Tensor]:
    """Clip the updates in place and take them into their averages, which are returned."""
    sums = _sum_over_shards([update.square().sum() for update in updates], params)
    for update, total, parameter in zip(updates, sums, params, strict=True):
        rms = (total / max(parameter.numel(), 1)).sqrt()
        update.div_((rms / group["clip_threshold"]).clamp_(min=1.0))
    averages = [
        local(state["exp_avg"]).view_as(u) for state, u in zip(states, updates, strict=True)
    ]
    torch._foreach_mul_(averages, group["betas"][0])
    torch._foreach_add_(averages, updates, alpha=1 - group["betas"][0])
    return averages


def _apply(params: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
    weights = [local(p) for p in params]
    wide = [widened(w) for w in weights]
    if group["weight_decay"]:
        torch._foreach_add_(wide, wide, alpha=-float(group["weight_decay"] * group["lr"]))
    steps = [u.view_as(w).to(w.dtype) for u, w in zip(updates, wide, strict=True)]
    torch._foreach_add_(wide, steps, alpha=-float(group["lr"]))
    for weight, value in zip(weights, wide, strict=True):
        if value is not weight:
            weight.copy_(value)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or itself if it is not narrower: what is computed in it is rounded once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def keep_fp32(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """After load_state_dict(saved), which rounds states to the dtype of their weights: as saved."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, params, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dtype != parameter.dtype:
                kept = value.to(device=parameter.device, copy=True)
                optimizer.state[parameter][name] = kept


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and all(size == 1 for size in parameter.shape[2:])


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape[:2])


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(parameter, DTensor) and any(
        isinstance(placement, Shard) and placement.dim != 0 for placement in parameter.placements
    ):
        raise ValueError(
            f"weights must be cut along their first dimension, got {parameter.placements}"
        )
    state = {"exp_avg": torch.zeros_like(parameter, dtype=torch.float32)}
    if not _is_matrix(parameter):
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state
    row, column = _zero_rows(parameter), parameter.shape[1]
    device = parameter.device
    for name in _FACTORS:
        zeros = torch.zeros(column, dtype=torch.float32, device=device)
        state[name] = row.clone() if name.endswith("row") else zeros
    return state


def _zero_rows(parameter: Tensor) -> Tensor:
    """A zero for each row, cut among processes as the rows are."""
    part = local(parameter)
    zeros = torch.zeros(part.shape[0], dtype=torch.float32, device=part.device)
    if not isinstance(parameter, DTensor):
        return zeros
    return DTensor.from_local(
        zeros,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size([parameter.shape[0]]),
        stride=(1,),
    )


def _sum_over_shards(sums: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """The sums over all parts of their parameters, in one exchange for each group of processes."""
    groups: dict[Any, list[int]] = {}
    for index, parameter in enumerate(params):
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard):
                    groups.setdefault(parameter.device_mesh.get_group(axis), []).append(index)
    for group, members in groups.items():
        flat = torch.cat([sums[index].flatten() for index in members])
        distributed.all_reduce(flat, group=group)
        parts = flat.split([sums[index].numel() for index in members])
        for index, part in zip(members, parts, strict=True):
            sums[index] = part.view_as(sums[index])
    return sums
