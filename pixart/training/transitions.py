"""What carries a model from one stage of a recipe to the next: positions, captions, compression.

Each changes a PixArt in place, before it is wrapped for training, and returns it; what cannot be done
raises a ValueError and leaves the model as it was.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pixart.checkpoint.config import is_compressed
from pixart.config import KVCompression, PixArtConfig
from pixart.model.blocks import SelfAttention
from pixart.model.compression import add_merging
from pixart.model.embedders import PositionTables, SinusoidEmbedder
from pixart.model.transformer import PixArt
from pixart.training.calibration import Arguments, NormStart, fit_norm, measure

KVStart = Literal["mean", "calibrated", "random"]


def interpolate_positions(
    model: PixArt, resolution: int, pe_interpolation: float | None = None, *, downsample: int = 8
) -> PixArt:
    """Make `resolution` the native one; no weight depends on it, the position tables do.

    resolution: side in pixels; downsample: pixels per latent. pe_interpolation: divides the
    coordinates. None keeps their range, so that a model twice the size meets the same positions,
    twice as dense; the old value would extrapolate instead. PixArt-Σ has resolution / 512.
    """
    patch, config = model.config.patch_size, model.config
    if resolution < 1 or resolution % (downsample * patch):
        raise ValueError(
            f"resolution must be a positive multiple of {downsample * patch}, got {resolution}"
        )
    size = resolution // downsample
    if pe_interpolation is None:
        pe_interpolation = config.pe_interpolation * (size // patch) / config.base_size
    return _set_config(model, replace(config, input_size=size, pe_interpolation=pe_interpolation))


@torch.no_grad()
def lengthen_captions(model: PixArt, length: int, null_caption: Tensor | None = None) -> PixArt:
    """Let captions have up to `length` tokens. Only the table of the null caption has that size.

    null_caption: (length, caption_channels), the features of the empty caption, padded: what
    PixArt-Σ puts there. None repeats the table from its start. Cross-attention knows no order, and
    keys that are all there twice attend like keys that are there once: with a whole number of
    repetitions the model computes the same as before, with 120 tokens in 300 almost the same.
    """
    embedder, config = model.y_embedder, model.config
    old = embedder.y_embedding
    if length < config.model_max_length:
        raise ValueError(
            f"length must be at least the model's {config.model_max_length} tokens, got {length}; "
            "it takes shorter captions as it is"
        )
    shape = (length, config.caption_channels)
    if null_caption is not None and null_caption.shape != shape:
        raise ValueError(f"null_caption must be {shape}, got {tuple(null_caption.shape)}")
    if null_caption is None:
        table = old.repeat(-(-length // len(old)), 1)[:length]
    else:
        table = null_caption.to(old).clone()
        model.null_caption_stored = True  # type: ignore[assignment]
    embedder.y_embedding = table
    return _set_config(model, replace(config, model_max_length=length))


@torch.no_grad()
def add_micro_condition(model: PixArt) -> PixArt:
    """Let the model see image size and aspect ratio, as PixArt-α does from 1024 px on.

    The embedders start with an output of zero: at first the model computes the same as before.
    """
    if model.config.micro_condition:
        return model
    config = replace(model.config, micro_condition=True)  # raises for a width that is no 3 · n
    like = model.x_embedder.proj.weight
    for name in ("csize_embedder", "ar_embedder"):
        embedder = SinusoidEmbedder(config.hidden_size // 3)
        first, last = cast(nn.Linear, embedder.mlp[0]), cast(nn.Linear, embedder.mlp[2])
        nn.init.normal_(first.weight, std=0.02)
        for zero in (first.bias, last.weight, last.bias):
            nn.init.zeros_(zero)
        setattr(model, name, embedder.to(like))
    return _set_config(model, config)


def add_kv_compression(
    model: PixArt,
    compression: KVCompression,
    *,
    start: KVStart = "mean",
    batches: Iterable[Arguments] = (),
) -> PixArt:
    """Compress keys and values of a model's dense blocks. No other weight changes.

    start: "mean" is the published one, averaging and a plain LayerNorm. "calibrated" averages too
    and sets the norm so that it moves keys and values least (`calibrate`); without a norm there is
    nothing to set, and the mean is that already. "random" is PyTorch's initialisation of the
    convolution, to compare with. batches: for "calibrated" alone: arguments of the model's forward,
    tuples or mappings, with noised latents and timesteps as in training; a few are enough.
    Blocks that are compressed in the same way stay as they are; those that are compressed in
    another way, or would become dense, are refused.
    """
    old = model.config.kv_compression if is_compressed(model.config) else None
    if old == compression:
        return model
    if old is not None and not _extends(compression, old):
        raise ValueError(f"model must be dense or compressed as in {compression}, got {old}")
    new = [layer for layer in compression.layers if old is None or layer not in old.layers]
    config = replace(model.config, kv_compression=compression)  # raises for layers beyond depth
    check_start(start, compression)
    if compression.ratio == 1:
        return _set_config(model, config)
    fitted: dict[int, NormStart] = {}
    if start == "calibrated" and compression.norm == "layer":
        fitted = {
            layer: fit_norm(keys, values)
            for layer, (keys, values) in measure(
                model, replace(compression, layers=tuple(new)), batches
            ).items()
        }
    for layer in new:
        attention = cast(Any, model.blocks[layer]).attn
        _install(attention, compression, random=start == "random", fitted=fitted.get(layer))
    return _set_config(model, config)


def _extends(compression: KVCompression, old: KVCompression) -> bool:
    same = replace(compression, layers=old.layers) == old
    return same and set(old.layers) <= set(compression.layers)


def check_start(start: str, compression: KVCompression) -> None:
    """Raise ValueError for a start that a compression cannot have."""
    if start not in ("mean", "calibrated", "random"):
        raise ValueError(f"start must be mean, calibrated or random, got {start!r}")
    learned = compression.sampling == "conv"
    if not learned and (
        start == "random" or (start == "calibrated" and compression.norm == "layer")
    ):
        raise ValueError(
            f'start must be "mean" for sampling {compression.sampling!r}, '
            f"which has no convolution to set, got {start!r}"
        )


@torch.no_grad()
def _install(
    attention: SelfAttention, compression: KVCompression, random: bool, fitted: NormStart | None
) -> None:
    like, width = attention.proj.weight, attention.proj.out_features
    add_merging(attention, compression, width, like.device, like.dtype)
    if random:
        cast(nn.Conv2d, attention.sr).reset_parameters()
    if fitted is not None:
        cast(Any, attention.sr).bias.copy_(fitted.offset)
        cast(Any, attention.norm).weight.copy_(fitted.weight)
        cast(Any, attention.norm).bias.copy_(fitted.bias)
    attention.compression = compression


def _set_config(model: PixArt, config: PixArtConfig) -> PixArt:
    model.config = config
    model.position_tables = PositionTables(config)
    return model
