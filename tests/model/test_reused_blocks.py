"""Blocks that are not computed, whose change of the tokens is added again."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart import cost
from pixart.config import KVCompression, PixArtConfig
from pixart.model.transformer import PixArt, Reuse

SIZES = {
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 4,
    "caption_channels": 20,
    "model_max_length": 5,
}


def build(**options):
    torch.manual_seed(0)
    model = PixArt(PixArtConfig(**{**SIZES, "input_size": 8, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def inputs(batch=2):
    return torch.randn(batch, 4, 8, 8), torch.tensor([500]), torch.randn(batch, 5, 20)


def directly(model, first, latents, timesteps, caption, change):
    """The same by the parts of the model: its first blocks, what is added, and its ends."""

    kept = model.blocks
    seen = []
    handles = [block.register_forward_hook(lambda m, i, o: seen.append(o[0])) for block in kept]
    try:
        whole = model(latents, timesteps, caption)
    finally:
        for handle in handles:
            handle.remove()
    if change is None:
        return whole, seen[-1] - seen[first - 1]
    x = seen[first - 1] + change
    rows = model._last_rows(model._embed_timesteps(timesteps, len(latents), x.device))
    shift, scale = (row.unsqueeze(1) for row in rows)
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    patches = model.final_layer(normed * (1 + scale) + shift)
    return model._unpatchify(patches, (4, 4)), change


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 2, 3])
def test_it_is_the_first_blocks_and_what_the_others_added_elsewhere(first):
    model = build()
    given, other = inputs(), inputs()
    reuse = Reuse(first)
    plain, change = directly(model, first, *given, None)
    assert torch.equal(model(*given, reuse=reuse), plain)
    torch.testing.assert_close(reuse.change, change)
    expected, _ = directly(model, first, *other, change)
    got = model(*other, reuse=Reuse(first, reuse.change))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - model(*other)).abs().max() > 1e-2, "a control: all blocks give something else"


@torch.no_grad()
def test_of_the_same_call_it_is_that_call_but_for_rounding():
    model, given = build(kv_compression=KVCompression((2, 3), 2)), inputs()
    reuse = Reuse(2)
    plain = model(*given, reuse=reuse)
    torch.testing.assert_close(model(*given, reuse=reuse), plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_control_adds_in_the_blocks_that_are_computed():
    from pixart.model.control import Control

    model, given = build(), inputs()
    network = model.new_control(2)
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    control = Control(network, torch.randn(1, 4, 8, 8), 0.5, None)
    reuse = Reuse(1)
    plain = model(*given, controls=[control], reuse=reuse)
    again = model(*given, controls=[control], reuse=reuse)
    torch.testing.assert_close(again, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", [0, 4, -1])
def test_no_block_and_all_blocks_are_refused(first):
    with pytest.raises(ValueError, match=f"reuse.first must be from 1 to 3 blocks, got {first}"):
        build()(*inputs(), reuse=Reuse(first))


def test_what_is_computed_is_what_is_counted():
    model, (latents, timesteps, caption) = build(kv_compression=KVCompression((2, 3), 2)), inputs(1)
    reuse = Reuse(1)
    model(latents, timesteps, caption, reuse=reuse)
    encoded = model.encode_caption(caption)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, timesteps, encoded, reuse=reuse)
    expected = cost.forward_flops(model.config, (4, 4), 5, encoded=True, blocks=1)
    assert counter.get_total_flops() == expected
