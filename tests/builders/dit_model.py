"""A class-conditional DiT under its published names."""

import numpy as np
import torch
from torch import Tensor

WIDTH, DEPTH, SIDE = 144, 3, 8  # SIDE: tokens of the native grid


def positions(side: int = SIDE) -> Tensor:
    """DiT's fixed table: sines and cosines of the column, then of the row."""
    frequencies = 10000.0 ** -(np.arange(WIDTH // 4) / (WIDTH / 4))
    rows, cols = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    parts = [wave(np.outer(c, frequencies)) for c in (cols, rows) for wave in (np.sin, np.cos)]
    return torch.tensor(np.concatenate(parts, axis=1), dtype=torch.float32)[None]


def dit() -> dict[str, Tensor]:
    """A class-conditional DiT's state dict under its published names, with random values."""
    sizes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (WIDTH, 4, 2, 2),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (1001, WIDTH),
        "final_layer.linear.weight": (32, WIDTH),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    linears["adaLN_modulation.1"] = (6, 1)
    for layer in range(DEPTH):
        for name, (rows, cols) in linears.items():
            sizes[f"blocks.{layer}.{name}.weight"] = (rows * WIDTH, cols * WIDTH)
            sizes[f"blocks.{layer}.{name}.bias"] = (rows * WIDTH,)
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(shape, generator=generator) * 0.1 for n, shape in sizes.items()}
    return state | {"pos_embed": positions()}
