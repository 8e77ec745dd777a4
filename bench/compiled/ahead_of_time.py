"""Compile what a launcher would launch, for a GPU that is not there.

The operators themselves run, forward and backward, on tensors without data (device "meta") of real
shapes, so that types, strides, divisibility and constants are those of a real launch. Only the last
step differs: where Triton would time the configurations and start one, each is compiled and noted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.workloads import sizes as shapes
from pixart.resolution import RESOLUTIONS
from pixart_kernels import compress_kv, flash_attention, gate_add, gate_add_modulate, modulate
from pixart_kernels.dispatch import launch
from pixart_kernels.dispatch.registration import NAMESPACE

BATCH = 2  # guidance: with and without the caption
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Launch(NamedTuple):
    kernel: str  # "attention_forward.forward": its file and its name there
    config: str
    is_default: bool  # first of the list that is tuned over
    compiled: Any  # CompiledKernel, or None
    error: str
    floor_bytes: int  # of the tensors it takes, each once


class Case(NamedTuple):
    """A call of an operator as the model makes it."""

    name: str
    resolution: str
    dtype: str
    head_dim: int  # of attention, else 0
    call: Callable[[], Any]

    def run(self) -> None:
        """Forward, and backward unless gradients are off."""
        outputs = self.call()
        if torch.is_grad_enabled():
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


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
def recording(architecture: str, defaults_only: bool = False) -> Iterator[list[Launch]]:
    """While it lasts, launches on that architecture are compiled into the list instead.

    defaults_only: of each list of configurations, the first.
    """
    launches: list[Launch] = []
    compile_only = JITFunction.run
    tuned: dict[str, Any] = {"default": True, "names": ()}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled, error = None, ""
        try:
            compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        except (TritonError, RuntimeError) as failure:
            error = _cause(failure)
        label = _label(kwargs, tuned["names"])
        kernel = f"{self.module.rpartition('.')[2]}.{self.fn.__name__.lstrip('_')}"
        floor = _floor_bytes((args, tuple(kwargs.values())))
        launches.append(Launch(kernel, label, tuned["default"], compiled, error, floor))

    def tune(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        # Triton prunes nothing where there is nothing to choose.
        configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
        for config in configs[:1] if defaults_only else configs:
            options = config.all_kwargs()
            if config.pre_hook:
                config.pre_hook({**self.nargs, **kwargs, **options})
            tuned.update(default=config is configs[0], names=tuple(config.kwargs))
            self.fn.run(*args, **kwargs, **options)
        tuned.update(default=True, names=())

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", tune),
        mock.patch.object(driver, "_active", _Driver(architecture)),
        mock.patch.object(launch, "architecture", lambda device: architecture),
        _Launchers(),
    ):
        yield launches


def _cause(failure: BaseException) -> str:
    """In one line; Triton wraps an error in one more for each function that it is inside."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"


def _label(options: dict[str, Any], names: tuple[str, ...]) -> str:
    """ "Q128-K64-w8-s3": tuned constants, warps and stages."""
    parts = [f"{name.removeprefix('BLOCK_')}{options[name]}" for name in names]
    parts.append(f"w{options.get('num_warps', 4)}")
    if "num_stages" in options:
        parts.append(f"s{options['num_stages']}")
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


def cases() -> Iterator[Case]:
    """Every call that the model makes, and the other dtypes, head sizes and ratios that users have."""
    for resolution in RESOLUTIONS:
        for kind in ("self", "compressed", "cross", "masked"):
            yield attention("bf16", 72, kind, resolution)
        yield compression("bf16", 2, resolution)
        yield from modulation("bf16", resolution)
    for dtype, head_dim in (("bf16", 64), ("bf16", 96), ("fp16", 72), ("fp32", 72)):
        yield attention(dtype, head_dim, "self", "1k")
    for dtype, ratio in (("bf16", 3), ("bf16", 4), ("fp16", 2), ("fp32", 2)):
        yield compression(dtype, ratio, "1k")
    for dtype in ("fp16", "fp32"):
        yield from modulation(dtype, "1k")


def attention(dtype: str, head_dim: int, kind: str, resolution: str) -> Case:
    """kind: what the keys are, as in shapes.keys. q, k and v are views of what makes them."""
    head = (shapes.XL2.hidden_size // head_dim, head_dim)
    queries, keys = shapes.tokens(resolution), shapes.keys(kind, resolution)
    if kind in ("self", "compressed"):
        q, k, v = _empty(queries, 3, *head, dtype=dtype).unbind(2)
    else:
        q = _empty(queries, *head, dtype=dtype)
        k, v = _empty(keys, 2, *head, dtype=dtype).unbind(2)
    if kind == "compressed":
        k, v = (_empty(keys, *head, dtype=dtype) for _ in range(2))
    lengths = torch.empty(BATCH, dtype=torch.int32, device="meta") if kind == "masked" else None
    run = partial(flash_attention, q, k, v, kv_lengths=lengths)
    return Case(f"{kind}-{dtype}-{head_dim}", resolution, dtype, head_dim, run)


def compression(dtype: str, ratio: int, resolution: str) -> Case:
    channels = shapes.XL2.hidden_size
    k, v = _empty(shapes.tokens(resolution), 3, channels, dtype=dtype).unbind(2)[1:]
    weight = _parameter(channels, 1, ratio, ratio, dtype=dtype)
    rows = [_parameter(channels, dtype=dtype) for _ in range(3)]
    grid = shapes.grid(resolution)
    run = partial(compress_kv, k, v, weight, *rows, grid=grid, ratio=ratio)
    return Case(f"compress{ratio}-{dtype}", resolution, dtype, 0, run)


def modulation(dtype: str, resolution: str) -> Iterator[Case]:
    channels = shapes.XL2.hidden_size
    x, branch = (_empty(shapes.tokens(resolution), channels, dtype=dtype) for _ in range(2))
    # The model keeps these in fp32, six of them side by side.
    gate, shift, scale = _empty(6, channels, dtype="fp32").unbind(1)[:3]
    calls: dict[str, Callable[[], object]] = {
        "modulate": partial(modulate, x, shift, scale),
        "gate_add": partial(gate_add, x, branch, gate),
        "add": partial(gate_add, x, branch),
        "gate_add_modulate": partial(gate_add_modulate, x, branch, gate, shift, scale),
        "add_modulate": partial(gate_add_modulate, x, branch, None, shift, scale),
    }
    for name, run in calls.items():
        yield Case(f"{name}-{dtype}", resolution, dtype, 0, run)


def _empty(*shape: int, dtype: str) -> Tensor:
    return _parameter(BATCH, *shape, dtype=dtype)


def _parameter(*shape: int, dtype: str) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta", requires_grad=True)
