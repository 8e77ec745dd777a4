"""From the latents of one picture to its pixels; numbers that are not finite become no picture."""

import textwrap

from torch import Tensor

from pixart.pipeline.request import Request
from pixart.vae.autoencoder import VAE, Tiled
from pixart.vae.strips import Strips


class NotFinitePicture(RuntimeError):
    """A picture that came to NaN or infinity, which would be drawn black. One line with its prompt."""


def decode(
    vae: VAE,
    latent: Tensor,
    request: Request,
    progress: Tiled | None,
    strips: Strips | None = None,
) -> tuple[Tensor, int | bool]:
    """Latents (1, C, h, w) to the pixels of `VAE.decode`, and the tile that the VAE took. strips:
    as there. Raises NotFinitePicture."""
    _check_finite(latent, request, "latents", "a lower guidance, or a checkpoint that is whole")
    height, width = (count * vae.downsample for count in latent.shape[2:])
    tile = vae.choose_tile(height, width, request.tile)
    image = vae.decode(latent, tile=tile, progress=progress, strips=strips)
    _check_finite(image, request, "pixels", "a VAE that does not overflow")
    return image, tile


def _check_finite(numbers: Tensor, request: Request, what: str, way_out: str) -> None:
    if bool(numbers.isfinite().all()):
        return
    prompt = textwrap.shorten(request.prompt, 60, placeholder="…")
    raise NotFinitePicture(
        f"{what} must be finite, got NaN or infinity for {prompt!r} (seed {request.seed}, "
        f"{request.steps} steps, guidance {request.guidance}); draw it in bf16 or fp32, with {way_out}"
    )
