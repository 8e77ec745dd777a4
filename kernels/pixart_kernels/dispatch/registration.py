"""How an operator reaches PyTorch: Triton where Triton runs, its eager reference everywhere else.

PyTorch's dispatcher is the only dispatch code. An operator is registered with its reference for
every device and its Triton launcher for TRITON_DEVICES; its gradient is a second operator, which
only those devices have. On other devices autograd records the reference's own steps, so that there
nothing is slower or larger than plain PyTorch. Triton is imported when a kernel is first launched:
it is not there on every system, and takes time.

Kernels have first derivatives in reverse mode, and compute in fp32. What else PyTorch can do with an
operator (forward mode, torch.func, fp64) it does with the reference, on every device.

One rule for dtypes on every path: an operator takes fp32, bf16, fp16 and fp64 tokens, tensors that
share a dtype where its docstring says so, and gives what comes out the dtype of its first argument,
a gradient that of its argument. Autocast changes none of it.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

NAMESPACE = "pixart"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
TRITON_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

P = ParamSpec("P")
T = TypeVar("T")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register_operator(
    name: str,
    reference: Callable[..., Any],
    *,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register `pixart::name` and return what calls it. All functions take the arguments of `reference`,
    whose annotations are the schema; none may return a view of an argument.

    fake: empty outputs for tensors without data. save(ctx, inputs, output) and backward(ctx,
    *output gradients) are as in torch.library.register_autograd.
    """
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", reference, mutates_args=())
    operator.register_kernel(TRITON_DEVICES)(launch)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=save)
    # Wins over the line above where there are no kernels: autograd sees the reference's steps.
    for key in ("AutogradMPS", "AutogradXPU", *(() if INTERPRETED else ("AutogradCPU",))):
        _library.impl(name, reference, key)

    def call(*arguments: Any) -> Any:
        # Kernels would give a tangent of zero, and cannot be mapped or nested.
        by_steps = in_forward_mode() or is_transformed()
        if by_steps or arguments[0].dtype == torch.float64:
            return reference(*arguments)
        return operator(*arguments)

    return call


def register_backward(
    name: str, launch: Callable[..., Any], *, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `pixart::name`, the gradient of an operator, for TRITON_DEVICES; returns it."""
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}", launch, mutates_args=(), device_types=TRITON_DEVICES
    )
    operator.register_fake(fake)
    operator.register_autograd(_refuse_second_derivative)
    return operator


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "second derivatives must be taken by torch.func (hessian, grad of grad): kernels have first ones"
    )


def in_forward_mode() -> bool:
    """Whether tensors may have tangents: in torch.func.jvp and in torch.autograd.forward_ad's level."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) is at work."""
    return torch._C._are_functorch_transforms_active()


def without_autocast(reference: Callable[P, T]) -> Callable[P, T]:
    """A reference whose dtypes follow its arguments alone, as those of the kernels do."""

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = (*args, *kwargs.values())
        kind = next(value for value in given if isinstance(value, torch.Tensor)).device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return reference(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return reference(*args, **kwargs)

    return call


def check_floating(name: str, tokens: torch.Tensor) -> None:
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} must be fp32, bf16, fp16 or fp64, got {tokens.dtype}; cast it")
