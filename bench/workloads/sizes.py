"""The sizes that the benches run at, and the models that have them.

Sizes are those of square images; "-shallow" models have two blocks of the full width, dense and
compressed, which stand for all 28.
"""

from typing import Any, NamedTuple

from pixart.config import KVCompression, PixArtConfig
from pixart.resolution import RESOLUTIONS

PATCH_PIXELS = 16  # side of a token: the VAE's 8 pixels times the patch size 2
RATIO = 2  # of the published compression
TINY = "tiny"
SHALLOW = "-shallow"
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
GPU_SIZES = ("4k", "2k", "1k", "512")  # of bench.gpu: the numbers that matter most come first


class Compression(NamedTuple):
    """The deeper half of the blocks, or all, merge ratio × ratio keys and values into one: as
    published unless told."""

    ratio: int = RATIO
    everywhere: bool = False

    @property
    def variant(self) -> str:
        """The name of our model that is compressed like this."""
        ratio = "" if self.ratio == RATIO else f" r{self.ratio}"
        return f"ours compressed{ratio}{' everywhere' if self.everywhere else ''}"


def config(resolution: str, compression: Compression | None = None) -> PixArtConfig:
    """XL/2 at that size; a model of two small blocks at the tiny one."""
    sizes: dict[str, Any] = {"hidden_size": 1152, "num_heads": 16, "depth": 28}
    sizes |= {"model_max_length": 300, "caption_channels": 4096}
    if resolution.endswith(SHALLOW):
        sizes |= {"depth": 2}
    if resolution == TINY:
        sizes = {"hidden_size": 144, "num_heads": 2, "depth": 2}
        sizes |= {"model_max_length": 12, "caption_channels": 48}
    merged = None
    if compression is not None:
        first = 0 if compression.everywhere else sizes["depth"] // 2
        merged = KVCompression(tuple(range(first, sizes["depth"])), compression.ratio)
    return PixArtConfig(
        **sizes,
        input_size=PIXELS[resolution] // 8,
        pe_interpolation=PIXELS[resolution] / 512,
        class_dropout_prob=0.0,  # all train with the same captions
        kv_compression=merged,
    )


def grid(resolution: str, ratio: int = 1) -> tuple[int, int]:
    """Rows and columns of a square image's tokens, or of its key tokens after compression."""
    side = PIXELS[resolution] // PATCH_PIXELS
    return -(-side // ratio), -(-side // ratio)


def tokens(resolution: str, ratio: int = 1) -> int:
    rows, cols = grid(resolution, ratio)
    return rows * cols
