"""accelerate() beside others: LoRA, checkpointing, torch.compile, offloading hooks, processors."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_model import TOLERANCE, count_calls, diffusers_model, masks, run, snapshot
from diffusers_model import kernels_can_run as kernels_can_run  # a fixture
from small_model import inputs, relative_error
from torch import Tensor, nn

from pixart.config import KVCompression
from pixart.patch import accelerate, restore


class LowRank(nn.Module):
    """What PEFT puts in a Linear's place, without PEFT."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        self.base.weight += self.up.weight @ self.down.weight
        return self.base


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_low_rank_layers_work_merged_or_not(accelerated_first: bool) -> None:
    torch.manual_seed(0)
    model, plain = diffusers_model(), diffusers_model()
    if accelerated_first:
        accelerate(model)
    for block, plain_block in zip(model.transformer_blocks, plain.transformer_blocks, strict=True):
        for name in ("to_q", "to_k", "to_v"):
            layer = LowRank(getattr(block.attn1, name))
            setattr(block.attn1, name, layer)
            setattr(plain_block.attn1, name, copy.deepcopy(layer))
    if not accelerated_first:
        accelerate(model)
    expected = run(plain, masks()["prefix"])
    assert relative_error(run(model, masks()["prefix"]), expected) < TOLERANCE
    run(model).sum().backward()
    assert model.transformer_blocks[0].attn1.to_q.down.weight.grad.abs().sum() > 0
    for block in model.transformer_blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn1, name, getattr(block.attn1, name).merge())
    assert relative_error(run(model, masks()["prefix"]), expected) < TOLERANCE


def test_peft_adapters_train_and_merge() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = diffusers_model()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj", "linear_1", "linear_2"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    expected = run(wrapped, masks()["prefix"])
    assert accelerate(wrapped) is wrapped
    assert relative_error(run(wrapped, masks()["prefix"]), expected) < TOLERANCE
    run(wrapped).sum().backward()
    adapters = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    assert adapters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    merged = wrapped.merge_and_unload()
    assert relative_error(run(merged, masks()["prefix"]), expected) < TOLERANCE
    assert relative_error(run(restore(merged), masks()["prefix"]), expected) < TOLERANCE


@pytest.mark.parametrize("kv_compression", [None, KVCompression([1])])
def test_gradient_checkpointing_recomputes_each_call_with_its_own_mask_and_grid(
    kv_compression: KVCompression | None,
) -> None:
    model = accelerate(diffusers_model(), kv_compression=kv_compression).train()

    def gradients() -> list[Tensor]:
        # Two calls before one backward: what the first one saw must not be what the second left.
        wide = inputs(height=6, width=18)[0]
        first = run(model, masks()["scattered"])
        second = run(model, masks()["prefix"], hidden_states=wide)
        model.zero_grad()
        (first.square().mean() + second.square().mean()).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.enable_gradient_checkpointing()
    for actual, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("accelerated_first", "name"), [(True, "aot_eager"), (False, "eager")])
def test_torch_compile_takes_the_whole_model_without_a_break(
    accelerated_first: bool, name: str
) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(name)(graph, examples)

    model, mask, other = diffusers_model(num_layers=1), masks()["prefix"], masks()["all kept"]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    if not accelerated_first:
        run(compiled, mask)
    accelerate(compiled, kv_compression=KVCompression([0]))
    before = len(graphs)
    out = run(compiled, mask)
    assert relative_error(out, run(model, mask)) < TOLERANCE
    assert relative_error(run(compiled, other), run(model, other)) < TOLERANCE
    assert len(graphs) == before + 2  # packing captions, forward; another mask is no new graph
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    restore(model)
    assert relative_error(run(compiled, mask), run(model, mask)) < TOLERANCE


def hook_like_offloading(model: Any, library: str) -> Callable[[], None]:
    """Wrap the blocks' forwards as offloading does, on one device. Returns what takes it off."""
    if library == "accelerate":
        hooks = pytest.importorskip("accelerate.hooks")
        for block in model.transformer_blocks:
            hooks.add_hook_to_module(block, hooks.ModelHook(), append=True)
        return lambda: hooks.remove_hook_from_module(model, recurse=True)
    hooks = pytest.importorskip("diffusers.hooks")  # since 0.33
    registry = hooks.HookRegistry.check_if_exists_or_initialize
    for block in model.transformer_blocks:
        registry(block).register_hook(hooks.ModelHook(), "test")

    def remove() -> None:
        for block in model.transformer_blocks:
            registry(block).remove_hook("test")

    return remove


