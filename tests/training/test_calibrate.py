import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_model import build, relative_error, sizes
from torch import Tensor

from pixart.config import KVCompression
from pixart.model.blocks import SelfAttention
from pixart.model.transformer import PixArt
from pixart.training.calibration import DOMINANCE, fit_norm, measure
from pixart.training.transitions import add_kv_compression

COMPRESSION = KVCompression((1, 2), 2)
GRID = (16, 20)  # latents; tokens are 8 by 10


def lifelike(seed: int = 0, loud: int = 1, **changes: Any) -> PixArt:
    """A model whose keys and values have statistics as in trained ones: channels that differ in
    length by a factor of ten, keys (loud 1) or values (loud 2) several times longer than the other,
    and constants that on a few channels of the keys are longer than anything else."""
    model = build(seed, depth=3, **changes)
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        weight, bias = block.attn.qkv.weight.unflatten(0, (3, -1)), block.attn.qkv.bias.view(3, -1)
        with torch.no_grad():
            for part, factor in ((1, 1.0), (2, 0.5)):
                spread = torch.randn(len(weight[part]), 1, generator=generator) * 0.6
                weight[part] *= spread.exp() * factor
                bias[part] += torch.randn(bias[part].shape, generator=generator) * 0.3
            bias[1, ::48] += 6.0
            weight[loud] *= 3.0
            weight[0] *= 0.5
    return model


def pictures(seed: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents that are smooth beneath the noise, timesteps, captions."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 4, 3, 4, generator=generator)
    noise = torch.randn(batch, 4, *GRID, generator=generator)
    smooth = F.interpolate(coarse, size=GRID, mode="bicubic")
    timesteps = torch.tensor([50.0, 400.0, 800.0])[:batch]
    share = timesteps.view(-1, 1, 1, 1) / 1000
    latents = (1 - share).sqrt() * smooth + share.sqrt() * noise
    return latents, timesteps, torch.randn(batch, 12, 48, generator=generator)


@torch.no_grad()
def distance(dense: PixArt, converted: PixArt) -> float:
    """Output error on pictures that no calibration has seen."""
    batch = pictures(seed=99)
    return relative_error(converted(*batch), dense(*batch))


def convert(dense: PixArt, start: Any, norm: str = "layer") -> PixArt:
    compression = KVCompression(COMPRESSION.layers, 2, norm=norm)
    batches = [pictures(seed) for seed in range(2)]
    return add_kv_compression(copy.deepcopy(dense), compression, start=start, batches=batches)


@pytest.mark.parametrize("loud", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_calibrated_start_gives_back_most_of_what_the_plain_norm_costs(
    seed: int, loud: int
) -> None:
    dense = lifelike(seed, loud)
    merging = distance(dense, convert(dense, "mean", norm="none"))  # what no norm can give back
    mean, calibrated = (distance(dense, convert(dense, s)) for s in ("mean", "calibrated"))
    assert calibrated < 0.75 * mean
    assert calibrated - merging < 0.3 * (mean - merging)


def test_it_stands_between_no_norm_and_a_random_start_also_with_normed_keys() -> None:
    dense = lifelike(qk_norm=True)
    for module in dense.modules():
        if isinstance(module, SelfAttention) and module.k_norm is not None:
            torch.nn.init.constant_(module.k_norm.weight, 2.0)
    starts = ("calibrated", "mean", "random")
    errors = [distance(dense, convert(dense, start)) for start in starts]
    assert errors == sorted(errors) and errors[0] < 0.5 * errors[1]


def test_it_survives_rounding_to_sixteen_bits() -> None:
    dense = lifelike(loud=2)
    converted = convert(dense, "calibrated")
    exact = distance(dense, converted)
    for layer in COMPRESSION.layers:
        attention: Any = converted.blocks[layer].attn
        for module in (attention.sr, attention.norm):
            module.bfloat16().float()
    assert distance(dense, converted) < 1.1 * exact


def test_a_model_without_a_norm_begins_as_the_mean() -> None:
    dense = lifelike()
    expected = convert(dense, "mean", norm="none")
    assert distance(expected, convert(dense, "calibrated", norm="none")) == 0


def tokens(channels: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(2, 1, channels, generator=generator) + torch.tensor([0.5, 4.0]).view(
        2, 1, 1
    )
    lengths[:, :, 7] = 0.01
    constants = torch.randn(2, 1, channels, generator=generator)
    keys, values = torch.randn(2, 300, channels, generator=generator) * lengths + constants
    return keys, values


def test_the_fitted_norm_passes_tokens_but_for_their_mean_and_the_quietest_channel() -> None:
    keys, values = tokens()
    offset, weight, bias = fit_norm(keys, values)
    assert weight[7] == 0 and offset.argmax() == 7 and weight.count_nonzero() == 95
    for x, is_value in ((keys, False), (values, True)):
        passed = F.layer_norm(x + offset, (96,), weight, bias)
        expected = x - x.mean(dim=1, keepdim=True)
        expected[:, 7] = 0
        if is_value:
            torch.testing.assert_close(passed.mean(dim=0), x.mean(dim=0), atol=1e-4, rtol=0)
        difference = (passed - passed.mean(dim=0)) - (expected - expected.mean(dim=0))
        assert difference.norm() < 2 / DOMINANCE**2 * expected.norm()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_tokens_that_say_nothing_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite and not all zero"):
        fit_norm(torch.full((5, 8), value), torch.full((5, 8), value))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_measured_are_the_merged_keys_and_values_of_the_asked_blocks(qk_norm: bool) -> None:
    model = lifelike(qk_norm=qk_norm)
    seen: list[Tensor] = []
    attention: Any = model.blocks[1].attn
    attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    found = measure(model, KVCompression((1,), 2), [pictures(3)])
    assert list(found) == [1]
    _, k, v = attention.qkv(seen[0]).chunk(3, dim=-1)
    k = attention.k_norm(k) if qk_norm else k
    for measured, dense in zip(found[1], (k, v), strict=True):
        assert measured.shape == (3 * 4 * 5, 144)
        first = dense.unflatten(1, (8, 10))[0, :2, :2].mean(dim=(0, 1))
        torch.testing.assert_close(measured[0], first)


def test_measuring_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = lifelike(class_dropout_prob=0.5).train()
    before = torch.get_rng_state()
    latents, timesteps, caption = pictures(0)
    batch = {"latents": latents, "timesteps": timesteps, "caption": caption}
    add_kv_compression(model, COMPRESSION, start="calibrated", batches=[batch])
    assert torch.equal(torch.get_rng_state(), before) and model.training
    attention: Any = model.blocks[1].attn
    assert not attention._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in attention.parameters())


def test_a_batch_that_does_not_fit_leaves_the_model_dense() -> None:
    model = lifelike(micro_condition=True)
    with pytest.raises(ValueError, match="image_size"):
        add_kv_compression(model, COMPRESSION, start="calibrated", batches=[pictures(0)])
    with pytest.raises(ValueError, match="at least one batch"):
        add_kv_compression(model, COMPRESSION, start="calibrated")
    assert model.config.kv_compression is None and model.blocks[1].attn.sr is None
    fits = (*pictures(0, batch=2), None, *sizes().values())
    add_kv_compression(model, COMPRESSION, start="calibrated", batches=[fits])
    assert model.blocks[1].attn.sr is not None
