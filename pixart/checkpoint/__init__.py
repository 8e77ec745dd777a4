"""Every checkpoint format, both directions."""

from pixart.checkpoint.load import (
    TRANSFORMER_FILES,
    CheckpointError,
    CheckpointWriteError,
    OpenedTransformer,
    Surroundings,
    config_from_diffusers,
    config_to_diffusers,
    empty_model,
    load_transformer,
    open_transformer,
    read_config,
    resolve,
    save_transformer,
)

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
