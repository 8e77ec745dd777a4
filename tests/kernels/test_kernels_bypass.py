"""The door past PyTorch's dispatcher: what may take it, and what must be seen by the dispatcher.

In Triton's interpreter, where CPU tensors have kernels. A call that goes the long way is noticed where
it enters the registered operator, or the reference that stands for it under transforms.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_kernels import flash_attention, flash_attention_reference
from pixart_kernels.attention import operator
from pixart_kernels.dispatch.registration import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter: TRITON_INTERPRET=1")

DOORS = {"forward": operator._attention, "backward": operator._attention_backward}
_generator = torch.Generator().manual_seed(0)
Q, K, V = torch.randn(3, 2, 8, 2, 16, generator=_generator).unbind(0)
OUT = flash_attention_reference(Q, K, V)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The doors that calls went round, in order; what is traced by a compiler is not called."""
    found: list[str] = []

    def spied(name: str, long_way: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if not torch.compiler.is_compiling():
                found.append(name)
            return long_way(*arguments)

        return call

    for name, door in DOORS.items():
        monkeypatch.setattr(door, "long_way", spied(name, door.long_way))
    return found


def same(actual: Tensor, expected: Tensor = OUT, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-3)


def gradients(attention: Attention) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    out = attention(*leaves)
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))


def same_gradients(attention: Attention, reference: Attention = flash_attention_reference) -> None:
    for actual, expected in zip(gradients(attention), gradients(reference), strict=True):
        same(actual, expected, 2e-3)


# What nobody but the kernels sees.


def without_gradients() -> None:
    with torch.no_grad():
        same(flash_attention(Q, K, V))


def inference_mode() -> None:
    with torch.inference_mode():
        out = flash_attention(Q.clone(), K.clone(), V.clone())
        assert out.is_inference()
        same(out)


def autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        same(flash_attention(Q, K, V))


def forward_and_backward() -> None:
    same_gradients(flash_attention)


def checkpointing() -> None:
    checkpoint = torch.utils.checkpoint.checkpoint
    same_gradients(lambda *x: checkpoint(flash_attention, *x, use_reentrant=False))


def saved_tensors_hooks() -> None:
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        same_gradients(flash_attention)
    assert len(packed) >= 5  # q, k, v, out and lse; the reference's as well


def parameters() -> None:
    with torch.no_grad():
        same(flash_attention(*(torch.nn.Parameter(x) for x in (Q, K, V))))


def an_address_that_16_does_not_divide() -> None:
    moved = torch.cat([torch.zeros(1), Q.flatten()])[1:].view(Q.shape)
    assert moved.data_ptr() % 16
    same(flash_attention(moved, K, V))


def a_default_device() -> None:
    torch.set_default_device("cpu")  # leaves a mode on for good
    try:
        same(flash_attention(Q, K, V))
    finally:
        torch.set_default_device(None)


def inside_of_a_device() -> None:
    with torch.device("meta"):  # of new tensors, which these are not
        same(flash_attention(Q, K, V))


def wrong_shapes_before_and_after_right_ones() -> None:
    for call in (flash_attention, flash_attention):
        with pytest.raises(ValueError, match="v must have the shape of k"):
            call(Q, K, V[:, :4])
        same(flash_attention(Q, K, V))


DIRECT = [
    without_gradients,
    inference_mode,
    autocast,
    forward_and_backward,
    checkpointing,
    saved_tensors_hooks,
    parameters,
    an_address_that_16_does_not_divide,
    a_default_device,
    inside_of_a_device,
    wrong_shapes_before_and_after_right_ones,
]


@pytest.mark.parametrize("context", DIRECT, ids=lambda context: context.__name__)
def test_nothing_observes_and_the_call_is_direct(
    context: Callable[[], None], seen: list[str]
) -> None:
    context()
    assert seen == []


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        return [name.removesuffix(".default") for name in self.names if "pixart" in name]


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda *x: flash_attention(*x))(Q, K, V).graph
    assert any("pixart" in str(node.target) for node in graph.nodes)


def jit_trace() -> None:
    traced = torch.jit.trace(lambda *x: flash_attention(*x), (Q, K, V), check_trace=False)
    assert "pixart" in str(traced.graph)
    same(traced(2 * Q, K, V), flash_attention_reference(2 * Q, K, V))


def vmap() -> None:
    stacked = [torch.stack([x, -x]) for x in (Q, K, V)]
    out = torch.func.vmap(flash_attention)(*stacked)
    same(out[0])
    same(out[1], flash_attention_reference(-Q, -K, -V))


def functional_gradient() -> None:
    def total(attention: Attention) -> Tensor:
        return torch.func.grad(lambda q: attention(q, K, V).sum())(Q)

    same(total(flash_attention), total(flash_attention_reference))


def functionalize() -> None:
    same(torch.func.functionalize(lambda *x: flash_attention(*x))(Q, K, V))


def a_dispatch_mode() -> None:
    with _Log() as log, torch.no_grad():
        same(flash_attention(Q, K, V))
    assert log.ours() == ["pixart.flash_attention"]


def a_dispatch_mode_and_backward() -> None:
    with _Log() as log:
        gradients(flash_attention)
    assert log.ours() == ["pixart.flash_attention", "pixart.flash_attention_backward"]


