"""Previews: the linear map of each VAE, and a TAESD in its place."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pixart.config import EMBEDDED
from pixart.files import CheckpointError
from pixart.shapes.scene import draw, sample_scene
from pixart.vae.autoencoder import VAE
from pixart.vae.preview import PUBLISHED, Preview, fit
from pixart.weights import NotFiniteError

ASSETS = Path(__file__).parent.parent.parent / "pixart" / "assets" / EMBEDDED
SD, SDXL = 0.18215, 0.13025
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE.from_pretrained(ASSETS)


def with_config(factor: float, channels: tuple[int, ...] = (128, 256, 512, 512)) -> Any:
    """A VAE of which nothing but the configuration is there."""
    config = SimpleNamespace(
        scaling_factor=factor, shift_factor=None, latent_channels=4, block_out_channels=channels
    )
    model = SimpleNamespace(config=config)
    model.eval = lambda: SimpleNamespace(requires_grad_=lambda _: model)
    return VAE(model)


def scenes(count: int, side: int = 128) -> Tensor:
    """(count, 3, side, side) in [-1, 1]"""
    rng = random.Random(0)
    kinds = [("one", "pair", "group")[number % 3] for number in range(count)]
    pixels = np.stack([draw(sample_scene(rng, kind), side) for kind in kinds])
    return torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1


def test_the_map_fitted_to_the_embedded_vae_gives_the_colours_of_pictures_it_has_not_seen(
    vae: VAE,
) -> None:
    images = scenes(24)
    latents = vae.encode(images, sample=False)
    shown = torch.stack([torch.from_numpy(np.array(image)) for image in Preview(vae)(latents)])
    assert shown.shape == (24, 16, 16, 3)
    wanted = ((F.avg_pool2d(images, 8) + 1) * 127.5).movedim(1, -1)
    left = (shown - wanted).square().sum()
    explained = 1 - float(left / (wanted - wanted.mean((0, 1, 2))).square().sum())
    print(f"R² {explained:.5f}")
    assert explained > 0.999


def test_the_fit_is_the_same_every_time_and_made_once(vae: VAE) -> None:
    preview = Preview(vae)
    assert torch.equal(preview.colours, fit(vae)) and preview.colours is preview.colours
    assert preview.colours.shape == (5, 3)


def test_a_fit_takes_no_random_number_of_others(vae: VAE) -> None:
    before = torch.random.get_rng_state()
    fit(vae)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("factor", [SD, SDXL])
def test_the_vaes_of_sd_and_sdxl_have_the_published_map(factor: float) -> None:
    preview = Preview(with_config(factor))
    latents = torch.randn(2, 4, 3, 5)
    shown = np.stack([np.array(image) for image in preview(latents)])
    *factors, bias = map(np.array, PUBLISHED[factor])
    wanted = sum(one * latents[:, number].numpy()[..., None] for number, one in enumerate(factors))
    wanted = np.round(np.clip((wanted + bias + 1) / 2, 0, 1) * 255)
    assert shown.shape == (2, 3, 5, 3) and np.abs(shown - wanted).max() <= 1


@pytest.mark.parametrize(("factor", "channels"), [(1.0, (128, 256, 512, 512)), (SD, (64,) * 4)])
def test_no_other_vae_gets_the_published_map(factor: float, channels: tuple[int, ...]) -> None:
    with pytest.raises(AttributeError):  # it is fitted, and there is nothing to encode with
        Preview(with_config(factor, channels)).colours  # noqa: B018


def test_latents_that_are_not_finite_give_a_picture_all_the_same(vae: VAE) -> None:
    [image] = Preview(vae)(torch.full((1, 4, 2, 2), torch.nan))
    assert image.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 16, 8, 8)])
def test_latents_of_another_shape_are_refused(vae: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\), got"):
        Preview(vae)(torch.zeros(shape))


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Saves a random AutoencoderTiny."""

    def make(**changes: Any) -> Path:
        from diffusers import AutoencoderTiny

        torch.manual_seed(0)
        narrow = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        AutoencoderTiny(**(narrow | changes)).save_pretrained(tmp_path / "taesd")
        return tmp_path / "taesd"

    return make


def test_a_taesd_decodes_at_full_size(vae: VAE, tiny: Callable[..., Path]) -> None:
    from diffusers import AutoencoderTiny

    folder = tiny()
    latents = torch.randn(2, 4, 6, 10)
    images = Preview(vae, folder)(latents)
    assert [image.size for image in images] == [(80, 48)] * 2
    with torch.no_grad():
        wanted = AutoencoderTiny.from_pretrained(folder).decode(latents[1:]).sample[0]
    wanted = ((wanted + 1) * 127.5).clamp(0, 255).round().movedim(0, -1)
    assert np.abs(np.array(images[1]) - wanted.numpy()).max() <= 1


def test_a_large_picture_is_decoded_in_tiles(
    vae: VAE, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    preview, latents = Preview(vae, tiny()), torch.randn(1, 4, 80, 80)
    whole = np.array(preview(latents)[0]).astype(int)
    monkeypatch.setattr("pixart.vae.preview._WHOLE", 64)
    tiles = np.array(preview(latents)[0]).astype(int)
    assert tiles.shape == whole.shape and np.abs(tiles - whole).mean() < 2


WRONG = {
    "channels": ({"latent_channels": 16}, "4 latent channels of the VAE, got 16; name the TAESD"),
    "levels": (
        {"decoder_block_out_channels": (8,) * 3, "num_decoder_blocks": (1,) * 3},
        "8 pixels a latent of the VAE, got 4",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_taesd_of_another_vae_is_refused(vae: VAE, tiny: Callable[..., Path], wrong: str) -> None:
    changes, message = WRONG[wrong]
    with pytest.raises(CheckpointError, match=message):
        Preview(vae, tiny(**changes))


def test_a_damaged_taesd_is_named(vae: VAE, tiny: Callable[..., Path]) -> None:
    folder = tiny()
    tensors = load_file(folder / WEIGHTS)
    name = "decoder.layers.0.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"cannot be used .missing {name}"):
        Preview(vae, folder)
    tensors[name][0] = torch.nan
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(NotFiniteError, match=name):
        Preview(vae, folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latent_channels", 10**9),
        ("decoder_block_out_channels", [10**9] * 4),
        ("decoder_block_out_channels", [4096] * 4),
        ("num_decoder_blocks", 3),
        ("_class_name", "AutoencoderKL"),
    ],
)
def test_a_taesd_of_numbers_that_cannot_be_is_named(
    vae: VAE, tiny: Callable[..., Path], name: str, value: object
) -> None:
    folder = tiny()
    config = json.loads((folder / "config.json").read_text()) | {name: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="taesd: ") as caught:
        Preview(vae, folder)
    assert str(caught.value).isprintable()


def test_a_pickle_and_a_folder_without_a_taesd_are_refused(
    vae: VAE, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny()
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold safetensors"):
        Preview(vae, folder)
    with pytest.raises(FileNotFoundError, match="must hold the config.json"):
        Preview(vae, tmp_path)
