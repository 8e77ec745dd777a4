"""From pictures to latents and back; diffusers' VAE, tiled exactly."""

from pixart.vae.autoencoder import VAE, Generators, Tiled, to_images

__all__ = ["VAE", "Generators", "Tiled", "to_images"]
