"""What a PixArt transformer is made of: frozen configurations, and the released checkpoints."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from pixart.few_step import FewStep

EMBEDDED = "shapes"  # the name of the model that ships, where a path or hub id may stand
EMBEDDED_CONTROL = "shapes-control"  # the same of the control that ships
SAMPLINGS = ("conv", "average", "uniform", "uniform_every")
MAX_LENGTH = {"sigma": 300, "alpha": 120}  # caption tokens of each family, which read T5
CLIP_LENGTH = 77  # of the text half of every published CLIP


@dataclass(frozen=True)
class KVCompression:
    """The listed blocks attend to keys and values merged R×R (PixArt-Σ, section 3.2).

    layers: block indices, any iterable, kept as a sorted tuple.
    ratio: R, 1 to 4; 1 compresses nothing.
    sampling: "conv" (learned, starts as the mean), "average" (the mean), "uniform" (the top left
        token of each R×R patch) or "uniform_every" (every R-th token of the flat sequence).
    norm: LayerNorm of what was merged, "layer" or "none". None takes the published choice, "layer"
        after "conv" and "none" otherwise.
    """

    layers: tuple[int, ...]
    ratio: int = 2
    sampling: str = "conv"
    norm: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layer_tuple(self.layers))
        if isinstance(self.ratio, bool) or self.ratio not in (1, 2, 3, 4):
            raise ValueError(f"ratio must be 1, 2, 3 or 4, got {self.ratio!r}")
        object.__setattr__(self, "ratio", int(self.ratio))
        if self.sampling not in SAMPLINGS:
            raise ValueError(
                f"sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}"
            )
        if self.norm is None:
            object.__setattr__(self, "norm", "layer" if self.sampling == "conv" else "none")
        if self.norm not in ("layer", "none"):
            raise ValueError(f'norm must be "layer" or "none", got {self.norm!r}')

    @classmethod
    def parse(cls, text: str, norm: str | None = None) -> "KVCompression":
        """LAYERS:RATIO[:SAMPLING], LAYERS being numbers and ranges: "14-27:2", "3,5,7-9:4:average"."""
        match = re.fullmatch(r"([\d,-]+):(\d+)(?::(\w+))?", text)
        if not match:
            raise ValueError(
                f"kv_compress must be LAYERS:RATIO[:SAMPLING] like 14-27:2, got {text!r}"
            )
        layers: list[int] = []
        for part in match[1].split(","):
            if not (span := numbers_of(part)):
                raise ValueError(f"kv_compress layers must be like 14-27 or 3,5, got {part!r}")
            layers += span
        return cls(tuple(layers), int(match[2]), match[3] or "conv", norm)

    def to_text(self) -> str:
        """As `parse` reads it: "14-27:2:conv"."""
        return f"{ranges_of(self.layers)}:{self.ratio}:{self.sampling}"

    def applies_to(self, layer: int) -> bool:
        """Whether the block of this index merges anything."""
        return self.ratio > 1 and layer in self.layers


@dataclass(frozen=True)
class PixArtConfig:
    """The shape of one transformer. The defaults are XL/2 for 1024 px captions of 300 tokens.

    input_size: side of the native latent. With patch_size and pe_interpolation it fixes the range
        of the position coordinates; it limits no image to that size.
    caption_embedding: whether an MLP brings text features to hidden_size. Without it the blocks attend to
        the features as they are, which must be of that width ("On the Scalability of Diffusion-based
        Text-to-Image Generation", table 2).
    few_step: how a distilled model is drawn. Two configurations that differ in it alone are equal: they are
        of the same network.
    """

    input_size: int = 128
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    model_max_length: int = 300
    pe_interpolation: float = 1.0
    pred_sigma: bool = True
    class_dropout_prob: float = 0.1
    micro_condition: bool = False
    qk_norm: bool = False
    kv_compression: KVCompression | None = None
    caption_embedding: bool = True
    few_step: FewStep | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_width(self)
        if not isinstance(self.few_step, FewStep | None):
            raise ValueError(f"few_step must be a FewStep or None, got {self.few_step!r:.60}")
        compression = self.kv_compression
        if compression is None:
            return
        if not isinstance(compression, KVCompression):
            raise ValueError(f"kv_compression must be a KVCompression or None, got {compression!r}")
        if compression.layers and compression.layers[-1] >= self.depth:
            raise ValueError(
                f"kv_compression.layers must be below depth {self.depth}, "
                f"got {compression.layers[-1]}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Noise, then as many channels of learned variance if there is one."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def base_size(self) -> int:
        """Side of the native grid in tokens."""
        return self.input_size // self.patch_size

    @classmethod
    def from_official(
        cls,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        pred_sigma: bool = True,
        drop_path: float = 0.0,
        caption_channels: int = 4096,
        pe_interpolation: float | None = None,
        lewei_scale: float | None = None,
        config: object = None,
        model_max_length: int = 120,
        micro_condition: bool = False,
        qk_norm: bool = False,
        kv_compress_config: Mapping[str, Any] | None = None,
    ) -> "PixArtConfig":
        """From the official constructor's arguments, with its defaults.

        lewei_scale is what PixArt-α calls pe_interpolation. Two arguments of the official
        constructor do not change the network: learn_sigma (about the loss), config (where to log).
        """
        if drop_path:
            raise ValueError(f"drop_path must be 0, got {drop_path}")
        scales = {scale for scale in (pe_interpolation, lewei_scale) if scale is not None}
        if len(scales) > 1:
            raise ValueError(
                f"lewei_scale must equal pe_interpolation {pe_interpolation}, got {lewei_scale}"
            )
        return cls(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            caption_channels=caption_channels,
            model_max_length=model_max_length,
            pe_interpolation=scales.pop() if scales else 1.0,
            pred_sigma=pred_sigma,
            class_dropout_prob=class_dropout_prob,
            micro_condition=micro_condition,
            qk_norm=qk_norm,
            kv_compression=_compression_from_official(kv_compress_config),
        )

    def to_official(self) -> dict[str, Any]:
        """The official constructor's arguments, if it can express this model; ValueError if not."""
        if not self.caption_embedding:
            raise ValueError(
                "caption_embedding must be true for the official model, which always embeds captions, "
                "got false; write the pixart or the diffusers format"
            )
        arguments = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("kv_compression", "caption_embedding", "few_step"):
            del arguments[name]
        return arguments | {"kv_compress_config": _compression_to_official(self.kv_compression)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes and from_dict returns to an equal configuration."""
        values = asdict(self)
        if self.kv_compression is not None:
            values["kv_compression"]["layers"] = list(self.kv_compression.layers)
        del values["few_step"]  # left out where there is none: versions before know no such key
        return values | ({"few_step": self.few_step.to_dict()} if self.few_step else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PixArtConfig":
        """The inverse of to_dict. Missing keys take their default, unknown keys are an error."""
        _check_keys("PixArtConfig", values, [one.name for one in fields(cls)])
        values = dict(values)
        compression = values.get("kv_compression")
        if isinstance(compression, Mapping):
            names = [one.name for one in fields(KVCompression)]
            _check_keys("kv_compression", compression, names)
            if "layers" not in compression:
                raise ValueError(f"kv_compression must have layers, got {dict(compression)}")
            values["kv_compression"] = KVCompression(**compression)
        if values.get("few_step") is not None and not isinstance(values["few_step"], FewStep):
            values["few_step"] = FewStep.from_dict(values["few_step"])
        return cls(**values)


def ranges_of(numbers: Iterable[int]) -> str:
    """Numbers in order, 0, 1, 2, 5, as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def numbers_of(text: str) -> range:
    """Of one part of such a text: "5" or "0-2". Empty for anything else."""
    ends = re.fullmatch(r"\s*([0-9]{1,4})(?:\s*-\s*([0-9]{1,4}))?\s*", text)
    return range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)


def _layer_tuple(layers: Iterable[int]) -> tuple[int, ...]:
    try:
        layers = tuple(layers)
    except TypeError:
        raise ValueError(f"layers must be an iterable of block indices, got {layers!r}") from None
    for layer in layers:
        if not _is_integer(layer) or layer < 0:
            raise ValueError(f"layers must be non-negative integers, got {layer!r}")
    return tuple(sorted({int(layer) for layer in layers}))


def _is_integer(value: object) -> bool:
    # True is an int in Python, and true in JSON is a mistake here.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # By comparison: math.isfinite fails for whole numbers beyond a float's range.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


# Far beyond every model there is, and small enough to be multiplied and counted up to.
_MOST = {
    "input_size": 16384,
    "patch_size": 64,
    "in_channels": 4096,
    "hidden_size": 65536,
    "depth": 1000,
    "num_heads": 4096,
    "caption_channels": 65536,
    "model_max_length": 65536,
}
_NUMBERS = {"mlp_ratio": (1 / 64, 64), "pe_interpolation": (1e-6, 1e6)}


def _check_sizes(config: PixArtConfig) -> None:
    for name, most in _MOST.items():
        value = getattr(config, name)
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")
    if config.input_size < config.patch_size:
        raise ValueError(
            f"input_size must be at least patch_size {config.patch_size}, got {config.input_size}"
        )
    for name, (least, limit) in _NUMBERS.items():
        value = getattr(config, name)
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not least <= value <= limit:
            raise ValueError(f"{name} must be from {least} to {limit}, got {value!r}")
    dropped = config.class_dropout_prob
    if not _is_number(dropped) or not 0 <= dropped <= 1:
        raise ValueError(f"class_dropout_prob must be in [0, 1], got {dropped!r}")
    for name in ("pred_sigma", "micro_condition", "qk_norm", "caption_embedding"):
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")


def _check_width(config: PixArtConfig) -> None:
    width = config.hidden_size
    if width % config.num_heads:
        raise ValueError(
            f"hidden_size must be divisible by num_heads {config.num_heads}, got {width}"
        )
    if config.mlp_hidden_size < 1:
        raise ValueError(f"mlp_ratio must give a width of at least 1, got {config.mlp_ratio}")
    if width % 4:  # sine and cosine of two coordinates
        raise ValueError(f"hidden_size must be divisible by 4, got {width}")
    if config.micro_condition and width % 3:  # height, width and aspect ratio take a third each
        raise ValueError(f"hidden_size must be divisible by 3 to micro-condition, got {width}")
    if not config.caption_embedding and config.caption_channels != width:
        raise ValueError(
            f"caption_channels must be hidden_size {width} without caption_embedding, "
            f"got {config.caption_channels}"
        )
    if config.head_dim > 128:  # what the attention kernels are made for
        raise ValueError(f"head_dim must be at most 128, got {config.head_dim}")


def _check_keys(what: str, values: Mapping[str, Any], known: list[str]) -> None:
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise ValueError(
            f"{what} must have keys among {', '.join(known)}, got {', '.join(unknown)}"
        )


def _compression_from_official(values: Mapping[str, Any] | None) -> KVCompression | None:
    if not values:
        return None
    _check_keys("kv_compress_config", values, ["sampling", "scale_factor", "kv_compress_layer"])
    layers = tuple(values.get("kv_compress_layer") or ())
    ratio = int(values.get("scale_factor", 1))
    if ratio == 1 or not layers:
        return None
    # The official "ave" interpolates to the nearest token, which is what "uniform" takes.
    sampling: Any = values.get("sampling")
    return KVCompression(layers, ratio, "uniform" if sampling == "ave" else sampling)


def _compression_to_official(compression: KVCompression | None) -> dict[str, Any]:
    if compression is None or compression.ratio == 1 or not compression.layers:
        return {"sampling": None, "scale_factor": 1, "kv_compress_layer": []}
    published_norm = "layer" if compression.sampling == "conv" else "none"
    if compression.sampling == "average" or compression.norm != published_norm:
        raise ValueError(
            "kv_compression must be one that the official model has, "
            f"got sampling {compression.sampling!r} with norm {compression.norm!r}"
        )
    return {
        "sampling": compression.sampling,
        "scale_factor": compression.ratio,
        "kv_compress_layer": list(compression.layers),
    }


Family = Literal["sigma", "alpha"]
