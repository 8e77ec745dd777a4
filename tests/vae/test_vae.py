"""The VAE against diffusers used directly, and tiles against the whole image."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pixart import device as device_module
from pixart.device import free_memory
from pixart.files import CheckpointError
from pixart.vae import autoencoder as vae_module
from pixart.vae.autoencoder import VAE, Plan, to_images

ODD = (33, 21)  # latent sides that no tile divides, 264 by 168 pixels


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sigma")
    return published.build_sigma(path, with_transformer=False, vae_channels=(8, 16, 16, 24))


@pytest.fixture(scope="module")
def vae(pipeline: Path) -> VAE:
    return VAE.from_pretrained(pipeline)


def uneven(channels: int, height: int, width: int) -> Tensor:
    """A smooth picture, calm on the left and strong on the right: no tile is like another."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, channels, 4, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return smooth * torch.linspace(0.05, 2.0, width)


def modify_config(pipeline: Path, path: Path, **changes: object) -> Path:
    shutil.copytree(pipeline / "vae", path / "vae")
    file = path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def test_scaling_and_sizes_come_from_the_models_own_configuration(vae: VAE, tmp_path: Path) -> None:
    assert (vae.scaling_factor, vae.shift_factor) == (0.13025, 0.0)
    assert (vae.downsample, vae.latent_channels) == (8, 4)
    alpha = VAE.from_pretrained(published.build_alpha(tmp_path))
    assert alpha.scaling_factor == 0.18215


def test_decode_equals_diffusers(pipeline: Path, vae: VAE) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    latents = uneven(4, *ODD)
    with torch.no_grad():
        expected = theirs.decode(latents / 0.13025).sample
    assert vae.decode(latents).equal(expected)


def test_encode_equals_diffusers_with_the_same_generator(pipeline: Path, vae: VAE) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    images = torch.cat([uneven(3, 64, 40), uneven(3, 64, 40).flip(3)])
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
    mean, std = vae.posterior(images)
    assert mean.equal(posterior.mean) and std.equal(posterior.std)
    assert vae.encode(images, sample=False).equal(posterior.mode() * 0.13025)
    drawn = posterior.sample(torch.Generator().manual_seed(3)) * 0.13025
    assert vae.encode(images, torch.Generator().manual_seed(3)).equal(drawn)


def test_a_generator_for_each_image_makes_it_independent_of_the_batch(vae: VAE) -> None:
    images = torch.cat([uneven(3, 32, 32), uneven(3, 32, 32).flip(3)])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = vae.encode(images, generators)
    second = vae.encode(images[1:], torch.Generator().manual_seed(6))
    assert (both[1] - second[0]).abs().max() <= 1e-5 * second.abs().max()
    assert not both[0].equal(vae.encode(images[:1], torch.Generator().manual_seed(6))[0])
    with pytest.raises(ValueError, match="generator must be one or 2, got 1"):
        vae.encode(images, generators[:1])


def test_an_image_decodes_to_the_same_bits_in_any_batch(vae: VAE) -> None:
    latents = torch.cat([uneven(4, 6, 9), uneven(4, 6, 9).flip(3)])
    for tile in (None, 32):
        alone = vae.decode(latents[1:], tile=tile)
        assert vae.decode(latents, tile=tile)[1:].equal(alone)


def test_shift_factor_is_honoured_in_both_directions(pipeline: Path, tmp_path: Path) -> None:
    shifted = VAE.from_pretrained(modify_config(pipeline, tmp_path, shift_factor=0.5))
    plain = VAE.from_pretrained(pipeline)
    images, latents = uneven(3, 32, 32), uneven(4, 4, 4)
    got = shifted.encode(images, sample=False)
    expected = plain.encode(images, sample=False) - 0.5 * 0.13025
    assert (got - expected).abs().max() <= 1e-6
    assert shifted.decode(latents).allclose(plain.decode(latents + 0.5 * 0.13025), atol=1e-5)


