"""Pipelines of the published sizes with random weights: encoding, denoising and decoding take as long
as with trained ones.

Sizes: T5 v1.1 XXL, the VAE of SDXL, XL/2 (config.json of google/t5-v1_1-xxl, stabilityai/sdxl-vae
and PixArt-alpha/PixArt-Sigma-XL-2-1024-MS). The tokenizer is that of the embedded model, which may
cut a prompt into another number of tokens than T5's.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.workloads import models, sizes
from pixart import cost
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


LATENT_CHANNELS, COLOURS = 4, 3


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
        latent_channels=LATENT_CHANNELS,
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


@cache
def directory(resolution: str, device: torch.device) -> Path:
    """What `write` writes without compression, once for this process."""
    folder = tempfile.TemporaryDirectory()
    _FOLDERS.append(folder)  # goes when the process ends
    write(Path(folder.name), resolution, None, device)
    return Path(folder.name)


_FOLDERS: list[Any] = []


def text_flops(config: PixArtConfig, tokens: int) -> int:
    """T5's encoder on one caption, every token attending to all."""
    own, width = TEXT[config.hidden_size], config.caption_channels
    inner = own["num_heads"] * own["d_kv"]
    products = 4 * cost.product_flops(tokens, width, inner)
    products += 3 * cost.product_flops(
        tokens, width, own["d_ff"]
    )  # the gate has a layer of its own
    return own["num_layers"] * (products + cost.attention_flops(tokens, tokens, inner))


def decoder_flops(config: PixArtConfig, grid: tuple[int, int]) -> int:
    """The VAE's decoder on so many rows and columns of latents, at once."""
    own = VAE[config.hidden_size]
    levels, layers = own["block_out_channels"], own["layers_per_block"]
    area, width = grid[0] * grid[1], levels[-1]

    def convolution(inputs: int, outputs: int, side: int = 3) -> int:
        return cost.product_flops(area, side**2 * inputs, outputs)

    def residual(inputs: int, outputs: int) -> int:
        shortcut = convolution(inputs, outputs, 1) if inputs != outputs else 0
        return convolution(inputs, outputs) + convolution(outputs, outputs) + shortcut

    total = convolution(LATENT_CHANNELS, LATENT_CHANNELS, 1) + convolution(LATENT_CHANNELS, width)
    total += 2 * residual(width, width) + 4 * cost.product_flops(area, width, width)
    total += cost.attention_flops(area, area, width)
    for number, outputs in enumerate(reversed(levels)):
        if number:  # the level before ends by doubling the sides
            area *= 4
            total += convolution(width, width)
        total += residual(width, outputs) + layers * residual(outputs, outputs)
        width = outputs
    return total + convolution(width, COLOURS)


@contextmanager
def half_precision() -> Iterator[None]:
    """What is built in here has fp16 weights: in fp32, T5 alone would take 19 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
