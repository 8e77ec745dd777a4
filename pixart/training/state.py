"""Training state on disk: a checkpoint is whole or it is not there.

Every file is written beside its final name, flushed to the disk and renamed, so that a process
killed at any moment leaves either the old or the new state, never half of one.
"""

import os
from pathlib import Path
from typing import Any

import torch


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain Python values) to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any] | None:
    """The state saved at `path`, on the CPU, or None when nothing was saved yet. Runs no code."""
    if not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)
