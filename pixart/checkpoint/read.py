"""Reads checkpoints. The format is taken from the contents, and no code in a file ever runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoint.names import CONFIG, OWN_KEY, SIDECAR, from_diffusers, recognise
from pixart.config import MAX_LENGTH
from pixart.files import CheckpointError, parse_json, read_json
from pixart.tensors import check_plain, container, read_safetensors, read_torch
from pixart.weights import find_weights


@dataclass
class Contents:
    """A checkpoint as read.

    tensors: under their official names, with whatever else is there. present: the file's own names.
    naming: "official" or "diffusers". format: the one save_transformer would write, None if none.
    config: ours, as PixArtConfig.to_dict() gave it. diffusers_config: config.json; it has no place
    for model_max_length and class_dropout_prob.
    """

    tensors: dict[str, Tensor]
    present: list[str]
    naming: str
    format: str | None
    config: dict[str, Any] | None = None
    diffusers_config: dict[str, Any] | None = None
    model_max_length: int | None = None
    class_dropout_prob: float = 0.1
    notes: list[str] = field(default_factory=list)


def read_checkpoint(
    path: Path, *, ema: bool = False, variant: str | None = None, dtype: torch.dtype | None = None
) -> Contents:
    """Read a file, or a directory of a transformer or pipeline. dtype: what it will be cast to."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_dir():
        if ema:
            raise ValueError("ema is for official .pth files, got a directory")
        return _read_directory(path, variant, dtype)
    if variant is not None:
        raise ValueError(f"variant is for diffusers directories, got {variant!r} for a file")
    return _read_file(path, ema, dtype)


def _read_file(path: Path, ema: bool, dtype: torch.dtype | None) -> Contents:
    kind = container(path)
    config: Any = None
    if kind == "safetensors":
        tensors, metadata = read_safetensors(path)
        if ema:
            raise ValueError("has no averaged weights (state_dict_ema)")
        # Anybody may write metadata: "config" is ours only beside our "format".
        if metadata.get("format") == "pixart":
            config = _parse(metadata.get("config", ""))
    else:
        tensors, config = _pick_state_dict(read_torch(path, kind), ema)
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"its configuration must be a mapping, got a {type(config).__name__}")
    check_plain(path, tensors, dtype)
    stripped, naming = recognise(tensors)
    official = from_diffusers(stripped) if naming == "diffusers" else stripped
    format = None
    if naming == "official":
        format = "official" if kind != "safetensors" else "pixart" if config else None
    return Contents(official, list(stripped), naming, format, config)


def _parse(text: str) -> Any:
    try:
        return parse_json(text, "config")
    except ValueError as error:
        raise ValueError(f"its metadata holds no valid configuration ({error})") from None


def _pick_state_dict(payload: Any, ema: bool) -> tuple[dict[str, Any], Any]:
    """(state dict, our configuration if it is there) out of what torch.load gave."""
    if not isinstance(payload, dict):
        raise ValueError(f"holds a {type(payload).__name__}, not a state dict")
    wanted = "state_dict_ema" if ema else "state_dict"
    if isinstance(payload.get(wanted), dict):
        return payload[wanted], payload.get(OWN_KEY)
    if ema:
        raise ValueError("has no averaged weights (state_dict_ema)")
    if "state_dict_ema" in payload:
        raise ValueError("has only averaged weights (state_dict_ema); ask for them with ema")
    return payload, None


def _read_directory(path: Path, variant: str | None, dtype: torch.dtype | None) -> Contents:
    directory = path
    if (path / "model_index.json").is_file():
        directory = path / "transformer"
        if not directory.is_dir():
            raise ValueError("is a pipeline without a transformer/ directory")
    weights, found = find_weights(directory, variant)
    tensors: dict[str, Tensor] = {}
    for file in weights:
        kind = container(file)
        part = read_safetensors(file)[0] if kind == "safetensors" else read_torch(file, kind)
        if not isinstance(part, dict):
            raise CheckpointError(f"{file}: holds a {type(part).__name__}, not a state dict")
        check_plain(file, part, dtype)
        tensors |= part
    config = read_json(directory / CONFIG)
    stripped, naming = recognise(tensors)
    if naming != "diffusers":
        raise ValueError(
            f"{weights[0].name} has official names; give that file instead of the directory"
        )
    contents = Contents(from_diffusers(stripped), list(stripped), naming, "diffusers")
    contents.diffusers_config = config
    if found != variant:
        contents.notes.append(f"has only the variant {found!r}, which was taken")
    _read_extras(directory, contents, dtype)
    return contents


def _read_extras(directory: Path, contents: Contents, dtype: torch.dtype | None) -> None:
    """What config.json does not hold: the null caption and two settings of training."""
    sidecar, index = directory / SIDECAR, directory.parent / "model_index.json"
    if sidecar.is_file():
        buffers, metadata = read_safetensors(sidecar)
        check_plain(sidecar, buffers, dtype)
        contents.tensors |= buffers
        extra = _parse(metadata.get("config", "{}"))
        if not isinstance(extra, dict):
            raise CheckpointError(f"{sidecar}: its configuration must be a mapping, got {extra!r}")
        contents.model_max_length = extra.get("model_max_length")
        contents.class_dropout_prob = extra.get("class_dropout_prob", 0.1)
    elif directory.name == "transformer" and index.is_file():
        pipeline = str(read_json(index).get("_class_name")).lower()
        lengths = [length for family, length in MAX_LENGTH.items() if family in pipeline]
        contents.model_max_length = lengths[0] if lengths else None
