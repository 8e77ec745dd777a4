"""CUDA graphs on a CPU: a recording is the list of the operations that ran, and replaying it computes
them again from what the recorded tensors hold by then, into the memory that they wrote.

As on a GPU, a replay knows nothing of tensors that have taken the place of recorded ones, Python does not
run again, and reading a number back spoils the recording.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixart.graphs import capture


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: list[Any]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        output = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, output))
        return output


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    cuda: ClassVar["FakeCuda"]

    def __init__(self) -> None:
        self.tape: list[Any] = []

    def spoil_outputs(self) -> None:
        """Recording computes nothing: until a replay, the memory that it writes holds anything."""
        for _, args, kwargs, output in self.tape:
            given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
            for tensor in _tensors(output):
                if tensor.untyped_storage().data_ptr() not in given and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    @torch.inference_mode()  # in which any tensor may be written to, as a GPU may
    def replay(self) -> None:
        assert self.tape, "it was reset"
        self.cuda.replayed += 1
        for func, args, kwargs, output in self.tape:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(output), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self.cuda.alive.remove(self)
        self.tape = []


class FakeCuda:
    """recorded, replayed: how often. alive: graphs that were not reset. stream: the current one."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.alive: list[Graph] = []
        self.stream = "main"

    @contextmanager
    def capture(
        self, graph: Graph, pool: Any, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        assert self.stream == str(stream) == "side" and pool is not None
        assert capture_error_mode == "thread_local"
        try:
            with _Recorder(graph.tape):
                yield
        except BaseException:
            self.stream = (
                "side, spoilt"  # as PyTorch leaves it, whose end of a recording fails then
            )
            raise RuntimeError("CUDA error: operation failed due to a previous error") from None
        graph.spoil_outputs()
        self.recorded += 1
        self.alive.append(graph)

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, str(stream)
        try:
            yield
        finally:
            self.stream = before


class _Stream:
    def __init__(self, name: str = "side") -> None:
        self.name = self.cuda_stream = name

    def __str__(self) -> str:
        return self.name

    def wait_stream(self, other: "_Stream") -> None:
        pass


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Let torch.cuda record what the CPU computes, from now on."""
    fake = FakeCuda()
    # A class, since libraries that are imported from now on annotate with it.
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (Graph,), {"cuda": fake}))
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(torch.cuda, "stream", fake.use)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: _Stream(fake.stream))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(capture, "_BENEATH", (*capture._BENEATH, __file__))
    return fake
