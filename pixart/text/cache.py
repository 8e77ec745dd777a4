"""The on-disk cache of prompt features: one safetensors file per prompt and text encoder.

A key is a digest of everything that a feature's bits depend on, the content of the encoder's and
the tokenizer's files among it. Entries hold the features as the encoder gave them: what is read
back equals what was computed, bit for bit. An entry's header says that it is ours, its key, shape and
tokens, and a digest of all that; one that does not hold what it says is computed again.

Before the first write of a process the entries that nobody has used for longest are removed until
LIMIT bytes of them are left, but none that it has used. Other files in the folder are left alone.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from pixart.files import parse_json, write_bytes

FORMAT = 2  # raise it when the meaning of an entry changes
LIMIT = 2 * 2**30  # bytes: some 4,000 prompts of 60 tokens of T5-XXL
MAX_HEADER = 2**20  # bytes; a header holds the text that was cut
_MARK = "pixart prompt"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFT_OVER = re.compile(r"\.[0-9a-f]{40}\.[a-z0-9_]{8}")  # of written_aside, by a killed process

logger = logging.getLogger("pixart")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One prompt's features (L, C), how many tokens of them count, and the text that was cut."""

    features: Tensor
    tokens: int
    cut: str


class PromptCache:
    """A file per prompt and encoder. needed: whether somebody asked for this very folder, and is
    warned where it cannot be used."""

    def __init__(
        self, directory: Path, identity: dict[str, object], *, needed: bool = True
    ) -> None:
        self.directory = directory
        self.identity = identity | {"format": FORMAT}
        self._needed = needed
        self._refused = False
        self._used_since: float | None = time.time() - 2  # file systems may round times down

    def path(self, text: str, padded: bool) -> Path:
        """The file of a prompt's entry, there or not."""
        # Sorted: the same identity must not have a key for each order of its parts.
        key = json.dumps(self.identity | {"padded": padded, "text": text}, sort_keys=True)
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def holds(self, text: str, padded: bool, dtype: torch.dtype) -> bool:
        """Whether `read` will find an entry."""
        path = self.path(text, padded)
        try:
            _read(path, dtype)
            # Used now, so that it is not among the first to be removed.
            os.utime(path)
        except (OSError, ValueError):
            return False
        return True

    def read(self, text: str, padded: bool, dtype: torch.dtype) -> Encoded | None:
        """The entry, None if there is none; a damaged or strange one is none either, with a warning."""
        path = self.path(text, padded)
        try:
            return _read(path, dtype)
        except OSError:
            return None
        except ValueError as error:
            warnings.warn(
                f"ignoring the unreadable prompt cache entry {path} ({error})", stacklevel=4
            )
            return None

    def write(self, text: str, padded: bool, encoded: Encoded) -> None:
        """Whole or not at all: a reader or a crash never meets half an entry. A disk that refuses is
        no error, since nothing depends on the cache."""
        if self._refused:
            return
        path = self.path(text, padded)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._prune()
            if _is_replaceable(path):
                # Not flushed: what a crash loses is encoded again.
                write_bytes(path, _content(path.stem, encoded), durable=False)
        except OSError as error:
            self._refused = True  # said once
            message = f"cannot cache prompts in {self.directory}: {error}"
            if self._needed:
                warnings.warn(message, stacklevel=4)
            else:
                logger.info(message)

    def _prune(self) -> None:
        """Once per process: a run's own entries would else push each other out before it draws."""
        if self._used_since is None:
            return
        used_since, self._used_since = self._used_since, None
        entries = list(_entries(self.directory))
        if sum(size for _, size, _ in entries) <= LIMIT:
            return
        entries = sorted(entry for entry in entries if _is_ours(entry[2]))
        excess = sum(size for _, size, _ in entries) - LIMIT
        removed = 0
        for used, size, path in entries:
            if excess <= 0 or used >= used_since:
                break
            excess -= size
            _remove(path)
            removed += 1
        if removed:
            logger.info(
                "%s: removed the %d prompts that were not used for longest: it keeps %d MiB",
                self.directory,
                removed,
                LIMIT >> 20,
            )


def _content(key: str, encoded: Encoded) -> bytes:
    """The file of an entry."""
    from safetensors.torch import save

    features = encoded.features.contiguous()
    metadata = {"pixart": _MARK, "key": key, "tokens": str(encoded.tokens), "cut": encoded.cut}
    kind, shape = _DTYPES[features.dtype], list(features.shape)
    data = features.view(torch.uint8).numpy().tobytes()
    metadata["digest"] = _digest(metadata, kind, shape, data)
    return save({"features": features}, metadata)