def a_dispatch_mode_round_the_backward_alone() -> None:
    q = Q.clone().requires_grad_()
    out = flash_attention(q, K, V).sum()
    with _Log() as log:
        out.backward()
    assert log.ours() == ["pixart.flash_attention_backward"]


def a_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    formula: Any = {torch.ops.pixart.flash_attention: lambda *args, **kwargs: 7}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        flash_attention(Q, K, V)
    assert counter.get_total_flops() == 7


def fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) for x in (Q, K, V)]
    for inside in (mode, contextlib.nullcontext()):
        with inside:
            out = flash_attention(*fake)
        assert isinstance(out, FakeTensor) and out.shape == Q.shape


def meta_tensors() -> None:
    out = flash_attention(*(x.to("meta") for x in (Q, K, V)))
    assert out.is_meta and out.shape == Q.shape


def a_function_mode() -> None:
    with _Functions() as functions:
        same(flash_attention(Q, K, V))
    assert any("flash_attention" in name for name in functions.names)


def a_subclass() -> None:
    out = flash_attention(*(x.as_subclass(_Subclass) for x in (Q, K, V)))
    assert type(out) is _Subclass
    same(out.as_subclass(Tensor))


def forward_mode() -> None:
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(attention(forward_ad.make_dual(Q, K), K, V)).tangent
            for attention in (flash_attention, flash_attention_reference)
        ]
    same(tangents[0], tangents[1])
    assert tangents[0].abs().max() > 0


def a_profiler() -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        flash_attention(Q, K, V)
    assert any("pixart::flash_attention" in event.key for event in found.key_averages())


def a_negative_bit() -> None:
    negative = torch._neg_view(Q)
    assert negative.is_neg()
    same(flash_attention(negative, K, V), flash_attention_reference(-Q, K, V))


OBSERVED = [
    make_fx,
    jit_trace,
    vmap,
    functional_gradient,
    functionalize,
    a_dispatch_mode,
    a_dispatch_mode_and_backward,
    a_dispatch_mode_round_the_backward_alone,
    a_flop_counter,
    fake_tensors,
    meta_tensors,
    a_function_mode,
    a_subclass,
    forward_mode,
    a_profiler,
    a_negative_bit,
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("context", OBSERVED, ids=lambda context: context.__name__)
def test_what_is_observed_goes_the_long_way(context: Callable[[], None], seen: list[str]) -> None:
    context()
    assert seen


def test_a_mode_round_the_backward_leaves_the_forward_direct(seen: list[str]) -> None:
    a_dispatch_mode_round_the_backward_alone()
    assert seen == ["backward"]


@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=["static", "dynamic"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_compiled_graph_holds_the_operator(options: Any, with_gradients: bool) -> None:
    held: list[str] = []

    def backend(module: Any, _: Any) -> Any:
        held.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    run = torch.compile(
        lambda q, k, v: 2 * flash_attention(q, k, v), fullgraph=True, backend=backend, **options
    )
    if with_gradients:
        same_gradients(run, lambda *x: 2 * flash_attention_reference(*x))
    else:
        same(run(Q, K, V), 2 * OUT)
    assert any("pixart.flash_attention" in name for name in held)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_the_operator(strict: bool) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attention(q, k, v)

    torch._dynamo.reset()
    program = torch.export.export(Attend(), (Q, K, V), strict=strict)
    assert any("pixart" in str(node.target) for node in program.graph.nodes)
    same(program.module()(Q, K, V))


def test_a_second_derivative_is_refused() -> None:
    q = Q.clone().requires_grad_()
    (first,) = torch.autograd.grad(flash_attention(q, K, V).square().sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="twice|second derivatives"):
        first.sum().backward()


def test_another_setting_of_tf32_is_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attention(Q, K, V)
    kept = len(DOORS["forward"].kept)
    flash_attention(Q, K, V)
    assert len(DOORS["forward"].kept) == kept
    monkeypatch.setattr("pixart_kernels.dispatch.launch.precision", lambda dtype: "tf32")
    flash_attention(Q, K, V)
    assert len(DOORS["forward"].kept) == kept + 1


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_tensors_are_refused_by_pytorch(process_group: None, seen: list[str]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    spread = [distribute_tensor(x, mesh, [Replicate()]) for x in (Q, K, V)]
    with pytest.raises(NotImplementedError, match="sharding strategy"):
        flash_attention(*spread)
    assert seen == ["forward"]


class _Layer(torch.nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.linear = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(*self.linear(x).unflatten(-1, (3, 2, 16)).unbind(2))


def test_fully_sharded_layers_train_directly(process_group: None, seen: list[str]) -> None:
    from torch.distributed.fsdp import fully_shard

    ours, plain = _Layer(flash_attention), _Layer(flash_attention_reference)
    plain.load_state_dict(ours.state_dict())
    fully_shard(ours)
    x = Q.flatten(2)
    for layer in (ours, plain):
        layer(x).square().sum().backward()
    grad: Any = ours.linear.weight.grad
    assert plain.linear.weight.grad is not None and seen == []
    same(grad.full_tensor(), plain.linear.weight.grad, 2e-3)
