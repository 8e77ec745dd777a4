"""Compile what a launcher would launch, for a GPU that is not there.

The operators themselves run, forward and backward, on tensors without data (device "meta") of real
shapes, so that types, strides, divisibility and constants are those of a real launch. Only the last
step differs: where Triton would start a kernel, it is compiled and noted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.workloads.operators import OPERATORS, Workload
from bench.workloads.operators.workload import outputs_of
from pixart_kernels.dispatch import bypass, configurations, launch
from pixart_kernels.dispatch.registration import NAMESPACE


class Launch(NamedTuple):
    kernel: str
    config: str
    is_default: bool  # the first of its row's candidates
    compiled: Any  # CompiledKernel, or None
    error: str
    floor_bytes: int  # of the tensors it takes, each once


class _Launchers(TorchDispatchMode):
    """Operators on tensors without data take the way that they take on a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == NAMESPACE:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            return func.redispatch(keys, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Driver:
    """What Triton asks of a GPU's driver before a launch."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        number = architecture.removeprefix("sm_")
        self.target = (
            GPUTarget("cuda", int(number), 32)
            if number != architecture
            else GPUTarget("hip", architecture, 64)
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """While it lasts, launches on that architecture are compiled into the list instead."""
    launches: list[Launch] = []
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled, error = None, ""
        try:
            compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        except (TritonError, RuntimeError) as failure:
            error = _cause(failure)
        floor = _floor_bytes((args, tuple(kwargs.values())))
        launches.append(Launch(kernel_name(self), _label(kwargs), True, compiled, error, floor))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(driver, "_active", _Driver(architecture)),
        mock.patch.object(launch, "architecture", lambda device: architecture),
        _Launchers(),
    ):
        bypass.forget()  # what was worked out for another architecture
        try:
            yield launches
        finally:
            bypass.forget()


def compile_all(work: Workload, architecture: str, defaults_only: bool = False) -> list[Launch]:
    """Every kernel that the work launches, with every candidate of its row, or with the first."""
    with recording(architecture) as launches:
        configurations.forget_chosen()
        run(work)
        rows = configurations.chosen()
        found = list(launches)
        for kernel, (row, first) in rows.items():
            for candidate in () if defaults_only else row.candidates:
                # Those in another language are in candidates.py, which also has them for scaled queries.
                if candidate == first or configurations.language(candidate) != "triton":
                    continue
                launches.clear()
                with configurations.pinned({kernel: candidate}):
                    run(work)
                # The others were compiled with their first ones above.
                known = {(one.kernel, one.config) for one in found}
                new = [one for one in launches if (one.kernel, one.config) not in known]
                found += [one._replace(is_default=False) for one in new]
    return found


def kernel_name(kernel: Any) -> str:
    """ "attention_forward.forward": its module and its name there."""
    module = kernel.module.removeprefix("pixart_kernels.").replace(".", "_")
    return f"{module}.{kernel.fn.__name__.lstrip('_')}"


def _cause(failure: BaseException) -> str:
    """In one line; Triton wraps an error in one more for each function that it is inside."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"


def _label(options: dict[str, Any]) -> str:
    """ "Q128-K64-w8-s3": tuned constants, warps and stages."""
    tuned = ("BLOCK_Q", "BLOCK_K", "MOST_ROWS", "STAGES")
    parts = [f"{name.removeprefix('BLOCK_')}{options[name]}" for name in tuned if name in options]
    parts.append(f"w{options.get('num_warps', 4)}")
    for name, letter in (("num_stages", "s"), ("maxnreg", "r")):
        if name in options:
            parts.append(f"{letter}{options[name]}")
    return "-".join(parts)


def _floor_bytes(arguments: object) -> int:
    sizes: dict[tuple[object, object], int] = {}
    for tensor in _tensors(arguments):
        # A pointer and TMA descriptors may lead to the same elements.
        start = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        size = tensor.numel() * tensor.element_size()
        sizes[start] = max(size, sizes.get(start, 0))
    return sum(sizes.values())


def _tensors(arguments: object) -> Iterator[Tensor]:
    if isinstance(arguments, tuple | list):
        for argument in arguments:
            yield from _tensors(argument)
    elif isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, TensorDescriptor):
        yield arguments.base


def cases() -> list[Workload]:
    """Every call that the model makes, and the other dtypes, head sizes and ratios that users have."""
    return [work for operator in OPERATORS.values() for work in operator.compiled(operator)]


def run(work: Workload) -> None:
    """Forward, and backward unless gradients are off."""
    outputs = outputs_of(work.operator.ours(**work.inputs(torch.device("meta"))))
    if torch.is_grad_enabled() and work.operator.has_backward:
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
