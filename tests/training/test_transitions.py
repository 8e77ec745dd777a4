from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import KEPT, SMALL, build, inputs, mask_of, relative_error, sizes

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression, PixArtConfig
from pixart.model.transformer import PixArt
from pixart.releases import RELEASED
from pixart.resolution import position_embedding
from pixart.training.transitions import (
    KVStart,
    add_kv_compression,
    add_micro_condition,
    interpolate_positions,
    lengthen_captions,
)

COMPRESSION = KVCompression((1,), 2)


def state(model: PixArt) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_kept(model: PixArt, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_twice_the_resolution_meets_the_same_coordinates_twice_as_dense() -> None:
    model = build(pe_interpolation=0.5)
    latents, timesteps, caption = inputs(height=16, width=16)
    before, weights = model(latents, timesteps, caption), state(model)
    assert interpolate_positions(model, 256) is model
    assert (model.config.input_size, model.config.pe_interpolation) == (32, 1.0)
    assert_kept(model, weights)
    # The range is the same, so at the old grid the model computes what it did.
    assert torch.equal(model(latents, timesteps, caption), before)
    table = model.position_tables((16, 16), latents).view(16, 16, -1)
    coarse = position_embedding(144, (8, 8), 8, 0.5).view(8, 8, -1)
    assert torch.equal(table[::2, ::2], coarse)


def test_the_ladder_of_sigma_has_the_published_scales() -> None:
    def config(name: str) -> PixArtConfig:
        small = {key: value for key, value in SMALL.items() if key != "input_size"}
        return replace(RELEASED[f"PixArt-Sigma-XL-2-{name}"].config, **small)

    model = PixArt(config("256x256"))
    for name, pixels in (("512-MS", 512), ("1024-MS", 1024), ("2K-MS", 2048)):
        interpolate_positions(model, pixels)
        assert model.config == config(name)
    assert interpolate_positions(model, 4096).config.pe_interpolation == 8.0


def test_a_given_scale_is_taken_even_if_it_extrapolates() -> None:
    model = build(pe_interpolation=0.5)
    latents, timesteps, caption = inputs()
    before = model(latents, timesteps, caption)  # fills the cache of tables
    interpolate_positions(model, 256, 0.5)
    expected = build(pe_interpolation=0.5, input_size=32)
    assert model.config == expected.config
    assert torch.equal(model(*inputs()), expected(*inputs()))
    assert not torch.equal(model(*inputs()), before)


@pytest.mark.parametrize("resolution", [0, -256, 200])
def test_a_resolution_without_a_whole_grid_is_refused(resolution: int) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"multiple of 16, got {resolution}"):
        interpolate_positions(model, resolution)
    with pytest.raises(ValueError, match="pe_interpolation must be"):
        interpolate_positions(model, 256, 0.0)
    assert model.config.input_size == 16


def test_longer_captions_leave_the_model_as_it_was() -> None:
    model = build()
    latents, timesteps, caption = inputs()
    mask = mask_of(KEPT[:2])
    before, table = model(latents, timesteps, caption, mask), model.y_embedder.y_embedding.clone()
    lengthen_captions(model, 30)
    assert model.config.model_max_length == 30
    assert torch.equal(model(latents, timesteps, caption, mask), before)
    assert torch.equal(model.y_embedder.y_embedding, torch.cat([table, table, table[:6]]))
    model.train()
    model(latents, timesteps, torch.randn(2, 30, 48))  # refuses more tokens than its table has


def test_a_repeated_null_caption_means_the_same() -> None:
    model = build()
    latents, timesteps, _ = inputs()
    short = model(latents, timesteps, model.y_embedder.y_embedding.expand(2, -1, -1))
    lengthen_captions(model, 24)
    long = model(latents, timesteps, model.y_embedder.y_embedding.expand(2, -1, -1))
    assert relative_error(long, short) < 1e-5


def test_a_given_null_caption_is_stored_with_the_model(tmp_path: Path) -> None:
    model = build()
    model.null_caption_stored = False  # type: ignore[assignment]
    null = torch.randn(20, 48)
    lengthen_captions(model, 20, null)
    save_transformer(model, tmp_path / "model.safetensors")
    opened = load_transformer(tmp_path / "model.safetensors")
    assert torch.equal(opened.y_embedder.y_embedding, null)
    assert opened.config.model_max_length == 20


def test_captions_are_not_shortened() -> None:
    model = build()
    with pytest.raises(ValueError, match="at least the model's 12 tokens, got 8"):
        lengthen_captions(model, 8)
    with pytest.raises(ValueError, match=r"null_caption must be \(20, 48\), got \(12, 48\)"):
        lengthen_captions(model, 20, torch.zeros(12, 48))
    assert len(model.y_embedder.y_embedding) == model.config.model_max_length == 12


