"""T5's features with its weights in memory, or streamed: read from the disk block by block, for all prompts of a
pass at once.

Streamed, the weights stay in mapped files. A block's bytes are copied into one of two buffers on the device, as
they are stored; while a GPU computes with one, the next block travels into the other on a stream of its own. The
buffers live as long as the network, and events order copies and products: nothing is ever handed back to
PyTorch's allocator while a copy is under way. A CPU runs the same code with one buffer, without streams.

Either way a block is made dense when it is needed (`Stored.dense`), and computed by the same function on each
prompt alone: features have the same bits, whatever the memory and whoever shares the pass.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pixart.device import free_memory, has_bf16_products
from pixart.text.stored import EMBEDDING, Stored, Weights
from pixart.text.t5 import BIAS, FINAL_NORM, WO, T5Shape, block_name, norm, position_bias, run_block
from pixart.weights import check_finite

Memory = Literal["resident", "stream"]
# The tokens of a prompt, and how many at the end are masked padding.
Ids = tuple[Sequence[int], int]
_ALIGNED = 512  # bytes, as PyTorch's allocator has it: libraries choose their kernels by it too
_SPARE = 2**30  # bytes that stay free beside a T5 that is kept in memory
# Tokens of a pass: of T5-XXL in fp32 the stream takes 16 KiB for each. A GPU computes with so many in the time
# that the weights need; a CPU reads them from its page cache, and sooner shows that it gets on.
_TOKENS = {"cuda": 16384}
_TOKENS_ELSEWHERE = 2048

logger = logging.getLogger("pixart")


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of T5's products: its weights', but for bf16 on a CPU without such products, which computes
    them in fp32, each block's weights widened when it is needed: see `has_bf16_products`."""
    is_slow = dtype == torch.bfloat16 and not has_bf16_products(device)
    return torch.float32 if is_slow else dtype


def tokens_of_pass(device: torch.device) -> int:
    """Of all prompts that go through the blocks together."""
    return _TOKENS.get(device.type, _TOKENS_ELSEWHERE)


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device that T5's weights take, without activations: `resident`, all of them as they are
    held there, and `stream`. For whoever plans memory; nothing is read for it but headers."""

    resident: int
    stream: int

    @classmethod
    def of(
        cls, weights: Weights, shape: T5Shape, dtype: torch.dtype, device: torch.device
    ) -> "Footprint":
        computed = computed_in(dtype, device)
        blocks = [_of_block(weights, shape, layer) for layer in range(shape.layers)]
        largest = max(blocks, key=lambda block: sum(one.bytes for one in block.values()))
        held = sum(_held_bytes(one, name, dtype) for name, one in weights.tensors.items())
        # What is not stored as it is computed with is made dense beside its bytes.
        dense = sum(
            one.numbers * _dtype_of(name, computed).itemsize
            for name, one in largest.items()
            if not (one.is_plain and one.parts[0].dtype == _dtype_of(name, computed))
        )
        kept = sum(
            one.numbers * _dtype_of(name, computed).itemsize
            for name, one in largest.items()
            if not (one.is_plain and _dtype_of(name, dtype) == _dtype_of(name, computed))
        )
        buffers = _slots(device) * _Slot.size_of(largest)
        return cls(held + kept, buffers + dense)


def choose_memory(
    wanted: str,
    weights: Weights,
    footprint: Footprint,
    device: torch.device,
    free: int | None = None,
) -> Memory:
    """ "auto" is resident where the weights fit what is free, with a GiB to spare, and streamed elsewhere. What
    no file is mapped for is resident. free: bytes, None for those that are free now.
    ValueError where that was to be streamed."""
    if not weights.is_mapped:
        if wanted == "stream":
            raise ValueError(
                "text-encoder-memory must be resident for PyTorch files of before version 1.6, which cannot be "
                "mapped, got stream: write them again with python -m pixart.convert --text-encoder"
            )
        return "resident"
    if wanted != "auto":
        return "stream" if wanted == "stream" else "resident"
    found = free_memory(device) if free is None else free
    if footprint.resident + _SPARE <= found:
        return "resident"
    if free is None:  # who asks for other bytes only plans
        logger.info(
            "T5 takes %.1f GiB, and %.1f are free: it is streamed",
            footprint.resident / 2**30,
            found / 2**30,
        )
    return "stream"


class T5Network:
    """An encoder: prompts in, features out. slots: buffers of the stream; None for as many as the device can
    use."""

    def __init__(
        self,
        weights: Weights,
        shape: T5Shape,
        dtype: torch.dtype,
        device: torch.device,
        memory: Memory,
        where: str,
        slots: int | None = None,
    ) -> None:
        self.shape, self.dtype, self.device, self.memory = shape, dtype, device, memory
        self.vocabulary = shape.vocabulary
        self._computed, self._where = computed_in(dtype, device), where
        tensors = weights.tensors
        if memory == "resident":
            tensors = {
                name: one.to(device, _dtype_of(name, dtype)) for name, one in tensors.items()
            }
        self._blocks = [
            _of_block(Weights(tensors, True), shape, layer) for layer in range(shape.layers)
        ]
        self._embedding = tensors[EMBEDDING]
        self._bias, self._final = (
            self._dense(name, tensors[name].to(device, dtype)) for name in (BIAS, FINAL_NORM)
        )
        self._buffers: _Buffers | None = None
        if memory == "stream":
            self._buffers = _Buffers(
                self._blocks, device, _slots(device) if slots is None else slots
            )
        self._is_checked = False
        self._check_finite_rows()

    @property
    def has_passes(self) -> bool:
        """Whether blocks are read or unpacked for each pass, so that prompts had better share it."""
        plain = all(one.is_plain for block in self._blocks for one in block.values())
        return self.memory == "stream" or not plain or self._computed != self.dtype

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Ids]) -> list[Tensor]:
        """Features (L, width) of each prompt, on the device and in the dtype of the weights. NotFiniteError for
        weights that are not finite."""
        # The shortest first, so that one position bias at a time is kept.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i][0]), prompts[i][1]))
        streams = {i: self._embedded(prompts[i][0]) for i in order}
        for layer, weights in enumerate(self._dense_blocks()):
            if not self._is_checked:
                names = {block_name(layer, name): one for name, one in weights.items()}
                check_finite(names, self._where)
            known: tuple[int, int] | None = None
            for i in order:
                ids, padding = prompts[i]
                if known != (len(ids), padding):
                    known = (len(ids), padding)
                    bias = position_bias(self._bias, len(ids), padding, self.shape)
                streams[i] = run_block(streams[i], weights, bias, self.shape)
        self._is_checked = True
        return [
            norm(streams[i], self._final, self.shape)[0].to(self.dtype) for i in range(len(prompts))
        ]

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """(1, L, width). Of a mapped table only the rows that are needed are read."""
        table = self._embedding
        rows = table.rows(torch.tensor(ids, device=table.parts[0].device))
        return self._dense(EMBEDDING, rows).to(self.device)[None]

    def _dense(self, name: str, stored: Stored) -> Tensor:
        """Rounded to the weights' dtype first, so that fp32 products of bf16 weights are just that."""
        return stored.dense(_dtype_of(name, self.dtype)).to(_dtype_of(name, self._computed))

    def _dense_blocks(self) -> Iterator[dict[str, Tensor]]:
        blocks = self._buffers.filled() if self._buffers else iter(self._blocks)
        for block in blocks:
            yield {name: self._dense(name, stored) for name, stored in block.items()}

    def _check_finite_rows(self) -> None:
        """Of the embedding, and of what every pass uses: a piece at a time, as they may lie on the disk."""
        check_finite({BIAS: self._bias, FINAL_NORM: self._final}, self._where)
        if self._embedding.form != "plain":
            places = torch.arange(self.shape.vocabulary, device=self._embedding.parts[0].device)
            for some in places.split(2048):
                check_finite(
                    {EMBEDDING: self._embedding.rows(some).dense(torch.float32)}, self._where
                )
        else:
            check_finite({EMBEDDING: self._embedding.parts[0]}, self._where)


