"""Our autoencoder against diffusers', to the bit, and which folders are left to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart.vae.autoencoder import VAE
from pixart.vae.network import Autoencoder, AutoencoderConfig

SIZES: dict[str, Any] = {
    "block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip


def save(folder: Path, **options: Any) -> Any:
    """diffusers' model of random weights, which folder/vae holds then."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(**{**SIZES, **options}).eval()
    model.save_pretrained(folder / "vae")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
        {"layers_per_block": 2, "latent_channels": 16, "shift_factor": 0.1, "force_upcast": False},
    ],
    ids=["with attention", "of the embedded kind", "wider latents"],
)
def test_pictures_and_latents_have_the_bits_of_diffusers(tmp_path, options, dtype):
    theirs = save(tmp_path, **options).to(dtype)
    ours = VAE.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(ours.model, Autoencoder) and ours.dtype == dtype
    latents = torch.randn(
        1, ours.latent_channels, 6, 10, generator=torch.Generator().manual_seed(1)
    )
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(
            ours.model.decode(latents.to(dtype))[0], theirs.decode(latents.to(dtype))[0]
        )
        posterior = theirs.encode(image.to(dtype)).latent_dist
        mean, deviation = ours.posterior(image, tile=False)
    assert torch.equal(mean, posterior.mean.float())
    torch.testing.assert_close(deviation, posterior.std.float(), rtol=1e-2, atol=0)
    factor, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
    assert (ours.scaling_factor, ours.shift_factor) == (factor, shift)


def test_what_is_tiled_is_what_is_whole(tmp_path):
    save(tmp_path)
    vae = VAE.from_pretrained(tmp_path)
    latents = torch.randn(1, 4, 20, 24, generator=torch.Generator().manual_seed(1))
    whole, tiled = vae.decode(latents, tile=False), vae.decode(latents, tile=32)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-4)


def test_weights_are_a_copy_of_the_file(tmp_path):
    save(tmp_path)
    vae = VAE.from_pretrained(tmp_path)
    before = vae.model.decoder.conv_in.weight.clone()
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    with open(file, "r+b") as opened:
        opened.seek(-(file.stat().st_size // 2), 2)
        opened.write(bytes(file.stat().st_size // 2))
    assert torch.equal(vae.model.decoder.conv_in.weight, before)


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "relu"},
        {"norm_num_groups": 3},
        {"_class_name": "AutoencoderTiny"},
        {"mid_block_add_attention": "no"},
        {"down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"] * 2},
        {"block_out_channels": 8},
    ],
    ids=str,
)
def test_another_configuration_is_not_ours(change):
    assert AutoencoderConfig.of({"_class_name": "AutoencoderKL", **SIZES}) is not None
    assert AutoencoderConfig.of({"_class_name": "AutoencoderKL", **SIZES, **change}) is None


def test_weights_of_other_names_are_opened_by_diffusers(tmp_path):
    """Files of before 2023 call the parts of attention otherwise."""
    from safetensors.torch import load_file, save_file

    theirs = save(tmp_path)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    save_file(renamed, file, {"format": "pt"})
    vae = VAE.from_pretrained(tmp_path)
    assert not isinstance(vae.model, Autoencoder)
    latents = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(vae.model.decode(latents)[0], theirs.decode(latents)[0])


def test_a_setting_of_another_activation_is_opened_by_diffusers(tmp_path):
    save(tmp_path, act_fn="relu")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["act_fn"] == "relu"
    assert not isinstance(VAE.from_pretrained(tmp_path).model, Autoencoder)


@pytest.mark.parametrize("name", ["of_tomorrow", "latents_mean"])
def test_what_a_configuration_says_and_nobody_reads_is_told(tmp_path, caplog, name):
    save(tmp_path)
    VAE.from_pretrained(tmp_path)
    assert not caplog.records
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, name: [1.0] * 4}))
    VAE.from_pretrained(tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"has {name}, which is not read" in caplog.text