def _read(path: Path, dtype: torch.dtype) -> Encoded:
    """Raises OSError where there is none, ValueError for one that does not hold what it says."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            metadata, kind, shape, begin = _header(file)
            tokens, cut, stated = int(metadata["tokens"]), metadata["cut"], metadata["digest"]
            if metadata["pixart"] != _MARK or metadata["key"] != path.stem:
                raise ValueError("it is another's")
            rows, columns = shape
            length = rows * columns * dtype.itemsize
            if kind != _DTYPES.get(dtype) or not 0 < tokens <= rows or size != begin + length:
                raise ValueError(f"{kind} {shape}, {tokens} tokens, {size} bytes")
        except (KeyError, TypeError) as error:
            raise ValueError(f"its header lacks {error}") from error
        data = bytearray(file.read(length))
    if _digest(metadata, kind, shape, data) != stated:
        raise ValueError("its digest is another")
    features = torch.frombuffer(data, dtype=dtype).view(rows, columns)
    if not features.isfinite().all():
        raise ValueError("it is not finite")
    return Encoded(features, tokens, cut)


def _digest(metadata: dict[str, str], kind: str, shape: list[int], data: bytes | bytearray) -> str:
    said = [metadata[name] for name in ("pixart", "key", "tokens", "cut")]
    found = hashlib.sha256(json.dumps([said, kind, shape]).encode())
    found.update(data)
    return found.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file itself: no link is followed, and no pipe is waited for. ValueError for what is none."""
    extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        yield file


def _header(file: IO[bytes]) -> tuple[dict[str, str], str, list[int], int]:
    """Metadata, dtype and shape of the features, and where they begin. ValueError for what is no
    safetensors file with one tensor "features" of two dimensions."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise ValueError("it has no header")
    try:
        header = parse_json(file.read(length), "its header")
        metadata, features = header.pop("__metadata__"), header.pop("features")
        kind, shape = features["dtype"], features["shape"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("its header is damaged") from error
    texts = metadata.values() if isinstance(metadata, dict) else [None]
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else [None]
    if header or not all(isinstance(text, str) for text in texts):
        raise ValueError("its header is another's")
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"its features have the shape {shape}")
    return metadata, kind, shape, 8 + length


def _entries(directory: Path) -> Iterator[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of what is named like an entry or left by a process that was
    killed while it wrote one. What another process removes meanwhile is passed over."""
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            if _ENTRY.fullmatch(path.name):
                status = path.lstat()
            elif _LEFT_OVER.fullmatch(path.name):
                status = (path / "new" if (path / "new").exists() else path).lstat()
            else:
                continue
            yield status.st_mtime, status.st_size, path


def _is_ours(path: Path) -> bool:
    """Whether we wrote what is named like it; the headers of format 1 had no mark."""
    try:
        if _LEFT_OVER.fullmatch(path.name):
            inside = [file.name for file in path.iterdir()]
            is_ours = inside == [] or inside == ["new"] and _is_file(path / "new")
            return is_ours and not path.is_symlink()
        with _opened(path) as file:
            metadata, kind, (rows, columns), begin = _header(file)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError):
        return False
    if metadata.get("pixart") == _MARK:
        return metadata.get("key") == path.stem
    bytes_each = {name: dtype.itemsize for dtype, name in _DTYPES.items()}.get(kind, 0)
    return metadata.keys() == {"tokens", "cut"} and size == begin + rows * columns * bytes_each


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _is_replaceable(path: Path) -> bool:
    """Whether there is nothing, or a file itself: through a link another would be overwritten."""
    try:
        return _is_file(path)
    except FileNotFoundError:
        return True


def _remove(path: Path) -> None:
    # Another process may be pruning too.
    with contextlib.suppress(FileNotFoundError):
        if _ENTRY.fullmatch(path.name):
            path.unlink()
        else:
            (path / "new").unlink(missing_ok=True)
            path.rmdir()


def default_cache_dir() -> Path | None:
    """`pixart/prompts` in the user's cache directory; None for a user without a home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # A relative one is to be ignored (XDG Base Directory Specification).
        folder = folder if folder.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "pixart" / "prompts"
