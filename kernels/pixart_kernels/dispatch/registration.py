"""How an operator reaches PyTorch: Triton where Triton runs, its eager reference everywhere else.

PyTorch's dispatcher is the only dispatch code. An operator is registered with its reference for
every device and its Triton launcher for TRITON_DEVICES; its gradient is a second operator, which
only those devices have. On other devices autograd records the reference's own steps, so that there
nothing is slower or larger than plain PyTorch. Triton is imported when a kernel is first launched:
it is not there on every system, and takes time.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "pixart"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
TRITON_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

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
    """Register `pixart::name` and return it. All functions take the arguments of `reference`,
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
    return operator


def register_backward(
    name: str, launch: Callable[..., Any], *, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `pixart::name`, the gradient of an operator, for TRITON_DEVICES; returns it."""
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}", launch, mutates_args=(), device_types=TRITON_DEVICES
    )
    operator.register_fake(fake)
    return operator
