"""What every launcher needs from Triton. Imported by the kernel files and by nothing else.

A launcher works out once, for tensors of some dtypes, shapes and strides, what it launches: a `Launch`
for each kernel. From its second call on a Launch starts what Triton compiled, past Triton's binder:
3 µs a call instead of 30, and 7 instead of 45 with descriptors.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pixart_kernels.dispatch.registration import INTERPRETED

if INTERPRETED:
    from pixart_kernels.dispatch import interpreter  # needs NumPy, which torch and triton do not

    interpreter.correct_bfloat16()

ALIGNMENT = 16  # bytes: what Triton looks for in an address, and TMA wants of it
_first_launch = threading.RLock()  # two threads would compile the same kernel twice

Boxes = Callable[[Sequence[Tensor | None]], Sequence[TensorDescriptor | None]]


def architecture(device: torch.device) -> str:
    """What launchers choose kernels by: "sm_90", "gfx942", ..., or "interpreter".

    Raises RuntimeError for a GPU before sm_80, on which nothing is compiled.
    """
    if INTERPRETED and device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    if properties.major < 8:
        raise RuntimeError(
            f"{properties.name} is sm_{properties.major}{properties.minor}, and the kernels need sm_80 "
            "(Ampere) or later; on this GPU use the *_reference functions, or move the model to the CPU"
        )
    return f"sm_{properties.major}{properties.minor}"


def precision(dtype: torch.dtype) -> str:
    """How matrix products take their inputs: tf32 for fp32 ones if the caller's setting says so."""
    if dtype != torch.float32:
        return "ieee"  # of no consequence; and reading a setting that was made elsewhere can raise
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if allowed == "tf32" else "ieee"


def wanted_language() -> str | None:
    """ "triton" or "gluon" where PIXART_ATTENTION says so, None for what the table has first. Raises
    ValueError for other words."""
    value = os.environ.get("PIXART_ATTENTION") or None
    if value not in (None, "triton", "gluon"):
        raise ValueError(f"PIXART_ATTENTION must be triton or gluon, got {value!r}")
    return value


def is_switched_on(name: str) -> bool:
    """An environment variable that is on unless it says 0. Raises ValueError for other words."""
    value = os.environ.get(name, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device what no Launch does: Triton takes the current one, whatever it is given."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Box(TensorDescriptor):
    """A descriptor for the copy engine whose maker has checked what Triton checks again each time."""

    def __post_init__(self) -> None:
        pass


class Launch:
    """One launch of a kernel for tensors of known dtypes, shapes and strides.

    kernel: its parameters are tensors or None, then descriptors, then numbers, then constants.
    device: of the tensors. grid: programs. numbers: the values after the descriptors, constants: those
    of the constexprs, both in the kernel's order. boxes(tensors) makes the descriptors; a kernel that
    can do without takes `box_count` times None where there is no such function or an address is not a
    multiple of 16. options: of Triton's compiler.

    Triton compiles for dtypes, for None, for what integers are and for whether 16 divides an address.
    Who keeps a Launch by dtypes, shapes and strides fixes all but the last: tensors with other
    addresses go Triton's own way, each time.
    """

    __slots__ = (
        "arguments", "box_count", "boxes", "constants", "device", "grid", "kernel", "options", "run",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, int],
        boxes: Boxes | None = None,
        box_count: int = 0,
    ) -> None:
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        if names != list(constants):  # they are passed by place from the second launch on
            raise TypeError(f"constants must be {names}, got {list(constants)}")
        self.kernel = kernel
        self.device = device.index if device.type == "cuda" else None
        self.grid = (*grid, 1, 1)[:3]
        self.arguments, self.constants = (*numbers, *constants.values()), dict(constants)
        # Products and sums of a kernel may be fused on every GPU: the same bits on all of a kind.
        self.options = {"enable_fp_fusion": True, **options}
        self.boxes, self.box_count = boxes, box_count
        self.run: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if self.device is not None and self.device != torch.cuda.current_device():
            with torch.cuda.device(
                self.device
            ):  # Triton takes the current one, whatever it is given
                return self(*tensors)
        addresses: list[int | None] = []
        bits = 0
        for x in tensors:
            if x is None:
                addresses.append(None)
            else:
                address = x.data_ptr()
                addresses.append(address)
                bits |= address
        if self.boxes is None or (bits % ALIGNMENT and self.box_count):
            boxes: Sequence[TensorDescriptor | None] = (None,) * self.box_count
        else:
            boxes = self.boxes(tensors)
        if self.run is not None and not bits % ALIGNMENT:
            return self.run(*addresses, *boxes, *self.arguments)  # on the current stream
        numbers = self.arguments[: len(self.arguments) - len(self.constants)]
        with _first_launch:
            made = self.kernel[self.grid](
                *tensors, *boxes, *numbers, **self.constants, **self.options
            )
        # The interpreter compiles nothing.
        if not bits % ALIGNMENT and hasattr(made, "packed_metadata"):
            self.run = made[self.grid]
        return None
