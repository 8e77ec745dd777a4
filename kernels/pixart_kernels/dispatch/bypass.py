"""The door of an operator: round PyTorch's dispatcher where nothing would see the difference.

What follows from dtypes, shapes and strides is worked out once, by `prepare`, and kept; a call that
nothing observes goes straight to it. The dispatcher, its autograd formula and its checks in Python take
some 20 µs a call, longer than many of these kernels run.
"""

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

MOST_KEPT = 4096  # shapes of an operator; then all are worked out again

Compute = Callable[..., Any]
P = ParamSpec("P")
T = TypeVar("T")

try:
    from torch._C import (
        _get_function_stack_at,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
    from torch.autograd import profiler
    from torch.utils._device import DeviceContext

    _ = profiler._is_profiler_enabled

    def is_observed() -> bool:
        """Whether calls are compiled, traced, transformed, intercepted or profiled."""
        return bool(
            torch.compiler.is_compiling()  # first: a compiler that traces this stops here
            or _len_torch_dispatch_stack()
            or (_len_torch_function_stack() and not _is_only_a_device())
            or peek_interpreter_stack() is not None
            or _get_tracing_state() is not None
            or forward_ad._current_level >= 0
            or profiler._is_profiler_enabled
        )

    def _is_only_a_device() -> bool:
        # torch.set_default_device leaves its mode on for good; it concerns new tensors only, and
        # those made here name their device.
        return _len_torch_function_stack() == 1 and type(_get_function_stack_at(0)) is DeviceContext

except (ImportError, AttributeError):  # private names: without them every call takes the long way

    def is_observed() -> bool:
        return True


# Subclasses (DTensor, FakeTensor, ...) may mean something else by every operation.
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_NUMBERS = frozenset((float, int, bool, str, type(None)))
_doors: "list[Door]" = []  # one for each operator
_Kept = dict["Door", dict[tuple[Any, ...], Compute]]
_apart: dict[Hashable, _Kept] = {}
_outer: list[_Kept] = []  # what is set aside meanwhile
_remembered: list[Any] = []


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """functools.cache, until `forget`."""
    cached = functools.cache(function)
    _remembered.append(cached)
    return cast(Callable[P, T], cached)


def forget() -> None:
    """Work everything out again at the next call: after a change of what `prepare` goes by."""
    for every in (*_apart.values(), *_outer, {door: door.kept for door in _doors}):
        for kept in every.values():
            kept.clear()
    for cached in _remembered:
        cached.cache_clear()


@contextmanager
def apart(label: Hashable) -> Iterator[None]:
    """While it lasts, for all threads, what was worked out under this label is what is kept."""
    before = {door: door.kept for door in _doors}
    _outer.append(before)
    kept = _apart.setdefault(label, {})
    for door in _doors:
        door.kept = kept.setdefault(door, {})
    try:
        yield
    finally:
        for door in _doors:
            door.kept = before.get(door, {})
        _outer.remove(before)


class Door:
    """An operator, called with the arguments of its schema, all of them in their places.

    devices: types of device that have kernels. check(*arguments) raises for what is wrong with them.
    prepare(*arguments) returns `compute`, which takes these arguments and all others of the same
    dtypes, shapes, strides, numbers and setting, and gives the output. setting(*arguments): what else
    the kernels depend on. long_way(*arguments): the operator as PyTorch knows it. save and backward:
    as in torch.library.register_autograd, None for what has no derivative here.
    """

    def __init__(
        self,
        devices: tuple[str, ...],
        check: Callable[..., None] | None,
        prepare: Callable[..., Compute],
        long_way: Callable[..., Any],
        setting: Callable[..., object] | None = None,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.devices, self.check, self.prepare = devices, check, prepare
        self.long_way, self.setting = long_way, setting
        self.recorded = None if save is None or backward is None else _recorded(save, backward)
        self.kept: dict[tuple[Any, ...], Compute] = {}
        _doors.append(self)

    def __call__(self, *arguments: Any) -> Any:
        if is_observed():
            return self._observed(arguments)
        key: list[Any] = []
        device, records, wants_gradient = None, torch.is_grad_enabled(), False
        for x in arguments:
            kind = type(x)
            if kind in _TENSORS:
                if device is None:
                    device = x.device
                    if device.type not in self.devices or x.dtype is torch.float64:
                        return self._observed(arguments)
                    key.append(device)
                elif x.device != device:
                    return self._observed(arguments)
                # A lazy sign, which a kernel would not see; and several gradients as one
                # (is_grads_batched), which have no memory of their own.
                if x.is_neg() or (self.recorded is None and is_legacy_batchedtensor(x)):
                    return self._observed(arguments)
                if records and x.requires_grad:
                    wants_gradient = True
                key += (x.dtype, x.shape, x.stride())
            elif kind in _NUMBERS:
                key.append(x)
            else:
                return self._observed(arguments)
        if self.setting is not None:  # which only kernels depend on
            key.append(self.setting(*arguments))
        known = tuple(key)
        compute = self.kept.get(known) or self._keep(known, arguments)
        if wants_gradient:
            if self.recorded is None:
                return self.long_way(*arguments)
            return self.recorded.apply(*arguments, compute)
        return compute(*arguments)

    def _observed(self, arguments: tuple[Any, ...]) -> Any:
        if self.check is not None:
            self.check(*arguments)
        return self.long_way(*arguments)

    def compute(self, *arguments: Any) -> Any:
        """What the operator does on devices that have kernels, for PyTorch's dispatcher."""
        key: list[Any] = [] if self.setting is None else [self.setting(*arguments)]
        for x in arguments:
            if isinstance(x, Tensor):
                key += (x.device, x.dtype, x.shape, x.stride())
            else:
                key.append(x)
        known = ("dispatched", *key)
        compute = self.kept.get(known) or self._keep(known, arguments)
        return compute(*arguments)

    def _keep(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> Compute:
        if self.check is not None:
            self.check(*arguments)
        first = next(x for x in arguments if isinstance(x, Tensor))
        if first.dtype is torch.float64:
            raise ValueError(
                "kernels compute in fp32, got fp64; call the public function, which takes the reference"
            )
        compute = self.prepare(*arguments)
        if len(self.kept) >= MOST_KEPT:  # shapes without end: Triton's own cache still has them
            self.kept.clear()
        self.kept[key] = compute
        return compute


def _recorded(save: Callable[..., None], backward: Callable[..., Any]) -> Any:
    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *arguments, compute = inputs
            output = compute(*arguments)
            save(ctx, tuple(arguments), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            found = backward(ctx, *gradients)
            # As PyTorch has it: of an operator with one argument it may be that one's.
            return (*(found if isinstance(found, tuple | list) else (found,)), None)

    return Recorded
