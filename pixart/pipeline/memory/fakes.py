"""Tensors without numbers, on any device: the code of a run goes over them, and allocates what it would."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

Network = TypeVar("Network", bound=nn.Module)


class Fakes:
    """Makes such tensors, which go with no others."""

    def __init__(self) -> None:
        self._mode = _Mode()

    @contextmanager
    def made(self) -> Iterator[None]:
        """While it lasts every new tensor is one of these, on a GPU that is not here too; no gradients."""
        with self._mode, torch.no_grad(), _AbsentDevice():
            yield


def without_numbers(network: Network, device: torch.device) -> Network:
    """A network on the meta device, moved to a device in name: within `Fakes.made`."""
    sizes = {name: (one.shape, one.dtype) for name, one in _tensors(network).items()}
    held = {
        name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()
    }
    network.load_state_dict(held, assign=True)
    return network.eval()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    # Not its state dict, which detaches each: the mode takes no tensor that is not of its own making.
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


class _Mode(FakeTensorMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or importing the compiler, to keep it out, takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, types, args, kwargs or {})


class _AbsentDevice(TorchFunctionMode):
    """The few calls that ask the driver of a GPU, as which kernels it has: here in terms of those that do not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            return _of_data(args[0], kwargs)
        if func is Tensor.to and (target := _gpu_in((*args[1:], *kwargs.values()))) is not None:
            return _moved(args[0], target, (*args[1:], *kwargs.values()))
        if not (args and isinstance(args[0], Tensor) and args[0].device.type == "cuda"):
            return func(*args, **kwargs)
        x = args[0]
        if func is Tensor.__getitem__:
            return _part(x, args[1])
        if func in (Tensor.__setitem__, Tensor.copy_):
            return x  # which takes no memory
        if func is Tensor.contiguous:
            return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        if func is Tensor.new_tensor:
            return _of_data(args[1], {"dtype": x.dtype, "device": x.device, **kwargs})
        if func is F.scaled_dot_product_attention:  # the kernels that GPUs have store no scores
            return x.new_empty(*x.shape[:-1], args[2].shape[-1])
        return func(*args, **kwargs)


def _gpu_in(given: tuple[Any, ...]) -> torch.device | None:
    places = [torch.device(one) for one in given if isinstance(one, str | torch.device)]
    return next((place for place in places if place.type == "cuda"), None)


def _moved(x: Tensor, place: torch.device, given: tuple[Any, ...]) -> Tensor:
    dtype = next((one for one in given if isinstance(one, torch.dtype)), x.dtype)
    if x.device.type == place.type:
        return x.to(dtype)
    return torch.empty(x.shape, dtype=dtype, device=place)


def _of_data(data: Any, options: dict[str, Any]) -> Tensor:
    like = torch.empty(_shape(data))
    options = {name: options[name] for name in ("dtype", "device") if options.get(name) is not None}
    return like.to(**options) if options else like


def _shape(data: Any) -> tuple[int, ...]:
    if not isinstance(data, list | tuple):
        return ()
    return (len(data), *(_shape(data[0]) if data else ()))


def _part(x: Tensor, index: Any) -> Tensor:
    """x[index] for whole numbers, slices, None and ..., as views."""
    index = index if isinstance(index, tuple) else (index,)
    axis = 0
    for place, one in enumerate(index):
        if one is Ellipsis:
            axis = x.dim() - sum(other is not None for other in index[place + 1 :])
        elif one is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(one, slice):
            start, stop, step = one.indices(x.shape[axis])
            count = len(range(start, stop, step))
            part = x.narrow(axis, start, max(stop - start, 0)) if step == 1 else None
            if part is None:
                part = x.index_select(axis, torch.arange(count, device=x.device))
            x, axis = part, axis + 1
        else:
            x = x.select(axis, one)
    return x
