"""How much memory something holds at its peak, beyond what was held before it began.

On a GPU: what PyTorch's allocator gave out. On Linux: the resident set of the process, whose peak
the kernel lets a process set back. Elsewhere nobody tells, and every answer is None.
"""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from pixart.device import process_memory, return_cached

RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): what to write there


class Meter:
    """Counts from its making, or from `restart`, on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _can_tell():
            return_cached("cpu")
            RESET.write_text(RESET_PEAK)
        self.base = self._now()

    def held(self) -> int | None:
        """Bytes held now, beyond those at the beginning."""
        if self.device.type != "cuda":
            gc.collect()
            return_cached("cpu")
        return _beyond(self._now(), self.base)

    def peak(self) -> int | None:
        """The most bytes since the beginning, beyond those at the beginning."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return _beyond(torch.cuda.max_memory_allocated(self.device), self.base)
        return _beyond(_read("VmHWM"), self.base)

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        return _read("VmRSS")


def of(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What the call returns, and the bytes that it held at its peak."""
    meter = Meter(device)
    result = call()
    return result, meter.peak()


def of_next(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """The same of a second call: the first one folds weights and sets libraries up, for good."""
    call()
    return of(call, device)


def _beyond(bytes_held: int | None, base: int | None) -> int | None:
    return None if bytes_held is None or base is None else max(bytes_held - base, 0)


def _read(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    return process_memory(field) if _can_tell() else None


def _can_tell() -> bool:
    return os.access(RESET, os.W_OK)
