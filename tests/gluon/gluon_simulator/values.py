"""What a kernel computes with: tensors of registers, and pointers into global memory, on NumPy."""

import operator
import types
from collections.abc import Callable
from typing import Any

import numpy as np

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Fault(Exception):
    """The kernel's mistake."""


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x to the nearest number of "bf16" or "fp16", ties to even; everything is kept as fp32."""
    x = np.asarray(x, np.float32)
    if dtype == "fp32":
        return x
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
    up = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return np.where(np.isnan(x), np.float32(np.nan), up.astype(np.uint32).view(np.float32))


def data(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


class Tensor:
    """Numbers in registers, or one number. dtype: a name of BYTES, or None where it is of no matter."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: Any, dtype: str | None = None) -> None:
        self.data = np.asarray(data)
        self.dtype = dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: str) -> "Tensor":
        return Tensor(rounded(self.data, dtype) if dtype in BYTES else self.data, dtype)

    def reshape(self, shape: Any) -> "Tensor":
        return Tensor(self.data.reshape([int(n) for n in shape]), self.dtype)

    def __getitem__(self, key: Any) -> "Tensor":
        return Tensor(self.data[key], self.dtype)

    def __index__(self) -> int:
        return int(self.data)

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> "Tensor":
        return Tensor(-self.data)

    def __invert__(self) -> "Tensor":
        return Tensor(~self.data)


_TWO_SIDED = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "and_",
    "or_",
    "xor",
    "rshift",
    "lshift",
]
_COMPARISONS = ["lt", "le", "gt", "ge", "eq", "ne"]


def _operator(apply: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Tensor, Any], Any]:
    def operate(self: Tensor, other: Any) -> Any:
        if not isinstance(other, Tensor | int | float | np.generic | np.ndarray):
            return NotImplemented
        with np.errstate(all="ignore"):
            mine, others = self.data, data(other)
            return Tensor(apply(others, mine) if swapped else apply(mine, others))

    return operate


for _name in _TWO_SIDED + _COMPARISONS:
    _apply = getattr(operator, _name)
    _name = _name.strip("_")
    setattr(Tensor, f"__{_name}__", _operator(_apply, swapped=False))
    if _name not in _COMPARISONS:
        setattr(Tensor, f"__r{_name}__", _operator(_apply, swapped=True))


class Accumulator:
    """What a product will be: no number of it may be used before it was waited for."""

    def __init__(self, value: np.ndarray, group: int) -> None:
        self.value = value
        self.group = group  # which of its partition's products

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise Fault("uses a product that is still under way")

    __array__ = __getitem__ = __neg__ = _fail

    def __getattr__(self, name: str) -> Any:
        return self._fail()


for _name in [*(name.strip("_") for name in _TWO_SIDED), *_COMPARISONS]:
    setattr(Accumulator, f"__{_name}__", Accumulator._fail)
    setattr(Accumulator, f"__r{_name}__", Accumulator._fail)


class Pointer:
    """Into a flat array; the offset may be a tensor. dtype: what the elements are rounded to."""

    def __init__(self, array: np.ndarray, offset: Any = 0, dtype: str = "fp32") -> None:
        assert array.ndim == 1, array.shape
        self.array = array
        self.offset = offset
        self.dtype = types.SimpleNamespace(element_ty=dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.array, self.offset + data(other), self.dtype.element_ty)

    __radd__ = __add__

    def places(self, mask: Any, shape: tuple[int, ...] | None = None) -> tuple[Any, Any]:
        """Where it points, broadcast to the shape, and which of these places the mask keeps."""
        where = np.asarray(self.offset)
        if shape is None:
            shape = np.broadcast_shapes(where.shape, np.shape(data(mask)))
        where = np.broadcast_to(where, shape)
        keep = np.ones(shape, bool) if mask is None else np.broadcast_to(data(mask), shape)
        kept = where[keep]
        if kept.size and not (kept.min() >= 0 and kept.max() < self.array.size):
            raise Fault("reads or writes beyond a tensor")
        return where, keep
