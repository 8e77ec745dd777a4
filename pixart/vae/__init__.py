"""From pictures to latents and back; diffusers' VAE, tiled exactly."""

from pixart.vae.autoencoder import VAE, Generators, Tiled, to_images
from pixart.vae.preview import Preview

__all__ = ["VAE", "Generators", "Preview", "Tiled", "to_images"]
