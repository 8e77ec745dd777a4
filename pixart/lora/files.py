"""Files of LoRA adapters: in peft's layout, from here or from diffusers' models, and single ones.

Where diffusers has several layers in the place of one of ours (q, k and v), A = [A_q; A_k; A_v] and
B = diag(B_q, B_k, B_v) make the same sum: every such file is taken exactly, one that adapts q alone
as well. What is no pair of A and B (magnitudes of DoRA, biases, whole layers) and what belongs to no
layer of the model (adapters of a text encoder) is refused, never left out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from pixart.checkpoint.names import diffusers_names
from pixart.files import AGAIN, CheckpointError, listed, parse_json, read_json
from pixart.tensors import check_plain, container, read_safetensors
from pixart.weights import resolve

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's layout
_SINGLE = "pytorch_lora_weights.safetensors"  # diffusers', whose configuration is in its metadata

_FACTOR = re.compile(r"(.+)\.lora[_.](A|B|down|up)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(.+)\.(alpha)")  # of kohya's layout
_KINDS = {"down": "A", "up": "B"}
_WRAPPERS = re.compile(r"(?:(?:base_model|model|module|transformer|unet|diffusion_model)\.)*")
_UNDERSCORED = ("", "lora_transformer_", "lora_unet_", "lora_")
# The others move a part of the model's own weights into the adapter.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A (rank, in) and B (out, rank) of each adapted layer, fp32, and what B·A is times."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]


@dataclass(frozen=True)
class _Place:
    """A layer here, and which of the `count` equal parts of its rows a file's layer is."""

    layer: str
    part: int
    count: int


@dataclass(frozen=True)
class _Settings:
    """B·A is scaled by alpha over the rank, or over its root. patterns: alphas by expressions for
    names. Where no alpha is given, it is the rank."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def scale(self, name: str, rank: int, own: Tensor | None) -> float:
        # As peft reads alpha_pattern: at the end of a name, and the first that fits.
        fitting = (p for p in self.patterns if re.fullmatch(rf"(.*\.)?({p})", name))
        alpha = self.patterns.get(next(fitting, ""), self.alpha)
        alpha = alpha if own is None else float(own)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.by_root else rank)


def find_adapter(source: str | Path) -> Path:
    """The weights of a folder, a file or a hub id. CheckpointError if there are none."""
    path = resolve(source, allow_patterns=(WEIGHTS, CONFIG, _SINGLE))
    return _find(path) if path.is_dir() else path


def read_adapter(source: str | Path, sizes: Mapping[str, Size]) -> Adapter:
    """Open a folder, a file or a hub id. sizes: of the weights that can be adapted, by layer.

    Raises CheckpointError in one line for what is missing, no plain LoRA, or made for another model.
    """
    file = find_adapter(source)
    if container(file) != "safetensors":
        raise CheckpointError(f"{file}: must be a safetensors file, got a pickle")
    tensors, metadata = read_safetensors(file)
    check_plain(file, tensors, torch.float32)
    try:
        return _collect(tensors, _settings(file, metadata, tensors), sizes)
    except CheckpointError:
        raise
    except (ValueError, re.error) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _find(folder: Path) -> Path:
    for name in (WEIGHTS, _SINGLE):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds no LoRA, neither {WEIGHTS} nor {_SINGLE}")


def _settings(file: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> _Settings:
    if file.name == WEIGHTS:
        if not file.with_name(CONFIG).is_file():
            raise ValueError(f"lacks the {CONFIG} beside it; {AGAIN}")
        values: dict[str, Any] = read_json(file.with_name(CONFIG))
    else:
        stored = parse_json(metadata.get("lora_adapter_metadata", "{}"), "lora_adapter_metadata")
        if not isinstance(stored, dict):
            raise ValueError("must say in lora_adapter_metadata what its adapters are")
        if not stored and any(name.startswith("base_model.model.") for name in tensors):
            raise ValueError(
                f"is in peft's layout: it must be named {WEIGHTS}, beside its {CONFIG}"
            )
        values = {key.removeprefix("transformer."): value for key, value in stored.items()}
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights")
    if kind != "LORA":
        raise ValueError(f"must be a LoRA, got peft_type {kind!r}")
    if start not in _PLAIN_STARTS or values.get("fan_in_fan_out"):
        raise ValueError(
            f"must leave the weights of the model alone, got init_lora_weights {start!r}"
        )
    alpha, patterns = values.get("lora_alpha"), values.get("alpha_pattern") or {}
    alphas = [0 if alpha is None else alpha]
    alphas += patterns.values() if isinstance(patterns, dict) else [patterns]
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in alphas):
        raise ValueError(f"lora_alpha and alpha_pattern must be numbers, got {alpha!r}, {patterns}")
    return _Settings(alpha, patterns, bool(values.get("use_rslora")))


def _collect(
    tensors: Mapping[str, Tensor], settings: _Settings, sizes: Mapping[str, Size]
) -> Adapter:
    places = _places(sizes)
    parts: dict[str, dict[_Place, tuple[Tensor, Tensor, float]]] = {}
    found = _by_layer(tensors)
    if strange := [name for name in found if _place(name, places) is None]:
        raise ValueError(f"is for layers that this model does not have: {listed(strange)}")
    for name, values in found.items():
        place = _place(name, places)
        assert place is not None
        others = parts.setdefault(place.layer, {})
        if place in others or any(other.count != place.count for other in others):
            raise ValueError(f"has several adapters for {place.layer}")
        others[place] = _pair(name, values, sizes[place.layer], place.count, settings)
    packed = {layer: _pack(some, sizes[layer]) for layer, some in parts.items()}
    return Adapter(
        {layer: (a, b) for layer, (a, b, _) in packed.items()},
        {layer: scale for layer, (_, _, scale) in packed.items()},
    )


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by its own names of layers: A, B, and alpha where it has its own."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name) or _ALPHA.fullmatch(name)
        if match is None:
            raise ValueError(f"must hold nothing but pairs of A and B, got {name}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite")
        found.setdefault(match[1], {})[_KINDS.get(match[2], match[2])] = tensor
    if not found:
        raise ValueError("must hold an adapter, got no tensors")
    return found


def _places(sizes: Mapping[str, Size]) -> dict[str, _Place]:
    """Where a file's layers belong, by their names here and in diffusers, dots as underscores."""
    places = {}
    for layer in sizes:
        places[_flat(layer)] = _Place(layer, 0, 1)
        theirs = [name.removesuffix(".weight") for name in diffusers_names(f"{layer}.weight")]
        for part, name in enumerate(theirs):
            places[_flat(name)] = _Place(layer, part, len(theirs))
    return places


