"""Tensors that processes hold in parts, in safetensors files and a plan in JSON: no pickle.

    FOLDER/00002.json              what process 2 of those that wrote has: name, place and size of each
                                   part, the file that holds it, and size and SHA-256 of its files
    FOLDER/00002-0000.safetensors  its parts, at most about 1 GiB a file

Any number of processes reads what any other number wrote. A tensor of several tensors (8-bit states)
is held as these, each under its own name.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pixart.distributed import local, rank
from pixart.files import read_json, sha256_of, write_json

FILE_BYTES = 1 << 30
MEMBER = "/"  # between the name of a tensor and that of one which it is made of

Region = tuple[tuple[int, ...], tuple[int, ...]]  # where a part begins, and its size
Read = Callable[[Tensor], Tensor]  # a part, as the kind of tensor that is given


@dataclass(frozen=True)
class Part:
    """Some of a tensor: where it begins, its size, and how to read it as the kind of a given tensor."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    read: Read


@dataclass(frozen=True)
class Whole:
    """A tensor as it was saved: its size, and its parts."""

    size: tuple[int, ...]
    parts: list[Part]


def flatten(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of groups under one name each, GROUP.NAME."""
    return {
        f"{group}.{name}": value for group, held in tensors.items() for name, value in held.items()
    }


def write_chunks(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write what this process has of tensors; what all have alike the first one writes. OSError if the
    disk refuses."""
    plan: dict[str, Any] = {}
    sums: dict[str, Any] = {}
    batch: dict[str, Tensor] = {}
    held, number = 0, 0

    def write() -> None:
        nonlocal held, number
        if batch:
            _save(folder / _file(number), batch)
            sums[_file(number)] = checksum(folder / _file(number))
            batch.clear()
            held, number = 0, number + 1

    for name, tensor in flatten(tensors).items():
        if (region := own_region(tensor)) is None:
            continue
        plan[name] = {
            "size": list(tensor.shape),
            "start": list(region[0]),
            "part": list(region[1]),
            "file": _file(number),
        }
        for key, one in _members(name, local(tensor).detach()):
            batch[key] = one.to("cpu", copy=True).contiguous()  # weights that are tied, too
            held += batch[key].nbytes
        if held >= FILE_BYTES:
            write()
    write()
    write_json(folder / f"{rank():05d}.json", {"files": sums, "tensors": plan})


def checksum(path: Path) -> dict[str, Any]:
    """What tells whether a file is whole."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _file(number: int) -> str:
    return f"{rank():05d}-{number:04d}.safetensors"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the disk's own words are inside
        raise OSError(str(error)) from error


def _members(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of, and their names."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for member in tensor.__tensor_flatten__()[0]:
        yield f"{name}{MEMBER}{member}", getattr(tensor, member)


def own_region(tensor: Tensor) -> Region | None:
    """Where what this process writes of a tensor lies in it; None where others write it."""
    if isinstance(tensor, DTensor):
        chunks = tensor.__create_chunk_list__()
        if not chunks or 0 in chunks[0].sizes:  # fewer rows than processes
            return None
        return tuple(chunks[0].offsets), tuple(chunks[0].sizes)
    return ((0,) * tensor.ndim, tuple(tensor.shape)) if rank() == 0 else None


def plans(folder: Path) -> list[Path]:
    """What processes have written of what they had; not what lies beside it, as a Mac's ._00000.json."""
    return sorted(path for path in folder.glob("*.json") if re.fullmatch(r"\d{5,}", path.stem))


def read_chunks(folder: Path, stack: ExitStack) -> dict[str, Whole]:
    """What a folder holds, by GROUP.NAME. stack: keeps the files open. Raises ValueError, with the name
    of the file, for what is damaged."""
    found: dict[str, Whole] = {}
    files: dict[str, Any] = {}
    for path in plans(folder):
        plan = read_json(path).get("tensors")
        if not isinstance(plan, dict):
            raise ValueError(f"{path}: tensors must be a JSON object")
        for name, entry in plan.items():
            size, start, part = _place(path, name, entry)
            file = entry.get("file")
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{path}: file of {name} must be a file's name, got {file!r}")
            if file not in files:
                files[file] = _open(folder / file, stack)
            whole = found.setdefault(name, Whole(size, []))
            if whole.size != size:
                raise ValueError(f"{path}: {name} must be of one size, got {whole.size}, {size}")
            whole.parts.append(Part(start, part, _reader(files[file], folder / file, name, part)))
    return found


def _place(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], ...]:
    """The size of a tensor, where a part of it begins, and the part's size."""
    size, start, part = (_numbers(path, name, entry, key) for key in ("size", "start", "part"))
    alike = len(size) == len(start) == len(part)
    if not alike or any(a + n > whole for a, n, whole in zip(start, part, size, strict=True)):
        raise ValueError(f"{path}: {name} must lie within its size {list(size)}")
    return size, start, part


