"""Open a checkpoint as a model of ComfyUI."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from pixart.checkpoint.comfyui import check_comfyui
from pixart.checkpoint.load import naming_file, open_transformer
from pixart.config import KVCompression

logger = logging.getLogger("pixart")


def load_model(path: str | Path, kv_compression: KVCompression | None = None) -> Any:
    """ComfyUI's ModelPatcher around its PixArt with the weights of a checkpoint, whatever its format.

    kv_compression: opens a dense checkpoint compressed. CheckpointError, a ValueError of one line, where
    the file cannot be read or ComfyUI's PixArt cannot be built like it.
    """
    opened = open_transformer(path, kv_compression=kv_compression)
    with naming_file(opened.path):
        check_comfyui(opened.config)
    import comfy.model_management as management
    import comfy.model_patcher

    from pixart.comfyui.transformer import new_model

    tensors = opened.tensors()
    sizes: Counter[Any] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    model = new_model(opened.config, sizes.total(), sizes.most_common(1)[0][0])
    resting = management.unet_offload_device()
    model = model.to(resting)
    model.load_model_weights(dict(tensors), "")
    logger.info("%s: %s", path, opened.config)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=resting
    )
