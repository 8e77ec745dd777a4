"""Reads checkpoints: official files, ours, diffusers' folders, and what trainers wrap them in."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoint.names import (
    COMFYUI_FORMAT,
    CONFIG,
    CONTROL_CLASS,
    CONTROL_FORMAT,
    OWN_KEY,
    SIDECAR,
    from_diffusers,
    recognise,
)
from pixart.config import CLIP_LENGTH, MAX_LENGTH
from pixart.files import CheckpointError, listed, parse_json, read_json
from pixart.tensors import FLOATS_OF_8_BITS, check_plain, container, read_safetensors, read_torch
from pixart.weights import find_weights

# The official trainer's and Lightning's, DiT's, DeepSpeed's; and their averages.
_CONTAINERS = ("state_dict", "model", "module", "model_state_dict")
_AVERAGED = ("state_dict_ema", "ema", "model_ema", "ema_state_dict")
_NESTED = 4


@dataclass
class Contents:
    """A checkpoint as read.

    tensors: under their official names, with whatever else is there. present: the file's own names.
    naming: "official" or "diffusers". format: the one save_transformer would write, None if none.
    config: ours, as PixArtConfig.to_dict() gave it. diffusers_config: config.json; it has no place
    for model_max_length and class_dropout_prob. index_few_step: what the pipeline's model_index.json says.
    """

    tensors: dict[str, Tensor]
    present: list[str]
    naming: str
    format: str | None
    config: dict[str, Any] | None = None
    diffusers_config: dict[str, Any] | None = None
    model_max_length: int | None = None
    class_dropout_prob: float = 0.1
    index_few_step: Any = None
    notes: list[str] = field(default_factory=list)


def read_checkpoint(
    path: Path,
    *,
    ema: bool = False,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    sizes_only: bool = False,
) -> Contents:
    """Read a file, or a directory of a transformer or pipeline. dtype: what it will be cast to. sizes_only: what
    must be joined of several tensors is joined without its numbers."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_dir():
        if ema:
            raise ValueError("ema is for official .pth files, got a directory")
        return _read_directory(path, variant, dtype, sizes_only)
    check_no_variant(variant)
    return _read_file(path, ema, dtype, sizes_only)


def check_no_variant(variant: str | None) -> None:
    """ValueError for a variant of what is a file."""
    if variant is not None:
        raise ValueError(f"variant is for diffusers directories, got {variant!r} for a file")


@dataclass
class Payload:
    """The tensors of a control's file or folder, under the file's names. config: of the base, if ours is
    there. format: the one that save_control would write, None if none."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    format: str | None
    files: list[Path]


def read_payload(path: Path, variant: str | None = None) -> Payload:
    """Read a control's file, or its diffusers directory."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    config: Any = None
    files = [path]
    if path.is_dir():
        tensors, files, _ = _read_weights(path, variant)
        kind = read_json(path / CONFIG).get("_class_name", CONTROL_CLASS)
        if kind != CONTROL_CLASS:
            raise ValueError(f"config.json is of a {kind}, not of a {CONTROL_CLASS}")
        format: str | None = "diffusers"
        if (path / SIDECAR).is_file():
            config = _parse(read_safetensors(path / SIDECAR)[1].get("config", "null"))
    else:
        check_no_variant(variant)
        tensors, config, format = _read_control_file(path)
    if not isinstance(config, dict | None):
        raise ValueError(f"its configuration must be a mapping, got a {type(config).__name__}")
    return Payload(detached(tensors), config, format, files)


def _read_control_file(path: Path) -> tuple[dict[str, Tensor], Any, str | None]:
    kind = container(path)
    if kind == "safetensors":
        tensors, metadata = read_safetensors(path)
        is_ours = metadata.get("format") == CONTROL_FORMAT
        config = _parse(metadata.get("config", "null")) if is_ours else None
        format = "pixart" if is_ours else None
    else:
        tensors, config, is_official = _pick_state_dict(read_torch(path, kind), ema=False)
        format = "official" if is_official else None
    check_plain(path, tensors)
    return tensors, config, format


