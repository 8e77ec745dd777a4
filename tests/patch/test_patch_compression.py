"""accelerate(kv_compression=...): diffusers' model computes what ours does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_model import TOLERANCE, diffusers_model, masks, run
from diffusers_model import kernels_can_run as kernels_can_run  # a fixture
from safetensors.torch import load_file
from small_model import build, inputs, relative_error
from torch import nn

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.names import NULL_CAPTION, to_diffusers
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression
from pixart.model.transformer import PixArt
from pixart.patch import accelerate, restore

EVERY_KIND = [
    KVCompression([1]),
    KVCompression([0, 1], 3, "conv", "none"),
    KVCompression([0], 2, "average"),
    KVCompression([1], 4, "average", "layer"),
    KVCompression([1], 2, "uniform"),
    KVCompression([0, 1], 2, "uniform_every", "layer"),
    KVCompression([1], 1),
]


def weights(model: PixArt) -> dict[str, torch.Tensor]:
    """What diffusers calls them; it holds no null caption."""
    state = model.state_dict()
    del state[NULL_CAPTION]
    return to_diffusers(state)


@pytest.mark.parametrize("kv_compression", EVERY_KIND, ids=str)
def test_a_compressed_model_equals_ours(kv_compression: KVCompression) -> None:
    ours = build(kv_compression=kv_compression)
    theirs = accelerate(diffusers_model(), kv_compression=kv_compression)
    theirs.load_state_dict(weights(ours))  # every name, none else
    for height, width in ((10, 14), (6, 2)):  # 5 × 7 tokens: every ratio leaves a rest
        latents, timesteps, caption = inputs(height=height, width=width)
        mask = masks()["prefix"]
        expected = ours(latents, timesteps, caption, mask)
        given = {"hidden_states": latents, "encoder_hidden_states": caption}
        assert relative_error(run(theirs, mask, **given), expected) < TOLERANCE
    run(theirs).sum().backward()
    ours(*inputs()).sum().backward()
    for name, wanted in to_diffusers({n: p.grad for n, p in ours.named_parameters()}).items():
        actual = theirs.get_parameter(name).grad
        assert torch.allclose(actual, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max() + 1e-3), (
            name
        )


def test_compression_starts_as_the_mean_in_the_models_dtype_and_draws_no_random_numbers() -> None:
    model = diffusers_model().to(torch.bfloat16)
    state = torch.get_rng_state()
    accelerate(model, kv_compression=KVCompression([1], 3))
    assert torch.equal(torch.get_rng_state(), state)
    new = {
        name: p for name, p in model.named_parameters() if "attn1.sr" in name or ".norm." in name
    }
    kinds = {name.removeprefix("transformer_blocks.1.attn1."): p for name, p in new.items()}
    assert set(kinds) == {"sr.weight", "sr.bias", "norm.weight", "norm.bias"}
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in kinds.values())
    assert kinds["sr.weight"].unique().item() == pytest.approx(1 / 9, rel=2**-8)
    assert not kinds["sr.bias"].any() and not kinds["norm.bias"].any()
    assert (kinds["norm.weight"] == 1).all()
    assert run(model.to(torch.float32)).isfinite().all()


@pytest.mark.parametrize("kv_compression", EVERY_KIND[:5], ids=str)
def test_what_a_compressed_model_saves_is_a_checkpoint_of_ours(
    kv_compression: KVCompression, tmp_path: Path
) -> None:
    theirs = accelerate(diffusers_model(), kv_compression=kv_compression)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path)
    assert ours.config.kv_compression == kv_compression
    assert relative_error(ours(*inputs()), run(theirs)) < TOLERANCE


def test_a_compressed_checkpoint_of_ours_runs_in_diffusers(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    ours = build(kv_compression=KVCompression([1]))
    save_transformer(ours, tmp_path / "model")
    theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "model")  # without what it lacks
    accelerate(theirs, kv_compression=ours.config.kv_compression)
    (file,) = (tmp_path / "model").glob("diffusion*.safetensors")
    theirs.load_state_dict(load_file(file))
    assert relative_error(run(theirs), ours(*inputs())) < TOLERANCE


def test_restore_takes_compression_out_of_the_saved_configuration(tmp_path: Path) -> None:
    model = accelerate(diffusers_model(), kv_compression=KVCompression([1], 2, "uniform"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kv_compression"]["layers"] == [1]
    restore(model).save_pretrained(tmp_path)
    assert "kv_compression" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("kv_compression", "message"),
    [
        ("conv", "kv_compression must be a KVCompression or None, got 'conv'"),
        (KVCompression([1, 2]), "kv_compression.layers must be below 2, got 2"),
    ],
)
def test_a_compression_that_does_not_fit_is_refused(kv_compression: Any, message: str) -> None:
    model = diffusers_model()
    with pytest.raises(ValueError) as error:
        accelerate(model, kv_compression=kv_compression)
    assert str(error.value) == message
    accelerate(model)


def test_a_compressed_block_runs_with_our_processor_or_not_at_all() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Other(AttnProcessor2_0):
        pass

    model = diffusers_model()
    model.transformer_blocks[1].attn1.set_processor(Other())
    with pytest.raises(ValueError, match=r"blocks.1.attn1.processor must be .* plain .* Other"):
        accelerate(model, kv_compression=KVCompression([1]))
    accelerate(model, kv_compression=KVCompression([0]))
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"must be accelerate\(\)'s, got FusedAttnProcessor2_0"):
        run(model)


def test_compression_after_fusing_projections_reads_the_fused_ones() -> None:
    model = accelerate(diffusers_model(), kv_compression=KVCompression([1]))
    expected = run(model)
    restore(model).fuse_qkv_projections()
    accelerate(model, kv_compression=KVCompression([1]))
    assert relative_error(run(model), expected) < TOLERANCE


def test_what_a_compressed_block_cannot_honour_is_an_error() -> None:
    model = accelerate(diffusers_model(), kv_compression=KVCompression([1]))
    with pytest.raises(ValueError, match="attention_mask must be None in a compressed block"):
        run(model, attention_mask=torch.ones(2, 35))
    with pytest.raises(ValueError, match="transformer must be called, not its blocks"):
        model.transformer_blocks[1](
            torch.randn(2, 35, 144),
            encoder_hidden_states=torch.randn(2, 12, 144),
            timestep=torch.randn(2, 6 * 144),
        )


def test_weights_that_are_offloaded_take_no_compression() -> None:
    model = diffusers_model().to("meta")
    with pytest.raises(ValueError, match="before the weights are offloaded"):
        accelerate(model, kv_compression=KVCompression([1]))