def _of_block(weights: Weights, shape: T5Shape, layer: int) -> dict[str, Stored]:
    return {name: weights.tensors[block_name(layer, name)] for name in shape.block}


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 and name.endswith(WO) else dtype


def _held_bytes(stored: Stored, name: str, dtype: torch.dtype) -> int:
    return stored.numbers * _dtype_of(name, dtype).itemsize if stored.is_plain else stored.bytes


def _slots(device: torch.device) -> int:
    return 2 if device.type == "cuda" else 1


class _Slot:
    """A buffer of one block on the device; on CUDA with one of pinned memory, as only from there copies run
    beside products."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()
            # Products that were started before may still use the memory that the buffer was given.
            self.used.record(torch.cuda.current_stream(device))

    @staticmethod
    def size_of(block: Mapping[str, Stored]) -> int:
        return sum(_padded(part.nbytes) for one in block.values() for part in one.parts)

    def fill(
        self, block: Mapping[str, Stored], side: "torch.cuda.Stream | None"
    ) -> dict[str, Stored]:
        """Copy a block's bytes; returns what it holds, in this buffer."""
        if side is not None:
            self.copied.synchronize()  # what was in the pinned memory has left it
        target = self.pinned if side is not None else self.bytes
        held, start = {}, 0
        for name, one in block.items():
            parts = []
            for part in one.parts:
                end = start + part.nbytes
                _view(target[start:end], part).copy_(part)
                parts.append(_view(self.bytes[start:end], part))
                start += _padded(part.nbytes)
            held[name] = Stored(tuple(parts), one.shape, one.form)
        if side is not None:
            with torch.cuda.stream(side):
                side.wait_event(self.used)  # the block that was here is computed
                self.bytes[:start].copy_(self.pinned[:start], non_blocking=True)
                self.copied.record(side)
        return held


def _padded(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def _view(piece: Tensor, like: Tensor) -> Tensor:
    return piece.view(like.dtype).view(like.shape)


class _Buffers:
    """The blocks in turn, each in the slot after that of the one before."""

    def __init__(
        self, blocks: Sequence[Mapping[str, Stored]], device: torch.device, slots: int
    ) -> None:
        self._blocks, self._device = blocks, device
        size = max(map(_Slot.size_of, blocks))
        self._slots = [_Slot(size, device) for _ in range(slots)]
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def filled(self) -> Iterator[dict[str, Stored]]:
        """What is yielded holds until the next is asked for. By then its products are under way on a GPU, and
        the host reads the next block meanwhile."""
        if self._side is None:
            for layer in range(len(self._blocks)):
                yield self._fill(layer)[1]
            return
        current = torch.cuda.current_stream(self._device)
        try:
            for layer in range(len(self._blocks)):
                slot, held = self._fill(layer)
                current.wait_event(slot.copied)
                yield held
                slot.used.record(current)
        finally:
            # A pass that was broken off has copies under way into memory that may be freed next.
            current.wait_stream(self._side)

    def _fill(self, layer: int) -> tuple[_Slot, dict[str, Stored]]:
        slot = self._slots[layer % len(self._slots)]
        return slot, slot.fill(self._blocks[layer], self._side)
