"""Counts what is allocated on a device, and how much of it at once."""

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixart.pipeline.memory.heap import Heap

_BLOCKED = 16  # channels in which oneDNN's convolutions compute, on CPUs with AVX-512


class Meter(TorchDispatchMode):
    """While it lasts: bytes of tensors that are made. Of a CPU `heap` says what its process holds for them.

    now, peak: bytes in use. largest: of one tensor. What was there before (`own`) is not counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.heap = Heap() if device.type == "cpu" else None
        self._device, self._keys = device.type, itertools.count()
        self._known: dict[int, int | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in fakes.py

    def own(self, tensors: Iterable[Tensor]) -> None:
        """Leave these out."""
        for tensor in tensors:
            self._known.setdefault(tensor.untyped_storage()._cdata, None)

    @property
    def held(self) -> int:
        """Bytes at the peak that are held for what is in use."""
        return self.peak if self.heap is None else max(self.peak, self.heap.peak)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        workspace = self._workspace(func, args, made)
        for one in made:
            if one.device.type == self._device:
                self._add(one)
        for key, size in workspace[1:]:
            self._give(key, size)
        return out

    def _workspace(self, func: Any, args: tuple[Any, ...], made: list[Tensor]) -> list[Any]:
        """Take what the operator needs meanwhile: a CPU's convolution computes on copies of its input and output
        in blocks of channels, of which that of the input goes before the output is made."""
        if self._device != "cpu" or func is not torch.ops.aten.convolution.default:
            return []
        x, weight, groups = args[0], args[1], args[8]
        if x.device.type != "cpu" or groups > 1 or weight.shape[1] < _BLOCKED:
            return []
        taken = [(next(self._keys), _blocked(one)) for one in (x, made[0])]
        for key, size in taken:
            self._take(key, size)
        self._give(*taken[0])
        return taken

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return
        key, size = next(self._keys), storage.nbytes()
        self._known[place] = key
        self._take(key, size)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._drop, place, size).atexit = False

    def _drop(self, place: int, size: int) -> None:
        key = self._known.pop(place)
        assert key is not None
        self._give(key, size)

    def _take(self, key: int, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        if self.heap is not None and size:
            self.heap.take(key, size)

    def _give(self, key: int, size: int) -> None:
        self.now -= size
        if self.heap is not None and size:
            self.heap.give(key)


def _blocked(x: Tensor) -> int:
    channels = -(-x.shape[1] // _BLOCKED) * _BLOCKED
    return x.numel() // x.shape[1] * channels * x.itemsize
