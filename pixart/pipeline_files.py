"""The files of a pipeline directory: where they are, and what is wrong with those that are not."""

import json
import pickle
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pixart.checkpoint import TRANSFORMER_FILES, CheckpointError, resolve
from pixart.model import PixArt
from pixart.text import Quantization

EMBEDDED = "shapes"
_PIPELINE_FILES = (
    "*.json",
    "*/*.json",
    "*/*.safetensors",
    "*/*.bin",
    "*/*.model",
    *TRANSFORMER_FILES,
)
_SMALL_TEXT_ENCODER = 2**31  # bytes on disk; below it T5 runs in the dtype of the rest


def open_directory(source: str | Path, with_transformer: bool) -> Path:
    if str(source) == EMBEDDED:  # a directory of that name is ./shapes
        return Path(__file__).parent / "assets" / EMBEDDED
    directory = resolve(source, allow_patterns=_PIPELINE_FILES)
    needed = ["tokenizer", "text_encoder", "vae", "scheduler"] + ["transformer"] * with_transformer
    if missing := [name for name in needed if not (directory / name).is_dir()]:
        way_out = "give the directory of a whole pipeline"
        if missing == ["transformer"]:
            way_out = "name a transformer checkpoint with --transformer"
        raise CheckpointError(f"{directory}: has no {', '.join(missing)} folder; {way_out}")
    return directory


def check_fit(model: PixArt, path: Path, directory: Path) -> None:
    """Refuse a transformer that was made for another pipeline, before anything is run."""
    pairs = (
        ("text_encoder", "d_model", "caption_channels"),
        ("vae", "latent_channels", "in_channels"),
    )
    for folder, theirs, ours in pairs:
        given = read_json(directory / folder / "config.json").get(theirs)
        expected = getattr(model.config, ours)
        if given is not None and given != expected:
            raise CheckpointError(
                f"{path}: is made for {expected} {ours.replace('_', ' ')}, but {directory / folder} "
                f"has {given}; give the pipeline that it belongs to with --model"
            )


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Other libraries say what is wrong with a file, but not with which."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise CheckpointError(f"{folder}: cannot be used ({reason})") from error


def text_dtype(
    directory: Path, wanted: torch.dtype | Quantization | None, dtype: torch.dtype
) -> tuple[torch.dtype, Quantization | None]:
    if isinstance(wanted, str):
        return torch.bfloat16, wanted
    if wanted is not None:
        return wanted, None
    folder = directory / "text_encoder"
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return (torch.bfloat16 if size >= _SMALL_TEXT_ENCODER else dtype), None


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a pipeline needs it") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values
