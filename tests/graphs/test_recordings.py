"""Recorded steps: they compute what plain ones do, and notice all that would make them compute something
else. The graphs are those of fake_cuda."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pixart.graphs.capture import GraphError
from pixart.graphs.recordings import MAX_GRAPHS, Recordings
from pixart.graphs.state import State


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda(monkeypatch)


class Scaled(nn.Linear):
    """A layer as LoRA's are: numbers of its own beside the weights."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.scaling = {"one": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scaling["one"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.GELU(), Scaled(), nn.Dropout(0.0))


def draw(recordings: Recordings, net: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return recordings(net, lambda moving, _: net(moving[0]), [x], **options)


def step_of(recordings: Recordings, net: nn.Module) -> Callable[[], None]:
    """A call that must give what the model gives."""

    def step() -> None:
        x = torch.randn(2, 4)
        with torch.no_grad():
            assert torch.equal(draw(recordings, net, x), net(x))

    return step


def test_the_second_call_is_recorded_and_later_ones_replayed(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    step = step_of(recordings, net)
    counts = []
    for _ in range(4):
        step()
        counts.append((cuda.recorded, cuda.replayed))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_outputs_stay_as_they_were_returned(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    outputs = [draw(recordings, net, torch.full((1, 4), float(k))) for k in range(4)]
    for k, output in enumerate(outputs):
        assert torch.equal(output, net(torch.full((1, 4), float(k)))) and not output.requires_grad


def _replace_layer(net: nn.Sequential) -> None:
    net[0] = nn.Linear(4, 4)


def _replace_weight(net: nn.Sequential) -> None:
    net[2].weight = nn.Parameter(torch.randn(4, 4))


def _assign(net: nn.Sequential) -> None:
    net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()}, assign=True)


def _assign_one(net: nn.Sequential) -> None:
    net.load_state_dict({"0.bias": torch.randn(4)}, assign=True, strict=False)


def _move(net: nn.Sequential) -> None:
    net[2].weight.data = torch.randn(4, 4)


def _drop_bias(net: nn.Sequential) -> None:
    net[0].bias = None


def _scale(net: nn.Sequential) -> None:
    net[2].scaling["one"] = 0.5


def _buffer(net: nn.Sequential) -> None:
    net[2].register_buffer("extra", torch.zeros(3))


def _train(net: nn.Sequential) -> None:
    net[3].train(not net[3].training)


def _wrap(net: nn.Sequential) -> None:
    forward = net[0].forward
    net[0].forward = lambda x: forward(x) + 1  # as offloading hooks do


def _activate(net: nn.Sequential) -> None:
    net[1] = nn.SiLU()


CHANGES = [
    _replace_layer, _replace_weight, _assign, _assign_one, _move, _drop_bias, _scale, _buffer, _train,
    _wrap, _activate,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_changed_model_is_recorded_anew(
    cuda: FakeCuda, change: Callable[[nn.Sequential], None]
) -> None:
    recordings, net = Recordings(), model()
    step = step_of(recordings, net)
    for _ in range(3):
        step()
    change(net)
    for _ in range(3):
        step()
    assert cuda.recorded == 2


def test_weights_that_are_written_in_place_are_read_where_they_lie(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    step = step_of(recordings, net)
    for _ in range(3):
        step()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    step()
    assert cuda.recorded == 1


def test_a_model_that_comes_back_is_replayed(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    step, first, second = step_of(recordings, net), net[0], nn.Linear(4, 4)
    for layer in (first, second, first, second, first):
        net[0] = layer
        step()
    assert (cuda.recorded, cuda.replayed) == (2, 3)


def test_what_a_subclass_of_tensors_is_made_of_counts() -> None:
    net = model()
    a, b = torch.randn(4, 4), torch.randn(4, 4)

    def key(*parts: Tensor) -> object:
        net[2].weight = nn.Parameter(TwoTensor(*parts), requires_grad=False)
        return State(net).key

    assert key(a, b) == key(a, b) != key(a, b.clone())


def test_shapes_dtypes_strides_modes_and_keys_have_recordings_of_their_own(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()

    def twice(x: Tensor, **options: Any) -> Tensor:
        return [draw(recordings, net, x, **options) for _ in range(2)][1]

    x = torch.randn(4, 4)
    for other in (x, x[:2], x.t(), x.unsqueeze(0)):
        assert torch.equal(twice(other), net(other))
    assert cuda.recorded == 4
    twice(x), twice(x, key="other")
    assert cuda.recorded == 5
    with torch.autocast("cpu", torch.bfloat16):
        assert twice(x).dtype == torch.bfloat16
    assert twice(x).dtype == torch.float32 and cuda.recorded == 6
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if precision != "medium" else "high")
        twice(x)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert cuda.recorded == 7


def test_the_oldest_are_forgotten_and_their_memory_is_given_back(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()

    def draw_rows(rows: int) -> None:
        for _ in range(2):
            draw(recordings, net, torch.randn(rows, 4))

    for rows in range(1, MAX_GRAPHS + 3):
        draw_rows(rows)
        draw_rows(1)  # used all the time
    assert len(recordings) == len(cuda.alive) == MAX_GRAPHS
    recorded = cuda.recorded
    draw_rows(1)
    assert cuda.recorded == recorded
    draw_rows(2)
    assert cuda.recorded == recorded + 1
    recordings.clear()
    assert not len(recordings) and not cuda.alive
    draw_rows(1)
    assert cuda.recorded == recorded + 2


def test_inputs_that_stay_are_copied_when_others_come(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    kept = [torch.randn(2, 4)]

    def step(steady: list[Tensor]) -> None:
        x = torch.randn(2, 4)
        got = recordings(net, lambda a, b: net(a[0] + b[0]), [x], steady)
        assert torch.equal(got, net(x + steady[0]))

    for steady in (kept, kept, [*kept], [kept[0].clone()], kept):
        step(steady)
    assert cuda.recorded == 1


def test_recorded_in_inference_mode_and_replayed_outside_of_it(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    step = step_of(recordings, net)
    with torch.inference_mode():
        step(), step()
    step()
    with torch.inference_mode():
        step()
    assert cuda.recorded == 1


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


class Full(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if _get_current_dispatch_mode() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")
        return x


class Breaks(Full):
    error: BaseException = ValueError("no\nway")

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except torch.OutOfMemoryError:
            raise self.error from None


class Moves(nn.Module):
    """As layer-wise casting does, with weights in other memory after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.old = self.weight.data  # held, or the next would come to lie there
        self.weight.data = self.weight.data.clone()
        return x * self.weight


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Reads(), r"forward \(test_recordings.py:\d+\) waits for the GPU"),
        (Full(), "the GPU's memory is full"),
        (Breaks(), r"forward \(test_recordings.py:\d+\) fails while it is recorded \(no way\)"),
        (Moves(), "the model changes its own weights or attributes at each call"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_recorded_is_said_in_one_line(
    cuda: FakeCuda, layer: nn.Module, reason: str
) -> None:
    recordings, net = Recordings(), model().append(layer)
    x = torch.randn(2, 4)
    expected = net(x)
    assert torch.equal(draw(recordings, net, x), expected)
    line = f"^the denoising step .*{reason}.*; use cuda_graph=False$"
    with pytest.raises(GraphError, match=line) as error:
        draw(recordings, net, x)
    assert "\n" not in str(error.value)
    assert cuda.stream == "main", "the stream of the recording must not stay current"
    assert not len(recordings) and not cuda.alive
    del net[-1]
    step = step_of(recordings, net)
    step(), step()
    assert cuda.replayed == 1


def test_an_interruption_while_recording_is_one(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model().append(layer := Breaks())
    layer.error = KeyboardInterrupt()
    draw(recordings, net, torch.randn(2, 4))
    with pytest.raises(KeyboardInterrupt):
        draw(recordings, net, torch.randn(2, 4))


def test_hooks_which_a_replay_would_not_call_are_refused_by_name(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    handle = net[2].register_forward_hook(lambda *_: None)
    with pytest.raises(GraphError, match="cannot be a CUDA graph: 2 has a forward hook"):
        draw(recordings, net, torch.randn(2, 4))
    handle.remove()
    handle = net.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(GraphError, match="the model has a forward hook"):
        draw(recordings, net, torch.randn(2, 4))
    draw(recordings, net, torch.randn(2, 4), outside=True)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(GraphError, match="every module has a forward hook"):
            draw(recordings, net, torch.randn(2, 4))
    finally:
        handle.remove()
    draw(recordings, net, torch.randn(2, 4))


def test_weights_elsewhere_are_refused(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    net[2].weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    net[2].forward = lambda x: x  # type: ignore[method-assign]  # as offloading does
    draw(recordings, net, torch.randn(2, 4))
    with pytest.raises(GraphError, match="must be on one device, got cpu and meta"):
        draw(recordings, net, torch.randn(2, 4))


def test_threads_take_turns(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    failed: list[BaseException] = []

    def work(rows: int) -> None:
        try:
            for k in range(20):
                x = torch.full((rows, 4), float(k))
                with torch.no_grad():
                    assert torch.equal(draw(recordings, net, x), net(x))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(2,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and cuda.recorded == 1


def test_a_copy_takes_no_recordings(cuda: FakeCuda) -> None:
    recordings, net = Recordings(), model()
    for _ in range(2):
        draw(recordings, net, torch.randn(2, 4))
    assert not len(copy.deepcopy(recordings)) and len(recordings) == 1