# 40 pixels: tiles of very unequal neighbours; 96: tiles that do not divide the image; 1000: one.
@pytest.mark.parametrize("tile", [40, 96, 1000])
def test_tiled_decode_equals_the_whole_but_for_rounding(vae: VAE, tile: int) -> None:
    latents = uneven(4, *ODD)
    whole = vae.decode(latents, tile=False)
    tiled = vae.decode(latents, tile=tile)
    assert tiled.shape == whole.shape == (1, 3, 264, 168)
    assert (tiled - whole).abs().max() <= 1e-4 * whole.abs().max()


@pytest.mark.parametrize("tile", [40, 96, 1000])
def test_tiled_encode_equals_the_whole_but_for_rounding(vae: VAE, tile: int) -> None:
    images = torch.cat([uneven(3, 264, 168), uneven(3, 264, 168).flip(2)])
    for whole, tiled in zip(
        vae.posterior(images, tile=False), vae.posterior(images, tile=tile), strict=True
    ):
        assert tiled.shape == whole.shape == (2, 4, *ODD)
        assert (tiled - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_tiles_in_half_precision_stay_within_its_rounding(pipeline: Path, vae: VAE) -> None:
    half = VAE.from_pretrained(pipeline, dtype=torch.bfloat16)
    latents = uneven(4, *ODD)
    exact = vae.decode(latents, tile=False)
    whole = (half.decode(latents, tile=False) - exact).abs()
    tiled = (half.decode(latents, tile=96) - exact).abs()
    assert half.dtype == torch.bfloat16 and tiled.mean() <= 2 * whole.mean()


def test_tiling_leaves_the_model_as_it_was(vae: VAE) -> None:
    latents = uneven(4, 12, 12)
    before = vae.decode(latents, tile=False)
    vae.decode(latents, tile=32)
    assert vae.decode(latents, tile=False).equal(before)


def test_what_waits_in_host_memory_gives_the_same_image(vae: VAE) -> None:
    latents, images = uneven(4, 12, 12), uneven(3, 96, 96)
    for on_host in (False, True):
        plan = Plan(32, on_host)
        with torch.no_grad():
            decoded = vae._decode_tiled(latents / 0.13025, plan)
            moments = vae._encode_alone(images, plan)
        assert decoded.equal(vae.decode(latents, tile=32))
        assert moments[:, :4].equal(vae.posterior(images, tile=32)[0])


def test_tiles_are_chosen_from_the_free_memory(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for megabytes in (1_000_000, 1500, 500, 1):
        monkeypatch.setattr(vae_module, "free_memory", lambda device, m=megabytes: m * 10**6)
        chosen.append(vae._plan("decode", 2048 * 2048, None).tile)
    assert chosen == [None, 1024, 256, 128]


def test_a_choice_of_tiles_overrules_the_memory(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_module, "free_memory", lambda device: 0)
    assert vae._plan("decode", 64, False) == Plan(None)
    assert vae._plan("decode", 64, None).tile == min(vae_module.TILES)
    monkeypatch.setattr(vae_module, "free_memory", lambda device: sys.maxsize)
    assert vae._plan("decode", 64, True) == Plan(512)
    assert vae._plan("encode", 64, 48) == Plan(48)
    assert vae._plan("encode", 64, None) == Plan(None)


def test_a_batch_that_does_not_fit_is_encoded_one_image_at_a_time(
    vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    encode = vae._encode_alone

    def counted(images: torch.Tensor, plan: Plan) -> torch.Tensor:
        sizes.append(len(images))
        return encode(images, plan)

    monkeypatch.setattr(vae, "_encode_alone", counted)
    images = uneven(3, 32, 32).expand(3, -1, -1, -1)
    vae.posterior(images)
    one = vae_module.PEAK * 8 * 4 * 32 * 32 / vae_module.SHARE_OF_FREE
    monkeypatch.setattr(vae_module, "free_memory", lambda device: 2 * one)
    vae.posterior(images)
    assert sizes == [3, 1, 1, 1]


def test_fp16_is_widened_only_where_the_model_says_that_it_overflows(
    pipeline: Path, tmp_path: Path
) -> None:
    assert VAE.from_pretrained(pipeline, dtype=torch.float16).dtype == torch.float16
    upcast = modify_config(pipeline, tmp_path / "says so", force_upcast=True)
    assert VAE.from_pretrained(upcast, dtype=torch.float16).dtype == torch.float32
    assert VAE.from_pretrained(upcast, dtype=torch.bfloat16).dtype == torch.bfloat16
    alpha = published.build_alpha(tmp_path / "alpha")
    file = alpha / "vae" / "config.json"
    config = json.loads(file.read_text())
    config.pop("force_upcast")  # configurations older than the flag
    file.write_text(json.dumps(config))
    assert VAE.from_pretrained(alpha, dtype=torch.float16).dtype == torch.float32


def test_to_images_rounds_as_diffusers_does() -> None:
    from diffusers.image_processor import VaeImageProcessor

    images = torch.linspace(-1.2, 1.2, 3 * 40 * 50).reshape(1, 3, 40, 50).repeat(2, 1, 1, 1)
    expected = VaeImageProcessor().postprocess(images, output_type="pil")
    got = to_images(images)
    assert len(got) == 2 and got[0].size == (50, 40)
    for ours, theirs in zip(got, expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_wrong_arguments_are_named(vae: VAE, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\), got \(1, 3, 4, 4\)"):
        vae.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"sides that 8 divides, got \(1, 3, 20, 16\)"):
        vae.encode(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="at least 16 pixels, got 8"):
        vae.decode(torch.zeros(1, 4, 4, 4), tile=8)
    with pytest.raises(FileNotFoundError, match=r"vae/config\.json"):
        VAE.from_pretrained(tmp_path)


def test_free_memory_respects_a_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "CONTROL_GROUP", tmp_path)
    unlimited = free_memory("cpu")
    assert unlimited > 1 << 20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\n")
    assert free_memory("cpu") == 350000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory("cpu") > 1 << 20


def test_progress_counts_every_tile_up_to_the_last(vae: VAE) -> None:
    latents = uneven(4, *ODD)
    for tile, least in ((40, 100), (96, 20), (1000, 1), (False, 1)):
        seen: list[tuple[int, int]] = []
        vae.decode(latents, tile=tile, progress=lambda *counts, to=seen: to.append(counts))
        total = len(seen)
        assert total >= least and seen == [(k, total) for k in range(1, total + 1)]


def test_the_tile_that_memory_chose_can_be_chosen_again(
    vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_module, "free_memory", lambda device: 0)
    chosen = vae.choose_tile(264, 168)
    assert chosen == min(vae_module.TILES)
    tiled = vae.decode(uneven(4, *ODD))
    monkeypatch.setattr(vae_module, "free_memory", lambda device: sys.maxsize)
    assert vae.choose_tile(264, 168) is False
    assert vae.decode(uneven(4, *ODD), tile=chosen).equal(tiled)


def test_weights_that_do_not_fit_the_configuration_are_named(
    pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = modify_config(pipeline, tmp_path)
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.conv_out.bias"] = torch.zeros(5)
    save_file(tensors | {"extra": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        VAE.from_pretrained(path)
    assert "(missing decoder.conv_in.bias; mismatched decoder.conv_out.bias; unexpected extra)" in (
        str(caught.value)
    )
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_variant_is_taken_when_named_or_alone_and_nothing_is_said(
    pipeline: Path, tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = modify_config(pipeline, tmp_path)
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if suffix == "bin":
        torch.save(tensors, path / "vae" / "diffusion_pytorch_model.fp16.bin")
    else:
        save_file(tensors, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    latents = uneven(4, 6, 6)
    expected = VAE.from_pretrained(pipeline).decode(latents)
    for variant in (None, "fp16"):
        assert VAE.from_pretrained(path, variant=variant).decode(latents).equal(expected)
    with pytest.raises(CheckpointError, match="has no variant 'bf16'; .* its variants: fp16"):
        VAE.from_pretrained(path, variant="bf16")
    assert capfd.readouterr().err == ""
