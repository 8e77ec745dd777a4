"""The last recordings of a model's calls, found by all that they depend on."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pixart.graphs.capture import FULL, GraphError, capture
from pixart.graphs.state import State

MAX_GRAPHS = 8
_MAX_MET = 256  # keys of calls that were made once

Step = Callable[[list[Tensor], list[Tensor]], Any]


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    moving: list[Tensor]
    steady: list[Tensor]
    output: Any
    held: list[object]  # what the graph reads and nobody else owns, and what its key names
    # What `steady` is a copy of: not held, for a picture's caption is large.
    sources: list["weakref.ref[Tensor]"] = field(default_factory=list)

    def replay(self, moving: list[Tensor], steady: list[Tensor]) -> Any:
        """The output for these inputs, as tensors that later replays leave alone."""
        torch._foreach_copy_(self.moving, moving)
        # By identity: comparing the contents would wait for the GPU.
        known = [source() for source in self.sources]
        if len(known) != len(steady) or any(a is not b for a, b in zip(known, steady, strict=True)):
            torch._foreach_copy_(self.steady, steady)
            self.sources = [weakref.ref(each) for each in steady]
        self.graph.replay()
        return pytree.tree_map(_copy, self.output)


class Recordings:
    """Calls recorded as CUDA graphs, one for each combination of inputs and of the model's state.

    A call with a key of its own is made plainly, the second one is recorded, and from then on it is
    replayed: what is drawn in one step is never recorded. The last 8 recordings are kept; memory of the
    others is given back. One memory pool for each stream, which replays one after the other. Threads may
    share an object: they take turns.
    """

    def __init__(self) -> None:
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._pools: dict[Hashable, Any] = {}
        self._turn = threading.Lock()

    def __reduce__(self) -> tuple[type["Recordings"], tuple[()]]:
        return type(self), ()  # a copied or pickled model takes no recordings

    def __len__(self) -> int:
        return len(self._recordings)

    def __call__(
        self,
        model: nn.Module,
        step: Step,
        moving: Sequence[Tensor],
        steady: Sequence[Tensor] = (),
        *,
        key: Hashable = (),
        outside: bool = False,
        holds: Callable[[], Sequence[object]] = list,
    ) -> Any:
        """step(moving, steady), by the model, without gradients.

        step: a function of these tensors, of the model and of what `key` says, which returns tensors in
        any containers. moving, steady: on one CUDA device; the latter are taken to be what they were as
        long as they are the same objects. outside: of State. holds: what the step reads beside all of
        them, asked after recording. Raises GraphError.
        """
        moving, steady = list(moving), list(steady)
        with self._turn, torch.no_grad(), _current(moving[0].device):
            stream = _stream_of(moving[0].device)
            state = State(model, outside=outside)
            shapes = [(each.device, each.dtype, each.shape, each.stride()) for each in moving]
            shapes += [(each.device, each.dtype, each.shape, each.stride()) for each in steady]
            called = (stream, key, *shapes, *_modes(moving[0].device))
            wanted = (called, state.key)
            recording = self._recordings.get(wanted)
            if recording is None:
                if wanted not in self._met:
                    output = step(moving, steady)
                    # A first call may make what the model keeps for later ones.
                    self._remember((called, State(model, outside=outside).key))
                    return output
                recording = self._record(model, step, moving, steady, state, stream, outside)
                recording.held += holds()
                self._recordings[wanted] = recording
                while len(self._recordings) > MAX_GRAPHS:
                    self._drop(next(iter(self._recordings)))
            self._recordings.move_to_end(wanted)
            return recording.replay(moving, steady)

    def clear(self) -> None:
        """Give all recordings' memory back."""
        with self._turn:
            for key in list(self._recordings):
                self._drop(key)
            self._pools.clear()

    def _record(
        self,
        model: nn.Module,
        step: Step,
        moving: list[Tensor],
        steady: list[Tensor],
        state: State,
        stream: Hashable,
        outside: bool,
    ) -> _Recording:
        _check_devices(model, [*moving, *steady])

        def check() -> None:
            if State(model, outside=outside).key != state.key:
                raise GraphError(
                    "the model changes its own weights or attributes at each call, as offloading does"
                )

        try:
            # Copies: a recording reads these addresses for as long as it lives. No inference tensors,
            # which could not be written to outside of that mode.
            with torch.inference_mode(False):
                own = [each.clone() for each in moving], [each.clone() for each in steady]
            if stream not in self._pools:
                # A stream of its own too, kept: libraries keep a workspace for each that they meet.
                self._pools[stream] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            pool, side = self._pools[stream]
            graph, output = capture(lambda: step(*own), pool, side, check)
        except GraphError:
            self._pools.pop(stream, None)  # a spoilt recording may leave its pool unusable
            raise
        except torch.OutOfMemoryError as error:
            raise GraphError(FULL) from error
        return _Recording(graph, *own, output, state.held)

    def _remember(self, key: Hashable) -> None:
        self._met[key] = None
        if len(self._met) > _MAX_MET:
            self._met.popitem(last=False)

    def _drop(self, key: Hashable) -> None:
        self._recordings.pop(key).graph.reset()


def _check_devices(model: nn.Module, inputs: list[Tensor]) -> None:
    """Of weights that are fetched for each call, and of numbers that a recording would keep as they are."""
    places = {each.device for each in (*model.parameters(), *model.buffers(), *inputs)}
    if len(places) > 1:
        names = " and ".join(sorted(map(str, places)))
        raise GraphError(f"weights and inputs must be on one device, got {names}")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _modes(device: torch.device) -> tuple[Hashable, ...]:
    """What PyTorch computes by, beside the inputs."""
    kind, matmul = device.type, torch.backends.cuda.matmul
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        # Not get_float32_matmul_precision, which refuses where the newer setting is in use.
        getattr(matmul, "fp32_precision", None) or matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Streams and graphs are those of the current device, which need not be the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream_of(device: torch.device) -> Hashable:
    return (device, torch.cuda.current_stream().cuda_stream)
