"""The optimizers of a stage by name, and the learning rate of each step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from pixart.device import has_bf16_products
from pixart.distributed import local
from pixart.training.bounds import Bounds, number_problems
from pixart.training.came import CAME, keep_fp32, widened
from pixart.training.problems import refuse

FACTOR = "factor"  # of the learning rate, among the settings of a group of parameters
MUON_MIN_SIDE = 64  # orthogonalising a thin matrix says little; those are left to AdamW
_BETAS = {"came": (0.9, 0.999, 0.9999), "adamw": (0.9, 0.999)}
_BOUNDS = {
    "learning_rate": Bounds(0, 1, above=True),  # each of these optimizers steps by about so much
    "clip_norm": Bounds(0, 1e9, above=True),
    "betas": Bounds(0, 1),
    "eps": Bounds(0, 1, above=True),
    "weight_decay": Bounds(0, 10),
    "warmup_steps": Bounds(0, 10**8),
    "final_ratio": Bounds(0, 1),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights follow gradients. The defaults are those of PixArt-Σ's published recipes."""

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["came", "adamw", "muon", "adamw-8bit"] = "came"
    """muon: orthogonal steps of large matrices, AdamW for the rest. adamw-8bit needs torchao."""
    learning_rate: float = 2e-5
    betas: tuple[float, ...] | None = None
    """None: (0.9, 0.999, 0.9999) for came, else (0.9, 0.999)."""
    eps: float | None = None
    """Added to AdamW's denominator, also to that of muon's and adamw-8bit's; None: PyTorch's 1e-8. Not
    for came, which has two of its own."""
    weight_decay: float = 0.0
    clip_norm: float = 0.01
    """Gradients longer than this are shortened to it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 1000
    decay_fraction: float = 1.0
    """Share of the steps, at the end, in which linear and cosine decay."""
    final_ratio: float = 0.02
    """What is left of the learning rate at the last step."""
    rate_rule: Literal["none", "sqrt", "linear"] = "none"
    """How the rate grows with the batch, from 256 images: the published trainer takes sqrt."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from number_problems(self, _BOUNDS, "optimizer.")
        if not 0 < self.decay_fraction <= 1:
            yield f"optimizer.decay_fraction must be in (0, 1], got {self.decay_fraction}"
        count = len(self._published_betas)
        if self.betas is not None and len(self.betas) != count:
            yield f"optimizer.betas must be {count} numbers for {self.name}, got {self.betas}"
        if any(beta == 1 for beta in self.betas or ()):
            yield f"optimizer.betas must be below 1, got {self.betas}"
        if self.eps is not None and self.eps > 0 and self.name == "came":
            yield (
                f"optimizer.eps must be None for came, which has two of its own, got {self.eps}; "
                "leave it out, or take another optimizer.name"
            )

    @property
    def _published_betas(self) -> tuple[float, ...]:
        return _BETAS["came" if self.name == "came" else "adamw"]

    def rate(self, step: int, steps: int, batch: int) -> float:
        """The learning rate of a step (counted from 0) of a run of `steps`, for so many images."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = min(1.0, (steps - step) / max(1.0, steps * self.decay_fraction))
        if self.schedule == "constant":
            left = 1.0
        elif self.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        scale = {"none": 1.0, "sqrt": math.sqrt(batch / 256), "linear": batch / 256}[self.rate_rule]
        return (
            self.learning_rate * scale * warm * (self.final_ratio + (1 - self.final_ratio) * left)
        )


def build_optimizers(
    model: nn.Module,
    settings: OptimizerSettings,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> list[torch.optim.Optimizer]:
    """The optimizers that share the parameters of a model among them, those that want a gradient.

    factors: of the learning rate, for parameters with these parts in their names; each has optimizers of
    its own.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = []
    for part, factor in {**factors, "": 1.0}.items():
        own = [p for name, p in named if part in name]
        named = [pair for pair in named if part not in pair[0]]
        optimizers = _optimizers_of(own, model, settings) if own else []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group[FACTOR] = factor
        found += optimizers
    return found


