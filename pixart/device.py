"""The device to work on, how much memory it has left for us, and how much we took."""

import sys
from pathlib import Path

import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
# Limit and use of a container, version 2 of control groups first.
GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def check_cuda_graph(wanted: bool, device: torch.device) -> None:
    """Raise ValueError if launches cannot be recorded on this device."""
    if wanted and device.type != "cuda":
        raise ValueError(
            f"cuda_graph must be False on {device}, got True: only a CUDA device records its "
            "launches; leave it out"
        )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is. ValueError when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {str(device)!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be there, got {str(device)!r}, but PyTorch finds no CUDA device; "
            "use --device cpu, or install a CUDA build of torch"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device must be below cuda:{count}, got {str(device)!r}")
    return chosen


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on the device; sys.maxsize where nobody can tell."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu":
        return min(_host_memory(), *(_group_memory(*files) for files in GROUP_FILES))
    return sys.maxsize


def return_cached(device: torch.device | str) -> None:
    """Give back the memory that PyTorch holds on the device and does not use."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _host_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that the kernel would give without swapping, page cache included."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return sys.maxsize
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else sys.maxsize


def _group_memory(limit: str, usage: str, stat: str) -> int:
    """A container's limit less its use; its file cache counts as free."""
    try:
        most = int((CONTROL_GROUP / limit).read_text())
        used = int((CONTROL_GROUP / usage).read_text())
        lines = (CONTROL_GROUP / stat).read_text().splitlines()
    except (OSError, ValueError):  # no such version here, or the limit is the word "max"
        return sys.maxsize
    cache = [int(line.split()[1]) for line in lines if line.startswith("inactive_file ")]
    return max(most - used + sum(cache), 0)


def peak_memory() -> int:
    """Bytes at most, of the CUDA allocator where it was used, else of the process (0 on Windows)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
