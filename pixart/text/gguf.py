"""Reads GGUF files, version 2 and 3 (ggml's docs/gguf.md): what a file says of itself is compared with the file
before it is believed. The tensors are mapped from the disk; arrays among the metadata are passed over."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.files import AGAIN, CheckpointError, listed, short
from pixart.text.ggml import TYPES, Type

MAGIC = b"GGUF"
# A T5's header has 1.3 MB, most of it the tokenizer's words.
_MAX_HEADER, _MAX_TENSORS, _MAX_KEYS, _MAX_TEXT = 2**26, 2**16, 2**16, 2**20
_MAX_ITEMS, _MAX_NESTED = 2**22, 4
_MAX_SIZE = 2**48  # numbers of a tensor: products of sizes stay whole numbers of 64 bits
_SCALARS = {  # of the types of values, as struct has them
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class Held:
    """A tensor as the file holds it: `data`, of the type's dtype and the tensor's shape where that is not
    packed, else (rows, blocks of a row, bytes of a block) uint8. shape: of the numbers, as PyTorch has it."""

    data: Tensor
    shape: tuple[int, ...]
    type: Type


class _Damaged(Exception):
    """Why a file is none."""


def read_gguf(path: Path) -> tuple[dict[str, Held], dict[str, Any]]:
    """The tensors and the metadata, arrays left out. CheckpointError for what is damaged, of another
    version, or has tensors of a type that is not read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = _Reader(file.read(min(size, _MAX_HEADER)))
        metadata, infos = _read_header(header)
        start = _aligned(header.place, metadata)
        held = _placed(infos, start, size, metadata)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except _Damaged as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error}); {AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not held:
        return {}, metadata
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return {info.name: _taken(content, info, place) for info, place in held}, metadata


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    type: Type
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.type.numbers * self.type.size


class _Reader:
    """Little-endian values, one after the other, of what was read of a file."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place, self.items = content, 0, 0

    def bytes(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self.content):
            raise _Damaged("its header ends too early")
        found, self.place = self.content[self.place : end], end
        return found

    def number(self, code: str) -> Any:
        [value] = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        return value

    def count(self, what: str, most: int) -> int:
        value: int = self.number("Q")
        if value > most:
            raise _Damaged(f"it says that there are {value:,} {what}, more than {most:,}")
        return value

    def text(self) -> str:
        content = self.bytes(self.count("bytes of a text", _MAX_TEXT))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("a text of its header is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of the metadata; None of an array."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY or depth == _MAX_NESTED:
            raise _Damaged(f"its metadata has a value of the type {kind}, {depth} deep")
        inner, count = self.number("I"), self.count("items of an array", _MAX_ITEMS)
        self.items += count
        if self.items > _MAX_ITEMS:
            raise _Damaged(f"its metadata has more than {_MAX_ITEMS:,} items")
        if inner in _SCALARS:
            self.bytes(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        skip: Callable[[], Any] = lambda: self.value(inner, depth + 1)  # noqa: E731
        for _ in range(count):
            skip()
        return None


def _read_header(header: _Reader) -> tuple[dict[str, Any], list[_Info]]:
    if header.bytes(4) != MAGIC:
        raise _Damaged("it does not begin with GGUF")
    version: int = header.number("I")
    if version not in (2, 3):
        raise ValueError(
            f"must be a GGUF file of version 2 or 3, little-endian, got version {version}"
        )
    tensors = header.count("tensors", _MAX_TENSORS)
    metadata: dict[str, Any] = {}
    for _ in range(header.count("keys of metadata", _MAX_KEYS)):
        key = header.text()
        if key in metadata:
            raise _Damaged(f"its metadata has {short(key)} twice")
        metadata[key] = header.value(header.number("I"))
    infos = [_read_info(header) for _ in range(tensors)]
    if len({info.name for info in infos}) < len(infos):
        raise _Damaged("it has two tensors of one name")
    return {key: value for key, value in metadata.items() if value is not None}, infos


def _read_info(header: _Reader) -> _Info:
    name, rank = header.text(), header.number("I")
    if not 1 <= rank <= 4:
        raise _Damaged(f"{short(name)} has {rank} dimensions")
    sizes = [header.number("Q") for _ in range(rank)]
    kind, offset = header.number("I"), header.number("Q")
    if kind not in TYPES:
        known = ", ".join(one.name for one in TYPES.values())
        raise ValueError(
            f"{name} must be of a type that is read ({known}), got ggml's type {kind}; take a file of "
            "another quantisation"
        )
    if not all(1 <= size <= _MAX_SIZE for size in sizes) or math.prod(sizes) > _MAX_SIZE:
        raise _Damaged(f"{short(name)} has the sizes {sizes}")
    if sizes[0] % TYPES[kind].numbers:
        raise _Damaged(
            f"{short(name)} has rows of {sizes[0]}, no multiple of {TYPES[kind].numbers}"
        )
    return _Info(name, tuple(reversed(sizes)), TYPES[kind], offset)


def _alignment(metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or not 8 <= value <= 2**16 or value % 8:
        raise _Damaged(f"its alignment is {short(value)}")
    return int(value)


def _aligned(place: int, metadata: dict[str, Any]) -> int:
    unit = _alignment(metadata)
    return -(-place // unit) * unit


def _placed(
    infos: list[_Info], start: int, size: int, metadata: dict[str, Any]
) -> list[tuple[_Info, int]]:
    """Each tensor with the byte at which it begins. No byte may be two tensors'."""
    unit, end = _alignment(metadata), start
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset % unit or info.offset >= size:
            raise _Damaged(f"{short(info.name)} begins at {info.offset}, no place in it")
        begin = start + info.offset
        if begin < end:
            raise _Damaged(f"{short(info.name)} begins within another tensor")
        end = begin + info.bytes
        if end > size:
            raise _Damaged(f"{short(info.name)} ends at {end:,}, the file at {size:,}")
    return [(info, start + info.offset) for info in infos]


def _taken(content: Tensor, info: _Info, place: int) -> Held:
    data = content[place : place + info.bytes]
    if info.type.dtype is not None:
        return Held(data.view(info.type.dtype).view(info.shape), info.shape, info.type)
    blocks = info.shape[-1] // info.type.numbers
    return Held(data.view(-1, blocks, info.type.size), info.shape, info.type)


# The names that llama.cpp gives T5's tensors, and those of transformers.
_OF_BLOCKS = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_OF_ALL = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
ARCHITECTURES = ("t5encoder", "t5")


def t5_names(path: Path, names: list[str], metadata: dict[str, Any]) -> dict[str, str]:
    """The names that transformers gives the tensors of a T5 in GGUF, by the file's. Others, such as a
    decoder's, stay as they are. CheckpointError for a file of another network."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: must hold the encoder of T5 (architecture t5encoder), got {short(architecture)}"
        )
    is_gated = any(name.endswith(".ffn_gate.weight") for name in names)
    of_blocks = _OF_BLOCKS if is_gated else {**_OF_BLOCKS, "ffn_up": "layer.1.DenseReluDense.wi"}
    found = {}
    for name in names:
        stem = name.removesuffix(".weight")
        parts = stem.split(".", 3)
        if stem in _OF_ALL:
            found[name] = f"{_OF_ALL[stem]}.weight"
        elif len(parts) == 4 and parts[:2] == ["enc", "blk"] and parts[3] in of_blocks:
            found[name] = f"encoder.block.{parts[2]}.{of_blocks[parts[3]]}.weight"
        else:
            found[name] = name
    if len(set(found.values())) < len(found):
        raise CheckpointError(f"{path}: has tensors twice ({listed(sorted(names))}); {AGAIN}")
    return found