@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
@pytest.mark.parametrize(
    "order",
    ["hook accelerate restore unhook", "hook accelerate unhook restore"]
    + ["accelerate hook restore unhook", "accelerate hook unhook restore"],
)
def test_hooks_around_blocks_may_come_and_go_at_any_time(
    order: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffusers_model()
    expected = run(model, masks()["prefix"])
    passes = count_calls(monkeypatch, "gate_add_modulate")
    steps: dict[str, Callable[[], Any]] = {
        "hook": lambda: steps.update(unhook=hook_like_offloading(model, library)),
        "accelerate": lambda: accelerate(model),
        "restore": lambda: restore(model),
    }
    is_accelerated = False
    for step in order.split():
        steps[step]()
        is_accelerated = {"accelerate": True, "restore": False}.get(step, is_accelerated)
        passes.clear()
        assert relative_error(run(model, masks()["prefix"]), expected) < TOLERANCE
        assert len(passes) == (2 if is_accelerated else 0), step
    assert torch.equal(run(model, masks()["prefix"]), expected)


def test_the_hook_of_enable_model_cpu_offload_and_ours_do_not_meet() -> None:
    offload = pytest.importorskip("accelerate")
    hooks = pytest.importorskip("accelerate.hooks")
    model = accelerate(diffusers_model(), kv_compression=KVCompression([1]))
    expected = run(model, masks()["prefix"])
    _, hook = offload.cpu_offload_with_hook(model, "cpu")
    assert torch.equal(run(model, masks()["prefix"]), expected)
    hook.remove()
    restore(model)
    hooks.remove_hook_from_module(model, recurse=True)
    offload.cpu_offload_with_hook(model, "cpu")
    accelerate(model, kv_compression=KVCompression([1]))
    assert torch.equal(run(model, masks()["prefix"]), expected)


def test_a_forward_that_somebody_else_replaced_is_an_error_and_nothing_changes() -> None:
    model = diffusers_model()
    block = model.transformer_blocks[1]
    block.forward = lambda *args, **kwargs: args[0]
    before = snapshot(model)
    with pytest.raises(ValueError, match="forward must not have been replaced"):
        accelerate(model)
    assert snapshot(model) == before
    del block.forward
    accelerate(model)
    block.forward = lambda *args, **kwargs: args[0]
    before = snapshot(model)
    with pytest.raises(ValueError, match="forward must not have been replaced"):
        restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("mask", ["scattered", "bias"])
def test_fused_projections_stay_fused(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusers_model()
    expected = run(model, masks()[mask])
    model.fuse_qkv_projections()
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn1.to_k.weight)  # not what is read
    accelerate(model)
    attention = count_calls(monkeypatch, "flash_attention")
    assert relative_error(run(model, masks()[mask]), expected) < TOLERANCE
    assert len(attention) == (2 if mask == "bias" else 4)


def test_processors_of_others_stay_and_work(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models import attention_processor
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Scaled(AttnProcessor2_0):
        def __call__(self, *args: Any, scaled: float = 1.0, **kwargs: Any) -> Tensor:
            return super().__call__(*args, **kwargs) * scaled

    model = diffusers_model()
    scaled = Scaled()
    for attention in (model.transformer_blocks[0].attn1, model.transformer_blocks[1].attn2):
        attention.set_processor(scaled)
    options = {"cross_attention_kwargs": {"scaled": 0.5}}
    expected = run(model, masks()["scattered"], **options)
    with caplog.at_level(logging.INFO, "pixart"):
        accelerate(model)
    assert "transformer_blocks.0.attn1.processor stays: Scaled" in caplog.text
    assert model.transformer_blocks[1].attn2.processor is scaled
    warned: list[str] = []
    monkeypatch.setattr(attention_processor.logger, "warning", warned.append)
    assert relative_error(run(model, masks()["scattered"], **options), expected) < TOLERANCE
    assert all("pixart" not in message for message in warned)  # nor complain of our arguments
    restore(model)
    assert model.transformer_blocks[0].attn1.processor is scaled


def test_a_processor_set_later_stays_after_restore() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model = diffusers_model()
    expected = run(model, masks()["prefix"])
    accelerate(model)
    model.set_default_attn_processor()
    assert relative_error(run(model, masks()["prefix"]), expected) < TOLERANCE
    restore(model)
    assert type(model.transformer_blocks[0].attn1.processor) is AttnProcessor
