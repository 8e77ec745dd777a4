"""One file for ComfyUI: the official names and positions, in safetensors.

ComfyUI takes a file for PixArt by the names of its tensors, and reads little more from it: the blocks are
counted and the side of the position table is seen, all else is what the released models have
(comfy/model_detection.py, detect_unet_config, of ComfyUI 0.3.64). Tensors that it does not know are
dropped with a line in its log, so that a compressed model would open and draw noise. Whatever it would
open as another network is therefore written under a prefix that it does not know: it refuses such a
file, and pixart.comfyui's loader opens it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pixart.checkpoint.config import is_compressed
from pixart.checkpoint.names import COMFYUI_PREFIX
from pixart.config import MAX_LENGTH, PixArtConfig

# What ComfyUI builds whatever the file says.
_FIXED = {
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "caption_channels": 4096,
    "pred_sigma": True,
    "qk_norm": False,
}
_LATENTS_OF_SCALE_1 = 64  # it guesses pe_interpolation as input_size // 64


def check_comfyui(config: PixArtConfig) -> None:
    """Raise ValueError for what neither ComfyUI nor the loader of pixart.comfyui can build."""
    if not config.caption_embedding:
        raise ValueError(
            "caption_embedding must be true for ComfyUI, whose PixArt always embeds captions, got false; "
            "write the pixart or the diffusers format"
        )


def stock_obstacle(config: PixArtConfig) -> str | None:
    """Why ComfyUI alone would open the model as another network, None if it opens this one."""
    if is_compressed(config):
        return "ComfyUI alone drops the tensors of K/V compression"
    for name, fixed in _FIXED.items():
        if (value := getattr(config, name)) != fixed:
            return f"ComfyUI alone takes {name} to be {fixed}, and the model has {value}"
    guess = config.input_size // _LATENTS_OF_SCALE_1
    if config.pe_interpolation != guess:
        return (
            f"ComfyUI alone takes pe_interpolation to be {guess} at {config.input_size * 8} px, "
            f"and the model has {config.pe_interpolation}"
        )
    if config.model_max_length == MAX_LENGTH["alpha"] and not config.micro_condition:
        return "ComfyUI alone takes PixArt-α without size conditions for Σ, whose VAE is another"
    return None


def comfyui_tensors(config: PixArtConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under official names, named so that ComfyUI alone opens them rightly or not at all."""
    prefix = "" if stock_obstacle(config) is None else COMFYUI_PREFIX
    return {prefix + name: tensor for name, tensor in tensors.items()}


def comfyui_settings(config: PixArtConfig) -> dict[str, Any]:
    """What ComfyUI's PixArtMS is built from, K/V compression aside. ValueError if it cannot be."""
    check_comfyui(config)
    family = "alpha" if config.model_max_length == MAX_LENGTH["alpha"] else "sigma"
    return {
        "image_model": f"pixart_{'alpha' if config.micro_condition else family}",
        "input_size": config.input_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "caption_channels": config.caption_channels,
        "model_max_length": config.model_max_length,
        "pe_interpolation": config.pe_interpolation,
        "pred_sigma": config.pred_sigma,
        "micro_condition": config.micro_condition,
        "qk_norm": config.qk_norm,
    }
