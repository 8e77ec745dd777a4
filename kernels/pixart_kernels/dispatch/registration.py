"""How an operator reaches PyTorch: Triton where Triton runs, its eager reference everywhere else.

An operator is registered with its reference for every device and its Triton launcher for
TRITON_DEVICES; its gradient is a second operator, which only those devices have. On other devices
autograd records the reference's own steps, so that there nothing is slower or larger than plain
PyTorch. A call on such a device that nothing observes goes to the launcher directly (bypass.py).
Triton is imported when a kernel is first launched: it is not there on every system, and takes time.

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
from torch import Tensor
from torch.autograd import forward_ad

from pixart_kernels.dispatch.bypass import Compute, Door

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
    check: Callable[..., None],
    prepare: Callable[..., Compute],
    fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    setting: Callable[..., object] | None = None,
) -> Door:
    """Register `pixart::name` and return what calls it. All functions take the arguments of `reference`,
    whose annotations are the schema; none may return a view of an argument.

    check raises ValueError for arguments that do not fit. prepare returns what launches the kernels for
    such arguments, whose outputs may be None where nobody asked for them; setting: what else it goes
    by. fake: empty outputs for tensors without data. save(ctx, inputs, output) and backward(ctx,
    *output gradients), of which those not defined are None, are as in torch.library.register_autograd.
    """
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", reference, mutates_args=())

    def long_way(*arguments: Any) -> Any:
        # Kernels would give a tangent of zero, and cannot be mapped or nested.
        by_steps = in_forward_mode() or is_transformed()
        if by_steps or arguments[0].dtype == torch.float64:
            return reference(*arguments)
        return operator(*arguments)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # or zeros for an output that nothing uses would be read
        save(ctx, inputs, output)

    door = Door(TRITON_DEVICES, check, prepare, long_way, setting, save_inputs, backward)
    operator.register_kernel(TRITON_DEVICES)(_without_none(door.compute))
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=save_inputs)
    # Wins over the line above where there are no kernels: autograd sees the reference's steps.
    for key in ("AutogradMPS", "AutogradXPU", *(() if INTERPRETED else ("AutogradCPU",))):
        _library.impl(name, reference, key)
    return door


def register_backward(
    name: str,
    schema: Callable[..., Any],
    *,
    prepare: Callable[..., Compute],
    fake: Callable[..., Any],
    setting: Callable[..., object] | None = None,
) -> Door:
    """Register `pixart::name`, the gradient of an operator, for TRITON_DEVICES; returns what calls it.

    schema: a function whose annotations say what it takes and gives; it is not called.
    """
    described = torch.library.infer_schema(schema, mutates_args=())
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        _without_none(lambda *arguments: door.compute(*arguments)),
        mutates_args=(),
        device_types=TRITON_DEVICES,
        schema=described,
    )
    operator.register_fake(fake)
    operator.register_autograd(_refuse_second_derivative)
    door = Door(TRITON_DEVICES, None, prepare, operator, setting)
    return door


def _without_none(compute: Compute) -> Compute:
    """PyTorch's operators give tensors only: what nobody asked for is empty."""

    def call(*arguments: Any) -> Any:
        output = compute(*arguments)
        if not isinstance(output, tuple):
            return output
        given = next(x for x in arguments if isinstance(x, Tensor))
        return tuple(given.new_empty(0, dtype=torch.float32) if x is None else x for x in output)

    return call


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


def are_known(*sizes: int) -> bool:
    """Whether sizes are numbers, not symbols of a program that is traced for several: what asks how large
    a symbol is limits the program to sizes of which the answer is the same."""
    return all(type(size) is int for size in sizes)


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


def check_device(name: str, x: Tensor, beside: Tensor) -> None:
    """A layer that was offloaded or never loaded is on another device, and PyTorch's dispatcher would
    follow it: to nothing but shapes, on "meta"."""
    if x.device != beside.device:
        raise ValueError(f"{name} must be on {beside.device}, got {x.device}")


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} must be fp32, bf16, fp16 or fp64, got {x.dtype}; cast it")
