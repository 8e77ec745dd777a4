"""A pipeline of full size in files without contents: headers, and holes that take no room on the disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from published import SCHEDULER, TRANSFORMER, build_tokenizer

from pixart.checkpoint.load import empty_model
from pixart.checkpoint.names import to_diffusers
from pixart.config import PixArtConfig
from pixart.text.t5 import T5Shape
from pixart.vae.network import Autoencoder, AutoencoderConfig

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
T5_XXL = T5Shape(32128, 4096, 64, 10240, 24, 64, 32)
CHANNELS = (128, 256, 512, 512)


def build_xl2(
    path: Path,
    *,
    depth: int = 28,
    dtype: torch.dtype = torch.bfloat16,
    t5: T5Shape = T5_XXL,
    channels: tuple[int, ...] = CHANNELS,
) -> Path:
    """Σ-XL/2 for 1024 px. depth: fewer blocks, t5, channels: of the VAE, for what is to be computed."""
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _json(path / "model_index.json", index)
    _json(path / "scheduler" / "scheduler_config.json", SCHEDULER)
    build_tokenizer(path / "tokenizer")
    _json(path / "text_encoder" / "config.json", t5.to_config())
    _holes(path / "text_encoder" / "model.safetensors", t5.tensors, dtype)
    sizes = {"num_layers": depth, "caption_channels": t5.width}
    width = {"num_attention_heads": 16, "cross_attention_dim": 1152}
    _json(path / "transformer" / "config.json", TRANSFORMER | sizes | width)
    config = PixArtConfig(depth=depth, pe_interpolation=2.0, caption_channels=t5.width)
    tensors = {
        name: one
        for name, one in empty_model(config).state_dict().items()
        if name != "y_embedder.y_embedding"
    }
    weights = {name: tuple(one.shape) for name, one in to_diffusers(tensors).items()}
    _holes(path / "transformer" / "diffusion_pytorch_model.safetensors", weights, dtype)
    vae: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "force_upcast": False,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 0.13025,
    }
    _json(path / "vae" / "config.json", vae)
    known = AutoencoderConfig.of(vae)
    assert known is not None
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in Autoencoder(known).state_dict().items()}
    _holes(path / "vae" / "diffusion_pytorch_model.safetensors", shapes, dtype)
    return path


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _holes(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
