"""What a PixArt computes and moves at least, counted once for everything that asks.

FLOPs are those of matrix products, convolutions and attention, 2 per multiply-add, exactly as
torch.utils.flop_counter counts them. Left out: norms, activations, softmax, gates, sums, and the
position table. Head channels count as they are, never in a padded width. Bytes are floors: each
input read once, each output written once.

Axis letters: N image tokens, M key tokens, L caption tokens, C channels, R compression ratio.
"""

import math
from collections.abc import Sequence

from pixart.config import KVCompression, PixArtConfig

Tokens = int | tuple[int, int]  # N of a grid that the ratio divides, or any grid's rows and columns
SINUSOIDS = 256  # channels that a timestep or a size is embedded from
ATTENTION = ("self-attention", "cross-attention")  # of a block: products without weights


def forward_flops(
    config: PixArtConfig,
    tokens: Tokens,
    caption_tokens: int | None = None,
    *,
    encoded: bool = False,
    kv_ratios: Sequence[int] = (),
    blocks: int | None = None,
) -> int:
    """One image through the whole transformer, forward; a training step is three of them.

    caption_tokens: L, model_max_length where left out. encoded: the caption's keys and values were made
    before, as a sampler makes them once for all steps. kv_ratios: as `PixArt.forward` takes them. blocks:
    how many are computed, None for all.
    """
    ratios: Sequence[int | None] = kv_ratios or [None] * config.depth
    computed = sum(
        sum(block_flops(config, layer, tokens, caption_tokens, ratio).values())
        for layer, ratio in enumerate(ratios[:blocks])
    )
    captions = 0 if encoded else caption_flops(config, caption_tokens)
    return computed + captions + ends_flops(config, tokens)


def block_flops(
    config: PixArtConfig,
    layer: int,
    tokens: Tokens,
    caption_tokens: int | None = None,
    ratio: int | None = None,
) -> dict[str, int]:
    """One block for one image, by operation; without the caption's keys and values. ratio: what keys and
    values are merged by in this call, None for what the block was made for."""
    count, width = _count(tokens), config.hidden_size
    text = config.model_max_length if caption_tokens is None else caption_tokens
    compression = config.kv_compression
    keys, merging, projected = count, 0, count
    if compression is not None and compression.applies_to(layer):
        keys = merged_keys(compression, tokens)
        merging = merging_flops(compression, keys, width)
        if ratio is not None and ratio > compression.ratio:
            left = _left(tokens, compression.ratio)
            further = KVCompression((), ratio // compression.ratio, "average")
            keys = merged_keys(further, left)
            merging += merging_flops(further, keys, width)
    elif ratio is not None and ratio > 1:
        mean = KVCompression((), ratio, "average")
        keys = merged_keys(mean, tokens)
        if config.qk_norm:  # it stands between the projection and the merging
            merging = merging_flops(mean, keys, width)
        else:
            projected = keys
    product = 2 * count * width**2
    return {
        "self-attention": attention_flops(count, keys, width),
        "cross-attention": attention_flops(count, text, width),
        # Queries, keys, values and output of the image; query and output of the caption.
        "projections": (1 + 1 + 2) * product + 2 * 2 * projected * width**2,
        "MLP": 2 * 2 * count * width * config.mlp_hidden_size,
        "merging keys and values": merging,
    }


def caption_flops(config: PixArtConfig, caption_tokens: int | None = None) -> int:
    """One caption: its embedder's two layers, if it has any, its keys and values in every block."""
    width = config.hidden_size
    text = config.model_max_length if caption_tokens is None else caption_tokens
    embedder = config.caption_channels + width if config.caption_embedding else 0
    return 2 * text * width * embedder + caption_keys_flops(config, text)


def caption_keys_flops(config: PixArtConfig, caption_tokens: int) -> int:
    """Keys and values of one caption, in every block."""
    return config.depth * 2 * product_flops(caption_tokens, config.hidden_size, config.hidden_size)


def ends_flops(config: PixArtConfig, tokens: Tokens) -> int:
    """What one image takes outside of blocks and captions: patches in and out, timestep, sizes."""
    width, area = config.hidden_size, config.patch_size**2
    patches = _count(tokens) * area * (config.in_channels + config.out_channels) * width
    timestep = _sinusoid_products(width) + 6 * width**2
    sizes = 3 * _sinusoid_products(width // 3) if config.micro_condition else 0
    return 2 * (patches + timestep + sizes)


def _sinusoid_products(width: int) -> int:
    return (SINUSOIDS + width) * width


def product_flops(rows: int, inputs: int, outputs: int) -> int:
    """A linear layer on so many rows."""
    return 2 * rows * inputs * outputs


def merged_keys(compression: KVCompression, tokens: Tokens) -> int:
    """M: how many keys and values are left of the tokens."""
    ratio, count = compression.ratio, _count(tokens)
    if compression.sampling == "uniform_every":
        return -(-count // ratio)
    if isinstance(tokens, int):
        return -(-count // ratio**2)
    return math.prod(merged_grid(tokens, ratio))


def _left(tokens: Tokens, ratio: int) -> Tokens:
    """What is left of the tokens when R×R of them are merged."""
    return -(-tokens // ratio**2) if isinstance(tokens, int) else merged_grid(tokens, ratio)


def merged_grid(grid: tuple[int, int], ratio: int) -> tuple[int, int]:
    """Rows and columns that merging R×R tokens leaves."""
    return -(-grid[0] // ratio), -(-grid[1] // ratio)


def merging_flops(compression: KVCompression, keys: int, width: int) -> int:
    """Making M merged keys and values: a convolution of each; picking tokens takes none."""
    is_sum = compression.sampling in ("conv", "average")
    return 2 * 2 * keys * width * compression.ratio**2 if is_sum else 0


def attention_flops(queries: int, keys: int, width: int, *, backward: bool = False) -> int:
    """2 matrix products forward; 5 backward, where the scores are made again."""
    return (10 if backward else 4) * queries * keys * width


def attention_bytes(
    queries: int, keys: int, width: int, itemsize: int, *, backward: bool = False
) -> int:
    """q, k, v and the output; backward reads all of these with a gradient, and writes three."""
    passes = 4 if backward else 2
    return passes * (queries + keys) * width * itemsize


def merging_bytes(
    grid: tuple[int, int], ratio: int, width: int, itemsize: int, *, backward: bool = False
) -> int:
    """K and V in, merged K and V out; backward reads K, V and two small gradients, writes two."""
    large, small = grid[0] * grid[1], -(-grid[0] // ratio) * -(-grid[1] // ratio)
    return 2 * width * itemsize * ((2 if backward else 1) * large + small)


def product_bytes(rows: int, inputs: int, outputs: int, itemsize: int) -> int:
    """A linear layer: what comes in, its weight, and what goes out."""
    return itemsize * (rows * (inputs + outputs) + inputs * outputs)


def _count(tokens: Tokens) -> int:
    return tokens if isinstance(tokens, int) else tokens[0] * tokens[1]
