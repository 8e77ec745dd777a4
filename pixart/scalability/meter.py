"""How much memory a process holds at its peak, for one that measures a single thing."""

from contextlib import suppress
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET, RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # proc(5)


class Meter:
    """The most bytes held since its making, beyond those held then: on a CUDA device what PyTorch's allocator
    gave out, on Linux the resident set. Elsewhere nobody tells.

    Not getrusage's ru_maxrss: it begins with the peak of the process that started this one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif STATUS.exists():
            with suppress(
                OSError
            ):  # where it may not, what importing held at its peak may hide a little
                RESET.write_text(RESET_PEAK)
            self._before = _status("VmRSS")

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or not STATUS.exists():
            return None
        return max(_status("VmHWM") - self._before, 0)


def _status(field: str) -> int:
    """Bytes, of the process's own status."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0
