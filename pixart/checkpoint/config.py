"""The configuration behind a checkpoint: from its tensors, and from and to diffusers' config.json.

Functions here raise ValueError with the reason alone; load.py puts the path in front. What
had to be assumed comes back as notes, one sentence each.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoint.names import CAPTION_WEIGHT, NULL_CAPTION, POSITIONS
from pixart.checkpoint.positions import solve_interpolation
from pixart.config import MAX_LENGTH, KVCompression, PixArtConfig, ranges_of
from pixart.files import listed
from pixart.model.compression import initial_values

_PUBLISHED_HEAD_DIM = 72
# Diffusers' class can be configured into other networks; these values make it PixArt's.
_PIXART_IN_DIFFUSERS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
}
_MOST = 2**16  # of any size in config.json
# Where a field of ours has another name there.
_FIELDS_OF_DIFFUSERS = {
    "input_size": "sample_size",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "hidden_size": "attention_head_dim",
    "head_dim": "attention_head_dim",
    "pe_interpolation": "interpolation_scale",
    "micro_condition": "use_additional_conditions",
}
PUBLISHED_CLASS = "PixArtKVTransformer2DModel"  # of the remote code of pixart.publishing
# Of it in the place of a norm_type, so that diffusers' own class refuses a model that it would run wrong.
PUBLISHED_NORM = (
    f"ada_norm_single of {PUBLISHED_CLASS}; load the pipeline with trust_remote_code=True"
)
# The second was the first one's name until 2024.
_DIFFUSERS_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel", PUBLISHED_CLASS)


@dataclass(frozen=True)
class Surroundings:
    """What is known from a pipeline about a transformer that is opened for it.

    model_max_length: of the pipeline's family. config: of the pipeline's own transformer; believed
    about a checkpoint of the same width and depth. source: whose it is, in words.
    """

    model_max_length: int | None = None
    config: PixArtConfig | None = None
    source: str = "the pipeline's own transformer"

    def config_if_like(self, hidden_size: int, depth: int) -> PixArtConfig | None:
        """The configuration of the pipeline's transformer if it has this width and depth."""
        own = self.config
        same = own is not None and (own.hidden_size, own.depth) == (hidden_size, depth)
        return own if same else None


NO_PIPELINE = Surroundings()  # of a checkpoint that is opened by itself


def config_to_diffusers(config: PixArtConfig) -> dict[str, Any]:
    """The config.json of a diffusers directory; diffusers ignores keys that it does not know.

    caption_channels is null without a caption embedding: there diffusers builds no caption_projection.
    """
    values: dict[str, Any] = {
        "_class_name": _DIFFUSERS_CLASSES[0],
        **_PIXART_IN_DIFFUSERS,
        "attention_head_dim": config.head_dim,
        "caption_channels": config.caption_channels if config.caption_embedding else None,
        "cross_attention_dim": config.hidden_size,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "interpolation_scale": config.pe_interpolation,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
        # Never left out: diffusers takes its absence at 128 latents for "yes".
        "use_additional_conditions": config.micro_condition,
    }
    if config.mlp_ratio != 4.0:
        values["mlp_ratio"] = config.mlp_ratio
    if config.qk_norm:
        values["qk_norm"] = True
    if config.kv_compression is not None:
        values["kv_compression"] = config.to_dict()["kv_compression"]
    if config.few_step is not None:
        values["few_step"] = config.few_step.to_dict()
    return values


