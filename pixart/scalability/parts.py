"""What stands beside a denoiser: text encoders and the VAE's decoder, built on the meta device.

Their sizes are those of the published configurations, written out here: nothing is fetched to be counted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pixart.libraries import importing
from pixart.scalability.counting import Count, count

# google/t5-v1_1-xxl, whose encoder PixArt reads captions with.
T5_XXL: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# openai/clip-vit-large-patch14, its text half.
CLIP_L: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
# stabilityai/sdxl-vae.
SDXL_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def count_t5(config: Mapping[str, Any], tokens: int) -> Count:
    """An encoder on one prompt of so many tokens. config: transformers' T5Config."""
    with importing():
        from transformers import T5Config, T5EncoderModel
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config)).eval()
    return count(model, lambda model: model(input_ids=_ids(tokens)))


def count_clip(config: Mapping[str, Any], tokens: int) -> Count:
    """The text half of a CLIP on one prompt. config: transformers' CLIPTextConfig."""
    with importing():
        from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    return count(model, lambda model: model(input_ids=_ids(tokens)))


def count_decoder(config: Mapping[str, Any], size: int) -> Count:
    """A VAE's decoder on one picture of size × size pixels. config: diffusers' AutoencoderKL."""
    with importing():
        from diffusers import AutoencoderKL
    with torch.device("meta"):
        whole: Any = AutoencoderKL(**config)
    whole.eval()
    side = size // 2 ** (len(config["block_out_channels"]) - 1)
    latents = torch.empty(1, config["latent_channels"], side, side, device="meta")
    decoder = nn.Sequential(whole.post_quant_conv, whole.decoder)
    return count(decoder, lambda decoder: decoder(latents))


def _ids(tokens: int) -> torch.Tensor:
    return torch.zeros(1, tokens, dtype=torch.long, device="meta")