def _numbers(path: Path, name: str, entry: Any, key: str) -> tuple[int, ...]:
    values: Any = entry.get(key) if isinstance(entry, dict) else None
    is_plain = isinstance(values, list) and all(type(one) is int and one >= 0 for one in values)
    if not is_plain:
        raise ValueError(f"{path}: {key} of {name} must be a list of whole numbers, got {values!r}")
    return tuple(values)


def _open(path: Path, stack: ExitStack) -> Any:
    if not path.is_file():  # nor a pipe, which would wait for a writer
        raise ValueError(f"{path}: must be a file of the state, there is none")
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is truncated or damaged ({error})") from error


def _reader(file: Any, path: Path, name: str, size: tuple[int, ...]) -> Read:
    def read(like: Tensor) -> Tensor:
        members = [key for key, _ in _members(name, like)]
        try:
            tensors = [file.get_tensor(key) for key in members]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: is damaged, or of other training ({error})") from error
        return _assemble(like, tensors, size, f"{path}: {name}")

    return read


def _assemble(like: Tensor, tensors: Sequence[Tensor], size: tuple[int, ...], where: str) -> Tensor:
    tensor = tensors[0]
    if tuple(tensor.shape) != size:  # the first member of several is as large as the whole
        raise ValueError(f"{where} must be of size {list(size)}, got {list(tensor.shape)}")
    if not hasattr(like, "__tensor_flatten__"):
        return tensor
    names, context = like.__tensor_flatten__()
    members = dict(zip(names, tensors, strict=True))
    stride = torch.empty(size, device="meta").stride()
    kind: Any = type(like)
    return kind.__tensor_unflatten__(members, context, torch.Size(size), stride)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], saved: Mapping[str, Whole], source: Path) -> None:
    """Give tensors the values that were saved under their names, each process its own part. source: what
    was saved, for messages. Raises ValueError where it does not hold them."""
    for name, tensor in tensors.items():
        if name not in saved:
            raise ValueError(f"{source} holds no {name}")
        if saved[name].size != tuple(tensor.shape):
            raise ValueError(
                f"{source}: {name} must be of size {list(tensor.shape)}, "
                f"got {list(saved[name].size)}"
            )
        _fill(tensor, saved[name], f"{source}: {name}")


def _fill(tensor: Tensor, saved: Whole, where: str) -> None:
    target = local(tensor).detach()
    start: tuple[int, ...] = (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        chunks = tensor.__create_chunk_list__()
        start = tuple(chunks[0].offsets) if chunks else start
    filled = 0
    for part in saved.parts:
        first = [max(a, b) for a, b in zip(start, part.start, strict=True)]
        ends = zip(start, target.shape, part.start, part.size, strict=True)
        size = [min(a + n, b + m) - f for f, (a, n, b, m) in zip(first, ends, strict=True)]
        if any(length <= 0 for length in size):
            continue
        value = part.read(target)
        _narrow(target, start, first, size).copy_(_narrow(value, part.start, first, size))
        filled += math.prod(size)
    if filled != target.numel():
        raise ValueError(f"{where} has {filled} of the {target.numel()} values that it must have")


def _narrow(
    tensor: Tensor, start: Sequence[int], first: Sequence[int], size: Sequence[int]
) -> Tensor:
    for dim, (begin, place, length) in enumerate(zip(start, first, size, strict=True)):
        if length != tensor.shape[dim]:
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, place - begin, place - begin + length)
    return tensor
