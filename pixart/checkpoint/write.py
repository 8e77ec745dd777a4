"""Writing checkpoints: whole or not at all, and never over something else."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pixart.checkpoint.names import CONFIG, OWN_KEY, SIDECAR
from pixart.checkpoint.read import read_checkpoint
from pixart.files import CheckpointError, CheckpointWriteError, listed, written_aside
from pixart.weights import WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit


def transformer_format(path: Path) -> str | None:
    """The format of the transformer there, None if it is something else."""
    try:
        return read_checkpoint(path).format
    except ValueError:
        return None


def check_destination(
    path: Path,
    format: str,
    overwrite: bool,
    *,
    format_of: Callable[[Path], str | None] = transformer_format,
) -> None:
    """Raise CheckpointError if writing this format to path would destroy something else. format_of: of
    what is replaced without overwrite."""
    if not path.exists():
        return
    if path.is_dir() != (format == "diffusers"):
        kinds = ("a directory", "one file") if path.is_dir() else ("a file", "a directory")
        raise CheckpointError(f"{path}: is {kinds[0]}, and the {format} format is {kinds[1]}")
    if path.is_dir():
        _check_directory(path, overwrite, format_of)
    elif not path.is_file():
        raise CheckpointError(f"{path}: is neither a file nor a directory")
    elif path.stat().st_size and not overwrite and format_of(path) != format:
        raise CheckpointError(
            f"{path}: exists and is no {format} checkpoint; give another path, or overwrite"
        )


def _check_directory(path: Path, overwrite: bool, format_of: Callable[[Path], str | None]) -> None:
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
    if names and not overwrite and format_of(path) != "diffusers":
        kind = "PixArt transformer" if format_of is transformer_format else "ControlNet"
        raise CheckpointError(f"{path}: holds no {kind}; give another path, or overwrite")


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
    """Write a new file, with the permissions that the user's umask gives."""
    path.touch()
    mode = path.stat().st_mode  # save_file leaves a file that only its owner may read
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def write_official(
    path: Path, tensors: Mapping[str, Tensor], config: dict[str, Any] | None
) -> None:
    """A .pth as the official trainer saves it, with our configuration beside its "state_dict" if it is
    known."""
    # A tensor that is a part of something larger would take all of it to the file.
    whole = {
        name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
        for name, t in tensors.items()
    }
    with path.open("wb") as file:  # a file of ours: torch's own hides why a write failed
        torch.save({"state_dict": whole} | ({OWN_KEY: config} if config else {}), file)


def write_directory(
    directory: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    extra: dict[str, Any] | None,
    max_shard_size: int | str | None,
) -> None:
    """A diffusers directory: config.json, weights in one file or indexed shards, our sidecar unless
    `extra` is None."""
    directory.mkdir()
    write_config(directory / CONFIG, config)
    if extra is not None:
        sidecar = {"format": "pixart", "config": json.dumps(extra)}
        write_safetensors(directory / SIDECAR, buffers, sidecar)
    layout = _layout(tensors, max_shard_size)
    for file, names in layout.filename_to_tensors.items():
        write_safetensors(directory / file, {n: tensors[n] for n in names}, {"format": "pt"})
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        write_config(directory / f"{WEIGHTS}.safetensors.index.json", index)


def write_config(path: Path, values: object) -> None:
    """JSON as diffusers and transformers lay it out, into a folder that is not yet published."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _layout(tensors: Mapping[str, Tensor], max_shard_size: int | str | None) -> "StateDictSplit":
    """Which file each tensor goes to; one file for all if there is no limit."""
    from huggingface_hub import split_state_dict_into_shards_factory

    size = str(sys.maxsize if max_shard_size is None else max_shard_size).strip()
    if not re.fullmatch(r"(?=.*[1-9])(\d+|\d+(\.\d+)?\s*[KMGT]B)", size, re.IGNORECASE):
        raise ValueError(f'max_shard_size must be bytes or like "5GB", got {max_shard_size!r}')
    return split_state_dict_into_shards_factory(
        dict(tensors),
        # Not by storage: q, k and v are parts of one, and are written as three.
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{WEIGHTS}{{suffix}}.safetensors",
        max_shard_size=int(size) if size.isdecimal() else size,
    )
