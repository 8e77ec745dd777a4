"""Save ControlNet-Transformers: the official layout, diffusers' research format, and safetensors of our own."""

import json
import logging
from pathlib import Path

from torch import Tensor

from pixart.checkpoint.control import control_to_diffusers, read_control
from pixart.checkpoint.names import CONTROL_CLASS, CONTROL_FORMAT, NULL_CAPTION, POSITIONS
from pixart.checkpoint.save import check_official, choose_format, positions_of
from pixart.checkpoint.write import (
    check_destination,
    whole_or_not_at_all,
    write_directory,
    write_official,
    write_safetensors,
)
from pixart.config import PixArtConfig
from pixart.model.control import ControlNet
from pixart.model.transformer import PixArt
from pixart.weights import check_finite

logger = logging.getLogger("pixart")


def save_control(
    network: ControlNet,
    path: str | Path,
    *,
    base: PixArt | None = None,
    config: PixArtConfig | None = None,
    format: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a control in the dtype that it has: whole, or not at all (CheckpointWriteError).

    format: "pixart" (one safetensors file), "official" (.pth) or "diffusers" (a directory); None takes it
    from the path's suffix. base: whose weights an official file holds beside; the official code opens no
    file without. config: the base's, for those who open the file, None if it is not known. The rest as
    in save_transformer.
    """
    path = Path(path)
    format = choose_format(path, format, max_shard_size)
    if format == "comfyui":
        raise ValueError(
            "format must be official, diffusers or pixart for a control, got comfyui, which has no "
            "ControlNet of PixArt"
        )
    if getattr(network, "peft_config", {}):
        raise ValueError("a control must be plain to be saved, got LoRA adapters; merge them first")
    if base is not None and format != "official":
        raise ValueError(f"base is for official files, which hold it too, got format {format!r}")
    check_destination(path, format, overwrite, format_of=_format_of)
    config = config if base is None else base.config
    if format == "official" and config is not None:
        check_official(config)
    tensors = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    check_finite(tensors, f"the control to be saved as {path}")
    stored = {} if config is None else config.to_dict()
    with whole_or_not_at_all(path) as aside:
        if format == "pixart":
            metadata = {"config": json.dumps(stored)} if stored else {}
            write_safetensors(aside, tensors, {"format": CONTROL_FORMAT} | metadata)
        elif format == "official":
            # In the order of the official model's state dict.
            write_official(aside, _base_tensors(base) | tensors, stored or None)
        else:
            values = {"_class_name": CONTROL_CLASS, "num_layers": network.copies}
            extra = stored or None
            write_directory(aside, values, control_to_diffusers(tensors), {}, extra, max_shard_size)
    if format == "official" and base is None:
        logger.info(
            "%s: the official code opens no control without its base's weights beside", path
        )


def _base_tensors(base: PixArt | None) -> dict[str, Tensor]:
    if base is None:
        return {}
    own = {name: tensor.detach().cpu() for name, tensor in base.state_dict().items()}
    if not getattr(base, "null_caption_stored", True):
        del own[NULL_CAPTION]  # random numbers: see load_transformer
    check_finite(own, "the base to be saved with its control")
    own = {POSITIONS: positions_of(base.config, own)} | own
    return {f"base_model.{name}": tensor for name, tensor in own.items()}


def _format_of(path: Path) -> str | None:
    try:
        return read_control(path).format
    except ValueError:
        return None
