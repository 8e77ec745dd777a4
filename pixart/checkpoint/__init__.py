"""Every checkpoint format, both directions."""

from pixart.checkpoint.config import Surroundings, config_from_diffusers, config_to_diffusers
from pixart.checkpoint.load import (
    TRANSFORMER_FILES,
    OpenedTransformer,
    empty_model,
    load_transformer,
    open_transformer,
    read_config,
)
from pixart.checkpoint.save import save_transformer
from pixart.files import CheckpointError, CheckpointWriteError
from pixart.weights import resolve

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "OpenedTransformer",
    "Surroundings",
    "TRANSFORMER_FILES",
    "config_from_diffusers",
    "config_to_diffusers",
    "empty_model",
    "load_transformer",
    "open_transformer",
    "read_config",
    "resolve",
    "save_transformer",
]
