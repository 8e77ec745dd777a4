"""A denoising step recorded once per size and replayed."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pixart.model.blocks import EncodedCaption
from pixart.model.transformer import PixArt

MAX_GRAPHS = 8
_WARM_UP = 2  # calls before recording: kernels are tuned, and libraries take their workspaces


@dataclass
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], object]
    output: Tensor
    caption: EncodedCaption | None = None  # whose keys and values the inputs hold
    held: list[Tensor] = field(default_factory=list)  # read by the recording, owned by nobody else


class CudaGraphs:
    """Denoising steps recorded as CUDA graphs, one for each combination of input sizes.

    A step of XL/2 is some 400 launches; up to 512 px a GPU is done with each before the CPU has
    sent the next. Recordings live as long as this object, in one memory pool, the last 8 of them.
    """

    def __init__(self) -> None:
        self._recordings: OrderedDict[object, _Recording] = OrderedDict()
        self._pools: dict[torch.device, Any] = {}

    @torch.no_grad()
    def __call__(
        self,
        transformer: PixArt,
        latents: Tensor,
        timesteps: Tensor,
        caption: EncodedCaption,
        sizes: tuple[Tensor, ...],
    ) -> Tensor:
        """The transformer's prediction, as a tensor that later calls leave alone."""
        with _current(latents.device):
            return self._replay(transformer, latents, timesteps, caption, sizes)

    def _replay(
        self,
        transformer: PixArt,
        latents: Tensor,
        timesteps: Tensor,
        caption: EncodedCaption,
        sizes: tuple[Tensor, ...],
    ) -> Tensor:
        moving, steady = [latents, timesteps, *sizes], caption.tensors
        # A model that was moved or replaced has its weights elsewhere.
        weights = transformer.x_embedder.proj.weight.data_ptr()
        inputs = [(tensor.shape, tensor.dtype) for tensor in (*moving, *steady)]
        key = (latents.device, id(transformer), weights, caption.lengths is None, *inputs)
        if key not in self._recordings:
            self._recordings[key] = self._record(transformer, moving, caption)
            if len(self._recordings) > MAX_GRAPHS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        torch._foreach_copy_(recording.inputs[: len(moving)], moving)
        # By identity: comparing the contents would wait for the GPU.
        if recording.caption is not caption:
            torch._foreach_copy_(recording.inputs[len(moving) :], steady)
            recording.caption = caption
        recording.replay()
        # The next replay writes to the same memory.
        return recording.output.clone()

    def _record(
        self, transformer: PixArt, moving: list[Tensor], caption: EncodedCaption
    ) -> _Recording:
        # Copies: a recording reads these addresses for as long as it lives.
        latents, timesteps, *sizes = (tensor.clone() for tensor in moving)
        own = caption.clone()

        def step() -> Tensor:
            return transformer(latents, timesteps, own, None, *sizes)

        replay, output = self._capture(step)
        # The model forgets position tables when it has met many grids; the recording reads them.
        held = list(transformer.position_tables.tables.values())
        return _Recording([latents, timesteps, *sizes, *own.tensors], replay, output, held=held)

    def _capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        device = stream.device
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pools[device], stream=stream):
            output = step()
        return graph.replay, output


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Streams and graphs are those of the current device, which need not be the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
