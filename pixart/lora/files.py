"""Files of LoRA adapters: in peft's layout, from here or from diffusers' models, and single ones.

Where diffusers has several layers in the place of one of ours (q, k and v), A = [A_q; A_k; A_v] and
B = diag(B_q, B_k, B_v) make the same sum: every such file is taken exactly, one that adapts q alone
as well. What is no pair of A and B (magnitudes of DoRA, biases, whole layers) and what belongs to no
layer of the model (adapters of a text encoder) is refused, never left out.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from pixart.checkpoint.names import diffusers_names
from pixart.few_step import FewStep
from pixart.files import AGAIN, CheckpointError, listed, parse_json, read_json
from pixart.releases import adapter_named, adapter_of
from pixart.tensors import check_plain, container, read_safetensors
from pixart.weights import check_finite, resolve

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's layout
_SINGLE = "pytorch_lora_weights.safetensors"  # diffusers', whose configuration is in its metadata

_FACTOR = re.compile(r"(.+)\.lora[_.](A|B|down|up)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r".+\.alpha")  # of kohya's layout
_KINDS = {"down": "A", "up": "B"}
_WRAPPERS = re.compile(
    r"(?:(?:base_model|model|module|transformer|unet|diffusion_model|_orig_mod)\.)*"
)
# The same where a dot is an underscore, and kohya's own.
_UNDERSCORED = re.compile(
    r"(?:lora|base_model|model|module|transformer|unet|diffusion_model|_orig_mod)_"
)
_FUSED = {"to_q": "to_qkv", "to_k": "to_kv"}  # by the first of diffusers' layers that lie in ours
# The others move a part of the model's own weights into the adapter.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Settings of peft that make something else of A and B.
_OTHER_METHODS = (
    "fan_in_fan_out", "use_dora", "use_qalora", "use_bdlora", "velora_config", "monteclora_config",
    "alora_invocation_tokens", "layer_replication", "modules_to_save",
)  # fmt: skip
_NAME = re.compile(r"(\^)?(\.\*)?((?:[\w.-]|\\[.-])+)\$?")
_MAX_PATTERNS, _MAX_ALPHA, _MAX_WRAPPERS = 1024, 1e6, 8


@dataclass(frozen=True)
class Adapter:
    """A (rank, in) and B (out, rank) of each adapted layer, fp32, and what B·A is times. few_step: what it
    makes the model drawn with."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]
    few_step: FewStep | None = None


@dataclass(frozen=True)
class _Place:
    """A layer here, and which of the `count` equal parts of its rows a file's layer is."""

    layer: str
    part: int
    count: int


@dataclass(frozen=True)
class _Pattern:
    """What peft's alpha_pattern means: a layer's name, or the end of one after a dot, in which a dot may be
    any character. `^` in front takes it for the whole, `.*` for any end.

    That much of an expression is compared character by character: `re` would let a file run for ever.
    """

    characters: tuple[str, ...]
    is_whole: bool
    is_any_end: bool

    @classmethod
    def parse(cls, text: str) -> "_Pattern":
        match = _NAME.fullmatch(text)
        if match is None or len(text) > 512:
            raise ValueError(
                "alpha_pattern must name layers (letters, digits, _ and -, dots, ^ or .* in front), "
                f"got {text[:99]!r}"
            )
        return cls(tuple(re.findall(r"\\?.", match[3])), bool(match[1]), bool(match[2]))

    def fits(self, name: str) -> bool:
        start = len(name) - len(self.characters)
        if start < 0 or not all(map(_is_same, self.characters, name[start:])):
            return False
        return start == 0 or self.is_any_end or not self.is_whole and name[start - 1] == "."


def _is_same(character: str, there: str) -> bool:
    return character == "." or character[-1] == there


@dataclass(frozen=True)
class _Settings:
    """B·A is scaled by alpha over the rank, or over its root. patterns: alphas of layers, of which the
    first that fits counts. Where no alpha is given, it is the rank."""

    alpha: float | None = None
    patterns: Sequence[tuple[_Pattern, float]] = ()
    by_root: bool = False

    def scale(self, name: str, rank: int, own: float | None) -> float:
        alpha = own
        if alpha is None:
            fitting = (alpha for pattern, alpha in self.patterns if pattern.fits(name))
            alpha = next(fitting, self.alpha)
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
    alphas = {name: tensors.pop(name) for name in list(tensors) if _ALPHA.fullmatch(name)}
    check_plain(file, tensors)
    try:
        own = {name: _number(name, tensor) for name, tensor in alphas.items()}
        layers = [match[1] for match in map(_FACTOR.fullmatch, tensors) if match]
        settings = _settings(file, metadata, [n for n in layers if f"{n}.alpha" not in own])
        adapter = _collect(tensors, own, settings, sizes)
        adapter = replace(adapter, few_step=_few_step(source, file, metadata))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    check_finite(tensors, str(file))
    return adapter


def _few_step(source: str | Path, file: Path, metadata: Mapping[str, str]) -> FewStep | None:
    """As the metadata of the weights says, or the configuration beside them, or the adapter's name."""
    said: Any = None
    if "few_step" in metadata:
        said = parse_json(metadata["few_step"], "few_step")
        if said is None:
            raise ValueError("few_step must be a mapping, got null")
    elif file.name == WEIGHTS:
        said = read_json(file.with_name(CONFIG)).get("few_step")
    if said is not None:
        return FewStep.from_dict(said)
    release = adapter_named(str(source)) or adapter_of(file)
    return release.few_step if release else None


