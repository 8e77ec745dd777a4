"""From latents to pixels: what is not finite becomes no picture."""

from typing import Any

import pytest
import torch

from pixart.pipeline.decoding import NotFinitePicture, decode
from pixart.pipeline.request import Request
from pixart.vae.autoencoder import VAE, to_images


class FlatVae(VAE):
    """Decodes to as many pixels, times what is given."""

    def __init__(self, factor: float) -> None:
        self.factor, self.downsample = factor, 1

    def choose_tile(self, *_: Any) -> bool:
        return False

    def decode(self, latents: torch.Tensor, **_: Any) -> torch.Tensor:
        return latents[:, :3] * self.factor


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_latents_and_pixels_that_are_not_finite_become_no_picture(number: float) -> None:
    request = Request("a cat", height=8, width=8, steps=5, guidance=2.0)
    latent = torch.ones(1, 4, 8, 8)
    pixels, _ = decode(FlatVae(1.0), latent, request, None)
    assert to_images(pixels)[0].getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(NotFinitePicture, match="pixels must be finite.* 'a cat' .seed 0, 5 steps"):
        decode(FlatVae(number), latent, request, None)
    latent[0, 3, 7, 7] = number
    with pytest.raises(NotFinitePicture, match="latents must be finite"):
        decode(FlatVae(1.0), latent, request, None)
