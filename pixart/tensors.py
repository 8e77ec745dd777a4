"""Files of tensors: safetensors and PyTorch's. The format is taken from the contents, what a file says of
its own size is compared with the file before it is believed, and no code in it ever runs."""

import argparse
import itertools
import os
import pickle
import pickletools
import re
import reprlib
import stat
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart.files import AGAIN, CheckpointError, parse_json

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATS_OF_8_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)  # no arithmetic: cast first
# XL/2's header has 0.1 MB, a trainer's pickle with the states of its optimizer 1 MB.
_MAX_HEADER, _MAX_PICKLE, _MAX_RECORDS = 2**22, 2**24, 100_000
_MAX_TUPLES, _MAX_OPCODES, _PICKLES_IN_A_FILE = 16, 10_000_000, 4
_SHARED = 4  # times that a file's bytes may be used by several of its tensors
# What the unpickler and the zip reader raise over damaged bytes.
_DAMAGED = (
    RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, MemoryError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


def container(path: Path) -> str:
    """Told by the first bytes: "safetensors", "zip" (of PyTorch) or "pickle" (of PyTorch < 1.6)."""
    try:
        # A named pipe would be waited for until somebody writes to it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: must be a file, got a folder, a pipe or a device")
        with path.open("rb") as file:
            head = file.read(64)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error
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
        _check_header(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except CheckpointError:
        raise
    except (SafetensorError, OSError, *_DAMAGED) as error:
        raise CheckpointError(
            f"{path}: is truncated or damaged ({_brief(error)}); {AGAIN}"
        ) from error


def _check_header(path: Path) -> None:
    """The library takes 100 MB of header, minutes of names, and the last of several tensors of a name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path}: must have a header of at most {_MAX_HEADER:,} bytes, got {length:,}; {AGAIN}"
            )
        parse_json(file.read(length), "its header", unique=True)


def read_torch(path: Path, kind: str) -> Any:
    """What torch.load makes of a file of tensors and plain containers; nothing in it may run."""
    try:
        if kind == "pickle":
            _refuse_plain_pickle(path)
            with path.open("rb") as code:
                check_pickles(code, str(path))
        # An archive's directory is at its end: a download that broke off has none.
        elif not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("the end of the archive is missing")
        else:
            _check_archive(path)
        # DiT's trainer keeps its options beside the weights: a class that only holds them.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange pickles; what is wrong becomes our error
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


def _check_archive(path: Path) -> None:
    """torch.save compresses nothing and writes each record once: what unpacks to more is no work of its."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        _check_records(path, records)
        for record in records:
            if record.filename.endswith(".pkl"):
                with archive.open(record) as code:
                    check_pickles(code, f"{path}: {record.filename}")


def _check_records(path: Path, records: list[zipfile.ZipInfo]) -> None:
    if len(records) > _MAX_RECORDS:
        raise CheckpointError(
            f"{path}: must hold at most {_MAX_RECORDS:,} records, got {len(records):,}"
        )
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path}: is a compressed archive ({record.filename}); unpack it, and save the weights "
                "with torch.save"
            )
        if record.filename.endswith(".pkl") and record.file_size > _MAX_PICKLE:
            raise CheckpointError(
                f"{path}: {record.filename} must have at most {_MAX_PICKLE:,} bytes, "
                f"got {record.file_size:,}"
            )
    names = {record.filename for record in records}
    if len(names) < len(records) or sum(r.file_size for r in records) > path.stat().st_size:
        raise CheckpointError(f"{path}: is truncated or damaged (its records overlap); {AGAIN}")


def check_pickles(code: IO[bytes], name: str) -> None:
    """A tuple that is a key is hashed through all that it holds: a few bytes that nest it 40 deep, each
    level twice the one before, take for ever. Looks at the opcodes, of each pickle in turn."""
    for _ in range(_PICKLES_IN_A_FILE):
        try:
            depth = _depth_of_tuples(itertools.islice(pickletools.genops(code), _MAX_OPCODES))
        except ValueError:  # what is cut off, or no pickle, is torch.load's to name
            return
        if depth > _MAX_TUPLES:
            raise CheckpointError(
                f"{name} must nest tuples at most {_MAX_TUPLES} deep, got {depth}"
            )


def _depth_of_tuples(code: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> int:
    """Of what the opcodes would make. The stack holds depths in the place of values."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    deepest = 0
    for opcode, argument, _ in code:
        name, needs, gives = opcode.name, opcode.stack_before, opcode.stack_after
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument, 0))
            continue
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else 0
            continue
        start = len(stack) - len(needs)
        if pickletools.markobject in needs:
            start = (marks.pop() if marks else 0) - needs.index(pickletools.markobject)
        taken = stack[max(start, 0) :]
        del stack[max(start, 0) :]
        depth = (
            max(taken, default=0) + 1
            if "TUPLE" in name
            else taken[0]
            if name == "DUP" and taken
            else 0
        )
        deepest = max(deepest, depth)
        stack += [depth] * len(gives)
    return deepest


def _refuse_plain_pickle(path: Path) -> None:
    """torch.save writes protocol 2. Other pickles are refused; opcodes say what they would call."""
    strings: list[str] = []
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            return
        file.seek(0)
        for opcode, argument, _ in itertools.islice(pickletools.genops(file), _MAX_RECORDS):
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of either kind, of any dtype, mapped from the disk. CheckpointError unless it
    holds nothing else."""
    kind = container(path)
    tensors = read_safetensors(path)[0] if kind == "safetensors" else read_torch(path, kind)
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}, not a state dict")
    check_stored(path, tensors)
    return tensors


def check_size(config: Mapping[str, Any], most: Iterable[str], files: Iterable[Path]) -> int:
    """How many numbers the files hold. Raises ValueError for sizes in a config.json, named in `most`, that
    are no whole numbers from 1 to that many: libraries take the memory before they compare."""
    held = sum(tensor.numel() for file in files for tensor in read_tensors(file).values())
    for name in most:
        value = config.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= held:
            raise ValueError(
                f"{name} must be a whole number that fits {held:,} weights, got {value!r}"
            )
    return held


def check_plain(path: Path, tensors: Mapping[Any, Any]) -> None:
    """Raise CheckpointError unless every value is a dense floating-point tensor whose numbers are in the
    file."""
    check_stored(path, tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS + FLOATS_OF_8_BITS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
            raise CheckpointError(f"{path}: {name} must be {kinds} or fp8, got {tensor.dtype}")


def check_stored(path: Path, tensors: Mapping[Any, Any]) -> None:
    """Raise CheckpointError unless every value is a dense tensor whose numbers are in the file."""
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"{reprlib.repr(name)} is a {type(tensor).__name__}"
            raise CheckpointError(
                f"{path}: holds no state dict of a transformer ({what}, not a tensor)"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} must be a dense tensor with data")
        # One number in a file may be spread, by strides of 0, over a tensor of any size.
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} must have all its numbers in the file, got shape {tuple(tensor.shape)}"
            )
        total += tensor.nbytes
    if total > _SHARED * path.stat().st_size:
        raise CheckpointError(
            f"{path}: must hold what its tensors say, got {total:,} bytes of them in a file of "
            f"{path.stat().st_size:,}"
        )
