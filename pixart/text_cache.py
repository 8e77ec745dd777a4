"""The on-disk cache of prompt features: one safetensors file per prompt and text encoder.

A key is a digest of everything that a feature's bits depend on, the content of the encoder's and
the tokenizer's files among it. Entries hold the features as the encoder gave them: what is read
back equals what was computed, bit for bit.
"""

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 1  # raise it when the meaning of an entry changes


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

    def path(self, text: str, padded: bool) -> Path:
        key = json.dumps(self.identity | {"padded": padded, "text": text}, sort_keys=True)
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def read(self, text: str, padded: bool, dtype: torch.dtype) -> Encoded | None:
        from safetensors import SafetensorError, safe_open

        path = self.path(text, padded)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor("features")
                metadata = file.metadata() or {}
            encoded = Encoded(features, int(metadata["tokens"]), metadata["cut"])
            if features.dtype != dtype or not 0 < encoded.tokens <= len(features):
                raise ValueError(f"{features.dtype} {tuple(features.shape)}, {encoded.tokens}")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            warnings.warn(
                f"ignoring the unreadable prompt cache entry {path} ({error})", stacklevel=4
            )
            return None
        return encoded

    def write(self, text: str, padded: bool, encoded: Encoded) -> None:
        """Written aside and renamed, so that a reader or a crash never meets half an entry."""
        from safetensors.torch import save

        metadata = {"tokens": str(encoded.tokens), "cut": encoded.cut}
        content = save({"features": encoded.features.contiguous()}, metadata)
        path = self.path(text, padded)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(content)
            os.replace(file.name, path)
        except OSError as error:
            warnings.warn(f"cannot cache prompts in {path.parent}: {error}", stacklevel=4)


def default_cache_dir() -> Path:
    """`pixart/prompts` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixart" / "prompts"


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