def _flat(name: str) -> str:
    # kohya writes underscores for dots, and names have underscores of their own: there is no way
    # back, so both sides are compared in this form.
    return name.replace(".", "_")


def _place(name: str, places: Mapping[str, _Place]) -> _Place | None:
    flat = _flat(_unwrapped(name))
    candidates = (places.get(flat.removeprefix(prefix)) for prefix in _UNDERSCORED)
    return next((place for place in candidates if place is not None), None)


def _unwrapped(name: str) -> str:
    match = _WRAPPERS.match(name)
    return name[match.end() :] if match else name


def _pair(
    name: str, values: Mapping[str, Tensor], shape: Size, count: int, settings: _Settings
) -> tuple[Tensor, Tensor, float]:
    """(A, B, what their product is times), if they fit a part of a weight of this shape."""
    if missing := {"A", "B"} - values.keys():
        raise ValueError(f"{name} must have A and B, got no {missing.pop()}")
    a, b = values["A"].float(), values["B"].float()
    rank = len(a) if a.dim() else 0
    expected = ((rank, *shape[1:]), (shape[0] // count, rank, *[1] * (len(shape) - 2)))
    given = (tuple(a.shape), tuple(b.shape))
    if rank == 0 or given != expected:
        raise ValueError(
            f"{name} must fit weights of {(shape[0] // count, *shape[1:])}, got A {given[0]} and "
            f"B {given[1]}; it was made for another model"
        )
    return a, b, settings.scale(_unwrapped(name), rank, values.get("alpha"))


def _pack(
    parts: Mapping[_Place, tuple[Tensor, Tensor, float]], shape: Size
) -> tuple[Tensor, Tensor, float]:
    """One pair for a layer from those of its parts, whose scales go into B."""
    ((first, whole), *_) = parts.items()
    if first.count == 1:
        return whole
    a = torch.cat([a for a, _, _ in parts.values()])
    b = a.new_zeros(shape[0], len(a))
    rows, column = shape[0] // first.count, 0
    for place, (_, own, scale) in parts.items():
        rank = own.shape[1]
        b[place.part * rows : (place.part + 1) * rows, column : column + rank] = own * scale
        column += rank
    return a, b, 1.0
