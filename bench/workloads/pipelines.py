"""Pipelines of the published sizes with random weights: encoding, denoising and decoding take as long
as with trained ones.

Sizes: T5 v1.1 XXL, the VAE of SDXL, XL/2 (config.json of google/t5-v1_1-xxl, stabilityai/sdxl-vae
and PixArt-alpha/PixArt-Sigma-XL-2-1024-MS). The tokenizer is that of the embedded model, which may
cut a prompt into another number of tokens than T5's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.workloads import models, sizes
from pixart.config import EMBEDDED, PixArtConfig

# By the width of the transformer: the published one's, the tiny one's.
TEXT: dict[int, dict[str, Any]] = {
    1152: {"vocab_size": 32128, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    144: {"vocab_size": 512, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 2},
}
VAE: dict[int, dict[str, Any]] = {
    1152: {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    144: {"block_out_channels": (32,) * 4, "layers_per_block": 1},
}


def text_encoder(config: PixArtConfig) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    rest: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5EncoderModel(
        T5Config(d_model=config.caption_channels, **TEXT[config.hidden_size], **rest)
    )


def vae(config: PixArtConfig) -> nn.Module:
    from diffusers import AutoencoderKL

    own = VAE[config.hidden_size]
    levels = len(own["block_out_channels"])
    model: Any = AutoencoderKL(
        **own,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=32,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    return model


def write(
    folder: Path, resolution: str, compression: sizes.Compression | None, device: torch.device
) -> None:
    """A pipeline directory, its weights made on the device and written in fp16; 11 GB at the published
    sizes, most of them T5's."""
    from pixart.pipeline.directory import open_directory
    from pixart.pipeline.export import export_pipeline

    config = sizes.config(resolution)
    with device, half_precision():
        texts, pictures = text_encoder(config), vae(config)
    export_pipeline(
        folder,
        transformer=models.build_ours(sizes.config(resolution, compression), device),
        text_encoder=texts,
        vae=pictures,
        spiece=open_directory(EMBEDDED, with_transformer=False) / "tokenizer" / "spiece.model",
        prediction_type="epsilon",
    )


@contextmanager
def half_precision() -> Iterator[None]:
    """What is built in here has fp16 weights: in fp32, T5 alone would take 19 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
