"""Tensors of states from before there were checksums, in PyTorch's distributed format: read only.

Its plan, `.metadata`, is a pickle. Here it makes records of names that this reader knows, and nothing
else: what a file asks for beyond these is refused, and nothing that it names is imported.
"""

import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.files import MAX_JSON, read_bounded
from pixart.tensors import check_pickles
from pixart.training.chunks import Part, Read, Whole

PLAN, PARTS = ".metadata", ".distcp"
_CHECKPOINT = "torch.distributed.checkpoint"
_RECORDS = {
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
}
# What such plans are written with: no buffers, no extensions, nothing persistent.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET",
    "LONG_BINGET",
}  # fmt: skip
# What an unpickler and the reader of an archive raise over damaged bytes.
_DAMAGED = (
    RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, pickle.UnpicklingError,
)  # fmt: skip


class _Record:
    """What a pickle says of an object, and no more."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"{type(self).__name__} has no {name}")
        return state[name]


class _Unpickler(pickle._Unpickler):
    """Makes records, of classes that no other file shares. Python's own: the one in C makes room for
    as many objects as a file says that it has."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._kinds: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        if (module, name) not in _RECORDS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return self._kinds.setdefault(name, type(name, (_Record,), {}))


def _unpickle(content: bytes, name: str) -> _Record:
    check_pickles(io.BytesIO(content), name)
    for opcode, _, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"it has a {opcode.name}")
    plan = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(plan, _Record):
        raise pickle.UnpicklingError("it holds no plan")
    return plan


def read_distributed(folder: Path) -> dict[str, Whole]:
    """What a folder in PyTorch's distributed format holds, by GROUP.NAME. Raises ValueError, with the
    name of the file, for what is damaged or would run code."""
    path = folder / PLAN
    try:
        plan = _unpickle(read_bounded(path, MAX_JSON), "it")
        places = {
            (_text(index.get("fqn")), _numbers(index.get("offset"))): info
            for index, info in plan.get("storage_data").items()
        }
        return {
            _text(name): _whole(folder, name, values, places)
            for name, values in plan.get("state_dict_metadata").items()
        }
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: is damaged, or no state that was saved here ({reason})"
        ) from error


def _whole(folder: Path, name: str, values: Any, places: dict[Any, Any]) -> Whole:
    if type(values).__name__ != "TensorStorageMetadata":
        raise ValueError(f"{name} is no tensor")
    whole = Whole(_numbers(values.get("size")), [])
    for chunk in values.get("chunks"):
        start, size = (_numbers(chunk.get(key)) for key in ("offsets", "sizes"))
        if not len(whole.size) == len(start) == len(size):
            raise ValueError(f"{name} has parts of another rank")
        # Taken out: a few bytes may list one part any number of times.
        info = places.pop((name, start))
        file, place, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        if Path(_text(file)).name != file:
            raise ValueError(f"{name} is in {file!r}, which is no file's name")
        _check_file(folder / file, *_numbers((place, length)))
        whole.parts.append(Part(start, size, _reader(folder / file, name, size, place, length)))
    return whole


def _check_file(path: Path, place: int, length: int) -> None:
    if not path.is_file() or path.stat().st_size < place + length:
        raise ValueError(f"{path} is missing or truncated")
    if not _is_archive(path, place, length, path.stat().st_mtime_ns):
        raise ValueError(f"{path} has changed since it was saved")


@lru_cache(maxsize=100_000)
def _is_archive(path: Path, place: int, length: int, changed: int) -> bool:
    """Whether a part is an archive whose members have their checksums. Read once, however often it is
    looked at."""
    try:
        with zipfile.ZipFile(io.BytesIO(_read(path, place, length))) as archive:
            records = archive.infolist()
            is_plain = all(info.compress_type == zipfile.ZIP_STORED for info in records)
            if not is_plain or sum(info.file_size for info in records) > length:
                return False
            for info in records:
                if info.filename.endswith(".pkl"):
                    check_pickles(io.BytesIO(archive.read(info)), info.filename)
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, *_DAMAGED):
        return False


def _read(path: Path, place: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(place)
        return file.read(length)


# What is none is not shown: a few bytes of pickle may be text without end.
def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(one) is int and one >= 0 for one in values):
        raise ValueError("sizes must be whole numbers")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("names must be text")
    return value


def _reader(path: Path, name: str, size: tuple[int, ...], place: int, length: int) -> Read:
    def read(like: Tensor) -> Tensor:
        reason, tensor = _attempt(lambda: _read_tensor(path, place, length))
        if isinstance(tensor, Tensor) and tuple(tensor.shape) == size:
            return tensor
        raise ValueError(f"{path}: {name} is truncated or damaged ({reason})")

    return read


def _read_tensor(path: Path, place: int, length: int) -> Any:
    content = io.BytesIO(_read(path, place, length))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pickle that torch.save did not write
        return torch.load(content, map_location="cpu", weights_only=True)


def _attempt(read: Callable[[], Any]) -> tuple[str, Any]:
    """Why something cannot be read, or what it is."""
    try:
        return "it has another size", read()
    except (OSError, *_DAMAGED) as error:
        first = str(error).strip().split("\n")[0]
        return first or type(error).__name__, None
