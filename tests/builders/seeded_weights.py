"""Weights and pictures that NumPy draws from a seed: the same here and where a reference was run, so that
a golden file needs to hold neither."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def drawn(shape: Sequence[int], name: str, seed: int = 0) -> np.ndarray:
    """Standard normal numbers of a name and a seed, fp32."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(
        tuple(shape), dtype=np.float32
    )


def weight(name: str, shape: Sequence[int], gain: float = 2.0, seed: int = 0) -> Tensor:
    """Such that signals keep their size through a deep network: variance gain / fan-in; scales of norms
    near 1; biases and means small; variances above 1."""
    values = drawn(shape, name, seed)
    if name.endswith("running_var"):
        values = 1 + 0.2 * np.abs(values)
    elif len(shape) >= 2 and not name.endswith("embedding") and "embed" not in name:
        values = values * np.float32(np.sqrt(gain / np.prod(shape[1:])))
    elif name.endswith("weight") and len(shape) == 1:
        values = 1 + 0.1 * values
    elif len(shape) >= 2:
        values = 0.3 * values
    else:
        values = 0.1 * values
    return torch.from_numpy(np.asarray(values, np.float32))


def weights(
    shapes: Mapping[str, Sequence[int]], gain: float = 2.0, seed: int = 0
) -> dict[str, Tensor]:
    """A state dict of `weight`s; counters and numbers of places are left out."""
    return {
        name: weight(name, shape, gain, seed)
        for name, shape in shapes.items()
        if not name.endswith(("num_batches_tracked", "position_ids"))
    }


def weights_of(network: nn.Module, gain: float = 2.0, seed: int = 0) -> dict[str, Tensor]:
    """`weights` in the shapes of a network."""
    return weights({name: tuple(t.shape) for name, t in network.state_dict().items()}, gain, seed)


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """RGB, by (width, height): a coloured slope, a bright box, and noise on half of it."""
    found = []
    for k, (width, height) in enumerate(sizes):
        rows, columns = np.mgrid[0:height, 0:width]
        red = 255 * columns / max(1, width - 1)
        green = 255 * rows / max(1, height - 1)
        blue = 127 + 127 * np.sin((rows + 2 * columns) / (3 + k))
        levels = np.stack([red, green, blue], 2)
        levels[height // 4 : height // 2, width // 4 : width // 2] = 250 - 40 * k
        noise = drawn((height, width, 3), f"picture {k}", seed)
        levels[:, : width // 2] += 30 * noise[:, : width // 2]
        found.append(Image.fromarray(levels.clip(0, 255).round().astype(np.uint8), "RGB"))
    return found
