"""Reads checkpoints. The format is taken from the contents, and no code in a file ever runs."""

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixart.checkpoint.names import CONFIG, OWN_KEY, SIDECAR, from_diffusers, recognise
from pixart.config import MAX_LENGTH
from pixart.files import AGAIN, CheckpointError, parse_json, read_json
from pixart.weights import find_weights

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_OTHER_FLOATS = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # no arithmetic: only with a dtype to cast to
# What the unpickler and the zip reader raise over damaged bytes.
_DAMAGED = (
    RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


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


def container(path: Path) -> str:
    """Told by the first bytes: "safetensors", "zip" (of PyTorch) or "pickle" (of PyTorch < 1.6)."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise CheckpointError(f"{path}: is empty; {AGAIN}")
    # 8 bytes with the length of the header, then the header, which is JSON.
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path}: is a web page, not weights; {AGAIN}")
    raise CheckpointError(
        f"{path}: is neither a safetensors nor a PyTorch file, or is damaged; {AGAIN}"
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). The tensors are mapped from the disk and read when first used."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is truncated or damaged ({_brief(error)}); {AGAIN}"
        ) from error


def read_torch(path: Path, kind: str) -> Any:
    """What torch.load makes of a file of tensors and plain containers; nothing in it may run."""
    try:
        if kind == "pickle":
            _refuse_plain_pickle(path)
        # An archive's directory is at its end: a download that broke off has none.
        elif not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("the end of the archive is missing")
        # Only an archive can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _DAMAGED as error:
        named = re.search(r"GLOBAL (\S+)|function ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named:
            raise CheckpointError(f"{path}: {_refusal(named[1] or named[2])}") from error
        raise CheckpointError(
            f"{path}: is truncated or damaged ({_brief(error)}); {AGAIN}"
        ) from error


def _refuse_plain_pickle(path: Path) -> None:
    """torch.save writes protocol 2. Other pickles are refused; opcodes say what they would call."""
    strings: list[str] = []
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            return
        file.seek(0)
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                strings = str(argument).split()
            if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                raise CheckpointError(f"{path}: {_refusal('.'.join(strings[-2:]))}")
            if isinstance(argument, str):
                strings.append(argument)
    raise CheckpointError(
        f"{path}: is a pickle that torch.save did not write, or is damaged; {AGAIN}"
    )


def _refusal(name: str) -> str:
    return f"contains code ({name}), refused; where you trust it, save its state_dict alone"


def _brief(error: BaseException) -> str:
    """The first line of a library's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Weights only load failed"):
        lines = lines[-2:]
    return (lines[0] if lines else type(error).__name__).split(". ")[0].rstrip(".")


def check_plain(path: Path, tensors: Mapping[Any, Any], dtype: torch.dtype | None) -> None:
    """Raise CheckpointError unless every value is a dense floating-point tensor with data."""
    allowed = _FLOATS if dtype is None else _FLOATS + _OTHER_FLOATS
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"{name!r} is a {type(tensor).__name__}"
            raise CheckpointError(
                f"{path}: holds no state dict of a transformer ({what}, not a tensor)"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} must be a dense tensor with data")
        if tensor.dtype not in allowed:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
            way_out = "; pass a dtype" if tensor.dtype in _OTHER_FLOATS else ""
            raise CheckpointError(f"{path}: {name} must be {kinds}, got {tensor.dtype}{way_out}")
