"""Writes a T5's encoder to one safetensors file, from any format that is read, a tensor at a time.

In fp8 each matrix of the blocks has a scale, its largest number divided by 448, the largest of e4m3, in ComfyUI's
first layout (`scaled_fp8`, `X.scale_weight`), which its later versions read too; the embedding, the norms and the
position bias are bf16, as no loader scales them.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from pixart.config import EMBEDDED
from pixart.files import CheckpointError, check_writable, write_json, written_aside
from pixart.text.networks import check_encoder, is_packed, kind_of, open_t5
from pixart.text.stored import EMBEDDING, SCALE, SCALED, Stored, read_weights
from pixart.text.t5 import BIAS, T5Shape
from pixart.weights import NotFiniteError, resolve

Precision = Literal["fp32", "bf16", "fp8"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_FILES = ("*.json", "text_encoder/*.json", "text_encoder/*.safetensors", "text_encoder/*.bin",
          "*.safetensors", "*.bin")  # fmt: skip
_AT_A_TIME = 2**24  # numbers that are dense in one go
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class _Planned:
    """A tensor of the new file, and where its numbers come from: all of `source`, or its scale alone."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Stored | None
    is_scale: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert_text_encoder(
    place: str, target: Path, precision: Precision, *, overwrite: bool = False
) -> str:
    """Write the encoder of a T5: a folder of config.json and model.safetensors that opens as a pipeline's
    `text_encoder`, or the file alone where `target` ends in .safetensors. place: a file, such a folder, a
    pipeline, a hub id or "shapes". Memory: a tensor or 64 MiB of it. Returns a sentence on what was written.

    CheckpointError for what is no T5, NotFiniteError for NaN in it, ValueError where something stands in the
    way of the target, OSError where the disk refuses; what stood there stands there then."""
    if place == EMBEDDED:
        source = Path(__file__).parent.parent / "assets" / EMBEDDED
    else:
        source = resolve(place, allow_patterns=_FILES)
    if source.is_dir() and (source / "text_encoder").is_dir():
        source = source / "text_encoder"
    is_file = target.suffix == ".safetensors"
    _check_target(source, target, is_file, overwrite)
    if source.is_dir():
        if kind_of(source) == "clip" or is_packed(source):
            raise CheckpointError(
                f"{source}: must hold a T5 that bitsandbytes has not quantised, and no CLIP"
            )
        opened = open_t5(source, None)
        shape, tensors = opened.shape, opened.weights.tensors
    else:
        weights = read_weights([source])
        check_encoder(source, weights, may_hold_decoder=True)
        tensors, shape = weights.tensors, _seen_shape(source, weights.tensors)
    planned = list(_plan({name: tensors[name] for name in sorted(shape.tensors)}, precision))
    with written_aside(target) as aside:
        if not is_file:
            aside.mkdir()
            write_json(aside / "config.json", shape.to_config(), indent=2)
        with open(aside if is_file else aside / "model.safetensors", "wb") as file:
            _write(file, planned, source)
    count = sum(math.prod(size) for size in shape.tensors.values())
    size = sum(one.bytes for one in planned)
    return f"{target}: {count:,} parameters, {precision}, {size:,} bytes"


def _check_target(source: Path, target: Path, is_file: bool, overwrite: bool) -> None:
    own, place = source.resolve(), target.resolve()
    if place in (own, own.parent) or own in place.parents:
        raise ValueError(f"DST must not be SRC, nor hold it, nor lie in it, got {target}")
    if target.exists():
        is_alike = target.is_file() if is_file else _is_encoder(target)
        if is_file != target.is_file():
            raise ValueError(
                f"{target}: must be {'a file' if is_file else 'a folder'}, or not be there"
            )
        if not overwrite:
            raise ValueError(f"{target}: is there already; replace it with --overwrite")
        if not is_alike:
            raise ValueError(
                f"{target}: must hold a text encoder alone to be replaced; name another"
            )
    check_writable(target)


def _is_encoder(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return names <= {"config.json", "model.safetensors"}


def _seen_shape(source: Path, tensors: dict[str, Stored]) -> T5Shape:
    """Of a file, which has no config.json. CheckpointError unless every block is whole."""
    try:
        shape = T5Shape.seen_in({name: one.shape for name, one in tensors.items()})
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    wanted = shape.tensors
    wrong = [
        name for name, size in wanted.items() if name not in tensors or tensors[name].shape != size
    ]
    if wrong := wrong + [name for name in tensors if name not in wanted]:
        raise CheckpointError(
            f"{source}: must hold {shape.layers} whole blocks of a T5 of width {shape.width}, but not so "
            f"{wrong[0]}"
        )
    return shape


def _plan(tensors: dict[str, Stored], precision: Precision) -> Iterator[_Planned]:
    if precision == "fp8":
        # Two numbers say that products are made in full precision, from widened weights.
        yield _Planned(SCALED, torch.float8_e4m3fn, (2,), None)
    for name, one in tensors.items():
        is_narrow = precision == "fp8" and len(one.shape) == 2 and name not in (EMBEDDING, BIAS)
        if is_narrow:
            yield _Planned(name, torch.float8_e4m3fn, one.shape, one)
            yield _Planned(name.removesuffix(".weight") + SCALE, torch.float32, (), one, True)
        else:
            yield _Planned(name, _DTYPES.get(precision, torch.bfloat16), one.shape, one)


def _write(file: IO[bytes], planned: list[_Planned], source: Path) -> None:
    """A header of 8-byte multiples, then the tensors end to end, as safetensors wants them."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in planned:
        begin, end = end, end + one.bytes
        header[one.name] = {
            "dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    scale = torch.ones(())
    for one in planned:
        if one.source is None:
            file.write(bytes(one.bytes))
            continue
        if one.is_scale:
            file.write(_bytes(scale))
            continue
        most = 0.0
        for piece in _pieces(one.source):
            if not math.isfinite(largest := float(piece.abs().max())):
                raise NotFiniteError(f"{source}: must be finite, got NaN or infinity in {one.name}")
            most = max(most, largest)
        is_narrow = one.dtype == torch.float8_e4m3fn
        scale = torch.tensor(most / LARGEST if most else 1.0)
        for piece in _pieces(one.source):
            # Clamped: the division may round up past the largest number, which fp8 has no infinity for.
            scaled = (piece / scale).clamp(-LARGEST, LARGEST) if is_narrow else piece
            file.write(_bytes(scaled.to(one.dtype)))


def _pieces(stored: Stored) -> Iterator[Tensor]:
    """The numbers in fp32, some rows at a time."""
    rows = max(1, _AT_A_TIME // max(1, stored.numbers // stored.shape[0]))
    for places in torch.arange(stored.shape[0]).split(rows):
        yield stored.rows(places).dense(torch.float32)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
