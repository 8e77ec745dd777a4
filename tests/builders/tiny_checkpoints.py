"""Tiny random checkpoints, for the tests of everything that opens one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.config import KVCompression, PixArtConfig
from pixart.model.transformer import PixArt
from pixart.resolution import position_embedding

SIGMA = PixArtConfig(
    input_size=8, hidden_size=72, depth=3, num_heads=1, caption_channels=24, model_max_length=7,
    pe_interpolation=2.0,
)  # fmt: skip
CONV = replace(SIGMA, kv_compression=KVCompression([0, 2], 2))

FORMATS = {"official": "m.pth", "pixart": "m.safetensors", "diffusers": "m"}


def build(config: PixArtConfig = SIGMA, dtype: torch.dtype = torch.float32) -> PixArt:
    """A model whose every tensor is random: fresh ones have zeros, which hide swapped tensors."""
    generator = torch.Generator().manual_seed(1)
    model = PixArt(config).eval()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.to(dtype)


def assert_same(model: PixArt, expected: PixArt) -> None:
    assert model.config == expected.config
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def official(config: PixArtConfig = SIGMA, *, positions: bool = True) -> dict[str, Tensor]:
    """A state dict as the official code saves it, without anything of ours."""
    side = config.base_size
    table = position_embedding(config.hidden_size, (side, side), side, config.pe_interpolation)
    return ({"pos_embed": table[None]} if positions else {}) | build(config).state_dict()


def save_official(path: Path, state: dict[str, Any], key: str | None = "state_dict") -> Path:
    torch.save({key: state, "epoch": 3} if key else state, path)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept))
