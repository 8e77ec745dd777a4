from dataclasses import replace
from typing import Any

import pytest
import torch
from control_formula import evaluate
from small_model import PARITY_TOLERANCE, build, inputs, relative_error, sizes
from torch import Tensor

from pixart.config import KVCompression
from pixart.model.control import Control, ControlNet
from pixart.model.transformer import PixArt

COPIES, DEPTH = 2, 4


def control_of(base: PixArt, copies: int = COPIES, seed: int = 7) -> ControlNet:
    """A control whose output depends on all of its parameters."""
    network = base.new_control(copies).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        numbers = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data.copy_(numbers)
    return network


def hint_of(batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(batch, 4, 10, 14, generator=torch.Generator().manual_seed(seed))


def published(base: PixArt, network: ControlNet) -> dict[str, Tensor]:
    own = {f"base_model.{name}": tensor for name, tensor in base.state_dict().items()}
    state = own | network.state_dict()
    return {name: tensor.double() for name, tensor in state.items()}


def direct(base: PixArt, network: ControlNet, hint: Tensor, **options: Any) -> Tensor:
    latents, timesteps, caption = (each.double() for each in inputs())
    positions = base.position_tables((5, 7), latents)
    return evaluate(
        published(base, network), latents, timesteps, caption, hint.double(),
        heads=base.config.num_heads, positions=positions, **options,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("micro_condition", [False, True])
def test_a_control_equals_the_published_formula(micro_condition: bool, scale: float) -> None:
    base = build(depth=DEPTH, micro_condition=micro_condition, pe_interpolation=2.0)
    network, hint = control_of(base), hint_of()
    conditions = sizes() if micro_condition else {}
    actual = base(*inputs(), **conditions, controls=[Control(network, hint, scale)])
    stacked = torch.cat([*sizes().values()], 1).double() if micro_condition else None
    expected = direct(base, network, hint, scale=scale, sizes=stacked)
    assert relative_error(actual, expected) < PARITY_TOLERANCE
    assert relative_error(base(*inputs(), **conditions), expected) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("copies", [1, 3])
def test_a_control_of_any_number_of_copies_equals_the_formula(copies: int) -> None:
    base = build(depth=DEPTH)
    network, hint = control_of(base, copies), hint_of()
    actual = base(*inputs(), controls=[Control(network, hint)])
    assert relative_error(actual, direct(base, network, hint)) < PARITY_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("compression", [None, KVCompression((1, 3), 2), KVCompression((0, 2), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_control_equals_its_base_to_the_bit(
    dtype: torch.dtype, compression: KVCompression | None
) -> None:
    base = build(depth=DEPTH, kv_compression=compression).to(dtype)
    latents, timesteps, caption = inputs(height=12, width=16)
    hint = torch.randn_like(latents)
    controls = [Control(base.new_control(2), hint), Control(base.new_control(3), hint, 0.3)]
    steered = base(latents, timesteps, caption, controls=controls)
    assert torch.equal(steered, base(latents, timesteps, caption))
    assert torch.equal(base.new_control(2).controlnet[1].copied_block.attn.qkv.weight,
                       base.blocks[1].attn.qkv.weight)  # fmt: skip


@torch.no_grad()
def test_what_is_encoded_once_gives_the_same_bits() -> None:
    base = build(depth=DEPTH)
    network, hint = control_of(base), hint_of()
    latents, timesteps, caption = inputs()
    plain = base(latents, timesteps, caption, controls=[Control(network, hint)])
    encoded = Control(
        network, base.encode_hint(network, hint), 1.0, base.encode_caption(caption, None, network)
    )
    seen = base.encode_caption(caption)
    assert torch.equal(base(latents, timesteps, seen, controls=[encoded]), plain)


@torch.no_grad()
def test_one_hint_serves_every_picture_of_a_batch_in_turn() -> None:
    base = build(depth=DEPTH)
    network, hint = control_of(base), hint_of(1)
    latents, timesteps, caption = inputs(4)
    one = base(latents, timesteps, caption, controls=[Control(network, hint)])
    each = base(latents, timesteps, caption, controls=[Control(network, hint.repeat(4, 1, 1, 1))])
    assert torch.equal(one, each)
    two = hint_of(2)
    turns = base(latents, timesteps, caption, controls=[Control(network, two)])
    both = base(latents, timesteps, caption, controls=[Control(network, torch.cat([two, two]))])
    assert torch.equal(turns, both)


@torch.no_grad()
def test_several_controls_add_up() -> None:
    """Alone they see another stream than together, beyond the first block that they steer: so one copy."""
    base = build(depth=2)
    first, second = control_of(base, 1, seed=7), control_of(base, 1, seed=8)
    seen: list[Tensor] = []
    base.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    one, two = Control(first, hint_of(seed=3), 0.5), Control(second, hint_of(seed=4), 2.0)
    for controls in ([], [one], [two], [one, two]):
        base(*inputs(), controls=controls)
    plain, with_one, with_two, with_both = seen
    assert relative_error(with_both - plain, with_one - plain + with_two - plain) < PARITY_TOLERANCE


@torch.no_grad()
def test_a_copy_compresses_where_its_block_does() -> None:
    base = build(depth=DEPTH, kv_compression=KVCompression((1, 3), 2))
    network = control_of(base)
    blocks = [each.copied_block for each in network.control_blocks]
    assert [block.attn.sr is None for block in blocks] == [True, False]
    latents, timesteps, caption = inputs(height=12, width=16)
    controls = [Control(network, torch.randn_like(latents))]
    assert base(latents, timesteps, caption, controls=controls).isfinite().all()


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_control_learns_and_its_frozen_base_does_not(every: int) -> None:
    base = build(depth=DEPTH).requires_grad_(False)
    network, hint = control_of(base).train(), hint_of()
    base.gradient_checkpointing = every
    base(*inputs(), controls=[Control(network, hint)]).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(grad is not None and grad.count_nonzero() > 0 for grad in gradients.values())
    assert all(parameter.grad is None for parameter in base.parameters())
    network.zero_grad()
    base.gradient_checkpointing = 0
    base(*inputs(), controls=[Control(network, hint)]).square().mean().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_the_gradient_of_a_control_is_that_of_the_formula() -> None:
    base = build(depth=DEPTH).double().requires_grad_(False)
    network = control_of(build(depth=DEPTH)).double()
    hint = hint_of()
    latents, timesteps, caption = (each.double() for each in inputs())
    weights = list(network.parameters())
    loss = base(latents, timesteps, caption, controls=[Control(network, hint)]).square().mean()
    actual = torch.autograd.grad(loss, weights)
    state = published(base, network) | dict(network.named_parameters())
    formula = evaluate(
        state, latents, timesteps, caption, hint.double(), heads=2,
        positions=base.position_tables((5, 7), latents),
    )  # fmt: skip
    for one, other in zip(
        actual, torch.autograd.grad(formula.square().mean(), weights), strict=True
    ):
        assert relative_error(one, other) < 10 * PARITY_TOLERANCE  # timesteps are fp32


def test_a_control_that_does_not_fit_is_refused() -> None:
    base = build(depth=DEPTH)
    network, hint = control_of(base), hint_of()
    latents, timesteps, caption = inputs()
    control = Control(network, hint)
    for wrong, words in (
        (
            replace(control, network=control_of(build(hidden_size=72, num_heads=1, depth=4))),
            "width 144",
        ),
        (replace(control, network=control_of(build(depth=6), 4)), "fewer than 4 copies"),
        (replace(control, hint=hint[:, :, :8]), "size of the latents"),
        (replace(control, hint=hint_of(3)), "batch divide 2"),
        (replace(control, caption=base.encode_caption(caption, None, network)), "must be None"),
    ):
        with pytest.raises(ValueError, match=words):
            base(latents, timesteps, caption, controls=[wrong])
    with pytest.raises(ValueError, match="encoded for it"):
        base(latents, timesteps, base.encode_caption(caption), controls=[control])
    with pytest.raises(ValueError, match="from 1 to 3"):
        base.new_control(4)
    with pytest.raises(ValueError, match="finite"):
        Control(network, hint, float("nan"))
