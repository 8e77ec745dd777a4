"""Writing checkpoints: whole or not at all, and never over something else."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pixart.checkpoint.names import CONFIG, OWN_KEY, SIDECAR, listed
from pixart.checkpoint.read import read_checkpoint
from pixart.files import CheckpointError, CheckpointWriteError, written_aside
from pixart.weights import WEIGHTS


def check_destination(path: Path, format: str, overwrite: bool) -> None:
    """Raise CheckpointError if writing this format to path would destroy something else."""
    if not path.exists():
        return
    if path.is_dir() != (format == "diffusers"):
        kinds = ("a directory", "one file") if path.is_dir() else ("a file", "a directory")
        raise CheckpointError(f"{path}: is {kinds[0]}, and the {format} format is {kinds[1]}")
    if path.is_dir():
        _check_directory(path, overwrite)
    elif not path.is_file():
        raise CheckpointError(f"{path}: is neither a file nor a directory")
    elif path.stat().st_size and not overwrite and _format_of(path) != format:
        raise CheckpointError(
            f"{path}: exists and is no {format} checkpoint; give another path, or overwrite"
        )


def _check_directory(path: Path, overwrite: bool) -> None:
    """The directory is replaced as a whole, so it may hold nothing that is not a checkpoint's."""
    names = sorted(entry.name for entry in path.iterdir())
    if "model_index.json" in names:
        raise CheckpointError(f"{path}: is a whole pipeline; write to {path / 'transformer'}")
    ours = rf"{re.escape(CONFIG)}|{SIDECAR}|{WEIGHTS}(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    if overwrite:  # variants, .bin and what comes with a repository
        ours += rf"|{WEIGHTS}.*|README\.md|\.git(attributes|ignore)"
    others = [name for name in names if not re.fullmatch(ours, name)]
    if others:
        raise CheckpointError(f"{path}: holds other files ({listed(others)}); give another path")
    if names and not overwrite and _format_of(path) != "diffusers":
        raise CheckpointError(
            f"{path}: holds no PixArt transformer; give another path, or overwrite"
        )


def _format_of(path: Path) -> str | None:
    try:
        return read_checkpoint(path).format
    except ValueError:
        return None


@contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """Yield where to write a checkpoint's file or folder, which then takes the place of `path`.
    Raises CheckpointWriteError if the disk refuses."""
    try:
        with written_aside(path) as aside:
            yield aside
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise CheckpointWriteError(
            f"{path}: cannot be written ({reason}); nothing was changed"
        ) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode  # save_file leaves a file that only its owner may read
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def write_official(path: Path, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    # A tensor that is a part of something larger would take all of it to the file.
    whole = {
        name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
        for name, t in tensors.items()
    }
    with path.open("wb") as file:  # a file of ours: torch's own hides why a write failed
        torch.save({"state_dict": whole, OWN_KEY: config}, file)


def write_directory(
    directory: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    extra: dict[str, Any],
    max_shard_size: int | str | None,
) -> None:
    """A diffusers directory: config.json, weights in one file or indexed shards, our sidecar."""
    directory.mkdir()
    _write_json(directory / CONFIG, config)
    sidecar = {"format": "pixart", "config": json.dumps(extra)}
    write_safetensors(directory / SIDECAR, buffers, sidecar)
    shards = _split(tensors, _bytes(max_shard_size))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"{WEIGHTS}{part}.safetensors"
        write_safetensors(directory / name, shard, {"format": "pt"})
        where |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(directory / f"{WEIGHTS}.safetensors.index.json", index)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split(tensors: Mapping[str, Tensor], max_bytes: int | None) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if max_bytes is not None and shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _bytes(size: int | str | None) -> int | None:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if not match or match[2].upper() not in units or float(match[1]) <= 0:
        raise ValueError(f'max_shard_size must be bytes or like "5GB", got {size!r}')
    return int(float(match[1]) * units[match[2].upper()])
