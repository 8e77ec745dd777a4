"""Files of tensors: safetensors and PyTorch's. The format is taken from the contents, and no code in a
file ever runs."""

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart.files import AGAIN, CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_OTHER_FLOATS = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # no arithmetic: only with a dtype to cast to
# What the unpickler and the zip reader raise over damaged bytes.
_DAMAGED = (
    RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


def container(path: Path) -> str:
    """Told by the first bytes: "safetensors", "zip" (of PyTorch) or "pickle" (of PyTorch < 1.6)."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise CheckpointError(f"{path}: is empty; {AGAIN}")
    # 8 bytes with the length of the header, then the header, which is JSON.
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path}: is a web page, not weights; {AGAIN}")
    raise CheckpointError(
        f"{path}: is neither a safetensors nor a PyTorch file, or is damaged; {AGAIN}"
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). The tensors are mapped from the disk and read when first used."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is truncated or damaged ({_brief(error)}); {AGAIN}"
        ) from error


def read_torch(path: Path, kind: str) -> Any:
    """What torch.load makes of a file of tensors and plain containers; nothing in it may run."""
    try:
        if kind == "pickle":
            _refuse_plain_pickle(path)
        # An archive's directory is at its end: a download that broke off has none.
        elif not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("the end of the archive is missing")
        # Only an archive can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _DAMAGED as error:
        named = re.search(r"GLOBAL (\S+)|function ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named:
            raise CheckpointError(f"{path}: {_refusal(named[1] or named[2])}") from error
        raise CheckpointError(
            f"{path}: is truncated or damaged ({_brief(error)}); {AGAIN}"
        ) from error


def _refuse_plain_pickle(path: Path) -> None:
    """torch.save writes protocol 2. Other pickles are refused; opcodes say what they would call."""
    strings: list[str] = []
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            return
        file.seek(0)
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                strings = str(argument).split()
            if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                raise CheckpointError(f"{path}: {_refusal('.'.join(strings[-2:]))}")
            if isinstance(argument, str):
                strings.append(argument)
    raise CheckpointError(
        f"{path}: is a pickle that torch.save did not write, or is damaged; {AGAIN}"
    )


def _refusal(name: str) -> str:
    return f"contains code ({name}), refused; where you trust it, save its state_dict alone"


def _brief(error: BaseException) -> str:
    """The first line of a library's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Weights only load failed"):
        lines = lines[-2:]
    return (lines[0] if lines else type(error).__name__).split(". ")[0].rstrip(".")


def check_plain(path: Path, tensors: Mapping[Any, Any], dtype: torch.dtype | None) -> None:
    """Raise CheckpointError unless every value is a dense floating-point tensor with data."""
    allowed = _FLOATS if dtype is None else _FLOATS + _OTHER_FLOATS
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"{name!r} is a {type(tensor).__name__}"
            raise CheckpointError(
                f"{path}: holds no state dict of a transformer ({what}, not a tensor)"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} must be a dense tensor with data")
        if tensor.dtype not in allowed:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
            way_out = "; pass a dtype" if tensor.dtype in _OTHER_FLOATS else ""
            raise CheckpointError(f"{path}: {name} must be {kinds}, got {tensor.dtype}{way_out}")