def config_from_diffusers(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    model_max_length: int,
    class_dropout_prob: float = 0.1,
    kv_compression: KVCompression | None = None,
) -> PixArtConfig:
    """The inverse of config_to_diffusers, also for directories that diffusers wrote.

    tensors, under their official names, decide what config.json leaves open.
    """
    if values.get("_class_name", _DIFFUSERS_CLASSES[0]) not in _DIFFUSERS_CLASSES:
        raise ValueError(
            f"config.json is of a {values['_class_name']}, not of a PixArt transformer"
        )
    if values.get("norm_type") == PUBLISHED_NORM:
        values = {**values, "norm_type": _PIXART_IN_DIFFUSERS["norm_type"]}
    for key, wanted in _PIXART_IN_DIFFUSERS.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"config.json: {key} must be {wanted!r}, got {values[key]!r}")
    head_dim, heads = _count(values, "attention_head_dim"), _count(values, "num_attention_heads")
    size, channels = _count(values, "sample_size"), _count(values, "in_channels")
    outputs = channels if values.get("out_channels") is None else _count(values, "out_channels")
    micro = values.get("use_additional_conditions")
    stored = values.get("kv_compression")
    scale = values.get("interpolation_scale")
    embeds = values.get("caption_channels", 0) is not None  # absent is an error, null is a choice
    fields = {
        "input_size": size,
        "patch_size": values.get("patch_size", 2),
        "in_channels": channels,
        "hidden_size": head_dim * heads,
        "depth": _count(values, "num_layers"),
        "num_heads": heads,
        "mlp_ratio": values.get("mlp_ratio", 4.0),
        "caption_channels": _count(values, "caption_channels") if embeds else head_dim * heads,
        "caption_embedding": embeds,
        "model_max_length": model_max_length,
        # Where it is null diffusers takes this.
        "pe_interpolation": max(size // 64, 1) if scale is None else scale,
        "pred_sigma": _predicts_variance(channels, outputs),
        "class_dropout_prob": class_dropout_prob,
        "micro_condition": _has(tensors, "csize_embedder.") if micro is None else micro,
        "qk_norm": values.get("qk_norm", _has(tensors, r"blocks\.\d+\.attn\.[qk]_norm\.")),
        "kv_compression": stored or infer_compression(tensors, kv_compression),
        "few_step": values.get("few_step"),
    }
    try:
        return PixArtConfig.from_dict(fields)
    except ValueError as error:
        theirs = _FIELDS_OF_DIFFUSERS.get(str(error).partition(" ")[0])
        raise ValueError(f"config.json{', ' + theirs if theirs else ''}: {error}") from None


def _count(values: Mapping[str, Any], key: str) -> int:
    if key not in values:
        raise ValueError(f"config.json has no {key}")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive integer, got {value!r}")
    if value > _MOST:
        raise ValueError(f"config.json: {key} must be at most {_MOST}, got {value}")
    return value


def infer_config(
    tensors: Mapping[str, Tensor],
    kv_compression: KVCompression | None = None,
    around: Surroundings = NO_PIPELINE,
) -> tuple[PixArtConfig, list[str]]:
    """The configuration of a state dict with official names, and what had to be assumed for it.

    kv_compression: what the caller asked for; it decides only where there is no convolution to see.
    around: tells what the tensors do not.
    """
    hidden, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    mlp_hidden, _ = shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = shape_of(tensors, "final_layer.linear.weight", 2)
    # Three digits: a stray name must not ask for a million blocks.
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d{1,3})\.", name) for name in tensors) if m]
    depth, micro = max(blocks) + 1, _has(tensors, "csize_embedder.")
    known = around.config_if_like(hidden, depth)
    embeds = not _takes_captions_as_they_are(tensors, hidden, known)
    caption_channels = shape_of(tensors, CAPTION_WEIGHT, 2)[1] if embeds else hidden
    notes: list[str] = []
    model_max_length = _infer_max_length(tensors, micro, around, notes)
    if POSITIONS not in tensors and known is not None:
        input_size, pe_interpolation = known.input_size, known.pe_interpolation
        notes.append(
            f"{POSITIONS} is absent: input_size {input_size} and pe_interpolation "
            f"{pe_interpolation} are those of {around.source}"
        )
    else:
        input_size, pe_interpolation = _infer_positions(
            tensors, patch, model_max_length, micro, notes
        )
    config = PixArtConfig(
        input_size=input_size,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=_infer_heads(hidden, notes) if known is None else known.num_heads,
        mlp_ratio=_mlp_ratio(mlp_hidden, hidden),
        caption_channels=caption_channels,
        caption_embedding=embeds,
        model_max_length=model_max_length,
        pe_interpolation=pe_interpolation,
        pred_sigma=_predicts_variance(channels, outputs // patch**2),
        micro_condition=micro,
        qk_norm=_has(tensors, r"blocks\.\d+\.attn\.[qk]_norm\."),
        kv_compression=infer_compression(tensors, kv_compression),
    )
    return config, notes


def _takes_captions_as_they_are(
    tensors: Mapping[str, Tensor], hidden: int, known: PixArtConfig | None
) -> bool:
    """Whether a transformer has no caption embedding, rather than lost it: its null caption, or the
    pipeline's transformer, must say so too."""
    if _has(tensors, r"y_embedder\.y_proj\."):
        return False
    if NULL_CAPTION in tensors:
        return shape_of(tensors, NULL_CAPTION, 2)[1] == hidden
    return known is not None and not known.caption_embedding


def _has(tensors: Mapping[str, Tensor], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in tensors)


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """ValueError for a tensor that is missing, empty, or of other dimensions."""
    if name not in tensors:
        raise ValueError(f"missing {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {shape}")
    if 0 in shape:
        raise ValueError(f"{name} must not be empty, got shape {shape}")
    return shape


def _infer_heads(hidden: int, notes: list[str]) -> int:
    if hidden % _PUBLISHED_HEAD_DIM:
        raise ValueError(
            f"does not tell its number of heads (width {hidden}); "
            "pass config=PixArtConfig(...), or --config FILE.json on the command line"
        )
    heads = hidden // _PUBLISHED_HEAD_DIM
    if heads != 16:
        notes.append(
            f"num_heads is not in the file: assumed {heads} heads of {_PUBLISHED_HEAD_DIM}"
        )
    return heads


def _mlp_ratio(mlp_hidden: int, hidden: int) -> float:
    ratio = mlp_hidden / hidden
    # PixArtConfig rounds width times ratio down: a quotient a hair too small loses a channel.
    return ratio if int(hidden * ratio) == mlp_hidden else math.nextafter(ratio, math.inf)


def _predicts_variance(channels: int, out_channels: int) -> bool:
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be {channels} or {2 * channels}, got {out_channels}")
    return out_channels == 2 * channels


def _infer_max_length(
    tensors: Mapping[str, Tensor], micro: bool, around: Surroundings, notes: list[str]
) -> int:
    if NULL_CAPTION in tensors:
        return shape_of(tensors, NULL_CAPTION, 2)[0]
    length, assumed = caption_length(micro, around)
    if assumed:
        notes.append(f"{NULL_CAPTION} is absent: assumed captions of {length} tokens")
    return length


def caption_length(micro_condition: bool, around: Surroundings) -> tuple[int, bool]:
    """How long a transformer's captions are that does not say it, and whether that is a guess."""
    if micro_condition:  # only α-1024 has it
        return MAX_LENGTH["alpha"], around.model_max_length != MAX_LENGTH["alpha"]
    if around.model_max_length is not None:
        return around.model_max_length, False
    return MAX_LENGTH["sigma"], True


def _infer_positions(
    tensors: Mapping[str, Tensor], patch: int, max_length: int, micro: bool, notes: list[str]
) -> tuple[int, float]:
    """(input_size, pe_interpolation), from the token count and the values of the stored table."""
    if POSITIONS not in tensors:
        # α has 1024 px only with micro-conditioning; the scale is pixels / 512.
        side = 32 if max_length == MAX_LENGTH["alpha"] and not micro else 64
        notes.append(
            f"{POSITIONS} is absent: assumed {side * 16} px, input_size {side * patch} and "
            f"pe_interpolation {side / 32}; pass a configuration if that is wrong"
        )
        return side * patch, side / 32
    side = side_of_positions(tensors)
    scale = solve_interpolation(tensors[POSITIONS][0], side)
    if scale is None:
        scale = side / 32
        notes.append(
            f"{POSITIONS} is no table of sines and cosines: assumed pe_interpolation {scale}"
        )
    return side * patch, scale


def side_of_positions(tensors: Mapping[str, Tensor]) -> int:
    """Of the square grid of which the stored table is."""
    _, tokens, _ = shape_of(tensors, POSITIONS, 3)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{POSITIONS} must be a table of a square grid, got {tokens} tokens")
    return side


def infer_compression(
    tensors: Mapping[str, Tensor], requested: KVCompression | None
) -> KVCompression | None:
    """Compression as the tensors show it; only the convolution and the norm leave any."""
    pattern = re.compile(r"blocks\.(\d+)\.attn\.(sr|norm)\.(weight|bias)")
    found = [match for match in map(pattern.fullmatch, tensors) if match]
    if not found:
        return None
    layers = sorted({int(match[1]) for match in found})
    convolutions = [match[0] for match in found if match[2] == "sr" and match[3] == "weight"]
    if not convolutions:
        if requested is not None and requested.sampling != "conv":
            return requested
        wanted = [f"blocks.{layer}.attn.sr.weight" for layer in layers]
        raise ValueError(
            f"missing {listed(wanted)}; if it is compressed without a convolution, "
            "say how with kv_compression="
        )
    ratio = shape_of(tensors, convolutions[0], 4)[-1]
    norm = "layer" if any(match[2] == "norm" for match in found) else "none"
    return KVCompression(tuple(layers), ratio, "conv", norm)


def is_compressed(config: PixArtConfig) -> bool:
    """Whether some block merges its keys and values."""
    compression = config.kv_compression
    return compression is not None and any(map(compression.applies_to, compression.layers))


def _spelt(compression: KVCompression | None) -> str:
    return "" if compression is None else f"{compression.to_text()} with norm {compression.norm}"


def open_compression(
    config: PixArtConfig, requested: KVCompression | None, tensors: dict[str, Tensor]
) -> tuple[PixArtConfig, list[str]]:
    """Add the compression that is asked of a dense checkpoint: new tensors, and a note on them."""
    stored = config.kv_compression
    if requested is None or requested == stored:
        return config, []
    if is_compressed(config):
        raise ValueError(
            f"is compressed as {_spelt(stored)}; kv_compression must be that or left out, got "
            f"{_spelt(requested)}"
        )
    config = replace(config, kv_compression=requested)
    new = initial_values(requested, config.hidden_size)
    for layer in requested.layers:
        like = tensors.get(f"blocks.{layer}.attn.proj.weight", torch.empty(0))
        for name, (shape, value) in new.items():
            tensors[f"blocks.{layer}.attn.{name}"] = like.new_full(shape, value)
    where = f"blocks.{{{ranges_of(requested.layers)}}}.attn"
    added = ", ".join(f"{where}.{name} = {value:.4g}" for name, (_, value) in new.items())
    return config, [f"was dense; initialised for compression: {added or 'no tensors'}"]
