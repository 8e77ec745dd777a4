"""How much memory a process holds at its peak, for one that measures a single thing."""

from contextlib import suppress
from pathlib import Path

import torch

from pixart.device import process_memory

RESET, RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # proc(5)


class Meter:
    """The most bytes held since its making, beyond those held then: on a CUDA device what PyTorch's allocator
    gave out, on Linux the resident set. Elsewhere nobody tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = process_memory("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self._before is not None:
            # Where it may not, what importing held at its peak may hide a little.
            with suppress(OSError):
                RESET.write_text(RESET_PEAK)

    def peak(self) -> int | None:
        """None where nobody tells."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        most = process_memory("VmHWM")
        if self.device.type != "cpu" or most is None or self._before is None:
            return None
        return max(most - self._before, 0)
