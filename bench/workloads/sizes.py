"""Which sizes the benches run at, and what the work at a size costs at least.

FLOPs are useful work: head dimension 72, never a padded width; 2 per multiply-add; exponentials and
element-wise work count nothing. Bytes are floors: each input read once, each output written once.
Axis letters: B batch, N image tokens, M key tokens, L text tokens, C channels, R compression ratio.
"""

from typing import NamedTuple

from pixart.resolution import RESOLUTIONS

PATCH_PIXELS = 16  # side of a token: the VAE's 8 pixels times the patch size 2
RATIO = 2  # of the published compression
TINY = "tiny"
SHALLOW = "-shallow"  # two blocks of the full width, dense and compressed, stand for all 28
PREDICTED = "8k"  # runs nowhere
PIXELS = {
    **RESOLUTIONS,
    PREDICTED: 8192,
    **{name + SHALLOW: side for name, side in RESOLUTIONS.items()},
    TINY: 96,  # 6 × 6 tokens, to try the benches out on any machine
}
# What `pytest bench` runs at, by device and smallest first: that size alone makes the smoke run.
OPERATOR_SIZES = {"cuda": ("512", "1k", "2k", "4k"), "cpu": ("256", "512", "1k")}
MODEL_SIZES = {
    "cuda": ("256", "512", "1k", "2k", "2880", "4k"),
    "cpu": tuple(size + SHALLOW for size in ("256", "512", "1k")),
}


class Model(NamedTuple):
    """A transformer's sizes: of XL/2 unless told."""

    hidden_size: int = 1152
    heads: int = 16
    depth: int = 28
    text_tokens: int = 300
    caption_channels: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def compressed_layers(self) -> range:
        """The deeper half, as published."""
        return range(self.depth // 2, self.depth)


class Compression(NamedTuple):
    """Which blocks merge ratio × ratio keys and values into one: as published unless told."""

    ratio: int = RATIO
    everywhere: bool = False

    def layers(self, sizes: Model) -> range:
        return range(sizes.depth) if self.everywhere else sizes.compressed_layers


XL2 = Model()
PUBLISHED = Compression()
TINY_MODEL = Model(hidden_size=144, heads=2, depth=2, text_tokens=12, caption_channels=48)


def model(resolution: str) -> Model:
    if resolution == TINY:
        return TINY_MODEL
    return XL2._replace(depth=2) if resolution.endswith(SHALLOW) else XL2


def grid(resolution: str, ratio: int = 1) -> tuple[int, int]:
    """Rows and columns of a square image's tokens, or of its key tokens after compression."""
    side = PIXELS[resolution] // PATCH_PIXELS
    return -(-side // ratio), -(-side // ratio)


def tokens(resolution: str, ratio: int = 1) -> int:
    rows, cols = grid(resolution, ratio)
    return rows * cols


def keys(kind: str, resolution: str, ratio: int = RATIO) -> int:
    """M of an attention: "self", "compressed", "cross" (text), or "masked" (text, some cut off)."""
    if kind == "self":
        return tokens(resolution)
    return tokens(resolution, ratio) if kind == "compressed" else model(resolution).text_tokens


def attention_flops(batch: int, queries: int, keys: int, channels: int, backward: bool) -> int:
    """2 matrix products forward; 5 backward, since the scores must be made again."""
    return (10 if backward else 4) * batch * queries * keys * channels


def attention_bytes(
    batch: int, queries: int, keys: int, channels: int, itemsize: int, backward: bool
) -> int:
    """q, k, v and the output; backward reads all of these with a gradient, and writes three."""
    query_passes, key_passes = (4, 4) if backward else (2, 2)
    return batch * channels * itemsize * (query_passes * queries + key_passes * keys)


def compress_bytes(
    batch: int, grid: tuple[int, int], ratio: int, channels: int, itemsize: int, backward: bool
) -> int:
    """K and V in, merged K and V out; backward reads K, V and two small gradients, writes two."""
    large = grid[0] * grid[1]
    small = -(-grid[0] // ratio) * -(-grid[1] // ratio)
    return 2 * batch * channels * itemsize * ((2 if backward else 1) * large + small)


# Passes over one (B, N, C) tensor, forward and backward. A gradient that equals another (x's in
# gate_add, and the branch's without a gate) takes no pass of its own.
PASSES = {
    "modulate": (2, 3),  # x, out / x, gradient, dx
    "gate_add": (3, 3),  # x, branch, out / branch, gradient, dbranch
    "gate_add_modulate": (4, 6),  # x, branch, y, out / branch, y, 2 gradients, dx, dbranch
    "add_modulate": (4, 4),  # the same without a gate: y, 2 gradients, dx
}


def elementwise_bytes(
    name: str, batch: int, tokens: int, channels: int, itemsize: int, backward: bool
) -> int:
    return PASSES[name][backward] * batch * tokens * channels * itemsize


def step_flops(
    resolution: str,
    batch: int,
    compressed: bool,
    compression: Compression = PUBLISHED,
    *,
    captions: bool = False,
) -> int:
    """One forward pass of the transformer's blocks; a training step is three of them. captions: it
    makes the captions' keys and values as well."""
    sizes, ratio = model(resolution), compression.ratio
    layers = compression.layers(sizes) if compressed else range(0)
    once = forward_flops(sizes, tokens(resolution), tokens(resolution, ratio), len(layers))
    return batch * (once + (caption_flops(sizes) if captions else 0))


def caption_flops(sizes: Model) -> int:
    """Of one caption: its embedder's two layers, its keys and values in every block."""
    width = sizes.hidden_size
    products = (sizes.caption_channels + width + sizes.depth * 2 * width) * width
    return 2 * sizes.text_tokens * products


def forward_flops(sizes: Model, count: int, merged_keys: int, merged: int) -> int:
    """Of one sample of `count` tokens, of which `merged` blocks see `merged_keys` keys.

    Without what is once per prompt or next to nothing: embedders, the caption's keys and values.
    """
    width = sizes.hidden_size
    # qkv, proj; query and output projection of the cross-attention; MLP of 4 times the width.
    linear = sizes.depth * count * 2 * width * width * (3 + 1 + 2 + 8)
    cross = sizes.depth * attention_flops(1, count, sizes.text_tokens, width, False)
    keys_of_all = (sizes.depth - merged) * count + merged * merged_keys
    return linear + cross + attention_flops(1, count, keys_of_all, width, False)