def _read_file(path: Path, ema: bool, dtype: torch.dtype | None, sizes_only: bool) -> Contents:
    kind = container(path)
    config: Any = None
    written_as = "pixart"
    if kind == "safetensors":
        tensors, metadata = read_safetensors(path)
        if ema:
            raise ValueError("has no averaged weights (state_dict_ema)")
        # Anybody may write metadata: "config" is ours only beside our "format".
        if metadata.get("format") in ("pixart", COMFYUI_FORMAT):
            config = _parse(metadata.get("config", ""))
            written_as = "pixart" if metadata["format"] == "pixart" else "comfyui"
        is_official = False
    else:
        tensors, config, is_official = _pick_state_dict(read_torch(path, kind), ema)
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"its configuration must be a mapping, got a {type(config).__name__}")
    check_plain(path, tensors)
    tensors = detached(tensors)
    stripped, naming, notes = recognise(tensors)
    # What is more than a transformer is never replaced by one.
    is_alone = naming == "official" and len(stripped) == len(tensors)
    format = "official" if is_official else written_as if config and kind == "safetensors" else None
    stripped = widened(stripped, dtype, notes)
    official = _joined(stripped, sizes_only) if naming == "diffusers" else stripped
    format = format if is_alone else None
    return Contents(official, list(stripped), naming, format, config, notes=notes)


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pickle may hold parameters, whose numbers are read with warnings about gradients."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def widened(
    tensors: dict[str, Tensor], dtype: torch.dtype | None, notes: list[str]
) -> dict[str, Tensor]:
    """fp8 as `dtype`, or as the rest of the file: PyTorch computes nothing in it. Both kinds of fp8 are
    exact in 16 bits."""
    narrow = [name for name, tensor in tensors.items() if tensor.dtype in FLOATS_OF_8_BITS]
    if not narrow:
        return tensors
    if dtype is None:
        others = {t.dtype for t in tensors.values()} - set(FLOATS_OF_8_BITS)
        dtype = functools.reduce(torch.promote_types, others) if others else torch.bfloat16
        kind = str(dtype).removeprefix("torch.")
        notes.append(f"has {len(narrow)} tensors of fp8, which were opened as {kind}")
    return tensors | {name: tensors[name].to(dtype) for name in narrow}


def _parse(text: str) -> Any:
    try:
        return parse_json(text, "config")
    except ValueError as error:
        raise ValueError(f"its metadata holds no valid configuration ({error})") from None


def _pick_state_dict(payload: Any, ema: bool) -> tuple[dict[str, Any], Any, bool]:
    """(state dict, our configuration if it is there, whether the official code would find it too) out of
    what torch.load gave."""
    if not isinstance(payload, dict):
        raise ValueError(f"holds a {type(payload).__name__}, not a state dict")
    config = payload.get(OWN_KEY)
    if config is not None and not _is_small(config):
        raise ValueError(f"its configuration ({OWN_KEY}) must be a few plain values")
    picked, keys = unpacked(payload, ema)
    if ema and not set(keys) & set(_AVERAGED):
        raise ValueError(f"has no averaged weights ({', '.join(_AVERAGED)})")
    if not ema and (key := next((key for key in _AVERAGED if key in picked), None)):
        raise ValueError(f"has only averaged weights ({key}); ask for them with ema")
    return picked, config, keys in ([], ["state_dict"], ["state_dict_ema"])


def unpacked(payload: dict[str, Any], ema: bool) -> tuple[dict[str, Any], list[str]]:
    """The state dict inside the dicts of trainers, and the keys that lead to it."""
    keys: list[str] = []
    while len(keys) < _NESTED:
        wanted = (
            (*_AVERAGED, *_CONTAINERS) if ema and not set(keys) & set(_AVERAGED) else _CONTAINERS
        )
        key = next((key for key in wanted if isinstance(payload.get(key), dict)), None)
        if key is None:
            break
        payload = payload[key]
        keys.append(key)
    return payload, keys


