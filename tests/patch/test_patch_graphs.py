"""accelerate(..., cuda_graph=True): forwards of diffusers' model replayed; the graphs are fake_cuda's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_model import TOLERANCE, diffusers_model, masks, run
from diffusers_model import kernels_can_run as kernels_can_run  # a fixture
from fake_cuda import FakeCuda, fake_cuda
from small_model import inputs, relative_error
from torch import Tensor, nn

import pixart.patch
from pixart.graphs.capture import GraphError
from pixart.graphs.forward import GraphedForward
from pixart.patch import accelerate, restore


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr("pixart.graphs.forward.check_cuda_graph", lambda *_: None)
    return fake_cuda(monkeypatch)


@torch.no_grad()
def draw(model: Any, mask: Tensor | None = None, **changes: Any) -> Tensor:
    return run(model, mask, **changes)


@pytest.mark.parametrize("micro_condition", [False, True])
def test_replays_compute_what_diffusers_does_whatever_comes_between(
    cuda: FakeCuda, micro_condition: bool
) -> None:
    model, plain = diffusers_model(micro_condition), diffusers_model(micro_condition)
    accelerate(model, cuda_graph=True)
    latents, _, caption = inputs()
    for k in range(3):
        for name in ("prefix", "scattered", "no mask", "bias"):
            given = {"hidden_states": latents + k, "encoder_hidden_states": caption - k}
            given["timestep"] = torch.tensor([900, 20 + k])
            got = draw(model, masks()[name], **given)
            assert relative_error(got, draw(plain, masks()[name], **given)) < TOLERANCE
    # The masks are packed before, and differ in their dtypes.
    assert (cuda.recorded, cuda.replayed) == (4, 8)


def test_both_kinds_of_output_are_returned(cuda: FakeCuda) -> None:
    model = accelerate(diffusers_model(), cuda_graph=True)
    for _ in range(3):
        with torch.no_grad():
            named = run(model)
            as_object = draw_object(model)
        assert torch.equal(named, as_object)
    assert cuda.recorded == 2


def draw_object(model: Any) -> Tensor:
    latents, timesteps, caption = inputs()
    conditions = {"resolution": None, "aspect_ratio": None}
    return model(latents, caption, timesteps, conditions).sample


def _swap_layer(model: Any) -> None:
    model.transformer_blocks[1].ff.net[2] = nn.Linear(576, 144)


def _swap_processor(model: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())


def _add_lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("change", [_swap_layer, _swap_processor, _add_lora])
def test_changes_of_the_model_are_noticed(cuda: FakeCuda, change: Callable[[Any], None]) -> None:
    model = accelerate(diffusers_model(), cuda_graph=True)
    before = [draw(model) for _ in range(3)][-1]
    change(model)
    after = [draw(model) for _ in range(3)]
    plain = restore(model)
    expected = draw(plain)
    assert all(relative_error(each, expected) < TOLERANCE for each in after)
    if change is not _swap_processor:
        assert relative_error(before, expected) > 1e-3
    assert cuda.recorded == 2


def test_adapters_that_are_weighed_and_taken_off_are_noticed(cuda: FakeCuda) -> None:
    model, plain = accelerate(diffusers_model(), cuda_graph=True), diffusers_model()
    changes: list[Callable[[Any], object]] = [
        lambda layer: layer.set_scale("default", 1.0),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.set_scale("default", 0.25),
    ]
    torch.manual_seed(0)
    _add_lora(model)
    torch.manual_seed(0)
    _add_lora(plain)
    outputs = []
    for change in changes:
        for each in (model, plain):
            for layer in each.modules():
                if hasattr(layer, "set_scale"):
                    change(layer)
        expected = draw(plain)
        outputs += [draw(model) for _ in range(3)]
        assert all(relative_error(got, expected) < TOLERANCE for got in outputs[-3:])
    assert relative_error(outputs[3], outputs[0]) > 1e-3 < relative_error(outputs[9], outputs[0])
    assert cuda.recorded == 3, "what was switched off and on again is replayed"


def test_calls_that_record_gradients_are_plain_ones(cuda: FakeCuda) -> None:
    model = accelerate(diffusers_model(), cuda_graph=True)
    for _ in range(3):
        run(model).sum().backward()
    assert cuda.recorded == 0 and all(p.grad is not None for p in model.parameters())


def test_hooks_of_the_model_run_at_each_call_and_those_inside_are_refused(cuda: FakeCuda) -> None:
    model, calls = accelerate(diffusers_model(), cuda_graph=True), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        draw(model)
    assert len(calls) == 3 and cuda.replayed == 2
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(GraphError, match=r"transformer_blocks\.1 has a forward hook"):
        draw(model)


def test_restore_takes_the_graphs_off(cuda: FakeCuda) -> None:
    model = diffusers_model()
    expected = draw(model)
    for _ in range(2):
        accelerate(model, cuda_graph=True)
        draw(model), draw(model)
        assert len(cuda.alive) == 1
        assert restore(model) is model and not cuda.alive
        assert "forward" not in vars(model) and torch.equal(draw(model), expected)


def test_restore_says_when_the_forward_is_somebody_elses(cuda: FakeCuda) -> None:
    model = accelerate(diffusers_model(), cuda_graph=True)
    graphed = model.forward
    model.forward = lambda *args, **kwargs: graphed(*args, **kwargs)
    with pytest.raises(ValueError, match="forward must not have been replaced by somebody else"):
        restore(model)
    model.forward = graphed
    restore(model)


def test_a_copy_has_graphs_of_its_own(cuda: FakeCuda) -> None:
    model = accelerate(diffusers_model(), cuda_graph=True)
    draw(model), draw(model)
    other = copy.deepcopy(model)
    assert isinstance(other.forward, GraphedForward) and other.forward.module is other
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
        other.proj_out.bias.mul_(2)
    for _ in range(3):
        assert relative_error(draw(other), 2 * draw(model)) < TOLERANCE
    assert cuda.recorded == 2


def test_compiled_calls_are_plain_ones(cuda: FakeCuda) -> None:
    torch.compiler.reset()
    model = accelerate(diffusers_model(num_layers=1), cuda_graph=True)
    expected = draw(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(draw(compiled), expected) < TOLERANCE
    assert cuda.recorded == 0


def test_where_no_kernel_runs_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixart.patch, "_obstacle", lambda: "the kernels need a GPU")
    model = diffusers_model()
    with pytest.raises(
        ValueError, match="cuda_graph must be False, got True: the kernels need a GPU"
    ):
        accelerate(model, cuda_graph=True)
    monkeypatch.setattr(pixart.patch, "_obstacle", lambda: None)
    accelerate(model, cuda_graph=True)  # it may be moved to a GPU yet
    with pytest.raises(ValueError, match="cuda_graph must be False on cpu"):
        draw(model)
