"""The device to work on: which there is, how fast it multiplies, and how much memory it has left."""

import ctypes
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
# Limit and use of a container, version 2 of control groups first.
GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
PROCESS_STATUS = Path("/proc/self/status")
# (rows, in, out) of products, smaller first: squares, and the layers of XL/2 at 256 and 1,024 tokens.
_CPU_PRODUCTS = (
    (256, 256, 256), (512, 512, 512), (256, 1152, 1152), (768, 768, 768), (256, 1152, 4608),
    (256, 4608, 1152), (1152, 1152, 1152), (1024, 1152, 4608), (1024, 4608, 1152),
)  # fmt: skip
_PRODUCTS = (
    (4096, 4096, 4096), (16384, 1152, 4608), (16384, 4608, 1152), (8192, 8192, 8192),
)  # fmt: skip


def check_cuda_graph(wanted: bool | Literal["auto"], device: torch.device) -> None:
    """Raise ValueError if launches are to be recorded on a device that cannot, or for another word."""
    if wanted != "auto" and not isinstance(wanted, bool):
        raise ValueError(f'cuda_graph must be True, False or "auto", got {wanted!r}')
    if wanted is True and device.type != "cuda":
        raise ValueError(
            f"cuda_graph must be False on {device}, got True: only a CUDA device records its "
            "launches; leave it out"
        )


def check_attention(wanted: str | None, device: torch.device) -> None:
    """Raise ValueError if self-attention cannot be computed in this precision on this device."""
    if wanted is None:
        return
    if wanted not in ("int8", "fp8"):
        raise ValueError(f'attention must be "int8", "fp8" or None, got {wanted!r}')
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f'attention must be None on {device}, got "{wanted}": 8-bit attention runs on CUDA, and on '
            "a CPU by a slow reference; leave it out"
        )
    if wanted == "fp8" and device.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError(
                f'attention must be "int8" or None on {name}, got "fp8": its matrix units have no e4m3 '
                "numbers; NVIDIA's have from sm_89 on"
            )


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions of fp32 in fp32 on a GPU, where PyTorch rounds their inputs to TF32 unless told
    otherwise: what measures pictures must give the same numbers as on a CPU."""
    from torch.backends import cudnn

    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def choose_device(device: str | torch.device | None, *, may_lack: bool = False) -> torch.device:
    """The device asked for, or the best there is. ValueError when it is not there, which a GPU may lack that
    nothing is to be computed on."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {str(device)!r}")
    if chosen.type == "cuda" and may_lack:
        return chosen
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be there, got {str(device)!r}, but PyTorch finds no CUDA device; "
            "use --device cpu, or install a CUDA build of torch"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device must be below cuda:{count}, got {str(device)!r}")
    return chosen


def check_kernels(device: torch.device) -> None:
    """Raise ValueError if the operators' kernels cannot run on a device that would need them."""
    obstacle = kernel_obstacle(device)
    if obstacle is not None:
        raise ValueError(f"device must run the kernels, got {device}: {obstacle}; use --device cpu")


def kernel_obstacle(device: torch.device) -> str | None:
    """Why a GPU cannot run the operators' kernels, None if it can or is none."""
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the kernels need Triton (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability 8.0, {name} has less"
    return None


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on the device; sys.maxsize where nobody can tell."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The driver counts as taken what PyTorch keeps for its next tensors.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu":
        return min(_host_memory(), *(_group_memory(*files) for files in GROUP_FILES))
    return sys.maxsize


def return_cached(device: torch.device | str) -> None:
    """Give back the memory that PyTorch, or on a CPU glibc, holds on the device and does not use."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], object] | None:
    """Of glibc, None where the process has another library. It lets other threads of Python run."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim


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
    """Bytes at most, of the GPU that had most allocated, else of the process (0 on Windows)."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if most := max(map(torch.cuda.max_memory_allocated, gpus), default=0):
        return most  # the current device is not always the one that is worked on
    # getrusage's ru_maxrss outlives execve(2): in a child it begins with the peak of its parent.
    if (most_held := process_memory("VmHWM")) is not None:
        return most_held
    if sys.platform == "win32":
        return 0
    import resource

    # macOS counts in bytes, others in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_memory(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Bytes that this process holds, or held at most, by proc(5); None where there is no such file."""
    if not PROCESS_STATUS.exists():
        return None
    for line in PROCESS_STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model, where the system tells it, else its kind."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


@cache
def has_bf16_products(device: torch.device) -> bool:
    """Whether products of bf16 matrices are instructions of the device. A CPU without them emulates them: on
    an AMD EPYC of Zen 2 they take 14 times as long as those of fp32."""
    if device.type != "cpu":
        return True
    found = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(found)


@cache
def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of matrix products as linear layers make them, the most that any of several sizes
    reached in about so many seconds: what shares of this device's peak are shares of.

    Short products among them: on a CPU that others use, one of 20 ms is always interrupted, and a
    longer one reaches no more where nobody else is. Random numbers, as zeros multiply faster.
    """
    at_once = 1 if device.type == "cpu" else 10  # so that launching takes no part of the time
    best, started = 0.0, time.perf_counter()
    products: list[tuple[int, Callable[[], object]]] = []
    for rows, size_in, size_out in _CPU_PRODUCTS if device.type == "cpu" else _PRODUCTS:
        if products and time.perf_counter() - started > seconds / 2:
            break  # a CPU without instructions for the dtype would take minutes for the longest
        flops = at_once * 2 * rows * size_in * size_out
        product = _product(rows, size_in, size_out, device, dtype)
        _seconds_of(product, at_once, device)  # libraries choose their kernels
        best = max(best, flops / _seconds_of(product, at_once, device))
        products.append((flops, product))
    while time.perf_counter() - started < seconds:
        for flops, product in products:
            best = max(best, flops / _seconds_of(product, at_once, device))
    return best


def _product(
    rows: int, size_in: int, size_out: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    x = torch.randn(rows, size_in, device=device).to(dtype)
    weight = torch.randn(size_out, size_in, device=device).to(dtype)
    return lambda: torch.mm(x, weight.t())


def _seconds_of(call: Callable[[], object], times: int, device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    """Until all that it was asked for is computed, for clocks."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
