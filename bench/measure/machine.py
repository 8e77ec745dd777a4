"""What a number was measured on: the machine, its peaks, and what else it did meanwhile."""

import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.measure import timing
from pixart.device import measure_peak, processor_name, usable_cores

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("kernels", "pixart", "bench")
LIBRARIES = ("torch", "triton", "numpy", "diffusers", "transformers", "flash-attn", "flash-attn-4")
PRODUCTS = {torch.bfloat16: "matmul", torch.float32: "matmul_fp32"}  # names of peaks
PROCESSOR_TIMES = Path("/proc/stat")
IDLE = (3, 4)  # columns of its first line: idle, and waiting for a disk
TICKS = 100  # per second: what Linux reports in, whatever its own clock (proc(5), USER_HZ)
READINGS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw"}
READINGS["celsius"] = "temperature.gpu"


def identity(device: torch.device) -> dict[str, Any]:
    """Of the machine alone: two commits on one machine have the same."""
    values: dict[str, Any] = {
        "device": device.type,
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return values | (_gpu(device) if device.type == "cuda" else {})


def name(machine: dict[str, Any] | None) -> str:
    """Of an identity: its GPU, or its CPU with what was used of it."""
    if machine is None:
        return "no machine"
    if machine.get("gpu"):
        return machine["gpu"]
    return f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"


def version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def revision() -> dict[str, Any]:
    """The commit, whether the sources are others than its, and the hashes of all and of the kernels'."""
    sources = [f"{folder}/*.py" for folder in SOURCES]
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=all", "--", *sources)),
        "source_sha256": source_hash(),
        "kernels_sha256": source_hash(("kernels",)),
    }


def source_hash(folders: Sequence[str] = SOURCES) -> str:
    """Of the code itself: a copy of the tree may come without its history."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "uuid": _uuid(device),
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": timing.cache_bytes(device),
        "driver": ", ".join(_smi(_uuid(device), "driver_version") or []) or None,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def _uuid(device: torch.device) -> str:
    """The GPU's name for nvidia-smi. Not its index: nvidia-smi counts all that the machine has, and
    PyTorch those of CUDA_VISIBLE_DEVICES, the fastest first."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _smi(uuid: str, *fields: str) -> list[str] | None:
    """What nvidia-smi says of this GPU, None without it or where it knows no such GPU (on AMD, and of
    a part of one)."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [value.strip() for value in done.stdout.split(",")] if done.returncode == 0 else None


class Moment:
    """Seconds of CPU time up to now: of this process and its children, and of the whole machine."""

    def __init__(self) -> None:
        self.wall = time.time()
        self.own = sum(os.times()[:4])
        self.all = _busy_seconds()

    def elsewhere(self, before: "Moment") -> float | None:
        """The share of all cores that others took since `before`; None where nobody tells, and where
        it was too short a time ago for the system's ticks to tell."""
        wall = self.wall - before.wall
        if self.all is None or before.all is None or wall < 100 / TICKS:
            return None
        others = (self.all - before.all) - (self.own - before.own)
        return max(others, 0.0) / (wall * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """Stolen time counts: another virtual machine had the core."""
    if not PROCESSOR_TIMES.exists():
        return None
    columns = PROCESSOR_TIMES.read_text(encoding="ascii").splitlines()[0].split()[1:9]
    busy = sum(int(ticks) for index, ticks in enumerate(columns) if index not in IDLE)
    return busy / TICKS


def load() -> float | None:
    """Processes that wanted a core, in the last minute's mean."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class ClockLog:
    """Clocks, power and temperature of a GPU in the background, about twice a second."""

    def __init__(self, device: torch.device, interval: float = 0.5) -> None:
        self.readings: list[tuple[float, list[str]]] = []
        self.interval = interval
        if device.type == "cuda" and shutil.which("nvidia-smi") is not None:
            threading.Thread(target=self._watch, args=[_uuid(device)], daemon=True).start()

    def _watch(self, uuid: str) -> None:
        while (values := _smi(uuid, *READINGS.values())) is not None:
            self.readings.append((time.time(), values))
            time.sleep(self.interval)

    def since(self, begin: float) -> dict[str, float] | None:
        """Medians from `begin` (of time.time()) on, None if nothing was read in that time."""
        rows = [values for when, values in list(self.readings) if when >= begin]
        columns = dict(zip(READINGS, zip(*rows, strict=True), strict=True)) if rows else {}
        medians = {name: _median(column) for name, column in columns.items()}
        return {name: value for name, value in medians.items() if value is not None} or None


def _median(column: tuple[str, ...]) -> float | None:
    numbers = [float(text) for text in column if text.replace(".", "", 1).isdigit()]
    return statistics.median(numbers) if numbers else None


def peaks(device: torch.device, *, tiny: bool) -> dict[str, dict[str, Any]]:
    """What this machine can do: bytes per second of a large copy, the most that any of some twenty
    reached, and FLOP/s of products in bf16 and in fp32, as measure_peak finds them.

    A copy of n bytes moves 2n.
    """
    size = 4 << 30 if device.type == "cuda" else 1 << 28
    if tiny:
        size = 1 << 22
    some = torch.randint(0, 100, (1 << 20,), dtype=torch.uint8, device=device)
    source = some.repeat(size >> 20)
    target = torch.empty_like(source)
    copy = {"copy": [lambda: target.copy_(source)]}
    (result,) = timing.measure(copy, device, seconds=0.5, least_rounds=20).values()
    if isinstance(result, Exception):
        raise result
    rate = 2 * size / min(result.samples)
    found: dict[str, dict[str, Any]] = {"copy": {"per_second": rate, "seconds": result.summary()}}
    for dtype, product in PRODUCTS.items():
        rate = measure_peak(device, dtype, seconds=0.02 if tiny else 1.0)
        found[product] = {"per_second": rate}
    return found


def product_rate(peaks: dict[str, dict[str, Any]], dtype: torch.dtype) -> float:
    """FLOP/s of the peak that products of a dtype are judged by: fp16's is that of bf16."""
    product = PRODUCTS[torch.bfloat16 if dtype == torch.float16 else dtype]
    return peaks[product]["per_second"]
