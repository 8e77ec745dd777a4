"""Files: read as JSON, written aside and renamed, locked, told apart by digests."""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint that cannot be opened or replaced: one line with path, reason and way out."""


class CheckpointWriteError(CheckpointError):
    """The disk refused. Nothing was left behind, and what stood at the destination still does."""


AGAIN = "download or copy it again"


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSON and UTF-8 errors
        raise CheckpointError(f"{path}: is not JSON ({error}); {AGAIN}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got a {type(values).__name__}")
    return values


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield where to write a file or directory that takes the place of `path` if all goes well."""
    path = Path(os.path.realpath(path))  # through a link, not over it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True
        ) as holder:
            aside = Path(holder) / "new"
            yield aside
            for written in [*aside.iterdir(), aside] if aside.is_dir() else [aside]:
                _flush(written)
            _replace(path, aside, Path(holder) / "old")
        _flush(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise CheckpointWriteError(
            f"{path}: cannot be written ({reason}); nothing was changed"
        ) from error


def _replace(path: Path, new: Path, old: Path) -> None:
    if not path.is_dir():
        os.replace(new, path)
        return
    os.replace(path, old)  # no system call exchanges a full directory
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_aside(path: Path, content: bytes) -> None:
    """Write, flush to the disk, rename: the file is whole or it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, values: object, indent: int | None = None) -> None:
    write_aside(path, json.dumps(values, indent=indent, ensure_ascii=False).encode())


@contextmanager
def claimed(lock: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock; if another does, waits for it or gives False.

    A lock ends with its process however that ends, so that no work stays claimed by the dead.
    """
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(directory: Path) -> str:
    """A digest of a folder's files: names, sizes, and 4 KiB at 512 even places of each.

    Files up to 2 MiB are read whole, a 10 GB shard every 20 MB, and T5-XXL's matrices are larger:
    other weights give another digest, copies and downloads of the same weights the same.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(4096, -(-size // 512))):
                file.seek(place)
                digest.update(file.read(4096))
    return digest.hexdigest()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
