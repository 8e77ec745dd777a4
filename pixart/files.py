"""Files: written aside and renamed, read as JSON, locked, compared by digests; and text for them.

Nothing here is written in place. Of a file, a reader, a crash or a full disk meets the old one or the
new one. Of a folder that replaces another too, but for the moment between two renames, in which there
is none at its path: a reader may meet that, and a crash leave it so, with the old one beside it as
`.NAME.HEX.old`.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be opened or replaced: one line with path, reason and way out."""


class CheckpointWriteError(CheckpointError):
    """The disk refused. Nothing was left behind, and what stood at the destination still does."""

    exit_code = 1  # of a command: not the fault of what was asked for


AGAIN = "download or copy it again"


@contextmanager
def written_aside(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield where to write a file or a folder, which takes the place of `path` if all goes well.

    The place is beside `path`, in a new folder of an unpredictable name. durable: flushed to the disk
    before it is renamed; without it, what is lost with the machine must be cheap to make again.
    Raises what the writer raises, and OSError; nothing is left behind then.
    """
    path = Path(os.path.realpath(path))  # through a link, not over it
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, as a rename does not cross file systems.
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.parent))
    try:
        yield holder / "new"
        publish(holder / "new", path, durable=durable)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def publish(aside: Path, path: Path, *, durable: bool = True) -> None:
    """Rename a finished file or folder to `path`, in place of what stands there. OSError if the disk
    refuses: what stood there is there still. A file is replaced in one step, a folder in two."""
    if durable:
        # The contents first: a disk may take the new name before them, and a crash would leave an
        # empty file under it.
        for written in [*aside.rglob("*"), aside] if aside.is_dir() else [aside]:
            flush(written)
    if path.is_dir() and not path.is_symlink():
        _exchange(path, aside)
    else:
        os.replace(aside, path)
    if durable:
        # A name is written with its folder, and lost with the machine until then.
        flush(path.parent)


def _exchange(path: Path, new: Path) -> None:
    """No system call replaces a folder that holds something."""
    old = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    # Ctrl-C too must not leave the place empty.
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder. Windows cannot open a folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file aside and rename it. OSError if the disk refuses."""
    with written_aside(path, durable=durable) as aside:
        aside.write_bytes(content)


def write_json(path: Path, values: object, indent: int | None = None) -> None:
    """Write JSON aside and rename it. OSError if the disk refuses."""
    write_bytes(path, json.dumps(values, indent=indent, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises CheckpointError for any other."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSON and UTF-8 errors
        raise CheckpointError(f"{path}: is not JSON ({error}); {AGAIN}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got a {type(values).__name__}")
    return values


@contextmanager
def claimed(lock: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock; if another does, waits for it or gives False.

    A lock ends with its process however that ends, so that no work stays claimed by the dead.
    """
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def fingerprint(directory: Path) -> str:
    """A digest of a folder's files: names, sizes, and 4 KiB at 512 even places of each.

    Files up to 2 MiB are read whole, a 10 GB shard every 20 MB, and T5-XXL's matrices are larger:
    other weights give another digest, copies and downloads of the same weights the same.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return fingerprint_files({path.relative_to(directory).as_posix(): path for path in files})


def fingerprint_files(files: Mapping[str, Path]) -> str:
    """The digest that `fingerprint` makes, of files under names of the caller's choice."""
    found = hashlib.sha256()
    for name, path in files.items():
        size = path.stat().st_size
        found.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(4096, -(-size // 512))):
                file.seek(place)
                found.update(file.read(4096))
    return found.hexdigest()


def check_text(name: str, text: str) -> None:
    """ValueError unless UTF-8 can write it: bytes of a command line that are no UTF-8 come as lone
    surrogates, which nobody can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be UTF-8 text, got {text!r}") from None


def printable(text: str) -> str:
    """A text of strangers without what commands a terminal, turns the order of letters around, or has
    no encoding. Line ends and tabs become spaces."""
    text = re.sub(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?", "", text)
    text = re.sub(r"[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]", " ", text)
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", "", text
    )


def digest(content: bytes) -> str:
    """32 hexadecimal digits that tell contents apart."""
    return hashlib.sha256(content).hexdigest()[:32]