def _is_small(config: Any) -> bool:
    """Whether it is made of a few plain values. A pickle of a few bytes may unfold to any size."""
    level, count = [config], 0
    for _ in range(4):
        count += len(level)
        if count > 4096:
            return False
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if not isinstance(inner, bool | int | float | str | None)
        ]
        if not all(isinstance(inner, dict | list | tuple) for inner in level):
            return False
    return not level


def _joined(tensors: dict[str, Tensor], sizes_only: bool) -> dict[str, Tensor]:
    """Under official names."""
    if sizes_only:
        tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return from_diffusers(tensors)


def _read_directory(
    path: Path, variant: str | None, dtype: torch.dtype | None, sizes_only: bool
) -> Contents:
    directory = path
    if (path / "model_index.json").is_file():
        directory = path / "transformer"
        if not directory.is_dir():
            raise ValueError("is a pipeline without a transformer/ directory")
    tensors, names, found = _read_weights(directory, variant)
    config = read_json(directory / CONFIG)
    stripped, naming, notes = recognise(tensors)
    if naming != "diffusers":
        raise ValueError(
            f"{names[0].name} has official names; give that file instead of the directory"
        )
    stripped = widened(stripped, dtype, notes)
    contents = Contents(
        _joined(stripped, sizes_only), list(stripped), naming, "diffusers", notes=notes
    )
    contents.diffusers_config = config
    if found != variant:
        contents.notes.append(f"has only the variant {found!r}, which was taken")
    _read_extras(directory, contents, dtype)
    return contents


def _read_weights(
    directory: Path, variant: str | None
) -> tuple[dict[str, Tensor], list[Path], str | None]:
    """All tensors of a diffusers directory, the files that hold them and the variant that was found."""
    weights, found = find_weights(directory, variant)
    tensors: dict[str, Tensor] = {}
    for file in weights:
        kind = container(file)
        part = read_safetensors(file)[0] if kind == "safetensors" else read_torch(file, kind)
        if not isinstance(part, dict):
            raise CheckpointError(f"{file}: holds a {type(part).__name__}, not a state dict")
        check_plain(file, part)
        if again := sorted(tensors.keys() & part.keys()):
            raise CheckpointError(
                f"{file}: must hold other tensors than the files before it, got {listed(again)}"
            )
        tensors |= detached(part)
    return tensors, weights, found


def _read_extras(directory: Path, contents: Contents, dtype: torch.dtype | None) -> None:
    """What config.json does not hold: the null caption and two settings of training."""
    sidecar, index = directory / SIDECAR, directory.parent / "model_index.json"
    is_of_pipeline = directory.name == "transformer" and index.is_file()
    if is_of_pipeline:
        contents.index_few_step = read_json(index).get("few_step")
    if sidecar.is_file():
        buffers, metadata = read_safetensors(sidecar)
        check_plain(sidecar, buffers)
        contents.tensors |= widened(buffers, dtype, [])
        extra = _parse(metadata.get("config", "{}"))
        if not isinstance(extra, dict):
            raise CheckpointError(f"{sidecar}: its configuration must be a mapping, got {extra!r}")
        contents.model_max_length = extra.get("model_max_length")
        contents.class_dropout_prob = extra.get("class_dropout_prob", 0.1)
    elif is_of_pipeline:
        parts = read_json(index)
        pipeline, encoder = str(parts.get("_class_name")).lower(), parts.get("text_encoder")
        lengths = [length for family, length in MAX_LENGTH.items() if family in pipeline]
        reads_clip = isinstance(encoder, list) and "CLIP" in str(encoder[-1:])
        contents.model_max_length = CLIP_LENGTH if reads_clip else lengths[0] if lengths else None