def _optimizers_of(
    parameters: Sequence[nn.Parameter], model: nn.Module, settings: OptimizerSettings
) -> list[torch.optim.Optimizer]:
    if settings.name == "came":
        options: dict[str, Any] = {"betas": settings.betas or _BETAS["came"]}
        return [CAME(parameters, **options, **_shared(settings))]
    if settings.name == "adamw-8bit":
        return [_adamw_8bit(parameters, settings)]
    matrices: list[Tensor] = []
    if settings.name == "muon":
        linears = (module for module in model.modules() if isinstance(module, nn.Linear))
        own = {id(p) for p in parameters}
        candidates = [linear.weight for linear in linears if id(linear.weight) in own]
        matrices = [weight for weight in candidates if min(weight.shape) >= MUON_MIN_SIDE]
    optimizers: list[torch.optim.Optimizer] = []
    chosen = {id(weight) for weight in matrices}
    if rest := [p for p in parameters if id(p) not in chosen]:
        optimizers.append(_adamw(rest, settings))
    if matrices:
        optimizers.append(Muon(matrices, **_shared(settings)))
    return optimizers


class Muon(torch.optim.Muon):
    """PyTorch's Muon, whose steps do not depend on how FSDP2 has cut the matrices among processes.

    Momentum is fp32 whatever the weights' dtype, and these are rounded once a step.

    Its five iterations in bf16 magnify every rounding: products of parts, added up, would lead to
    other steps. So a process gathers each matrix of momentum, in bf16, and iterates on the whole.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(
            params,  # type: ignore[arg-type]
            lr=lr,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states of a state_dict, in fp32 as they are."""
        super().load_state_dict(state_dict)
        keep_fp32(self, state_dict)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], widened(gradient)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(average, group["momentum"]).bfloat16()  # Nesterov's
        if isinstance(update, DTensor):
            mesh, whole = update.device_mesh, [Replicate()] * update.device_mesh.ndim
            step = DTensor.from_local(_orthogonal(update.full_tensor(), group), mesh, whole)
            update = step.redistribute(placements=update.placements)
        else:
            update = _orthogonal(update, group)
        weight = widened(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))
        if weight is not parameter:
            parameter.copy_(weight)


def _orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """The matrix with its singular values brought near 1, by Newton and Schulz's iteration:
    X <- a X + (b XXᵀ + c (XXᵀ)²) X, every result rounded to bf16."""
    a, b, c = group["ns_coefficients"]
    rounded = _as_it_is if has_bf16_products(matrix.device) else _rounded
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # the smaller XXᵀ
    x = rounded(x / x.norm().clamp(min=group["eps"]))
    for _ in range(group["ns_steps"]):
        square = rounded(x @ x.T)
        step = rounded(torch.addmm(square, square, square, beta=b, alpha=c))
        x = rounded(torch.addmm(x, step, x, beta=a))
    x = x.to(matrix.dtype)
    return x.T if tall else x


def _as_it_is(result: Tensor) -> Tensor:
    return result


def _rounded(result: Tensor) -> Tensor:
    """To bf16, in fp32: its products are quicker where those of bf16 are emulated."""
    return result.bfloat16().float()


def _shared(settings: OptimizerSettings) -> dict[str, Any]:
    return {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}


def _adam(settings: OptimizerSettings) -> dict[str, Any]:
    eps = {} if settings.eps is None else {"eps": settings.eps}
    return {"betas": settings.betas or _BETAS["adamw"], **eps, **_shared(settings)}


def _adamw(parameters: Sequence[Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
    fused = not any(isinstance(p, DTensor) and p.device.type == "cpu" for p in parameters)
    return torch.optim.AdamW(parameters, fused=fused, **_adam(settings))


def check_installed(settings: OptimizerSettings) -> None:
    """Raise ValueError for an optimizer whose library is not there."""
    if settings.name != "adamw-8bit":
        return
    try:
        import torchao.optim  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "optimizer.name must not be adamw-8bit without torchao; "
            "pip install 'pixart-fast[train]', or take adamw"
        ) from error


def _adamw_8bit(parameters: Sequence[Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
    check_installed(settings)
    from torchao.optim import AdamW8bit

    if any(isinstance(p, DTensor) for p in parameters):
        from torch._functorch import config

        # A process would take the compiled step of another, whose part of a weight may differ in size
        # and lie on another GPU (pytorch/pytorch#188390).
        config.enable_autograd_cache = False
    return AdamW8bit(parameters, **_adam(settings))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next steps have this learning rate, times the factor of each parameter."""
    for group in optimizer.param_groups:
        scaled = rate * group.get(FACTOR, 1.0)
        if isinstance(group["lr"], Tensor):  # torchao's, which is compiled in
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


@torch.no_grad()
def forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Bring its states to what they are before the first step."""
    for state in optimizer.state.values():
        for value in map(local, state.values()):
            # Not zero_(), which 8-bit states do not have.
            value.copy_(torch.zeros(value.shape, device=value.device))