def test_micro_conditions_begin_without_effect_and_can_be_learned() -> None:
    model = build()
    before = model(*inputs())
    add_micro_condition(model)
    after = model(*inputs(), **sizes())
    assert torch.equal(after, before)
    after.sum().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"csize_embedder.mlp.2.weight", "ar_embedder.mlp.2.bias"} <= names
    expected = PixArt(PixArtConfig(**SMALL, micro_condition=True)).state_dict()
    assert set(model.state_dict()) == set(expected)


@pytest.mark.parametrize("ratio", [2, 3])
def test_the_mean_start_is_the_published_one(ratio: int, tmp_path: Path) -> None:
    model = build().train()
    weights, chance = state(model), torch.get_rng_state()
    compression = KVCompression((0, 1), ratio)
    assert add_kv_compression(model, compression) is model
    assert torch.equal(torch.get_rng_state(), chance)
    assert_kept(model, weights)
    attention: Any = model.blocks[1].attn
    assert attention.sr.weight.shape == (144, 1, ratio, ratio)
    assert (attention.sr.weight == torch.tensor(ratio**-2.0)).all()
    assert not attention.sr.bias.any() and not attention.norm.bias.any()
    assert (attention.norm.weight == 1).all()
    # The checkpoint reader opens a dense file in the same way.
    save_transformer(build(), tmp_path / "dense.safetensors")
    opened = load_transformer(tmp_path / "dense.safetensors", kv_compression=compression)
    assert opened.config == model.config
    assert torch.equal(opened(*inputs()), model.eval()(*inputs()))


def test_a_compressed_model_is_saved_and_opened_as_such(tmp_path: Path) -> None:
    model = add_kv_compression(build(), COMPRESSION, start="random")
    save_transformer(model, tmp_path / "model.pth")
    opened = load_transformer(tmp_path / "model.pth")
    assert opened.config.kv_compression == COMPRESSION
    assert torch.equal(opened(*inputs()), model(*inputs()))


def test_a_random_start_draws_the_convolution() -> None:
    first, second = (add_kv_compression(build(), COMPRESSION, start="random") for _ in range(2))
    weights: list[Any] = [model.blocks[1].attn.sr.weight for model in (first, second)]
    assert weights[0].std() > 0.1 and not torch.equal(*weights)


@pytest.mark.parametrize("sampling", ["average", "uniform", "uniform_every"])
def test_compression_without_a_convolution_has_one_start(sampling: str) -> None:
    compression = KVCompression((1,), 2, sampling)
    weights = state(build())
    model = add_kv_compression(build(), compression, start="calibrated")
    assert set(model.state_dict()) == set(weights)
    assert model.blocks[1].attn.compression == compression
    with pytest.raises(ValueError, match="no convolution to set, got 'random'"):
        add_kv_compression(build(), compression, start="random")
    with pytest.raises(ValueError, match="no convolution to set, got 'calibrated'"):
        normed = KVCompression((1,), 2, sampling, norm="layer")
        add_kv_compression(build(), normed, start="calibrated", batches=[inputs()])


def test_new_tensors_have_the_dtype_of_the_model() -> None:
    model = build().to(torch.bfloat16)
    add_kv_compression(model, COMPRESSION, start="calibrated", batches=[inputs()])
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model(*inputs()).isfinite().all()


def test_ratio_one_compresses_nothing() -> None:
    model, expected = build(), build()
    add_kv_compression(model, KVCompression((1,), 1), start="calibrated")
    assert torch.equal(model(*inputs()), expected(*inputs()))


def test_a_compressed_model_stays_or_is_refused() -> None:
    model = add_kv_compression(build(), COMPRESSION, start="random")
    weights = state(model)
    assert_kept(add_kv_compression(model, COMPRESSION, start="calibrated"), weights)
    for other in (
        KVCompression((0,), 2),
        KVCompression((0, 1), 4),
        KVCompression((0, 1), 2, "average"),
    ):
        with pytest.raises(ValueError, match="must be dense or compressed as"):
            add_kv_compression(model, other)
    assert_kept(model, weights)


@pytest.mark.parametrize("start", ["mean", "calibrated"])
def test_more_blocks_are_compressed_without_touching_those_that_are(start: KVStart) -> None:
    model = add_kv_compression(build(), COMPRESSION, start="random")
    weights, added = state(model), KVCompression((0, 1), 2)
    add_kv_compression(model, added, start=start, batches=[inputs()])
    assert model.config.kv_compression == added and model.blocks[0].attn.sr is not None  # type: ignore[union-attr]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert model(*inputs()).isfinite().all()


def test_what_does_not_fit_leaves_the_model_dense() -> None:
    model = build()
    with pytest.raises(ValueError, match="below depth 2, got 2"):
        add_kv_compression(model, KVCompression((2,), 2))
    with pytest.raises(ValueError, match="start must be mean, calibrated or random, got 'warm'"):
        add_kv_compression(model, COMPRESSION, start="warm")  # type: ignore[arg-type]
    assert model.config.kv_compression is None
    assert torch.equal(model(*inputs()), build()(*inputs()))
