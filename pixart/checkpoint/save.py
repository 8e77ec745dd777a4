"""Save transformers: official .pth, diffusers directories, safetensors of our own and for ComfyUI."""

import json
import logging
from pathlib import Path

from torch import Tensor

from pixart.checkpoint.comfyui import check_comfyui, comfyui_tensors, stock_obstacle
from pixart.checkpoint.config import (
    config_to_diffusers,
    is_compressed,
)
from pixart.checkpoint.names import (
    COMFYUI_FORMAT,
    NOT_IN_DIFFUSERS,
    NULL_CAPTION,
    POSITIONS,
    to_diffusers,
)
from pixart.checkpoint.write import (
    check_destination,
    whole_or_not_at_all,
    write_directory,
    write_official,
    write_safetensors,
)
from pixart.config import PixArtConfig
from pixart.model.transformer import PixArt
from pixart.resolution import position_embedding
from pixart.weights import check_finite

logger = logging.getLogger("pixart")

FORMATS = ("official", "diffusers", "pixart", "comfyui")
_SUFFIXES = {".safetensors": "pixart", ".pth": "official", ".pt": "official", "": "diffusers"}


def save_transformer(
    model: PixArt,
    path: str | Path,
    *,
    format: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in the dtype that it has: whole, or not at all (CheckpointWriteError).

    format: "pixart" (one safetensors file, the configuration in its metadata), "official" (.pth) or
    "diffusers" (a directory); None takes it from the path's suffix. "comfyui" is one safetensors file too,
    and must be asked for. max_shard_size: bytes or "5GB", for diffusers directories. A checkpoint of the
    same format is replaced; anything else at path is an error unless overwrite, and always if it is a
    directory that holds more than a checkpoint.
    """
    path = Path(path)
    format = choose_format(path, format, max_shard_size)
    if adapters := getattr(model, "peft_config", {}):
        raise ValueError(
            f"model must be plain, got {len(adapters)} LoRA adapters; merge_lora puts them into its "
            "weights, save_lora writes them alone"
        )
    check_destination(path, format, overwrite)
    config = model.config
    if format == "official":
        check_official(config)
    elif format == "comfyui":
        check_comfyui(config)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if not getattr(model, "null_caption_stored", True):
        # Random numbers: see load_transformer.
        del tensors[NULL_CAPTION]
    check_finite(tensors, f"the model to be saved as {path}")
    with whole_or_not_at_all(path) as aside:
        if format == "pixart":
            metadata = {"format": "pixart", "config": json.dumps(config.to_dict())}
            write_safetensors(aside, tensors, metadata)
        elif format == "comfyui":
            metadata = {"format": COMFYUI_FORMAT, "config": json.dumps(config.to_dict())}
            tensors[POSITIONS] = positions_of(config, tensors)
            write_safetensors(aside, comfyui_tensors(config, tensors), metadata)
        elif format == "official":
            # First, as in the state dict of the official model.
            tensors = {POSITIONS: positions_of(config, tensors)} | tensors
            write_official(aside, tensors, config.to_dict())
        else:
            buffers = {name: tensors[name] for name in (NULL_CAPTION,) if name in tensors}
            values = config_to_diffusers(config)
            extra = {key: getattr(config, key) for key in NOT_IN_DIFFUSERS}
            write_directory(aside, values, to_diffusers(tensors), buffers, extra, max_shard_size)
    _say_who_cannot_run(config, format)


def choose_format(path: Path, format: str | None, max_shard_size: int | str | None) -> str:
    """The format that is asked for, or that the path's suffix says. ValueError for none, and for shards of
    a single file."""
    format = format or _SUFFIXES.get("" if path.is_dir() else path.suffix, path.suffix)
    if format not in FORMATS:
        raise ValueError(
            "format must be official, diffusers, pixart or comfyui, or one of the first three by the "
            f"suffix (.pth, none, .safetensors), got {format!r} for {path}"
        )
    if format == "comfyui" and path.suffix not in (".safetensors", ".sft"):
        raise ValueError(
            f"a file for ComfyUI must end in .safetensors, by which it is opened, got {path}"
        )
    if max_shard_size is not None and format != "diffusers":
        raise ValueError(f"max_shard_size is for diffusers directories, got format {format!r}")
    return format


def check_official(config: PixArtConfig) -> None:
    """Refuse what the official code would open as another network: it loads what a file has, and embeds
    captions with random weights where the file has none."""
    if not config.caption_embedding:
        config.to_official()


def positions_of(config: PixArtConfig, tensors: dict[str, Tensor]) -> Tensor:
    """The table of the native size: other programs read input_size and pe_interpolation from it."""
    side = config.base_size
    table = position_embedding(config.hidden_size, (side, side), side, config.pe_interpolation)
    return table[None].to(tensors["x_embedder.proj.weight"].dtype)


def _say_who_cannot_run(config: PixArtConfig, format: str) -> None:
    if format == "official":
        try:
            config.to_official()
        except ValueError as error:
            logger.info("the official code cannot run this model: %s", error)
    elif format == "comfyui" and (obstacle := stock_obstacle(config)):
        logger.info("%s; load the file with the node PixArtKVLoader of pixart.comfyui", obstacle)
    elif format == "diffusers" and (is_compressed(config) or config.qk_norm):
        logger.info("diffusers cannot run this model: it drops the tensors that it does not know")
