"""The weights of a T5 as files hold them: plain numbers, fp8 with or without scales, or packed as in GGUF.

A file is mapped from the disk; what it holds becomes dense a tensor at a time, in `Stored.dense`. So a T5 may
stay packed in memory, or on the disk, and is computed with dense weights all the same: no layer of its own, and
nothing that looks at the dtype of a packed weight.

Which formats there are: transformers' (safetensors or PyTorch's, in shards or not); fp8 that is a plain cast
(`t5xxl_fp8_e4m3fn.safetensors`); fp8 with a scale for each matrix, in ComfyUI's first layout (a key `scaled_fp8`,
`X.scale_weight` beside `X.weight`) and in its layout since December 2025 (`X.weight_scale`, and
`_quantization_metadata` among the metadata or `X.comfy_quant` beside the weight; ComfyUI's QUANTIZATION.md); GGUF.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pixart.files import AGAIN, CheckpointError, listed, parse_json, short
from pixart.tensors import (
    FLOATS_OF_8_BITS,
    check_stored,
    container,
    read_safetensors,
    read_torch,
)
from pixart.text.ggml import dequantise
from pixart.text.gguf import MAGIC, read_gguf, t5_names

EMBEDDING = "shared.weight"
SCALED = "scaled_fp8"  # the key of ComfyUI's first layout
SCALE = ".scale_weight"
_TWIN = "encoder.embed_tokens.weight"  # the same tensor
_SCALES = (SCALE, ".weight_scale")
_QUANTISED = "_quantization_metadata"
_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# Of products with fp8 activations, which are not made here; and a tokenizer that some files carry.
_IDLE = re.compile(r".*\.(?:scale_input|input_scale|comfy_quant)|spiece_model|scaled_fp8")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_AT_A_TIME = 2**22  # numbers that are unpacked in one go: fp32 takes 16 MiB for them


@dataclass(frozen=True)
class Stored:
    """A tensor as it is held. parts: the numbers, whose last axes are packed in a form of ggml's, and of a
    scaled one the scale. shape: of the dense tensor. form: "plain", "scaled", or the name of a ggml type."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    form: str = "plain"

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_plain(self) -> bool:
        """Whether it is as it is computed with, but for a cast between floats."""
        return self.form == "plain" and self.parts[0].dtype in _FLOATS

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers, on the same device; unpacked in fp32 and then rounded. What is of that dtype already
        is not copied."""
        if self.form == "plain":
            return self.parts[0].to(dtype)
        out = torch.empty(self.shape, dtype=dtype, device=self.parts[0].device)
        flat, done = out.view(-1), 0
        for piece in self._unpacked():
            flat[done : done + piece.numel()] = piece.view(-1)
            done += piece.numel()
        return out

    def _unpacked(self) -> Iterable[Tensor]:
        if self.form == "scaled":
            numbers, scale = self.parts
            for rows in numbers.split(max(1, _AT_A_TIME // max(1, numbers[0].numel()))):
                yield rows.float() * scale.float()
            return
        for blocks in self.parts[0].flatten(0, 1).split(_AT_A_TIME // 256):
            yield dequantise(blocks, self.form)

    def rows(self, places: Tensor) -> "Stored":
        """Some rows of a matrix, in any order."""
        numbers, *scale = self.parts
        shape = (len(places), *self.shape[1:])
        return Stored((_bytes(numbers)[places].view(numbers.dtype), *scale), shape, self.form)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Stored":
        """A copy to keep on a device. Plain numbers take the dtype, packed ones stay packed."""
        if self.is_plain:
            # A copy even where nothing changes: what is mapped is no memory of ours.
            return Stored((self.parts[0].to(device, dtype, copy=True),), self.shape)
        parts = tuple(part.to(device, copy=True) for part in self.parts)
        return Stored(parts, self.shape, self.form)


def _bytes(tensor: Tensor) -> Tensor:
    """fp8 cannot be indexed everywhere, bytes can."""
    return tensor.view(torch.uint8) if tensor.dtype in FLOATS_OF_8_BITS else tensor


@dataclass(frozen=True)
class Weights:
    """The tensors of an encoder under transformers' names, without those that encode nothing. others: names
    that are no weights of an encoder. is_mapped: whether they lie in mapped files. formats: for people."""

    tensors: dict[str, Stored]
    is_mapped: bool
    others: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        return sum(tensor.numbers for tensor in self.tensors.values())

    @property
    def formats(self) -> list[str]:
        return sorted({_format(tensor) for tensor in self.tensors.values()})


def _format(tensor: Stored) -> str:
    kind = str(tensor.parts[0].dtype).removeprefix("torch.")
    return {"plain": kind, "scaled": f"{kind} with scales"}.get(tensor.form, tensor.form)


def read_weights(files: Iterable[Path]) -> Weights:
    """Open the files of one encoder. CheckpointError for what cannot be read, has a tensor in two files, or
    is packed in a way that is not read."""
    tensors: dict[str, Stored] = {}
    is_mapped = True
    for file in files:
        kind = _container(file)
        part = _read_gguf(file) if kind == "gguf" else _read_file(file, kind)
        if again := sorted(tensors.keys() & part.keys()):
            raise CheckpointError(
                f"{file}: must hold other tensors than the files before it, got {listed(again)}"
            )
        tensors |= part
        is_mapped &= kind != "pickle"
    if EMBEDDING not in tensors and _TWIN in tensors:
        tensors[EMBEDDING] = tensors[_TWIN]
    tensors.pop(_TWIN, None)
    is_own = re.compile(r"shared\.weight|encoder\.(?:block|final_layer_norm)\..*")
    others = sorted(name for name in tensors if not is_own.fullmatch(name))
    own = {name: tensor for name, tensor in tensors.items() if name not in others}
    return Weights(own, is_mapped, others)


def _container(path: Path) -> Literal["gguf", "safetensors", "zip", "pickle"]:
    with suppress(OSError, ValueError):  # container says why it cannot be read
        if path.is_file():
            with path.open("rb") as file:
                if file.read(4) == MAGIC:
                    return "gguf"
    return container(path)  # type: ignore[return-value]


def _read_gguf(path: Path) -> dict[str, Stored]:
    held, metadata = read_gguf(path)
    names = t5_names(path, list(held), metadata)
    return {
        names[name]: Stored(
            (one.data,), one.shape, "plain" if one.type.unpack is None else one.type.name
        )
        for name, one in held.items()
    }


def _read_file(path: Path, kind: str) -> dict[str, Stored]:
    metadata: dict[str, str] = {}
    if kind == "safetensors":
        tensors, metadata = read_safetensors(path)
    else:
        tensors = read_torch(path, kind)
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path}: holds a {type(tensors).__name__}, not a state dict")
    check_stored(path, tensors)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        return _read_tensors(tensors, metadata)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Stored]:
    said = _said_formats(tensors, metadata)
    scales = {name for name in tensors if name.endswith(_SCALES)}
    used: set[str] = set()
    found = {}
    for name, tensor in tensors.items():
        if name in scales or _IDLE.fullmatch(name):
            continue
        layer = name.removesuffix(".weight")
        dtype = said.get(layer)
        if dtype is not None and tensor.dtype == torch.uint8:
            tensor = tensor.view(dtype)
        if tensor.dtype not in _FLOATS + FLOATS_OF_8_BITS:
            raise ValueError(f"{name} must be of floats of 8, 16 or 32 bits, got {tensor.dtype}")
        beside = [layer + end for end in _SCALES if layer + end in scales]
        used |= set(beside)
        if not beside:
            if dtype is not None:
                raise ValueError(f"{name} must have a scale beside it ({layer}.weight_scale)")
            found[name] = Stored((tensor,), tuple(tensor.shape))
            continue
        scale = tensors[beside[0]]
        found[name] = Stored(
            (tensor, _checked_scale(beside[0], scale)), tuple(tensor.shape), "scaled"
        )
    if scales - used:
        raise ValueError(f"has scales of no weight: {listed(sorted(scales - used))}; {AGAIN}")
    return found


def _checked_scale(name: str, scale: Tensor) -> Tensor:
    is_number = scale.is_floating_point() and scale.numel() == 1 and scale.dtype in _FLOATS
    if not is_number or not scale.isfinite().all():
        raise ValueError(
            f"{name} must be one finite number, got {tuple(scale.shape)} of {scale.dtype}"
        )
    return scale.reshape(()).float()


def _said_formats(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, torch.dtype]:
    """The dtype of each layer that a file in ComfyUI's later layout says is quantised."""
    said: dict[str, Any] = {}
    if _QUANTISED in metadata:
        values = parse_json(metadata[_QUANTISED], _QUANTISED)
        layers = values.get("layers") if isinstance(values, dict) else None
        if not isinstance(layers, dict):
            raise ValueError(f"{_QUANTISED} must have the layers, got {short(values)}")
        said |= layers
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) > 2**16:
                got = f"{tensor.dtype} of the shape {tuple(tensor.shape)}"
                raise ValueError(f"{name} must be JSON in bytes, got {got}")
            said[name.removesuffix(".comfy_quant")] = parse_json(bytes(tensor.tolist()), name)
    found = {}
    for layer, values in said.items():
        kind = values.get("format") if isinstance(values, dict) else values
        if not isinstance(kind, str) or kind not in _FORMATS:
            raise ValueError(
                f"{layer} must be quantised as {' or '.join(_FORMATS)}, got {short(kind)}; take a file in "
                "fp8, bf16 or GGUF"
            )
        if f"{layer}.weight" not in tensors:
            raise ValueError(f"{layer} is said to be quantised, and has no weight; {AGAIN}")
        found[layer] = _FORMATS[kind]
    return found
