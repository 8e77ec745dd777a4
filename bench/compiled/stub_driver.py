"""A GPU without a GPU: a stub of the CUDA driver, on which the whole host path of a launch runs.

After activate("sm_90") the operators launch their kernels for CPU tensors: the dispatcher, our launchers,
Triton's JIT, its compilers for that architecture, its launcher and the driver's calls all run, and only
the kernels do not, so that outputs hold whatever memory held. The stub (stub_driver.c) refuses launches
and TMA maps that a GPU would refuse, counts both, and writes a line about each into a log.

It replaces the driver of its process for good: whoever measures or tests with it starts a process.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pixart.files import parse_json, written_aside

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
# Bytes of shared memory that a block can have (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {
    "sm_75": 65536,
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}
COUNTS = ("launches", "maps", "refused")


class NoCompiler(RuntimeError):
    """There is no C compiler to build the stub with."""


_library: Any = None


def activate(architecture: str = "sm_90", log: Path | None = None) -> None:
    """Make CPU tensors go the way of a GPU's. To be called before triton and pixart_kernels are imported.

    log: a file that a line about each launch and each map is added to, see `logged`. Raises ValueError
    for an architecture that it does not know, RuntimeError where it comes too late or cannot be built.
    """
    global _library
    if architecture not in SHARED_MEMORY:
        known = ", ".join(SHARED_MEMORY)
        raise ValueError(f"architecture must be one of {known}, got {architecture}")
    for package in ("triton", "pixart_kernels"):
        if package in sys.modules:
            raise RuntimeError(f"the stub driver must be activated before {package} is imported")
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("the stub driver compiles kernels: unset TRITON_INTERPRET")
    import torch

    if torch.cuda.is_available():
        raise RuntimeError(
            "the stub driver must not replace that of a GPU: CUDA_VISIBLE_DEVICES=''"
        )
    _register_for_cpu_tensors()
    path = build()
    # Triton's modules are linked with this name, and get what is loaded already.
    _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    _library.stub_count.restype = ctypes.c_long
    capability = int(architecture.removeprefix("sm_"))
    shared = SHARED_MEMORY[architecture]
    _library.stub_configure(capability, shared, os.fsencode(log) if log else None)
    _tell_torch(capability, shared)
    _install(path.parent)


def counted(what: str) -> int:
    """How many "launches" and "maps" there were, and how many of both were "refused"."""
    if what not in COUNTS:
        raise ValueError(f"what must be one of {', '.join(COUNTS)}, got {what}")
    return int(_library.stub_count(what.encode()))


def logged(log: Path) -> list[dict[str, Any]]:
    """What a log says, in order: {"kind": "launch", "kernel", "grid", "block", "shared", "stream",
    "refused"} or {"kind": "map", "bytes" of an element, "dims", "strides", "box", "swizzle", "fill",
    "refused"}, innermost dimensions first; "refused" is the reason, empty if there is none."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [parse_json(line, str(log)) for line in lines]


def build() -> Path:
    """libcuda.so.1, in a folder of the user's cache that is named after what it is made of."""
    include = _triton() / "backends" / "nvidia" / "include"
    command = [_compiler(), "-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    parts = "\0".join((SOURCE.read_text(encoding="utf-8"), *command))
    path = _cache() / hashlib.sha256(parts.encode()).hexdigest()[:16] / "libcuda.so.1"
    if path.exists():
        return path
    with written_aside(path, durable=False) as aside:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(aside)], capture_output=True, text=True
        )
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise RuntimeError(f"{command[0]} cannot build the stub driver: {reason}")
    return path


def _compiler() -> str:
    names = (os.environ["CC"],) if os.environ.get("CC") else COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise NoCompiler(
        f"the stub driver needs a C compiler, found no {' or '.join(names)}; install one or set CC"
    )


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # not set, or to be ignored (XDG Base Directory Specification)
        folder = Path.home() / ".cache"
    return folder / "pixart" / "stub_driver"


def _triton() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("the stub driver needs Triton; pip install triton")
    return Path(spec.origin).parent


def _register_for_cpu_tensors() -> None:
    """Import the operators with their kernels registered for CPU tensors, as for the interpreter,
    and leave them believing that there is none."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("pixart_kernels")  # every operator, and not Triton
    finally:
        del os.environ["TRITON_INTERPRET"]
    for name, module in list(sys.modules.items()):
        if name.startswith("pixart_kernels") and hasattr(module, "INTERPRETED"):
            vars(module)["INTERPRETED"] = False


def _tell_torch(capability: int, shared: int) -> None:
    """What launchers ask PyTorch about a device."""
    import torch

    major, minor = divmod(capability, 10)
    properties: Any = SimpleNamespace(
        name="stub",
        major=major,
        minor=minor,
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        warp_size=32,
        shared_memory_per_block_optin=shared,
    )
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (major, minor)


def _install(folder: Path) -> None:
    import triton
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    triton.knobs.nvidia.libcuda_path = str(folder)
    stub: Any = CudaDriver()
    # These ask a PyTorch that was built for GPUs; there is one device, and one stream.
    stub.get_current_device = lambda: 0
    stub.set_current_device = lambda device: None
    stub.get_current_stream = lambda device: 0
    # Nothing runs, so nothing can be timed: of several configurations the first wins.
    stub.get_benchmarker = lambda: lambda call, quantiles, **options: [1.0] * len(quantiles)
    driver.set_active(stub)
