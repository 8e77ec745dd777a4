"""accelerate() under a ControlNet as diffusers' research code has it: it wraps a transformer, calls the
blocks one by one with keyword arguments, copies some of them and trains the copies."""

import copy
from typing import Any

import pytest
import torch
from diffusers_model import TOLERANCE, arguments, diffusers_model, kernels_can_run, masks  # noqa: F401
from small_model import relative_error
from torch import Tensor, nn

from pixart.patch import accelerate, restore

COPIES = 2


class Controlled(nn.Module):
    """A transformer, and copies of its first blocks between zero-initialised (here: random) projections."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer.requires_grad_(False)
        width, blocks = 144, transformer.transformer_blocks
        generator = torch.Generator().manual_seed(3)
        self.copies = nn.ModuleList(copy.deepcopy(block) for block in blocks[:COPIES])
        self.before = nn.Linear(width, width)
        self.after = nn.ModuleList(nn.Linear(width, width) for _ in range(COPIES))
        for parameter in (*self.before.parameters(), *self.after.parameters()):
            nn.init.normal_(parameter, std=0.05, generator=generator)
        self.copies.requires_grad_(True)

    def forward(self, latents: Tensor, hint: Tensor, mask: Tensor | None) -> Tensor:
        model, given = self.transformer, arguments()
        bias = None if mask is None else ((1 - mask.float()) * -10000.0).unsqueeze(1)
        x, c = model.pos_embed(latents), model.pos_embed(hint)
        t, _ = model.adaln_single(given["timestep"], {"resolution": None, "aspect_ratio": None},
                                  batch_size=len(latents), hidden_dtype=latents.dtype)  # fmt: skip
        caption = model.caption_projection(given["encoder_hidden_states"])
        options: dict[str, Any] = {
            "attention_mask": None, "encoder_hidden_states": caption, "timestep": t,
            "encoder_attention_mask": bias, "cross_attention_kwargs": None, "class_labels": None,
        }  # fmt: skip
        for layer, block in enumerate(model.transformer_blocks):
            if 1 <= layer <= COPIES:
                c = x + self.before(c) if layer == 1 else c
                c = self.copies[layer - 1](hidden_states=c, **options)
                x = x + self.after[layer - 1](c)
            x = block(x, **options)
        return model.norm_out(x)


def answer(model: Controlled, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of some of it for all that learns."""
    latents = arguments()["hidden_states"]
    out = model(latents, latents.flip(-1), mask)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Of a part: the squares of all that a norm gives add up to the same, whatever the weights.
    gradients = torch.autograd.grad(out[..., ::3].square().mean(), weights)
    return out.detach(), torch.cat([each.flatten() for each in gradients])


@pytest.mark.parametrize("name", ["no mask", "prefix"])
def test_blocks_called_one_by_one_and_copied_blocks_that_learn_give_the_same(name: str) -> None:
    mask = masks()[name]
    expected = answer(Controlled(diffusers_model(num_layers=4)), mask)
    before = Controlled(diffusers_model(num_layers=4))
    accelerate(before.transformer)  # copies were made of plain blocks
    after = Controlled(accelerate(diffusers_model(num_layers=4)))  # of accelerated ones
    for model in (before, after):
        out, gradient = answer(model, mask)
        assert relative_error(out, expected[0]) < TOLERANCE
        assert relative_error(gradient, expected[1]) < TOLERANCE


def test_a_copy_of_an_accelerated_block_has_weights_of_its_own() -> None:
    transformer = accelerate(diffusers_model(num_layers=4))
    model = Controlled(transformer)
    plain, _ = answer(model, None)
    with torch.no_grad():
        for parameter in model.copies.parameters():
            parameter.mul_(1.5)
    assert relative_error(answer(model, None)[0], plain) > 0.001
    fresh = answer(Controlled(transformer), None)[0]
    assert relative_error(fresh, plain) < TOLERANCE, "the blocks themselves did not change"
    restore(transformer)
    assert relative_error(answer(Controlled(transformer), None)[0], plain) < TOLERANCE
