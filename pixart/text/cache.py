"""The on-disk cache of prompt features: one safetensors file per prompt and text encoder.

A key is a digest of everything that a feature's bits depend on, the content of the encoder's and
the tokenizer's files among it. Entries hold the features as the encoder gave them: what is read
back equals what was computed, bit for bit. Before the first write of a process the entries that
nobody has used for longest are removed until LIMIT bytes are left, but none that it has used.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.files import write_bytes

FORMAT = 1  # raise it when the meaning of an entry changes
LIMIT = 2 * 2**30  # bytes: some 4,000 prompts of 60 tokens of T5-XXL

logger = logging.getLogger("pixart")


@dataclass(frozen=True)
class Encoded:
    """One prompt's features (L, C), how many tokens of them count, and the text that was cut."""

    features: Tensor
    tokens: int
    cut: str


class PromptCache:
    """A safetensors file per prompt and encoder; one that cannot be read counts as absent."""

    def __init__(self, directory: Path, identity: dict[str, object]) -> None:
        self.directory = directory
        self.identity = identity | {"format": FORMAT}
        self._used_since: float | None = time.time() - 2  # file systems may round times down

    def path(self, text: str, padded: bool) -> Path:
        """The file of a prompt's entry, there or not."""
        # Sorted: the same identity must not have a key for each order of its parts.
        key = json.dumps(self.identity | {"padded": padded, "text": text}, sort_keys=True)
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def holds(self, text: str, padded: bool, dtype: torch.dtype) -> bool:
        """Whether `read` will find an entry, at the cost of its header."""
        from safetensors import SafetensorError

        path = self.path(text, padded)
        try:
            with _opened(path) as (file, tokens, _):
                features = file.get_slice("features")
                rows, _ = features.get_shape()
                # Used now, so that it is not among the first to be removed.
                os.utime(path)
                kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
                return 0 < tokens <= rows and features.get_dtype() == kinds.get(dtype)
        except (OSError, SafetensorError, KeyError, ValueError):
            return False

    def read(self, text: str, padded: bool, dtype: torch.dtype) -> Encoded | None:
        """The entry, None if there is none; one that cannot be read is none either, with a warning."""
        from safetensors import SafetensorError

        path = self.path(text, padded)
        if not path.is_file():
            return None
        try:
            with _opened(path) as (file, tokens, cut):
                encoded = Encoded(file.get_tensor("features"), tokens, cut)
            if encoded.features.dtype != dtype or not 0 < tokens <= len(encoded.features):
                shape = tuple(encoded.features.shape)
                raise ValueError(f"{encoded.features.dtype} {shape}, {tokens} tokens")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            warnings.warn(
                f"ignoring the unreadable prompt cache entry {path} ({error})", stacklevel=4
            )
            return None
        return encoded

    def write(self, text: str, padded: bool, encoded: Encoded) -> None:
        """Whole or not at all: a reader or a crash never meets half an entry. A disk that refuses is
        a warning, since nothing depends on the cache."""
        from safetensors.torch import save

        metadata = {"tokens": str(encoded.tokens), "cut": encoded.cut}
        content = save({"features": encoded.features.contiguous()}, metadata)
        path = self.path(text, padded)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._prune()
            # Not flushed: what a crash loses is encoded again.
            write_bytes(path, content, durable=False)
        except OSError as error:
            warnings.warn(f"cannot cache prompts in {path.parent}: {error}", stacklevel=4)

    def _prune(self) -> None:
        """Once per process: a run's own entries would else push each other out before it draws."""
        if self._used_since is None:
            return
        used_since, self._used_since = self._used_since, None
        entries = sorted(_entries(self.directory))
        excess = sum(size for _, size, _ in entries) - LIMIT
        removed = 0
        for used, size, path in entries:
            if excess <= 0 or used >= used_since:
                break
            excess -= size
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                # Another process may be pruning too.
                path.unlink(missing_ok=True)
            removed += 1
        if removed:
            logger.info(
                "%s: removed the %d prompts that were not used for longest: it keeps %d MiB",
                self.directory,
                removed,
                LIMIT >> 20,
            )


def _entries(directory: Path) -> Iterator[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of everything in the cache. A process that was killed while it
    wrote leaves a folder; what another process removes meanwhile is passed over."""
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            inside = list(path.iterdir()) if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in inside)
            yield path.stat().st_mtime, size, path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int, str]]:
    """(file, tokens that count, text that was cut) of an entry."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        yield file, int(metadata["tokens"]), metadata["cut"]


def default_cache_dir() -> Path:
    """`pixart/prompts` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixart" / "prompts"
