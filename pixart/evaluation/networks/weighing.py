"""Files of weights: what of them is read, and what tells them apart."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pixart.files import AGAIN, CheckpointError, fingerprint_files, read_json
from pixart.tensors import check_stored, container, read_safetensors, read_torch

MAX_WIDTH = 65_536  # of an embedding


def weights_digest(version: str, files: Sequence[Path]) -> str:
    """16 hexadecimal digits that tell weights, and the versions of our code around them, apart. The same
    for a file wherever it lies."""
    named = {f"{version} {place}": path for place, path in enumerate(files)}
    return fingerprint_files(named)[:16]


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of tensors, also where a trainer put it under "state_dict" beside other
    things. Nothing in the file may run. CheckpointError for anything else."""
    kind = container(path)
    held = read_safetensors(path)[0] if kind == "safetensors" else read_torch(path, kind)
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: holds a {type(held).__name__}, not a state dict")
    check_stored(path, held)
    return held


def width_in(config: Path, name: str) -> int:
    """The number of features that a model's config.json states under `name`. CheckpointError for a file
    without a sensible one."""
    width = read_json(config).get(name)
    if type(width) is not int or not 1 <= width <= MAX_WIDTH:
        raise CheckpointError(
            f"{config}: {name} must be from 1 to {MAX_WIDTH:,}, got {width!r}; {AGAIN}"
        )
    return width