def _number(name: str, tensor: Tensor) -> float:
    """An alpha of any real dtype, alone in any shape."""
    if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be one number, got {tensor.dtype} of {tuple(tensor.shape)}")
    value = float(tensor.reshape(()))
    if not abs(value) <= _MAX_ALPHA:
        raise ValueError(f"{name} must be a number up to {_MAX_ALPHA:g}, got {value}")
    return value


def _find(folder: Path) -> Path:
    for name in (WEIGHTS, _SINGLE):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds no LoRA, neither {WEIGHTS} nor {_SINGLE}")


def _settings(file: Path, metadata: Mapping[str, str], layers: Iterable[str]) -> _Settings:
    """layers: those without an alpha of their own."""
    if file.name == WEIGHTS:
        if not file.with_name(CONFIG).is_file():
            raise ValueError(f"lacks the {CONFIG} beside it; {AGAIN}")
        values: dict[str, Any] = read_json(file.with_name(CONFIG))
    else:
        stored = parse_json(metadata.get("lora_adapter_metadata", "{}"), "lora_adapter_metadata")
        if not isinstance(stored, dict):
            raise ValueError("must say in lora_adapter_metadata what its adapters are")
        if not stored and any(name.startswith("base_model.model.") for name in layers):
            raise ValueError(
                f"is in peft's layout: it must be named {WEIGHTS}, beside its {CONFIG}"
            )
        values = {key.removeprefix("transformer."): value for key, value in stored.items()}
    return _plain_settings(values)


def _plain_settings(values: Mapping[str, Any]) -> _Settings:
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights")
    if kind != "LORA":
        raise ValueError(f"must be a LoRA, got peft_type {kind!r}")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"must leave the weights of the model alone, got init_lora_weights {start!r}"
        )
    if other := [key for key in _OTHER_METHODS if values.get(key)]:
        raise ValueError(f"must be a plain LoRA, got {other[0]} {values[other[0]]!r}")
    alpha, patterns = values.get("lora_alpha"), values.get("alpha_pattern")
    patterns = {} if patterns is None else patterns
    alphas = [0 if alpha is None else alpha]
    alphas += patterns.values() if isinstance(patterns, dict) else [patterns]
    if not isinstance(patterns, dict) or not all(map(_is_number, alphas)):
        raise ValueError(f"lora_alpha and alpha_pattern must be numbers, got {alpha!r}, {patterns}")
    if any(abs(one) > _MAX_ALPHA for one in alphas):
        raise ValueError(
            f"lora_alpha and alpha_pattern must be up to {_MAX_ALPHA:g}, got {alpha!r}, {patterns}"
        )
    if len(patterns) > _MAX_PATTERNS:
        raise ValueError(
            f"alpha_pattern must name at most {_MAX_PATTERNS} layers, got {len(patterns)}"
        )
    by_root = values.get("use_rslora")
    if by_root not in (None, True, False):
        raise ValueError(f"use_rslora must be true or false, got {by_root!r}")
    parsed = [(_Pattern.parse(name), own) for name, own in patterns.items()]
    return _Settings(alpha, parsed, bool(by_root))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _collect(
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    settings: _Settings,
    sizes: Mapping[str, Size],
) -> Adapter:
    places = _places(sizes)
    parts: dict[str, dict[_Place, tuple[Tensor, Tensor, float]]] = {}
    found = _by_layer(tensors)
    own = {name.removesuffix(".alpha"): alpha for name, alpha in alphas.items()}
    if lone := [name for name in own if name not in found]:
        raise ValueError(
            f"must hold nothing but pairs of A and B, got an alpha alone: {listed(lone)}"
        )
    if strange := [name for name in found if _place(name, places) is None]:
        raise ValueError(f"is for layers that this model does not have: {listed(strange)}")
    for name, values in found.items():
        place = _place(name, places)
        assert place is not None
        others = parts.setdefault(place.layer, {})
        if place in others or any(other.count != place.count for other in others):
            raise ValueError(f"has several adapters for {place.layer}")
        a, b = _pair(name, values, sizes[place.layer], place.count)
        others[place] = (a, b, settings.scale(_unwrapped(name), len(a), own.get(name)))
    packed = {layer: _pack(some, sizes[layer]) for layer, some in parts.items()}
    return Adapter(
        {layer: (a, b) for layer, (a, b, _) in packed.items()},
        {layer: scale for layer, (_, _, scale) in packed.items()},
    )


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by its own names of layers: A and B."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if name.startswith("bundle_emb."):
            raise ValueError(
                f"holds embeddings of new words ({name}), which are not read; save the LoRA without them"
            )
        if match is None:
            raise ValueError(f"must hold nothing but pairs of A and B, got {name}")
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
        if len(theirs) > 1:  # as diffusers' fuse_qkv_projections names them, stacked as here
            attention, _, first = theirs[0].rpartition(".")
            places[_flat(f"{attention}.{_FUSED[first]}")] = _Place(layer, 0, 1)
    return places


def _flat(name: str) -> str:
    # kohya writes underscores for dots, and names have underscores of their own: there is no way
    # back, so both sides are compared in this form.
    return name.replace(".", "_")


def _place(name: str, places: Mapping[str, _Place]) -> _Place | None:
    flat = _flat(_unwrapped(name))
    # One by one: "transformer_" is a wrapper, and how "transformer_blocks_0" begins.
    for _ in range(_MAX_WRAPPERS):
        match = _UNDERSCORED.match(flat)
        if flat in places or match is None:
            break
        flat = flat[match.end() :]
    return places.get(flat)


def _unwrapped(name: str) -> str:
    match = _WRAPPERS.match(name)
    return name[match.end() :] if match else name


def _pair(
    name: str, values: Mapping[str, Tensor], shape: Size, count: int
) -> tuple[Tensor, Tensor]:
    """A and B, if they fit a part of a weight of this shape."""
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
    return a, b


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
